"""Dialects side by side: what each claims, what none may, and what conversion leaves.

Headers are made by hand: what a file is must follow from names, dtypes, shapes and
markers alone.
"""

import dataclasses
import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from hijack.errors import AmbiguousError, CheckpointError, UnconsumedScaleError
from hijack.formats.identification import identify
from hijack.safetensors_io.header import TensorInfo

FP8 = torch.float8_e4m3fn


def header_of(tensors, metadata=None, config=None, markers=None):
    """A header of key to (dtype, *shape), and markers by key."""
    infos = {key: TensorInfo(d, tuple(shape)) for key, (d, *shape) in tensors.items()}
    said = {key: json.dumps(entry).encode() for key, entry in (markers or {}).items()}
    return hijack.Header(infos, metadata or {}, config, "x", reader=said.get)


def layer_of(scale, shape=(256, 256), dtype="F8_E4M3", name="weight_scale"):
    """A weight and its scale, (dtype, *shape)."""
    return {"a.weight": (dtype, *shape), f"a.{name}": scale}


def quantization(**said):
    """A ``config.json``."""
    return {"quantization_config": said}


def group_of(**weights):
    """A config of compressed-tensors with one group of 8-bit floats."""
    entry = {"weights": {"type": "float", "num_bits": 8, **weights}}
    return quantization(quant_method="compressed-tensors", config_groups={"g": entry})


def float8_tensor(kind, **data):
    """What torchao's metadata says of a weight."""
    return {"a.weight": json.dumps({"_type": kind, "_data": data})}


def table_of(**entry):
    """What ComfyUI's table in the header says of a weight."""
    return {"_quantization_metadata": json.dumps({"layers": {"a": entry}})}


TORCHAO = {"a._weight_qdata": ("F8_E4M3", 256, 256)}
BANK = {"a._weight_qdata": ("F8_E4M3", 4, 256, 256)}
MARK = {"a.comfy_quant": ("U8", 20)}
ROWWISE = "float8_e4m3fn_rowwise"
FINE = quantization(quant_method="fp8", weight_block_size=[128, 128])

