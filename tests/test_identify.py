"""identify: claims weighed, evidence kept, nothing ignored."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hijack
from hijack.errors import AmbiguousError, CheckpointError
from hijack.formats.identification import identify
from hijack.formats.preference import prefer
from hijack.safetensors_io.header import Header, TensorInfo, join
from schemes.blockwise_fp8 import BlockwiseFP8

FP8 = torch.float8_e4m3fn


class Claimant(hijack.Scheme):
    """Claims every layer that has a tensor named after it."""

    name = "claimant"
    certainty = hijack.Certainty.UNIQUE

    def quantize(self, weight, **options):
        """Not used here."""
        return weight, {self.name: weight}

    def dequantize(self, qdata, params, dtype):
        """Not used here."""
        return qdata.to(dtype)

    def match(self, header):
        """Claim with the certainty of the class."""
        for layer in header.layers():
            keys = {"weight": f"{layer}.weight", "mark": f"{layer}.mark"}
            if keys["mark"] in header.tensors:
                yield hijack.Claim(layer, self.name, "d", keys, None, self.certainty)


class Rival(Claimant):
    """The same claims under another name."""

    name = "rival"


class Surer(Claimant):
    """The same claims with a marker behind them."""

    name = "surer"
    certainty = hijack.Certainty.MARKED


def registry_of(*schemes):
    """A registry that knows only these."""
    registry = hijack.create_registry()
    for scheme in schemes:
        registry.register(scheme)
    return registry


def header(**tensors):
    """A header of tensors whose dots are written as two underscores."""
    named = {key.replace("__", "."): tensor for key, tensor in tensors.items()}
    return hijack.Header.from_state_dict(named)


def test_the_better_founded_claim_wins():
    """A marked claim beats one from key names."""
    found = identify(
        header(a__weight=torch.ones(2, 2), a__mark=torch.ones(1)),
        registry_of(Claimant(), Surer()),
    )
    assert found.claims()["a"].scheme == "surer"


def test_equal_claims_of_two_schemes_are_ambiguous():
    """The error names the layer, both schemes, and what to do."""
    found = identify(
        header(a__weight=torch.ones(2, 2), a__mark=torch.ones(1)),
        registry_of(Claimant(), Rival()),
    )
    assert set(found.ambiguous) == {"a"}
    assert found.layers == {}
    with pytest.raises(AmbiguousError, match=r"a: .*claimant, rival.*HIJACK_DISABLE"):
        found.claims()


MUSUBI = {
    "block": ((64, 2, 1), (1, 64)),
    "row": ((64, 1), (1, 128)),
    "tensor": ((), (64, 128)),
}


@pytest.mark.parametrize("kind", MUSUBI)
def test_musubi_scales_tell_the_block_size(kind):
    """Each of the three shapes gives its block size and its evidence."""
    shape, block_size = MUSUBI[kind]
    found = identify(
        header(x__weight=torch.ones(64, 128).to(FP8), x__scale_weight=torch.ones(shape))
    )
    claim = found.claims()["x"]
    assert (claim.scheme, claim.dialect) == ("blockwise_fp8", "musubi")
    assert claim.block_size == block_size
    assert "scale_weight" in claim.evidence[0]


def test_a_grid_that_does_not_divide_is_not_claimed():
    """The block size is never guessed: the scale is unconsumed instead."""
    found = identify(
        header(x__weight=torch.ones(192, 256).to(FP8), x__weight_scale=torch.ones(5, 2))
    )
    assert found.layers == {}
    assert found.unconsumed == ("x.weight_scale",)
    assert found.unscaled == ("x",)


def test_layers_in_formats_without_a_scheme_are_named():
    """ComfyUI's AWQ is none of ours; its scales are consumed, but it is not clear."""
    marker = torch.tensor(list(b'{"format": "awq_w4a16"}'), dtype=torch.uint8)
    found = identify(
        header(
            n__weight=torch.ones(4, 4, dtype=torch.int8),
            n__weight_scale=torch.tensor(1.0),
            n__input_scale=torch.tensor(1.0),
            n__comfy_quant=marker,
        )
    )
    assert found.unsupported["n"].format == "comfy_quant of another kind"
    assert (found.layers, found.unconsumed, found.clear) == ({}, (), False)
    assert "comfy_quant of another kind" in found.as_table()
    assert "n.weight" in json.loads(found.to_json())["foreign"]["n"]["keys"]


