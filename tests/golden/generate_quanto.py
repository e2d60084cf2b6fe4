"""Golden files of optimum-quanto: state dicts of frozen models."""

from __future__ import annotations

import importlib.metadata

import torch
from _folder import randn, said_by, write
from optimum.quanto import (
    freeze,
    qfloat8,
    qfloat8_e4m3fnuz,
    qfloat8_e5m2,
    qint4,
    qint8,
    quantize,
)

PROGRAM = f"optimum-quanto {importlib.metadata.version('optimum-quanto')}"


def frozen(weights, dtype):
    """State dict and dense weights of a model quantized with ``weights``."""
    model = torch.nn.Module()
    model.q = torch.nn.Linear(40, 24, dtype=dtype)
    model.out = torch.nn.Linear(32, 16, bias=False, dtype=dtype)
    model.conv = torch.nn.Conv2d(2, 8, 3, bias=False, dtype=dtype)
    for parameter in model.parameters():
        parameter.data = randn(*parameter.shape, dtype=dtype)
    quantize(model, weights=weights)
    freeze(model)
    parts = dict(model.named_children())
    dense = {name: part.weight.dequantize() for name, part in parts.items()}
    return {key: t.detach() for key, t in model.state_dict().items()}, dense


def main():
    """Write all folders."""
    for name, kind, dtype in (
        ("quanto", qfloat8, torch.bfloat16),
        ("quanto_e5m2", qfloat8_e5m2, torch.float32),
        ("quanto_int8", qint8, torch.bfloat16),
    ):
        tensors, dense = frozen(kind, dtype)
        write(
            name,
            tensors,
            program=PROGRAM,
            about=f"{kind.name} of a model of {dtype}",
            dense=dense,
            layers=said_by(
                "int8" if kind is qint8 else "blockwise_fp8",
                "quanto",
                q=(1, 40),
                out=(1, 32),
                conv=(1, 18),
            ),
        )
    for kind in (qint4, qfloat8_e4m3fnuz):
        tensors, _ = frozen(kind, torch.float32)
        write(
            f"foreign_quanto_{kind.name.removeprefix('q')}",
            tensors,
            program=PROGRAM,
            about=kind.name,
            foreign=dict.fromkeys(("q", "out", "conv"), "quanto"),
        )


if __name__ == "__main__":
    main()