#: What is read: tensors, what else the file says, dialect and block size.
READ = {
    "musubi blocks": (
        layer_of(("BF16", 256, 4, 1), name="scale_weight"),
        {},
        ("musubi", (1, 64)),
    ),
    "musubi rows": (
        layer_of(("BF16", 256, 1), name="scale_weight"),
        {},
        ("musubi", (1, 256)),
    ),
    "one scale": (
        layer_of(("F32",), name="scale_weight"),
        {},
        ("musubi", (256, 256)),
    ),
    "marked as a whole": (
        {**layer_of(("F32",), name="scale_weight"), "scaled_fp8": ("F8_E4M3", 2)},
        {},
        ("scaled_fp8", (256, 256)),
    ),
    "marked as a whole, blocks": (
        {
            **layer_of(("BF16", 256, 4, 1), name="scale_weight"),
            "scaled_fp8": ("F8_E4M3", 0),
        },
        {},
        ("scaled_fp8", (1, 64)),
    ),
    "marked as a whole, under today's name": (
        {
            **layer_of(("F32",)),
            "a.input_scale": ("F32",),
            "scaled_fp8": ("F8_E4M3", 2),
        },
        {},
        ("scaled_fp8", (256, 256)),
    ),
    "marked as a whole, rows under today's name": (
        {**layer_of(("F32", 256)), "scaled_fp8": ("F8_E4M3", 2)},
        {},
        ("scaled_fp8", (1, 256)),
    ),
    "rows of convert_to_quant, older": (
        layer_of(("F32", 256), name="scale_weight"),
        {},
        ("scaled_fp8", (1, 256)),
    ),
    "squares of convert_to_quant, older": (
        layer_of(("F32", 4, 4), name="scale_weight"),
        {},
        ("scaled_fp8", (64, 64)),
    ),
    "ComfyUI": (
        {**layer_of(("F32",)), **MARK},
        {"markers": {"a.comfy_quant": {"format": "float8_e4m3fn"}}},
        ("comfy_quant", (256, 256)),
    ),
    "tiles": (
        layer_of(("U8", 128, 4), shape=(96, 64)),
        {},
        ("comfy_quant", (1, 32)),
    ),
    "plain powers": (layer_of(("U8", 96, 2), shape=(96, 64)), {}, ("mxfp8", (1, 32))),
    "plain powers of ModelOpt": (
        layer_of(("U8", 96, 2), shape=(96, 64)),
        {"config": quantization(quant_method="modelopt")},
        ("mxfp8", (1, 32)),
    ),
    "plain powers of ModelOpt, of the shape of tiles": (
        layer_of(("U8", 128, 4), shape=(128, 128)),
        {"config": quantization(quant_method="modelopt", quant_algo="MXFP8")},
        ("mxfp8", (1, 32)),
    ),
    "Kijai": (layer_of(("F32",)), {}, ("kijai", (256, 256))),
    "AutoFP8, with the scale of an input": (
        {**layer_of(("F32",)), "a.input_scale": ("F32",)},
        {"config": quantization(quant_method="fp8", activation_scheme="static")},
        ("kijai", (256, 256)),
    ),
    "Black Forest Labs": (layer_of(("F32", 256)), {}, ("fp8r", (1, 256))),
    "FBGEMM": (
        {**layer_of(("F32", 256, 1)), "a.input_scale_ub": ("F32", 1)},
        {"config": quantization(quant_method="fbgemm_fp8", activation_scale_ub=1200.0)},
        ("fp8r", (1, 256)),
    ),
    "DeepSeek": (
        layer_of(("F32", 5, 2), shape=(576, 256), name="weight_scale_inv"),
        {"config": FINE},
        ("deepseek", (128, 128)),
    ),
    "DeepSeek's blocks under another name": (
        layer_of(("F32", 2, 2), shape=(192, 256)),
        {"config": FINE},
        ("deepseek", (128, 128)),
    ),
    "DeepSeek without a config": (
        layer_of(("F32", 2, 2), name="weight_scale_inv"),
        {},
        ("deepseek", (128, 128)),
    ),
    "DeepSeek's MXFP8": (
        layer_of(("U8", 256, 8), name="weight_scale_inv"),
        {"config": quantization(quant_method="mxfp8")},
        ("deepseek", (1, 32)),
    ),
    "compressed-tensors blocks": (
        layer_of(("BF16", 5, 2), shape=(576, 256)),
        {"config": group_of(strategy="block", block_structure=[128, 128])},
        ("compressed_tensors", (128, 128)),
    ),
    "compressed-tensors, the text model of several": (
        layer_of(("BF16", 5, 2), shape=(576, 200)),
        {
            "config": {
                "model_type": "x",
                "text_config": group_of(strategy="block", block_structure=[128, 128]),
            }
        },
        ("compressed_tensors", (128, 128)),
    ),
    "compressed-tensors rows": (
        layer_of(("BF16", 256, 1)),
        {"config": group_of(strategy="channel")},
        ("compressed_tensors", (1, 256)),
    ),
    "compressed-tensors MXFP8, of the shape of tiles": (
        layer_of(("U8", 128, 4), shape=(128, 128)),
        {"config": group_of(strategy="group", group_size=32)},
        ("compressed_tensors", (1, 32)),
    ),
    "compressed-tensors groups that are no power of two": (
        layer_of(("F32", 256, 2), shape=(256, 192)),
        {"config": group_of(strategy="group", group_size=96)},
        ("compressed_tensors", (1, 96)),
    ),
    "compressed-tensors groups longer than a row": (
        layer_of(("F32", 256, 1), shape=(256, 64)),
        {"config": group_of(strategy="group", group_size=128)},
        ("compressed_tensors", (1, 64)),
    ),
    "torchao without metadata": (
        {**TORCHAO, "a._weight_scale": ("F32", 256, 1)},
        {},
        ("torchao", (1, 256)),
    ),
    "torchao rows": (
        {**TORCHAO, "a._weight_scale": ("F32", 256, 1)},
        {"metadata": float8_tensor("Float8Tensor", block_size=[1, 256])},
        ("torchao", (1, 256)),
    ),
    "torchao rows of experts": (
        {**BANK, "a._weight_scale": ("F32", 4, 256, 1)},
        {"metadata": float8_tensor("Float8Tensor", block_size=[1, 1, 256])},
        ("torchao", (1, 256)),
    ),
    "torchao powers": (
        {**TORCHAO, "a._weight_scale": ("F8_E8M0", 256, 8)},
        {"metadata": float8_tensor("MXTensor", block_size=32)},
        ("torchao", (1, 32)),
    ),
    "torchao powers in tiles": (
        {**TORCHAO, "a._weight_scale": ("F8_E8M0", 64, 32)},
        {"metadata": float8_tensor("MXTensor", block_size=32, is_swizzled_scales=True)},
        ("torchao", (1, 32)),
    ),
    "SDNQ, lying down": (
        layer_of(("F32", 1, 64), shape=(64, 64), name="scale"),
        {"config": quantization(quant_method="sdnq", use_quantized_matmul=True)},
        ("sdnq", (1, 64)),
    ),
    "quanto": (
        {"a.weight._data": ("F8_E5M2", 8, 16), "a.weight._scale": ("BF16", 8, 1)},
        {},
        ("quanto", (1, 16)),
    ),
}