def test_scales_without_a_scheme_are_unconsumed_and_plain_casts_are_not():
    """A scale without a weight is reported; FP8 without a scale is only noted."""
    found = identify(
        header(a__weight_scale_inv=torch.ones(1), b__weight=torch.ones(2, 2).to(FP8))
    )
    assert found.unconsumed == ("a.weight_scale_inv",)
    assert found.unscaled == ("b",)


def test_a_key_that_begins_with_a_dot_is_nobodys():
    """The root's own weight has no dot before it."""
    fp8 = torch.ones(2, 2).to(FP8)
    tensors = {".weight": fp8, ".weight_scale_inv": torch.ones(1, 1)}
    found = identify(hijack.Header.from_state_dict(tensors))
    assert (found.layers, found.unscaled) == ({}, ())


def test_a_dense_checkpoint_claims_nothing():
    """Ordinary weights, biases and norms are nobody's."""
    found = identify(header(a__weight=torch.ones(2, 2), a__bias=torch.ones(2)))
    assert (found.layers, found.unconsumed, found.unscaled) == ({}, (), ())


def test_the_report_is_json():
    """Every claim is there with its keys and evidence."""
    found = identify(
        header(x__weight=torch.ones(4, 4).to(FP8), x__scale_weight=torch.ones(4, 1))
    )
    report = json.loads(found.to_json())
    assert report["layers"]["x"]["block_size"] == [1, 4]
    assert report["layers"]["x"]["keys"]["scale_weight"] == "x.scale_weight"
    assert found.groups() == [("blockwise_fp8", "musubi", "1x4", 1)]


def marked(layers, **tensors):
    """A header whose metadata says that of its layers."""
    metadata = {"hijack": json.dumps({"version": 1, "layers": layers})}
    tensors = tensors or {
        "x__weight": torch.ones(4, 8).to(FP8),
        "x__weight_scale": torch.ones(4, 1),
    }
    return hijack.Header(header(**tensors).tensors, metadata, None, "file")


def entry(**changes):
    """What metadata says of a good layer, with changes."""
    good = {"scheme": "blockwise_fp8", "params": ["weight_scale"]}
    return {"x": {**good, **changes}}


