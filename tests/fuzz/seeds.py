"""The files mutations start from: every dialect, as small as it can be."""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save, save_file
from torch import Tensor

import hijack
from hijack.errors import CheckpointError
from hijack.formats.matching import dialects_of
from hijack.safetensors_io.reader import read_header
from tests.fuzz.case import MODEL, Case

GOLDEN = Path(__file__).parent.parent / "golden"
#: Larger golden folders are left out: mutating them costs time and finds no more.
LARGEST = 12_000
F8 = torch.float8_e4m3fn
F32 = torch.float32
FP8_SCHEME = "blockwise_fp8"
#: Dialect to ways to quantize the dense model in it with block-wise FP8.
WRITTEN = {
    "musubi": [{}, {"block_size": "tensor"}],
    "comfy_quant": [{"block_size": "tensor"}, {"scale_dtype": torch.float8_e8m0fnu}],
    "deepseek": [{}, {"block_size": 16}],
    "compressed_tensors": [{}, {"block_size": "row"}, {"block_size": "tensor"}],
    "torchao": [{"block_size": "row"}],
    "hijack": [{"block_size": 16}, {"block_size": (8, 24)}],
}
#: Other schemes, to options with which they are written in each of their dialects.
OTHERS = {
    "int8": [{}, {"rotation": 16}, {"block_size": (8, 16)}],
    "nvfp4": [{}],
    "mxfp4": [{}],
    "nf4": [{}, {"double_quant": True}],
    "w4a8": [{"rotation": 16}],
    "convrot_w4a4": [{"rotation": 16}],
}
#: Those whose readers expect a config beside the file.
CONFIGURED = ("deepseek", "compressed_tensors")


def seeds() -> list[Case]:
    """All of them; the same each time."""
    return [*_written(), *_by_hand(), *_loras(), *_golden()]


def dense() -> dict[str, Tensor]:
    """A model of two layers, with a bias and a norm."""
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(16, 64, generator=generator).bfloat16(),
        "a.bias": torch.randn(16, generator=generator).bfloat16(),
        "b.c.weight": torch.randn(8, 32, generator=generator).bfloat16(),
        "norm.weight": torch.ones(8),
    }