#: What is named and not read.
NAMED = {
    "torchao powers that are no tiles": (
        {**TORCHAO, "a._weight_scale": ("F8_E8M0", 256, 8)},
        float8_tensor("MXTensor", block_size=32, is_swizzled_scales=True),
        "torchao of another kind",
    ),
    "torchao tiles that are not said to be": (
        {**TORCHAO, "a._weight_scale": ("F8_E8M0", 64, 32)},
        float8_tensor("MXTensor", block_size=32),
        "torchao of another kind",
    ),
    "torchao scales that cover no weight": (
        {
            "a._weight_qdata": ("F8_E4M3", 16, 64),
            "a._weight_scale": ("F32", 32, 16),
        },
        float8_tensor("Float8Tensor", block_size=[1, 64]),
        "torchao of another kind",
    ),
    "torchao integers": (
        {"a._weight_qdata": ("U8", 8, 8), "a._weight_scale": ("BF16", 8, 1)},
        float8_tensor("Int4Tensor"),
        "torchao of another kind",
    ),
    "torchao experts": (
        {"a._w1_qdata": ("F8_E4M3", 2, 8, 8), "a._w1_scale": ("F32", 2, 8, 1)},
        {},
        "torchao of another kind",
    ),
    "quanto 4-bit": (
        {
            "a.weight._data._data": ("U8", 4, 8),
            "a.weight._scale": ("BF16", 8, 1),
            "a.weight._shift": ("BF16", 8, 1),
            "a.input_scale": ("BF16",),
        },
        {},
        "quanto",
    ),
    "stacked experts": (
        {
            "a.gate_up_proj": ("F8_E4M3", 2, 256, 256),
            "a.gate_up_proj_scale_inv": ("F32", 2, 2, 2),
        },
        {},
        "stacked FP8 experts",
    ),
    "stacked experts, a scale for each row": (
        {"a.down_proj": ("F8_E4M3", 2, 64, 32), "a.down_proj_scale": ("F32", 2, 64, 1)},
        {},
        "stacked FP8 experts",
    ),
    "torchao of before": (
        {
            "a.weight:qdata": ("F8_E4M3", 64, 64),
            "a.weight:scale": ("F32", 64, 1),
            "a.bias:_data": ("F32", 64),
        },
        float8_tensor("Float8Tensor", block_size=[1, 64]),
        "torchao of another kind",
    ),
    "GPTQ without an order of columns": (
        {
            "a.qweight": ("I32", 8, 128),
            "a.qzeros": ("I32", 2, 16),
            "a.scales": ("F16", 2, 128),
        },
        {},
        "GPTQ",
    ),
    "AWQ": (
        {
            "a.qweight": ("I32", 64, 16),
            "a.qzeros": ("I32", 2, 16),
            "a.scales": ("F16", 2, 128),
        },
        {},
        "AWQ",
    ),
    "packed integers without zeros": (
        {"a.qweight": ("I32", 8, 128), "a.scales": ("F16", 2, 128)},
        {},
        "packed integers of another kind",
    ),
    "DeepSeek's FP4 experts": (
        layer_of(("U8", 64, 2), shape=(64, 32), dtype="I8", name="scale"),
        {},
        "DeepSeek FP4 experts",
    ),
    "gpt-oss's experts in names of its own": (
        {"a.blocks": ("U8", 4, 64, 2, 16), "a.scales": ("U8", 4, 64, 2)},
        {},
        "MXFP4 experts",
    ),
    "two codes a byte with scales of no shape that is known": (
        {
            "a.weight": ("U8", 64, 32),
            "a.weight_scale": ("F8_E4M3", 64, 5),
            "a.weight_scale_2": ("F32",),
        },
        {},
        "nvfp4 of another kind",
    ),
    "ComfyUI's 4-bit integers without a marker": (
        {
            "a.weight": ("I8", 64, 32),
            "a.weight_s_rel": ("F8_E4M3", 64, 8),
            "a.weight_s_channel": ("F32", 64),
            "a.weight_codebook": ("F32", 16),
        },
        {},
        "w4a8 of another kind",
    ),
    "a kind nobody knows, marked in the header alone": (
        layer_of(("F32",)),
        table_of(format="float8_of_tomorrow"),
        "comfy_quant of another kind",
    ),
    "integers with an offset": (
        {
            **layer_of(("F32", 64, 1), shape=(64, 64), dtype="I8"),
            "a.weight_offset": ("F32", 64, 1),
        },
        {},
        "int8 of another kind",
    ),
    "bytes with a scale that nothing marks": (
        layer_of(("F32", 64, 1), shape=(64, 64), dtype="U8", name="scale"),
        {},
        "integers without a marker",
    ),
}