CONTRADICTIONS = {
    "scale_2 is missing": entry(params=["weight_scale", "scale_2"]),
    "weight_scale is missing": entry(params=[]),
    "params are 7, expected a list": entry(params=7),
    "params are .*expected a list": entry(params=[["a"]]),
    "block_size is 'ab'": entry(block_size="ab"),
    r"block_size is \[9\]": entry(block_size=[9]),
    r"block_size is \[2, 8\], the shapes give \[1, 8\]": entry(block_size=[2, 8]),
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_metadata_that_does_not_match_the_tensors_is_refused(message):
    """The layer is named with the reason, and nobody may load it."""
    found = identify(marked(CONTRADICTIONS[message]), registry_of(BlockwiseFP8()))
    assert list(found.mismatches) == ["x"]
    assert not found.clear
    with pytest.raises(CheckpointError, match=rf"file: x: .*do not match.*{message}"):
        found.claims()
    assert "mismatch: x: " in found.as_table()
    assert "x" in json.loads(found.to_json())["contradictions"]


def test_a_scale_of_another_shape_than_marked_is_a_mismatch():
    """The scheme itself is asked whether the tensors fit each other."""
    found = identify(
        marked(
            entry(),
            x__weight=torch.ones(4, 8).to(FP8),
            x__weight_scale=torch.ones(3, 1),
        )
    )
    assert "does not divide" in found.mismatches["x"]


def test_one_bad_marker_leaves_the_other_layers_alone():
    """Each layer is judged for itself."""
    registry = registry_of(BlockwiseFP8())
    layers = {"x": entry()["x"], "y": entry(params=7)["x"]}
    tensors = {
        f"{name}__{part}": tensor
        for name in "xy"
        for part, tensor in (
            ("weight", torch.ones(4, 8).to(FP8)),
            ("weight_scale", torch.ones(4, 1)),
        )
    }
    found = identify(marked(layers, **tensors), registry)
    assert found.layers["x"].certainty == hijack.Certainty.MARKED
    assert list(found.mismatches) == ["y"]
    assert registry.problems == []


def test_schemes_that_are_not_there_are_named():
    """The user learns which plugin is missing; reading the file is not refused yet."""
    found = identify(marked(entry(scheme="int4_secret")), registry_of())
    assert found.unknown == {"x": "int4_secret"}
    assert "unknown: 1 layers are int4_secret" in found.as_table()
    assert not found.clear
    assert found.claims() == {}


def test_metadata_of_another_scheme_outweighs_shapes_that_fit():
    """Whatever reads claims, such as convert, must not take the layer for another."""
    tensors = {"x__weight": torch.ones(4, 8).to(FP8), "x__weight_scale": torch.ones(())}
    found = identify(marked(entry(scheme="rotated_fp8"), **tensors))
    assert (found.unknown, found.claims()) == ({"x": "rotated_fp8"}, {})


def test_metadata_of_a_layer_that_was_made_dense_means_nothing():
    """Other tools keep metadata when they replace tensors."""
    found = identify(marked(entry(), x__weight=torch.ones(4, 8)))
    assert found.clear
    assert found.claims() == {}


def test_keys_of_one_dialect_alone_outweigh_old_metadata():
    """A tool that renamed the scales and kept the metadata did no harm."""
    weight, scale = torch.ones(4, 8).to(FP8), torch.ones(4, 2, 1)
    found = identify(marked(entry(), x__weight=weight, x__scale_weight=scale))
    assert found.clear
    assert found.claims()["x"].dialect == "musubi"


def test_the_table_names_every_layer_if_asked():
    """Short by default; the evidence with verbose."""
    found = identify(marked(entry()))
    assert "metadata names blockwise_fp8" not in found.as_table()
    assert "metadata names blockwise_fp8" in found.as_table(verbose=True)


JSON = st.recursive(
    st.none() | st.integers(-1, 9) | st.sampled_from(["weight", "weight_scale", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["x", "scheme", "params", "block_size", "layers"]), inner
        )
    ),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(JSON, JSON, JSON)
def test_no_metadata_makes_a_plugin_fail(scheme, params, block_size):
    """Hostile markers end in a claim or in a note, never in an exception."""
    registry = registry_of(BlockwiseFP8())
    for name in ("blockwise_fp8", scheme):
        layers = entry(scheme=name, params=params, block_size=block_size)
        for table in (layers, {"x": params}, params):
            found = identify(marked(table), registry)
            found.as_table(verbose=True)
            found.to_json()
    assert registry.problems == []


# -- layers that are alike -------------------------------------------------------------


def scaled(name, dtype, *shape):
    """A scale of a weight of (64, 64)."""
    return {name: TensorInfo(dtype, shape)}


#: Tensors beside a weight, each of which several dialects have something to say about.
SCALES = [
    scaled("scale_weight", "F32"),
    scaled("scale_weight", "F32", 64, 1),
    scaled("scale_weight", "F32", 2, 2),
    scaled("scale_weight", "F32", 3, 3),
    scaled("weight_scale", "F32"),
    scaled("weight_scale", "F32", 64),
    scaled("weight_scale", "F32", 64, 1),
    scaled("weight_scale", "BF16", 2, 2),
    scaled("weight_scale", "U8", 64, 2),
    scaled("weight_scale", "U8", 128, 4),
    scaled("weight_scale_inv", "F32", 2, 2),
    scaled("_weight_scale", "F32", 64, 1),
    scaled("weight._scale", "F32", 64, 1),
]
EXTRAS = [
    {},
    scaled("bias", "F32", 60),
    scaled("input_scale", "F32"),
    scaled("scaled_fp8", "F8_E5M2", 0),
]
WEIGHTS = {"_weight_scale": "_weight_qdata", "weight._scale": "weight._data"}
MARKERS = [
    {"format": "float8_e4m3fn"},
    {"format": "float8_e4m3fn_blockwise", "group_size": 32},
    {"format": "mxfp8", "orig_shape": [60, 64]},
    {"scheme": "blockwise_fp8", "params": ["weight_scale"], "block_size": [32, 32]},
    {"_type": "Float8Tensor", "_data": {"block_size": [1, 64]}},
]
#: musubi-tuner replaces every ".weight" in the key of a scale.
LAYERS = ("a", "a.b", "a.c", "a.weight.d", "a.weight.e", "")


@st.composite
def headers(draw):
    """Headers of layers, some alike, and some alike but for what markers say."""
    choices = draw(st.lists(st.sampled_from(SCALES), min_size=1, max_size=2))
    table = draw(st.sampled_from(["hijack", "_quantization_metadata", "torchao"]))
    tensors, texts, said = {}, {}, {}
    for layer in LAYERS:
        parts = {**draw(st.sampled_from(choices)), **draw(st.sampled_from(EXTRAS))}
        weight = WEIGHTS.get(next(iter(parts)), "weight")
        marker = draw(st.sampled_from([None, *MARKERS]))
        if marker is not None and draw(st.booleans()):
            text = json.dumps(marker).encode()
            texts[join(layer, "comfy_quant")] = text
            parts["comfy_quant"] = TensorInfo("U8", (len(text),))
        elif marker is not None:
            said[layer] = marker
        for name, info in {weight: TensorInfo("F8_E4M3", (64, 64)), **parts}.items():
            key = join(layer, name)
            if name == "scale_weight":
                key = key.replace(".weight", ".scale_weight")
            tensors[key] = info
    metadata = {table: json.dumps({"layers": said})}
    if table == "torchao":
        metadata = {join(la, "weight"): json.dumps(entry) for la, entry in said.items()}
    return Header(tensors, metadata, reader=texts.get)


@given(headers())
@settings(max_examples=300, deadline=None)
def test_layers_that_are_alike_are_recognised_as_each_would_be(header):
    """Recognising one of each kind finds what recognising every one finds."""
    found = identify(header, registry_of(BlockwiseFP8()))
    assert found == identify(header, registry_of(OneByOne()))


class OneByOne(BlockwiseFP8):
    """Recognises every layer for itself."""

    def likeness(self, header, layer):
        """No layer is like another."""
        return None


def test_layers_whose_scales_have_odd_keys_are_not_alike():
    """What does not stand beside the weight is looked at for every layer."""
    weight = TensorInfo("F8_E4M3", (64, 64))
    tensors = {
        "a.weight.one.weight": weight,
        "a.scale_weight.one.scale_weight": TensorInfo("F32", (3, 3)),
        "a.weight.two.weight": weight,
        "a.scale_weight.two.scale_weight": TensorInfo("F32", (64, 1)),
    }
    found = identify(Header(tensors), registry_of(BlockwiseFP8()))
    assert set(found.layers) == {"a.weight.two"}
    assert found.unconsumed == ("a.scale_weight.one.scale_weight",)


def test_layers_of_one_shape_are_planned_once():
    """A scheme's tensors for a shape are made once, however many layers have it."""
    asked = []

    class Plain(hijack.Scheme):
        name = "plain_int8"
        claims_unmarked = True

        def quantize(self, weight, **options):
            asked.append(tuple(weight.shape))
            return weight.to(torch.int8), {"weight_scale": weight[:, :1].float()}

        def dequantize(self, qdata, params, dtype):
            return qdata.to(dtype)

    tensors = {}
    for number in range(20):
        tensors[f"{number}.weight"] = TensorInfo("I8", (4 + number % 2, 8))
        tensors[f"{number}.weight_scale"] = TensorInfo("F32", (4 + number % 2, 1))
    found = identify(Header(tensors), registry_of(Plain()))
    assert len(found.layers) == 20
    assert asked == [(4, 8), (5, 8)]


def test_a_layer_that_lost_its_scale_is_no_plain_cast():
    """FP8 without a scale is a plain cast only where no layer of the file has one."""
    coded = torch.ones(64, 128).to(FP8)
    assert identify(header(x__weight=coded, y__weight=coded)).clear
    found = identify(
        header(x__weight=coded, x__scale_weight=torch.ones(64, 2, 1), y__weight=coded)
    )
    assert (list(found.layers), found.unscaled) == (["x"], ("y",))
    assert not found.clear
    assert (
        "1 layers hold quantized data without a scale, unlike others"
        in found.as_table()
    )


@pytest.mark.parametrize(
    "key",
    [
        *("blocks.0.q_scale", "blocks.0.q_weight_scale", "blocks.0.q_scale.weight"),
        *("blocks.0.scale_q", "blocks.0.scales.q", "blocks_0_q_scale"),
        *("blocks.0.q:scale", "scales.blocks/0/q", "meta.blocks.0.q.weight.scale"),
        *("weight_scales", "quantization.scales", "blocks.0.Q_SCALE"),
    ],
)
def test_what_may_scale_plain_data_is_unconsumed_wherever_it_is(key):
    """A scale may be beside the layer, in a table, or all scales in one tensor."""
    tensors = {"blocks.0.q.weight": torch.ones(64, 128).to(FP8)}
    found = identify(Header.from_state_dict({**tensors, key: torch.ones(1)}))
    assert (found.unconsumed, found.clear) == ((key,), False)


@pytest.mark.parametrize(
    "key", ["scale", "up_scale", "gate_up_proj_amax", "gate_up_proj_weight_scale"]
)
def test_what_may_scale_stacked_experts_is_unconsumed(key):
    """FP8 experts in one tensor may have their scales beside them."""
    experts = {"experts.gate_up_proj": torch.ones(4, 64, 128).to(FP8)}
    assert identify(Header.from_state_dict(experts)).clear
    found = identify(
        Header.from_state_dict({**experts, f"experts.{key}": torch.ones(4)})
    )
    assert not found.clear


@pytest.mark.parametrize(
    "key",
    [
        *("blocks.0.norm.key_norm.scale", "logit_scale", "blocks.0.scale_shift_table"),
        *("scale_embedder.weight", "self_attn.k_scale"),
        *("upscaler.attn.in_proj_weight", "upscaler.quant_conv.weight"),
    ],
)
def test_parameters_that_are_called_scales_leave_plain_casts_clear(key):
    """Models have scales of their own, and norms of the name of another's module."""
    tensors = {
        "blocks.0.q.weight": torch.ones(64, 128).to(FP8),
        "norm.weight": torch.ones(64).to(FP8),
    }
    assert identify(Header.from_state_dict({**tensors, key: torch.ones(1)})).clear


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.int16, torch.int32, torch.int64, torch.bool),
        *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    ],
)
def test_weights_that_load_cannot_cast_are_not_clear(dtype):
    """Of dense weights in another dtype only FP8 is a plain cast."""
    found = identify(header(x__weight=torch.ones(64, 128).to(dtype)))
    assert (found.unscaled, found.clear) == (("x",), False)


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        *(("x.bias", torch.int8), ("x.bias", torch.float8_e4m3fnuz)),
        *(("table", torch.float8_e5m2fnuz), ("table", torch.float8_e8m0fnu)),
    ],
)
def test_tensors_beside_weights_that_load_refuses_are_not_clear(key, dtype):
    """Biases are no integers, and no model has the FP8 of older GPUs."""
    dense = {"x.weight": torch.ones(64, 128), "ids": torch.arange(4)}
    tensors = {**dense, key: torch.ones(64).to(dtype)}
    with pytest.raises(CheckpointError, match=f"{key}: is .*, expected a dense dtype"):
        identify(Header.from_state_dict(tensors)).check()
    tensors[key] = torch.ones(64).to(FP8)
    assert identify(Header.from_state_dict(tensors)).clear


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("grid", [(1, 64), (2, 64), (1, 128)])
def test_a_grid_that_may_be_transposed_is_ambiguous(name, grid):
    """As many columns of scales as rows of the weight may be a scale for each row."""
    tensors = {"x.weight": torch.ones(64, 128).to(FP8), f"x.{name}": torch.ones(grid)}
    found = identify(Header.from_state_dict(tensors))
    assert (list(found.ambiguous), found.layers) == (["x"], {})
    wide = {"x.weight": torch.ones(64, 8192).to(FP8), f"x.{name}": torch.ones(1, 64)}
    assert identify(Header.from_state_dict(wide)).layers["x"].block_size == (64, 128)


