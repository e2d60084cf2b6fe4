"""What happens to a state dict as it is loaded, without ComfyUI."""

from __future__ import annotations

import json
import types

import pytest
import torch

import hijack
from hijack.errors import (
    HijackError,
    UnconsumedScaleError,
    UnknownSchemeError,
)
from hijack.formats.native_marker import write_marker
from hijack.hosts.comfyui import markers
from hijack.hosts.comfyui.detection import (
    decode_claimed,
    encode_claimed,
    encode_others,
)
from hijack.hosts.comfyui.file_tensors import file_tensors
from hijack.hosts.comfyui.host_tensors import PlainHostTensors
from hijack.hosts.comfyui.loaders import make_model_config_from_unet
from hijack.quantized import QuantizedTensor

E4M3 = torch.float8_e4m3fn


class Int8(hijack.Scheme):
    """Symmetric int8, one scale per row: what an author writes, and no more."""

    name = "plain_int8"
    claims_unmarked = True

    def quantize(self, weight):
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        qdata = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        return qdata, {"weight_scale": scale}

    def dequantize(self, qdata, params, dtype):
        return (qdata.float() * params["weight_scale"]).to(dtype)


class Nibbles(hijack.Scheme):
    """4 bits, two in a byte, so that the data is narrower than the weight."""

    name = "plain_nibbles"

    def quantize(self, weight):
        scale = weight.float().abs().amax().clamp_min(1e-12) / 7
        qdata = (weight / scale).round().clamp(-7, 7).to(torch.uint8) + 8
        return qdata[:, 0::2] | qdata[:, 1::2] << 4, {"nibble_scale": scale}

    def dequantize(self, qdata, params, dtype):
        values = torch.stack((qdata & 15, qdata >> 4), -1).flatten(1).float() - 8
        return (values * params["nibble_scale"]).to(dtype)


@pytest.fixture
def registry():
    """A registry with the reference scheme and two of an author's."""
    from schemes.blockwise_fp8 import BlockwiseFP8

    registry = hijack.create_registry()
    for scheme in (BlockwiseFP8(), Int8(), Nibbles()):
        registry.register(scheme)
    return registry


def musubi(n=8, k=128, blocks=2):
    """Quantized data and block scales as musubi-tuner writes them."""
    torch.manual_seed(0)
    qdata = torch.randn(n, k).to(E4M3)
    return qdata, torch.rand(n, blocks, 1).to(torch.bfloat16)


def block_file(prefix=""):
    """A state dict with one block FP8 layer and two ordinary ones."""
    qdata, scale = musubi()
    return {
        f"{prefix}a.weight": qdata,
        f"{prefix}a.scale_weight": scale,
        f"{prefix}a.bias": torch.ones(8, dtype=torch.bfloat16),
        f"{prefix}norm.weight": torch.ones(8),
        f"{prefix}b.weight": torch.ones(8, 8, dtype=torch.bfloat16),
    }


