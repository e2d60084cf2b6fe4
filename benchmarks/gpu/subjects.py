"""What is checked and timed on a GPU: layers of every scheme, and a small model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hijack
import schemes

#: Title to a scheme and its options.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8 1x64": ("blockwise_fp8", {"block_size": (1, 64)}),
    "fp8 128x128": ("blockwise_fp8", {"block_size": (128, 128)}),
    "int8 row": ("int8", {"block_size": "row"}),
    "int8 row W8A8": ("int8", {"block_size": "row", "quantized_inputs": True}),
    "int8 row ConvRot": ("int8", {"block_size": "row", "rotation": 256}),
    "nvfp4": ("nvfp4", {}),
    "mxfp4": ("mxfp4", {}),
    "nf4": ("nf4", {}),
}


def make_layer(title: str, n: int, k: int, device: str, bias: bool = True) -> nn.Module:
    """A quantized Linear (N, K) in bfloat16."""
    schemes.register_all()
    scheme, options = LAYERS[title]
    layer = nn.Linear(k, n, bias, dtype=torch.bfloat16, device=device)
    layer.requires_grad_(False)
    return hijack.wrap_module(layer, scheme, **options)


class Block(nn.Module):
    """A block of Qwen-Image: image and text, each modulated, one attention.

    Args:
        width: of tokens, a multiple of 128.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 128
        for part in ("img", "txt"):
            self.add_module(f"{part}_mod", nn.Linear(width, 6 * width))
            for name in ("q", "k", "v", "out"):
                self.add_module(f"{part}_{name}", nn.Linear(width, width))
            self.add_module(f"{part}_up", nn.Linear(width, 4 * width))
            self.add_module(f"{part}_down", nn.Linear(4 * width, width))

    def part(self, name: str, x: Tensor) -> Tensor:
        """One of the Linears."""
        result: Tensor = self.get_submodule(name)(x)
        return result

    def forward(self, img: Tensor, txt: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """(T, C) image tokens, (S, C) text tokens and (1, C) time to the first two."""
        streams = {"img": img, "txt": txt}
        mods = {p: self.part(f"{p}_mod", F.silu(time)).chunk(6, -1) for p in streams}
        normal = {p: _modulated(x, *mods[p][:2]) for p, x in streams.items()}
        q, k, v = (
            torch.cat([self.part(f"{p}_{name}", normal[p]) for p in streams])
            .unflatten(-1, (self.heads, -1))
            .transpose(0, 1)
            for name in "qkv"
        )
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        parts = mixed.transpose(0, 1).flatten(1).split([len(img), len(txt)])
        for p, attended in zip(streams, parts, strict=True):
            x = streams[p] + mods[p][2] * self.part(f"{p}_out", attended)
            inner = self.part(f"{p}_up", _modulated(x, *mods[p][3:5]))
            inner = F.gelu(inner, approximate="tanh")
            streams[p] = x + mods[p][5] * self.part(f"{p}_down", inner)
        return streams["img"], streams["txt"]


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class Model(nn.Module):
    """Some blocks.

    Args:
        width: of tokens.
        layers: how many.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, img: Tensor, txt: Tensor, time: Tensor) -> Tensor:
        """(T, C) image tokens after all blocks."""
        for block in self.blocks:
            img, txt = block(img, txt, time)
        return img