@pytest.mark.parametrize("name", ["proj_down", "lora_A", "perm", "smooth", "lut"])
def test_the_rest_of_a_weight_is_not_left_out(name):
    """A part of low rank, or an order of columns, makes a weight another."""
    scaled = {
        "x__weight": torch.ones(64, 128).to(FP8),
        "x__weight_scale": torch.ones(()),
    }
    assert identify(header(**scaled)).clear
    found = identify(header(**scaled, **{f"x__{name}": torch.ones(2, 128)}))
    assert found.unconsumed == (f"x.{name}",)


def test_a_norm_beside_scaled_layers_may_be_a_plain_cast():
    """No format scales a weight of one dimension."""
    coded, norm = torch.ones(64, 128).to(FP8), torch.ones(64).to(FP8)
    found = identify(
        header(x__weight=coded, x__scale_weight=torch.ones(64, 2, 1), n__weight=norm)
    )
    assert (found.unscaled, found.clear) == (("n",), True)


def test_the_table_is_short_and_speaks_of_rows_and_tensors():
    """Three notes of a kind and the number of the rest; whole rows are called so."""
    coded = torch.ones(64, 128).to(FP8)
    layers = {f"o{i}__weight": coded for i in range(9)}
    lost = {f"o{i}__weight_scale_inv": torch.ones(5, 5) for i in range(9)}
    rows = {"r__weight": coded, "r__scale_weight": torch.ones(64, 1)}
    found = identify(header(**layers, **lost, **rows))
    text = found.as_table()
    assert text.count("unconsumed:") == 4
    assert "unconsumed: 6 more, see -v" in text
    assert found.as_table(verbose=True).count("unconsumed:") == 9
    assert "musubi   row" in text