def _written() -> Iterator[Case]:
    """What `quantize_file` writes, with its config beside it, and shards."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file(dense(), folder / "dense")
        for number, (scheme, dialect, options) in enumerate(_ways()):
            path = folder / f"{scheme}_{dialect}{number}" / MODEL
            path.parent.mkdir()
            hijack.quantize_file(
                folder / "dense",
                path,
                scheme,
                dialect=dialect,
                exclude=("norm",),
                write_config=scheme == FP8_SCHEME and dialect in CONFIGURED,
                **options,
            )
            yield Case.read(path.parent)
        path = folder / "shards" / MODEL
        path.parent.mkdir()
        hijack.quantize_file(folder / "dense", path, max_shard_size=800)
        yield Case.read(path.parent)


def _ways() -> Iterator[tuple[str, str, dict[str, object]]]:
    """Scheme, dialect and options that can be written."""
    for dialect, ways in WRITTEN.items():
        yield from ((FP8_SCHEME, dialect, options) for options in ways)
    for name, ways in OTHERS.items():
        scheme = hijack.schemes()[name]
        for dialect, options in itertools.product(dialects_of(scheme), ways):
            weights = [dense()[f"{layer}.weight"] for layer in ("a", "b.c")]
            with contextlib.suppress(CheckpointError):  # no place for the options
                for weight in weights if dialect.writes else ():
                    fit = dialect.fit_options(tuple(weight.shape), options)
                    if scheme.declines(tuple(weight.shape), **fit) is None:
                        dialect.encode(*scheme.quantize(weight, **fit), fit)
                if dialect.writes:
                    yield name, dialect.name, options


def _by_hand() -> Iterator[Case]:
    """Dialects that are only read, and markers that are wrong."""
    codes = {"a.weight": _codes(8, 32), "b.weight": _codes(8, 16)}
    one, rows = torch.tensor(0.5), torch.full((8, 1), 0.25)
    scaled = {"scaled_fp8": torch.empty(2, dtype=F8)}
    scaled |= {f"{layer}.scale_weight": one.clone() for layer in "ab"}
    yield _case("scaled_fp8", {**codes, **scaled, "a.scale_input": one})
    yield _case("kijai", {**codes, "a.scale_weight": rows, "b.scale_weight": one})
    marked = _marker({"format": "float8_e4m3fn"})
    plain = {"a.weight_scale": one, "a.comfy_quant": marked, "b.weight_scale": one}
    yield _case("comfy_marked", {**codes, **plain, "b.comfy_quant": marked})
    wrong = {"b.weight_scale": torch.ones(8), "b.comfy_quant": _marker([1])}
    for text in ("float8_e5m2", "mxfp8", "nvfp4", "float8_e4m3fn_blockwise", 7):
        table = {"format": text, "params": {"group_size": 32}, "full_precision": None}
        marker = {"a.weight_scale": one, "a.comfy_quant": _marker(table)}
        yield _case(f"comfy_wrong_{text}", {**codes, **marker, **wrong})
    table = {"layers": {"a": {"format": "float8_e4m3fn"}, "b": {"format": "mxfp8"}}}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", **table})}
    powers = torch.full((8, 1), 127, dtype=torch.uint8)
    mixed = {"a.weight_scale": one, "b.weight_scale": powers}
    yield _case("comfy_header", {**codes, **mixed}, header)
    yield _case("mxfp8_plain", {"a.weight": _codes(8, 32), "a.weight_scale": powers})
    yield _case("bare", codes)
    parts = {"weight._data": _codes(8, 16), "weight._scale": rows}
    quanto = {f"a.{name}": tensor for name, tensor in parts.items()}
    scales = {"a.input_scale": one, "a.output_scale": one.clone()}
    yield _case("quanto", {**quanto, **scales})
    marker = {"fp8r": "1", "format": "pt"}
    fp8r = {"a.weight": _codes(8, 32), "a.weight_scale": rows, "a.weight.scale": rows}
    yield _case("fp8r", fp8r, marker)
    root = {"weight": _codes(8, 8), "weight_scale": one, "bias": torch.ones(8)}
    yield _case("root", root)
    yield _case("hijack_legacy", {"weight": _codes(8, 8), "scale_weight": one})


def _codes(n: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(n * k)
    return torch.randn(n, k, generator=generator).to(F8)


def _marker(value: object) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _case(
    name: str,
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
    kind: str = "model",
) -> Case:
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    return Case(name, {MODEL: save(tensors, metadata)}, kind=kind)


def _loras() -> Iterator[Case]:
    """One of each kind, for the dense model."""
    one = torch.tensor(1.0)
    down, up = torch.ones(2, 64), torch.ones(16, 2)
    lora = {"lora_unet_a.lora_down.weight": down, "lora_unet_a.lora_up.weight": up}
    yield _lora("kohya", {**lora, "lora_unet_a.alpha": one})
    peft = {"b.c.lora_A.weight": torch.ones(2, 32)}
    peft |= {"b.c.lora_B.weight": torch.ones(8, 2), "a.lora_A.weight": down}
    said = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"a": 2}}
    metadata = {"lora_adapter_metadata": json.dumps(said)}
    peft = {f"transformer.{key}": tensor for key, tensor in peft.items()}
    yield _lora("peft", {**peft, "transformer.a.lora_B.weight": up}, metadata)
    yield _lora("dora", {**lora, "lora_unet_a.dora_scale": torch.ones(16, 1)})
    parts = {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up, "hada_w2_b": down}
    loha = {f"lycoris_a.{name}": part for name, part in parts.items()}
    yield _lora("loha", {**loha, "lycoris_a.alpha": one})
    lokr = {"a.lokr_w1": torch.ones(4, 4), "a.lokr_w2_a": torch.ones(4, 2)}
    yield _lora("lokr", {**lokr, "a.lokr_w2_b": torch.ones(2, 16), "a.alpha": one})
    yield _lora("diff", {"a.diff": torch.ones(16, 64), "a.diff_b": torch.ones(16)})
    mid = {"lora_unet_a.lora_mid.weight": torch.ones(2, 2)}
    yield _lora("mid", {**lora, **mid})


def _lora(
    name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> Case:
    return _case(f"lora_{name}", tensors, metadata, "lora")


def _golden() -> Iterator[Case]:
    """The golden folders that are small, and whole."""
    for expected in sorted(GOLDEN.glob("*/expected.json")):
        case = Case.read(expected.parent)
        for name in ("expected.json", "dense.safetensors"):
            case.files.pop(name, None)
        if case.main in case.files and case.size <= LARGEST:
            with tempfile.TemporaryDirectory() as folder:
                read_header(case.write(Path(folder)))
            yield case