def test_a_lone_layer_of_bitsandbytes_is_named():
    """Its weight has no layer before its name, as the parts of the weight have."""
    tensors = {
        "weight": ("U8", 1024, 1),
        "weight.absmax": ("F32", 32),
        "weight.quant_map": ("F32", 16),
        "weight.quant_state.bitsandbytes__nf4": ("U8", 90),
    }
    found = identify(header_of(tensors))
    assert {la: f.format for la, f in found.unsupported.items()} == {
        "": "bitsandbytes 4-bit"
    }
    assert "such as weight" in found.as_table()


#: What nobody may read a weight without.
NEEDED = ("pre_quant_scale", "weight_zero_point", "svd_up", "scale", "weight_scale_2")


@pytest.mark.parametrize("name", READ)
def test_a_dialect_is_told_by_its_header(name):
    """One claim, of the right dialect and blocks; nothing else is remarked on."""
    tensors, said, expected = READ[name]
    found = identify(header_of(tensors, **said))
    claim = found.claims()["a"]
    assert (claim.dialect, claim.block_size) == expected
    assert found.clear
    assert not claim.contradiction


#: Configs of SDNQ with which a weight of one scale is not its codes times the scale.
DISGUISED = (
    {"use_hadamard": True},
    {"modules_quant_config": {"a": {"use_hadamard": True}}},
    {"use_quantized_matmul": True},
)


@pytest.mark.parametrize("options", DISGUISED, ids=lambda said: next(iter(said)))
def test_a_weight_of_sdnq_that_may_be_another_is_not_read(options):
    """Rotated, or lying down where one scale does not tell."""
    tensors = layer_of(("F32", 1, 1), name="scale")
    config = quantization(quant_method="sdnq", **options)
    found = identify(header_of(tensors, config=config))
    assert (found.unsupported["a"].format, found.layers) == ("SDNQ", {})


def test_the_config_sdnq_writes_beside_the_other_is_read(tmp_path):
    """``config.json`` is the model's, and need not say how it was quantized."""
    tensors = {"a.weight": torch.ones(8, 8).to(FP8), "a.scale": torch.ones(8, 1)}
    save_file(tensors, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "x"}', "utf-8")
    said = {"quant_method": "sdnq", "weights_dtype": "float8_e4m3fn"}
    path = tmp_path / "quantization_config.json"
    path.write_text(json.dumps(said), "utf-8")
    claim = hijack.identify(tmp_path / "x.safetensors").claims()["a"]
    assert (claim.dialect, claim.block_size) == ("sdnq", (1, 8))


def test_each_shard_marks_its_own_layers(tmp_path):
    """The table of one shard does not take the place of another's."""
    for name in ("a", "b"):
        tensors = {
            f"{name}.weight": torch.ones(8, 8).to(FP8),
            f"{name}.weight_scale": torch.ones(8),
        }
        table = {"layers": {name: {"format": ROWWISE}}}
        said = {"_quantization_metadata": json.dumps(table)}
        save_file(tensors, tmp_path / f"{name}.safetensors", said)
    claims = hijack.identify(sorted(tmp_path.iterdir())).claims()
    assert {claim.dialect for claim in claims.values()} == {"comfy_quant"}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_a_marker_of_either_kind_of_bytes_is_read(dtype):
    """JSON may hold letters whose bytes are negative as int8."""
    text = '{"format": "float8_e4m3fn", "by": "\u00e9"}'.encode()
    tensors = {
        "a.weight": torch.ones(4, 4).to(FP8),
        "a.weight_scale": torch.tensor(1.0),
        "a.comfy_quant": torch.tensor(list(text), dtype=torch.uint8).view(dtype),
    }
    found = identify(hijack.Header.from_state_dict(tensors))
    assert found.claims()["a"].dialect == "comfy_quant"