class PlainInt8(hijack.Scheme):
    """int8 with one scale per row, which claims unmarked layers that fit."""

    name = "plain_int8"
    claims_unmarked = True

    def quantize(self, weight, **options):
        """Divide each row by its scale."""
        scale = weight.abs().amax(1, keepdim=True).float() / 127
        return (weight / scale).round().to(torch.int8), {"weight_scale": scale}

    def dequantize(self, qdata, params, dtype):
        """Multiply each row by its scale."""
        return (qdata * params["weight_scale"]).to(dtype)


INT8 = {
    "m.a.weight": torch.ones(4, 8, dtype=torch.int8),
    "m.a.weight_scale": torch.ones(4, 1),
}


def comfy_marker(name):
    """A marker of ComfyUI's, as a tensor of bytes."""
    text = json.dumps({"format": name}).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


def test_an_unmarked_layer_that_fits_is_claimed_only_if_the_scheme_says_so():
    """A native claim needs its marker, unless the scheme claims unmarked layers."""

    class Careful(PlainInt8):
        claims_unmarked = False

    plain = Header.from_state_dict(INT8)
    assert set(identify(plain, registry_of(PlainInt8())).layers) == {"m.a"}
    assert not identify(plain, registry_of(Careful())).layers
    marker = {"layers": {"m.a": {"scheme": "plain_int8", "params": ["weight_scale"]}}}
    marked = Header.from_state_dict(INT8, {"hijack": json.dumps(marker)})
    assert set(identify(marked, registry_of(Careful())).layers) == {"m.a"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "config"),
    [
        ({}, {}, {"quantization_config": {"quant_method": "hadamard_int8"}}),
        ({}, {"quantization_config": '{"quant_method": "sdnq"}'}, None),
        ({"m.a.comfy_quant": comfy_marker("convrot_w4a4")}, {}, None),
        (
            {},
            {"_quantization_metadata": '{"layers": {"m.a": {"format": "other"}}}'},
            None,
        ),
        ({"m.scaled_fp8": torch.zeros(0, dtype=FP8)}, {}, None),
        ({}, {"hijack": '{"layers": {"m.a": {"scheme": "other"}}}'}, None),
    ],
    ids=["config", "header", "marker", "table", "scaled_fp8", "hijack"],
)
def test_a_marker_or_config_of_another_format_outranks_a_fit(tensors, metadata, config):
    """Shapes that fit are no claim where something names another format."""
    view = Header.from_state_dict({**INT8, **tensors}, metadata)
    header = Header(view.tensors, metadata, config, reader=view.reader)
    found = identify(header, registry_of(PlainInt8()))
    assert not found.layers
    assert not found.ambiguous
    assert not found.clear


