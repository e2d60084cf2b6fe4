"""A stand-in for a program that loads models and has never heard of hijack.

It does what such programs do: read a file, put each tensor into the parameter of its
name, run the model. The demo patches it as `hijack.patch` patches ComfyUI.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from hijack.cli.minilm import Encoder

VERSION = "1.0"


def load_weights(model: nn.Module, path: Path) -> None:
    """Put the tensors of a file into a model; those it lacks are ignored."""
    model.load_state_dict(load_file(path), strict=False)


def embed(path: Path, ids: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings (B, C) by the encoder in a file."""
    encoder = Encoder().requires_grad_(False)
    load_weights(encoder, path)
    vectors: Tensor = encoder(ids, mask)
    return vectors