def decoded(qdata, scale):
    n, k = qdata.shape
    return (qdata.float().view(n, -1, k // scale.shape[1]) * scale.float()).view(n, k)


@pytest.fixture
def quantized(registry):
    """One quantized weight that passes for float32, and what it decodes to."""
    state_dict = block_file()
    expected = decoded(state_dict["a.weight"], state_dict["a.scale_weight"])
    encode_claimed(state_dict, "", registry=registry)
    return state_dict["a.weight"].to(torch.float32), expected


# -- the state dict --------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_claimed_layer_becomes_one_tensor(registry, prefix):
    """Data and scale become one tensor under the weight's key; nothing else moves."""
    state_dict = block_file(prefix)
    before = dict(state_dict)
    qdata, scale = (
        state_dict[f"{prefix}a.weight"],
        state_dict[f"{prefix}a.scale_weight"],
    )
    other = {"vae.c.weight": qdata, "vae.c.scale_weight": scale} if prefix else {}
    state_dict.update(other)
    assert encode_claimed(state_dict, prefix, registry=registry)
    weight = state_dict.pop(f"{prefix}a.weight")
    assert isinstance(weight, QuantizedTensor)
    assert torch.equal(weight.dense(torch.float32), decoded(qdata, scale))
    assert weight.qdata is qdata
    rest = {
        k: t for k, t in before.items() if not k.endswith(("a.weight", "scale_weight"))
    }
    assert state_dict == {**rest, **other}


def test_asking_twice_changes_nothing(registry):
    """A loader that asks again, after renaming keys, gets its quantized layers."""
    state_dict = block_file()
    assert encode_claimed(state_dict, "", registry=registry)
    before = dict(state_dict)
    assert encode_claimed(state_dict, "", registry=registry)
    assert {k: id(v) for k, v in state_dict.items()} == {
        k: id(v) for k, v in before.items()
    }


@pytest.mark.parametrize("scheme", [Int8(), Nibbles()])
def test_a_scheme_of_two_methods_is_enough(registry, scheme):
    """Any scheme's layers are taken, also if data and weight differ in shape."""
    dense = torch.randn(8, 16)
    qdata, params = scheme.quantize(dense)
    state_dict = {"x.weight": qdata, **{f"x.{name}": t for name, t in params.items()}}
    entry = {"scheme": scheme.name, "params": list(params)}
    for name in ("x", "model.diffusion_model.x"):  # the loader cuts the prefix off
        metadata = {"hijack": write_marker({name: entry})}
        found = dict(state_dict)
        assert encode_claimed(found, "", metadata, registry)
    state_dict = found
    assert state_dict["x.weight"].shape == (8, 16)
    expected = scheme.dequantize(qdata, params, torch.float32)
    assert torch.equal(state_dict["x.weight"].to(torch.float32), expected)


def marker(format_):
    """ComfyUI's marker of one layer."""
    text = json.dumps({"format": format_}).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


SCALED = {
    "a.weight": torch.ones(4, 4).to(E4M3),
    "a.weight_scale": torch.ones(()),
    "a.input_scale": torch.ones(()),
    "a.comfy_quant": marker("float8_e4m3fn"),
}
UNCLAIMED = {
    "bf16": {
        "a.weight": torch.ones(4, 4, dtype=torch.bfloat16),
        "a.bias": torch.ones(4),
    },
    "norm with a scale": {"n.scale": torch.ones(4), "a.weight": torch.ones(4, 4)},
    "cast to FP8": {"a.weight": torch.ones(4, 4).to(E4M3)},
    "ComfyUI's own": SCALED,
    "ComfyUI's older kind": {
        "scaled_fp8": torch.empty(2, dtype=E4M3),
        "a.weight": torch.ones(4, 4).to(E4M3),
        "a.scale_weight": torch.ones(()),
    },
    "nobody's": {"a.weight": torch.ones(4).to(E4M3), "a.s": torch.ones(3, 3)},
}


@pytest.mark.parametrize("kind", UNCLAIMED)
def test_what_nobody_claims_is_not_touched(registry, kind):
    """A file without claimed layers keeps every key, in order, and every object."""
    state_dict = dict(UNCLAIMED[kind])
    assert not encode_claimed(state_dict, "", registry=registry)
    assert list(state_dict) == list(UNCLAIMED[kind])
    assert all(state_dict[key] is UNCLAIMED[kind][key] for key in state_dict)


def test_an_ordinary_file_asks_nobody(registry, monkeypatch):
    """Plain weights never reach a plugin, so they cost one pass over the keys."""
    monkeypatch.setattr(type(registry), "identify", lambda *_: pytest.fail("asked"))
    state_dict = {f"{i}.weight": torch.ones(1) for i in range(9)}
    assert not encode_claimed(state_dict, "", registry=registry)


def test_unclaimed_files_are_left_to_comfyui():
    """With nothing claimed the original's own answer comes back, with its arguments."""
    seen = []
    answer = types.SimpleNamespace()

    def model_config_from_unet(*args, **kwargs):
        seen.append((args, kwargs))
        return answer

    patched = make_model_config_from_unet(model_config_from_unet)
    state_dict = {"a.weight": torch.ones(2, 2)}
    assert patched(state_dict, "", metadata={"x": "y"}) is answer
    assert seen == [((state_dict, ""), {"metadata": {"x": "y"}})]
    assert vars(answer) == {}


def test_clip_vision_in_a_checkpoint_is_decoded():
    """A checkpoint's image encoder, which ComfyUI builds next, gets dense weights."""
    import schemes.blockwise_fp8  # noqa: F401

    config = types.SimpleNamespace(clip_vision_prefix="embedder.visual.")
    patched = make_model_config_from_unet(lambda *_: config)
    state_dict = {"model.b.weight": torch.ones(2, 2), **block_file("embedder.visual.")}
    state_dict |= block_file("embedder.text.")
    key = "embedder.visual.a"
    expected = decoded(state_dict[f"{key}.weight"], state_dict[f"{key}.scale_weight"])
    patched(state_dict, "model.")
    assert type(state_dict[f"{key}.weight"]) is torch.Tensor
    assert torch.equal(state_dict[f"{key}.weight"], expected.bfloat16())
    assert f"{key}.scale_weight" not in state_dict
    assert isinstance(state_dict["embedder.text.a.weight"], QuantizedTensor)


# -- markers and errors ----------------------------------------------------------------


def test_a_marker_that_cannot_be_true_is_read_through(registry):
    """Block scales under ComfyUI's marker are block scales, before and after 0.4."""
    qdata, scale = musubi()
    old = {"scaled_fp8": torch.empty(0, dtype=E4M3), **block_file()}
    new = block_file()
    new["a.weight_scale"] = new.pop("a.scale_weight")
    new["a.comfy_quant"] = marker("float8_e4m3fn")
    for state_dict in (old, new):
        assert encode_claimed(state_dict, "", registry=registry)
        assert set(state_dict) == {"a.weight", "a.bias", "norm.weight", "b.weight"}
        assert torch.equal(
            state_dict["a.weight"].dense(torch.float32), decoded(qdata, scale)
        )


def test_the_old_marker_of_a_rewritten_file_is_void(registry):
    """0.4 to 0.7 leave it beside layers they mark as E4M3, whatever they are."""
    qdata = torch.randn(16, 64).to(torch.float8_e5m2)
    state_dict = {
        "scaled_fp8": torch.empty(0, dtype=torch.float8_e5m2),
        "other.scaled_fp8": torch.empty(0, dtype=E4M3),
        "a.weight": qdata,
        "a.weight_scale": torch.tensor(0.5),
        "a.comfy_quant": marker("float8_e4m3fn"),
    }
    read = markers.read_through(state_dict)
    assert set(read) == {"other.scaled_fp8", "a.weight", "a.scale_weight"}
    assert encode_claimed(state_dict, "", registry=registry)
    assert torch.equal(state_dict["a.weight"].dense(torch.float32), qdata.float() / 2)


def test_one_wrong_marker_makes_its_kind_doubtful(registry):
    """With one FP8 marker wrong, all layers marked so are ours, not only that one."""
    state_dict = {**block_file(), **{f"own{k[1:]}": t for k, t in SCALED.items()}}
    state_dict["a.weight_scale"] = state_dict.pop("a.scale_weight")
    state_dict["a.comfy_quant"] = marker("float8_e4m3fn")
    assert encode_claimed(state_dict, registry=registry)
    assert isinstance(state_dict["a.weight"], QuantizedTensor)
    assert isinstance(state_dict["own.weight"], QuantizedTensor)
    assert not any("comfy_quant" in key for key in state_dict)


def test_each_model_of_a_checkpoint_has_its_own_marker(registry):
    """A text encoder's wrong marker goes, another one's true marker stays."""
    true = {"scaled_fp8": torch.empty(2, dtype=E4M3), **UNCLAIMED["cast to FP8"]}
    true["a.scale_weight"] = torch.ones(())
    wrong = {"scaled_fp8": torch.empty(2, dtype=E4M3), **block_file()}
    state_dict = {f"t5.{key}": t for key, t in wrong.items()}
    state_dict |= {f"clip.{key}": t for key, t in true.items()}
    state_dict |= {f"model.{key}": t for key, t in block_file().items()}
    before = dict(state_dict)
    assert encode_others(state_dict, "model.", registry=registry)
    assert isinstance(state_dict["t5.a.weight"], QuantizedTensor)
    assert "t5.scaled_fp8" not in state_dict
    kept = [key for key in before if key.startswith(("clip.", "model."))]
    assert all(state_dict[key] is before[key] for key in kept)


def test_a_model_without_room_for_quantized_layers_gets_dense_weights(registry, caplog):
    """Decoded layers are float32, exact, counted, and named in one line of the log."""
    state_dict = block_file()
    expected = decoded(state_dict["a.weight"], state_dict["a.scale_weight"])
    plain = {"b.weight": state_dict["b.weight"]}
    with caplog.at_level("INFO", "hijack"):
        assert decode_claimed(state_dict, "VAE", registry=registry) == 1
        assert decode_claimed(plain, "VAE", registry=registry) == 0
    assert torch.equal(state_dict["a.weight"], expected)
    assert "a.scale_weight" not in state_dict
    assert [r.message for r in caplog.records if "decoded" in r.message] == [
        "hijack: a state dict: 1 quantized layers: blockwise_fp8 (musubi, 1x64) 1; "
        "decoded, because ComfyUI builds the VAE without quantized layers"
    ]


def test_comfyui_keeps_its_layers_beside_ours(registry):
    """In a file of both kinds, layers with a true marker stay as they are."""
    state_dict = {**block_file(), **UNCLAIMED["ComfyUI's own"]}
    state_dict = {
        k.replace("a.", "own."): t for k, t in state_dict.items() if k[0] == "a"
    }
    state_dict.update(block_file())
    own = {k: t for k, t in state_dict.items() if k.startswith("own.comfy")}
    assert encode_claimed(state_dict, "", registry=registry)
    assert isinstance(state_dict["a.weight"], QuantizedTensor)
    assert all(state_dict[key] is tensor for key, tensor in own.items())


def test_an_unreadable_marker_is_left_to_comfyui():
    """A marker that is no JSON, or of a format ComfyUI may know, is not judged."""
    for text in (b"{", b"[]", b'{"format": "nvfp4"}'):
        tensors = {
            "a.weight": torch.zeros(2, 2, dtype=torch.uint8),
            "a.weight_scale": torch.ones(2),
            "a.comfy_quant": torch.tensor(list(text), dtype=torch.uint8),
        }
        assert markers.read_through(tensors) == tensors


def test_a_scale_nobody_consumed_is_an_error(registry):
    """Beside claimed layers, a scale that fits no weight is named with what to do."""
    state_dict = block_file()
    state_dict["c.weight"], state_dict["c.scale_weight"] = musubi(blocks=3)
    before = dict(state_dict)
    with pytest.raises(
        UnconsumedScaleError, match=r"c: no scheme reads c\.scale_weight, \(8, 3, 1\)"
    ):
        encode_claimed(state_dict, "", registry=registry)
    assert state_dict == before


def test_a_scale_of_an_unknown_name_is_an_error_too(registry):
    """Data with a scale of any other name is not loaded as if they had none."""
    state_dict = {**block_file(), "c.weight": musubi()[0], "c.my_scale": torch.ones(3)}
    with pytest.raises(UnconsumedScaleError, match=r"c\.my_scale"):
        encode_claimed(state_dict, "", registry=registry)


def test_a_scheme_that_crashes_is_named(registry, monkeypatch):
    """If a scheme fails on its own layer, the error names layer and scheme."""

    def crash(*_):
        raise IndexError("too short")

    monkeypatch.setattr(Int8, "dequantize", crash)
    qdata, params = Int8().quantize(torch.randn(4, 4))
    with pytest.raises(
        HijackError, match=r"x: scheme plain_int8 cannot read it.*IndexErr"
    ):
        encode_claimed(
            {"x.weight": qdata, "x.weight_scale": params["weight_scale"]},
            "",
            registry=registry,
        )


# -- the quantized tensor --------------------------------------------------------------


def test_whatever_a_host_computes_uses_the_decoded_weight(quantized):
    """Joining, slicing, adding and multiplying give what dense weights would give."""
    weight, dense = quantized
    assert torch.equal(torch.cat([weight, weight]), torch.cat([dense, dense]))
    assert torch.equal(weight[2:4], dense[2:4])
    assert torch.equal(weight.t() + 1, dense.t() + 1)
    x = torch.randn(3, dense.shape[1])
    assert torch.equal(torch.nn.functional.linear(x, weight), x @ dense.t())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_moves_and_copies_keep_data_and_scales_together(quantized, mode):
    """detach, clone, to and Parameter stay quantized, and decode to the same."""
    weight, dense = quantized
    moved = PlainHostTensors().wrap(weight, weight.dtype)
    with mode():
        for same in (
            weight.detach(),
            weight.clone(),
            weight.to("cpu", copy=True),
            weight.to(device="cpu"),
            torch.nn.Parameter(weight, requires_grad=False),
            torch.empty_like(moved).copy_(moved),
        ):
            assert isinstance(same, QuantizedTensor)
            assert torch.equal(same.dense(torch.float32), dense)
        assert torch.equal(weight.to(torch.bfloat16), dense.to(torch.bfloat16))
        assert torch.equal(torch.empty_like(dense).copy_(weight), dense)


def test_nothing_is_written_by_accident(quantized):
    """In-place arithmetic is refused; it could only be wrong."""
    weight, _ = quantized
    with pytest.raises(HijackError, match="cannot write into a quantized weight"):
        weight.add_(1)
    with pytest.raises(HijackError, match="copy_ of a dense tensor: cannot write"):
        weight.copy_(torch.zeros(weight.shape))


def test_a_quantized_tensor_spells_itself_as_its_file_did(quantized):
    """The dialect's own keys and shapes come out again."""
    weight, _ = quantized
    tensors = file_tensors(weight)
    assert tensors.keys() == {"weight", "scale_weight"}
    assert tensors["scale_weight"].shape == (8, 2, 1)


@pytest.mark.parametrize(
    ("lone", "words"),
    [
        (
            {"a.weight_scale_inv": torch.ones(3, 3)},
            "reads a.weight_scale_inv",
        ),
        ({"a.scale_weight": torch.ones(8, 3, 1)}, "reads a.scale_weight"),
        ({"a.s": torch.ones(8, 3)}, "a: no scheme reads a.s"),
        ({"a.quantizer.scale": torch.ones(3)}, "a: no scheme reads a.quantizer.scale"),
        ({"a_scale": torch.ones(3)}, "a: no scheme reads a_scale"),
        ({"a_weight_scale": torch.ones(3)}, "a_weight_scale, .* while a has quantized"),
        ({"weight_scales": torch.ones(3)}, "^weight_scales: no scheme reads"),
    ],
)
def test_scales_nobody_reads_are_refused_where_no_layer_is_ours(registry, lone, words):
    """Data beside a scale is no weight, also if it is so in the whole file."""
    state_dict = {"a.weight": torch.ones(8, 128).to(E4M3), **lone}
    with pytest.raises(UnconsumedScaleError, match=words):
        encode_claimed(state_dict, "", registry=registry)
    dense = {"a.weight": torch.ones(8, 128), **lone}
    assert not encode_claimed(dense, "", registry=registry)
    cast = {"a.weight": state_dict["a.weight"], "a.input_scale": torch.ones(())}
    assert not encode_claimed(cast, "", registry=registry)


def test_layers_of_a_scheme_that_is_not_there_are_refused(registry):
    """The header names a scheme that nobody registered; its data is no weight."""
    marked = {"a": {"scheme": "int3_rows", "params": ["weight_scale"]}}
    state_dict = {
        "a.weight": torch.ones(8, 128, dtype=torch.int8),
        "a.weight_scale": torch.ones(8, 1),
    }
    metadata = {"hijack": write_marker(marked)}
    with pytest.raises(UnknownSchemeError, match="int3_rows"):
        encode_claimed(state_dict, "", metadata, registry)


def test_integers_that_nothing_marks_are_refused(registry):
    """ComfyUI would take them for weights."""
    state_dict = {
        "a.weight": torch.ones(8, 128, dtype=torch.int8),
        "a.scale": torch.ones(8, 1),
    }
    with pytest.raises(HijackError, match="integers without a marker"):
        encode_claimed(state_dict, "", registry=registry)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_integers_without_a_scale_are_refused(registry, dtype):
    """They are no weights; FP8 without one is, of any kind that torch has."""
    state_dict = {"a.weight": torch.ones(8, 128).to(dtype)}
    with pytest.raises(HijackError, match=f"a: has a weight of {dtype} without"):
        encode_claimed(state_dict, "", registry=registry)
    fnuz = {"a.weight": torch.ones(8, 128).to(torch.float8_e4m3fnuz)}
    assert not encode_claimed(fnuz, "", registry=registry)


def test_a_layer_that_lost_its_scale_is_refused(registry):
    """Others of its kind have one; layers of other kinds may be casts."""
    coded = torch.ones(8, 128).to(E4M3)
    state_dict = {
        "blocks.0.q.weight": coded,
        "blocks.0.q.scale_weight": torch.ones(8, 2, 1),
        "embed.weight": coded,
    }
    assert encode_claimed(dict(state_dict), "", registry=registry)
    state_dict["blocks.1.q.weight"] = coded
    with pytest.raises(
        UnconsumedScaleError, match=r"^blocks.1.q: .* as blocks.0.q has"
    ):
        encode_claimed(state_dict, "", registry=registry)