def test_a_config_that_names_the_scheme_does_not_refuse_it():
    """``quant_method`` may be the scheme's own name."""
    config = {"quantization_config": {"quant_method": "plain_int8"}}
    header = Header(Header.from_state_dict(INT8).tensors, {}, config)
    assert set(identify(header, registry_of(PlainInt8())).layers) == {"m.a"}


@pytest.mark.parametrize("shape", [(), (64,), (64, 1), (64, 2)])
def test_fp8_under_the_config_of_an_unknown_method_is_a_guess(shape):
    """A rotated weight has the same shapes; it is read only if that is assumed."""
    tensors = {
        "a.weight": TensorInfo("F8_E4M3", (64, 128)),
        "a.weight_scale": TensorInfo("F32", shape),
    }
    assert set(identify(Header(tensors), registry_of(BlockwiseFP8())).layers) == {"a"}
    config = {"quantization_config": {"quant_method": "hadamard_fp8"}}
    found = identify(Header(tensors, {}, config), registry_of(BlockwiseFP8()))
    assert set(found.ambiguous) == {"a"}
    block = hijack.text.block_text(found.ambiguous["a"][0].block_size)
    assumed = identify(
        Header(tensors, {}, config),
        registry_of(BlockwiseFP8()),
        assume=[block, "hijack"],
    )
    assert set(assumed.layers) == {"a"}