@pytest.mark.parametrize("name", NAMED)
def test_a_format_without_a_scheme_is_named(name):
    """The file is not clear, and every scale is consumed."""
    tensors, metadata, expected = NAMED[name]
    found = identify(header_of(tensors, metadata))
    assert {la: one.format for la, one in found.unsupported.items()} == {"a": expected}
    assert (found.layers, found.unconsumed, found.clear) == ({}, (), False)


def test_a_tensor_without_a_name_is_nobody_s_block_size(tmp_path):
    """A key may be empty; it is not that of a tensor which a layer lacks."""
    model = nn.Sequential(nn.Linear(64, 16, bias=False))
    hijack.wrap_model(model, "blockwise_fp8", block_size=16)
    hijack.save(model, tmp_path / "a.safetensors", "hijack")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = {**load_file(tmp_path / "a.safetensors"), "": torch.ones(16)}
    save_file(tensors, tmp_path / "b.safetensors", metadata)
    claim = hijack.identify(tmp_path / "b.safetensors").claims()["0"]
    assert claim.block_size == (1, 16)


def test_a_weight_that_is_marked_as_rotated_is_not_read():
    """The other words of such a marker are those of a weight that is not."""
    said = {"a.comfy_quant": {"format": ROWWISE, "convrot": True}}
    found = identify(header_of({**layer_of(("F32", 256)), **MARK}, markers=said))
    assert found.unsupported["a"].format == "comfy_quant of another kind"
    assert not found.layers


def test_integers_without_a_scale_are_no_plain_cast():
    """FP8 may be one; integers are codes of something."""
    assert identify(header_of({"a.weight": ("F8_E4M3", 8, 8)})).clear
    assert not identify(header_of({"a.weight": ("I8", 8, 8)})).clear


@pytest.mark.parametrize("extra", NEEDED)
@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "scale_weight"])
def test_what_a_weight_cannot_be_read_without_is_unconsumed(extra, scale):
    """A claim that knows nothing of such a tensor would decode to another weight."""
    tensors = {**layer_of(("F32",), name=scale), f"a.{extra}": ("F32", 256)}
    found = identify(header_of(tensors))
    assert found.unconsumed == (f"a.{extra}",)
    assert not found.clear


@pytest.mark.parametrize("extra", ["output_scale", "k_scale"])
def test_a_scale_of_outputs_says_nothing_of_the_weight(extra):
    """Attention's scales may lie beside the weights of its projections."""
    found = identify(header_of({**layer_of(("F32",)), f"a.{extra}": ("F32",)}))
    assert found.clear


def test_a_smoothed_weight_is_not_loaded():
    """Its inputs must be multiplied too, which no dialect does."""
    tensors = {
        "a.weight": torch.ones(4, 4).to(FP8),
        "a.weight_scale": torch.tensor(1.0),
        "a.pre_quant_scale": torch.ones(4),
    }
    model = torch.nn.Module()
    model.a = torch.nn.Linear(4, 4, bias=False)
    with pytest.raises(UnconsumedScaleError, match=r"no scheme reads a\.pre_quant"):
        hijack.load(model, tensors)


#: Guesses: tensors, and what each assumption gives.
GUESSED = {
    "ragged rows": (
        layer_of(("F32", 2, 2), shape=(192, 256), name="weight_scale_inv"),
        {"128x128": ("deepseek", (128, 128)), "96x128": ("deepseek", (96, 128))},
    ),
    "powers in either order": (
        layer_of(("U8", 128, 4), shape=(128, 128)),
        {"mxfp8": ("mxfp8", (1, 32)), "comfy_quant": ("comfy_quant", (1, 32))},
    ),
    "columns, or rows lying down": (
        layer_of(("F32", 1, 256)),
        {"256x1": ("hijack", (256, 1))},
    ),
    "columns, or rows lying down, where a marker says rows": (
        {**layer_of(("F32", 1, 256)), **MARK},
        {"256x1": ("comfy_quant", (256, 1))},
    ),
    "blocks without a size, and no squares if they divide": (
        {**layer_of(("F32", 2, 2), shape=(192, 256)), **MARK},
        {"128x128": ("comfy_quant", (128, 128)), "96x128": ("comfy_quant", (96, 128))},
    ),
    "rows that may be rotated": (
        layer_of(("F32", 256, 1), name="scale"),
        {"deepseek": ("deepseek", (1, 256)), "sdnq": ("sdnq", (1, 256))},
    ),
    "rows lying down that may be rotated": (
        layer_of(("F32", 1, 256), name="scale"),
        {"sdnq": ("sdnq", (1, 256))},
    ),
    "groups that may be rotated": (
        layer_of(("F32", 64, 4, 1), shape=(64, 4, 16), name="scale"),
        {"sdnq": ("sdnq", (1, 16))},
    ),
    "one scale of a weight that may be rotated": (
        layer_of(("F32", 1, 1), name="scale"),
        {"deepseek": ("deepseek", (256, 256)), "sdnq": ("sdnq", (256, 256))},
    ),
}


