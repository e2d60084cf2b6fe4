"""Golden files of optimum-quanto: state dicts of frozen models."""

from __future__ import annotations

import importlib.metadata

import torch
from _folder import randn, said, write
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
    for name, (n, k) in {"q": (24, 40), "out": (16, 32)}.items():
        linear = torch.nn.Linear(k, n, bias=name == "q", dtype=dtype)
        linear.weight.data = randn(n, k, dtype=dtype)
        if linear.bias is not None:
            linear.bias.data = randn(n, dtype=dtype)
        model.add_module(name, linear)
    quantize(model, weights=weights)
    freeze(model)
    dense = {
        name: model.get_submodule(name).weight.dequantize() for name in ("q", "out")
    }
    return {key: t.detach() for key, t in model.state_dict().items()}, dense


def main():
    """Write all folders."""
    for name, kind, dtype in (
        ("quanto", qfloat8, torch.bfloat16),
        ("quanto_e5m2", qfloat8_e5m2, torch.float32),
    ):
        tensors, dense = frozen(kind, dtype)
        write(
            name,
            tensors,
            program=PROGRAM,
            about=f"{kind.name} of a model of {dtype}",
            dense=dense,
            layers=said("quanto", q=(1, 40), out=(1, 32)),
        )
    for kind in (qint8, qint4, qfloat8_e4m3fnuz):
        tensors, _ = frozen(kind, torch.float32)
        write(
            f"foreign_quanto_{kind.name.removeprefix('q')}",
            tensors,
            program=PROGRAM,
            about=kind.name,
            foreign={"q": "quanto", "out": "quanto"},
        )


if __name__ == "__main__":
    main()