@pytest.mark.parametrize(
    "scale",
    [
        *("a.b.weight_quant.scale", "a.b.weight_quantizer._amax_scale", "a.b_scale"),
        *("a.b.weight_scaling", "scales.a.b", "a.b.weight.descale", "a.b.inner.s"),
        *("a.b.weight_amax", "a.b.w_inv", "weight_scales.a.b.weight"),
    ],
)
def test_whatever_may_scale_a_lone_matrix_is_unconsumed(scale):
    """FP8 beside a tensor that may be its scale is no plain cast, whatever its name."""
    coded, one = torch.ones(8, 16).to(FP8), torch.ones(())
    tensors = {"a.b.weight": coded, "a.b.bias": torch.ones(8), scale: one}
    found = identify(hijack.Header.from_state_dict(tensors))
    assert found.unconsumed == (scale,)
    assert not found.clear


def test_a_plain_cast_with_modules_and_statistics_beside_it_is_clear():
    """Other layers' weights, norms and statistics are no scales of a cast matrix."""
    cast, one = torch.ones(8, 16).to(FP8), torch.ones(8)
    found = identify(
        hijack.Header.from_state_dict(
            {
                "a.weight": cast,
                "a.bias": one,
                "a.norm.weight": one,
                "a.norm.bias": one,
                "a_norm.scale": one,
                "n.weight": one.to(FP8),
                "n.running_mean": one,
                "n.num_batches_tracked": torch.tensor(1),
            }
        )
    )
    assert found.unconsumed == ()
    assert found.clear


class MayBeRotated(Claimant):
    """Claims every layer twice: the file does not say whether it is rotated."""

    name = "may_be_rotated"
    certainty = hijack.Certainty.GUESS

    def match(self, header):
        """Both readings, as guesses."""
        for claim in super().match(header):
            for rotation in ("0", "256"):
                yield dataclasses.replace(claim, options={"rotation": rotation})


MARKED = {"a__weight": torch.ones(2, 2), "a__mark": torch.ones(1)}


def test_an_option_tells_two_readings_apart():
    """The error names both, and the word that assumes one."""
    registry = registry_of(MayBeRotated())
    found = identify(header(**MARKED), registry)
    with pytest.raises(
        AmbiguousError, match=r"rotation=0 or .*rotation=256.*assume=\['rotation=0'\]"
    ):
        found.check()
    found = identify(header(**MARKED), registry, assume=["rotation=256"])
    assert found.claims()["a"].options == {"rotation": "256"}


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("rival", "rival"),
        ("other, claimant, rival", "claimant"),
        ("rival,claimant", "rival"),
    ],
)
def test_a_preferred_scheme_wins_among_equals(monkeypatch, order, expected):
    """HIJACK_PREFER lists words, the first first; the report says that it chose."""
    monkeypatch.setenv("HIJACK_PREFER", order)
    found = identify(header(**MARKED), registry_of(Claimant(), Rival()))
    assert found.claims()["a"].scheme == expected
    assert f"chosen: 1 layers are read as {expected} d, preferred: " in found.as_table()
    assert json.loads(found.to_json())["layers"]["a"]["chosen"] == (
        f"preferred: {expected}"
    )


def test_what_is_preferred_does_not_outweigh_a_marker(monkeypatch):
    """A preference chooses among equals only, and none is no error."""
    monkeypatch.setenv("HIJACK_PREFER", "claimant")
    found = identify(header(**MARKED), registry_of(Claimant(), Surer()))
    assert found.claims()["a"].scheme == "surer"
    assert "chosen" not in found.as_table()


def test_what_is_assumed_outweighs_what_is_preferred(monkeypatch):
    """The call says it nearer than the environment."""
    monkeypatch.setenv("HIJACK_PREFER", "claimant")
    registry = registry_of(Claimant(), Rival())
    found = identify(header(**MARKED), registry, assume=["rival"])
    assert found.claims()["a"].chosen == "assumed: rival"
    with prefer(["rival"]):
        assert identify(header(**MARKED), registry).claims()["a"].scheme == "rival"