@pytest.mark.parametrize("name", GUESSED)
def test_a_guess_is_taken_only_if_it_is_assumed(name):
    """Without a word the file is refused; each word gives its own reading."""
    tensors, choices = GUESSED[name]
    header = header_of(tensors, markers={"a.comfy_quant": {"format": ROWWISE}})
    with pytest.raises(AmbiguousError, match="the format is ambiguous"):
        identify(header).claims()
    for word, expected in choices.items():
        claim = identify(header, assume=[word]).claims()["a"]
        assert (claim.dialect, claim.block_size) == expected


def test_the_likeliest_guess_is_the_one_suggested():
    """Blocks of a power of two, for a user who takes the hint as it stands."""
    tensors = layer_of(("F32", 2, 2), shape=(200, 256), name="weight_scale_inv")
    with pytest.raises(AmbiguousError, match=r"--assume 128x128`"):
        identify(header_of(tensors)).claims()


def test_the_hint_as_it_stands_is_enough():
    """Also where readings differ in dialect and in blocks."""
    tensors = layer_of(("F32", 2, 2), shape=(200, 256))
    claims = [
        dataclasses.replace(claim, dialect=dialect)
        for claim in identify(header_of(tensors)).ambiguous["a"]
        for dialect in ("one", "two")
    ]
    found = hijack.Identification("x", 2, {}, {"a": tuple(claims)})
    with pytest.raises(AmbiguousError, match="--assume one --assume 128x128`"):
        found.claims()


def test_a_config_of_another_strategy_leaves_blocks_alone_to_choose():
    """hijack's own dialect would read the same, under another name."""
    tensors = layer_of(("F32", 2, 2), shape=(192, 256))
    header = header_of(tensors, config=group_of(strategy="channel"))
    claim = identify(header, assume=["128x128"]).claims()["a"]
    assert (claim.dialect, claim.block_size) == ("compressed_tensors", (128, 128))


def test_groups_of_a_config_that_give_the_same_scales_are_a_choice():
    """Which layers a group is of need not be in the names of a file."""
    tensors = layer_of(("F32", 2, 2), shape=(192, 192))
    blocks = {"type": "float", "num_bits": 8, "strategy": "block"}
    groups = {
        str(size): {"weights": {**blocks, "block_structure": [size, size]}}
        for size in (128, 112)
    }
    config = quantization(quant_method="compressed-tensors", config_groups=groups)
    header = header_of(tensors, config=config)
    assert "a" in identify(header).ambiguous
    for size in (128, 112):
        claim = identify(header, assume=[f"{size}x{size}"]).claims()["a"]
        assert claim.block_size == (size, size)


def test_an_unconsumed_scale_is_shown_beside_its_weight():
    """So that a user sees what does not fit; it is no layer without a scale."""
    text = identify(header_of(layer_of(("F32", 3, 3, 3)))).as_table()
    assert "F32 [3, 3, 3] beside a weight F8_E4M3 [256, 256]" in text
    assert "without a scale" not in text


#: Marks that the shapes prove wrong, and how the layer is read.
WRONG = {
    "blocks that are rows": (
        {**layer_of(("F32", 192), shape=(192, 100)), **MARK},
        {"markers": {"a.comfy_quant": {"format": "float8_e4m3fn_blockwise"}}},
        (1, 100),
    ),
    "E4M3 that is E5M2": (
        {**layer_of(("F32",), dtype="F8_E5M2"), **MARK},
        {"markers": {"a.comfy_quant": {"format": "float8_e4m3fn"}}},
        (256, 256),
    ),
    "DeepSeek's blocks of another size": (
        layer_of(("F32", 4, 4), name="weight_scale_inv"),
        {"config": FINE},
        (64, 64),
    ),
    "a group of other blocks": (
        layer_of(("F32", 4, 4)),
        {"config": group_of(strategy="block", block_structure=[128, 128])},
        (64, 64),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mark_that_the_shapes_prove_wrong_is_not_believed(name):
    """The layer is read by its shapes."""
    tensors, said, size = WRONG[name]
    claim = identify(header_of(tensors, **said)).claims()["a"]
    assert claim.block_size == size


# -- conversion ------------------------------------------------------------------------


def convert(folder, tensors, dialect, metadata=None, **options):
    """A file of these tensors in another dialect: its tensors and metadata."""
    save_file(tensors, folder / "in.safetensors", metadata)
    hijack.convert_file(
        folder / "in.safetensors", folder / "out.safetensors", dialect, **options
    )
    with safe_open(folder / "out.safetensors", "pt") as file:
        said = file.metadata() or {}
    return load_file(folder / "out.safetensors"), said


def entry(**said):
    """A layer's marker as a tensor."""
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def musubi(layer="a", n=64, k=128):
    """A layer in blocks of 1 x 64, all of one scale."""
    codes = torch.arange(n * k).reshape(n, k).remainder(7).float().to(FP8)
    return {
        f"{layer}.weight": codes,
        f"{layer}.scale_weight": torch.full((n, k // 64, 1), 0.5),
    }


@pytest.mark.parametrize("dialect", ["deepseek", "hijack", "comfy_quant", "torchao"])
def test_marks_that_nobody_believed_do_not_outlive_a_conversion(tmp_path, dialect):
    """A musubi layer somebody marked for ComfyUI is marked as what it is now, alone."""
    marked = {**musubi(), "a.comfy_quant": entry(format="float8_e4m3fn_blockwise")}
    table = {"format_version": "1.0", "layers": {"a": {"format": "float8_e5m2"}}}
    metadata = {
        "_quantization_metadata": json.dumps(table),
        "quantization_config": json.dumps({"quant_method": "sdnq"}),
        "kept": "yes",
    }
    made, said = convert(tmp_path, marked, dialect, metadata)
    assert said["kept"] == "yes"
    assert "float8_e5m2" not in said.get("_quantization_metadata", "")
    assert "sdnq" not in said.get("quantization_config", "")
    assert ("a.comfy_quant" in made) == (dialect == "comfy_quant")
    claim = identify(tmp_path / "out.safetensors").claims()["a"]
    assert (claim.dialect, claim.contradiction) == (dialect, "")


def test_the_marks_of_layers_that_are_carried_along_stay(tmp_path):
    """ComfyUI's table names them and the layers that are converted."""
    table = {"format_version": "1.0", "layers": {"b": {"format": "awq_w4a16"}}}
    tensors = {
        **musubi(),
        "b.weight": torch.ones(4, 4, dtype=torch.int8),
        "b.weight_scale": torch.tensor(1.0),
    }
    metadata = {"_quantization_metadata": json.dumps(table)}
    _, said = convert(tmp_path, tensors, "comfy_quant", metadata)
    layers = json.loads(said["_quantization_metadata"])["layers"]
    assert layers["b"] == {"format": "awq_w4a16"}
    assert layers["a"] == {"format": "float8_e4m3fn"}


def quanto():
    """A layer as quanto writes it, with its two scales of activations."""
    return {
        "a.weight._data": torch.ones(4, 8).to(FP8),
        "a.weight._scale": torch.full((4, 1), 0.5),
        "a.input_scale": torch.tensor(1.0),
        "a.output_scale": torch.tensor(2.0),
    }


def test_a_scale_of_outputs_is_not_written_as_one_of_inputs(tmp_path):
    """ComfyUI has a place for one of them; for the other only if it may be dropped."""
    with pytest.raises(
        CheckpointError, match=r"a\.output_scale: is an activation scale"
    ):
        convert(tmp_path, quanto(), "comfy_quant")
    made, _ = convert(tmp_path, quanto(), "comfy_quant", drop_input_scales=True)
    assert made["a.input_scale"].item() == 1.0
    assert "a.output_scale" not in made


def test_dense_layers_do_not_hide_quantized_ones_of_like_names(tmp_path):
    """transformers takes a name for every end of a longer one, and all below it."""
    dense = {"a.weight": torch.ones(4), "up.weight": torch.ones(4), "n.weight": None}
    dense["n.weight"] = torch.ones(4)
    _, said = convert(
        tmp_path, {**musubi("x.up"), **musubi("a.b"), **dense}, "deepseek"
    )
    names = json.loads(said["quantization_config"])["modules_to_not_convert"]
    assert sorted(names) == ["^a$", "^up$", "n"]
    for name in names:
        for layer in ("x.up", "a.b"):
            assert not re.match(rf"(?:{name})(?=\.|$)", layer)
            assert not layer.endswith(name)


def test_the_header_says_of_a_padded_weight_what_its_marker_says(tmp_path):
    """ComfyUI replaces the marker by the header's entry; the shape is in both."""
    weight = torch.ones(24, 40, dtype=torch.bfloat16)
    save_file({"a.weight": weight}, tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    hijack.quantize_file(
        tmp_path / "in.safetensors", out, dialect="comfy_quant", block_size="1x32",
        scale_dtype=torch.float8_e8m0fnu,
    )  # fmt: skip
    with safe_open(out, "pt") as file:
        table = json.loads(file.metadata()["_quantization_metadata"])["layers"]
        marker = json.loads(bytes(file.get_tensor("a.comfy_quant").tolist()))
    assert table["a"] == marker
    assert marker["orig_shape"] == [24, 40]


@pytest.mark.parametrize("biased", [False, True])
def test_the_marker_tells_the_true_shape_of_a_padded_weight(tmp_path, biased):
    """Where there is no bias to tell it, nothing else does."""
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    tensors = {"a.weight": torch.randn(24, 40).bfloat16()}
    if biased:
        tensors["a.bias"] = torch.zeros(24)
    save_file(tensors, source)
    options = {"block_size": "1x32", "scale_dtype": torch.float8_e8m0fnu}
    hijack.quantize_file(source, out, dialect="comfy_quant", **options)
    assert hijack.identify(out).layers["a"].shape == (24, 40)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(40, 24, bias=biased)})
    hijack.load(model, out)
    assert model["a"].weight.shape == (24, 40)


@pytest.mark.parametrize("dialect", ["deepseek", "compressed_tensors"])
def test_hijacks_own_marker_outranks_a_config_in_the_folder(tmp_path, dialect):
    """The config describes the file that was converted from."""
    folder = tmp_path / "coded"
    folder.mkdir()
    dense, coded = tmp_path / "dense.safetensors", folder / "coded.safetensors"
    save_file({"0.weight": torch.randn(130, 70)}, dense)
    options = {"block_size": "128x128", "dialect": dialect}
    hijack.quantize_file(dense, coded, write_config=True, **options)
    hijack.convert_file(coded, folder / "own.safetensors", "hijack")
    weights = []
    for name in ("coded", "own"):
        assert identify(folder / f"{name}.safetensors").clear
        model = torch.nn.Sequential(torch.nn.Linear(70, 130, bias=False))
        hijack.load(model, folder / f"{name}.safetensors")
        weights.append(model[0].weight.dense(torch.float32))
    assert torch.equal(*weights)


@pytest.mark.parametrize("original", [[70, 64], [40, 32], [24, 40, 1], [0, 40]])
def test_a_true_shape_that_the_stored_one_does_not_pad_is_not_believed(original):
    """Sides are padded to the next multiple of 32, and no further."""
    stored = {"a.weight": ("F8_E4M3", 64, 64), "a.weight_scale": ("U8", 128, 4)}
    marker = {"format": "mxfp8", "orig_shape": original}
    (claim,) = identify(
        header_of({**stored, **MARK}, markers={"a.comfy_quant": marker})
    ).layers.values()
    assert claim.shape is None


def test_two_rows_are_rows_already():
    """The smallest weight for which a scale per row is not the scale of all."""
    rows = layer_of(("F32", 2), shape=(2, 256), name="scale_weight")
    claim = identify(header_of(rows)).layers["a"]
    assert (claim.dialect, claim.block_size) == ("scaled_fp8", (1, 256))
    single = layer_of(("F32", 1, 1), shape=(2, 64), name="scale")
    config = quantization(quant_method="sdnq", use_quantized_matmul=True)
    assert not identify(header_of(single, config=config)).layers  # maybe transposed
