"""Other programs that hijack is measured beside; none of them is in this repository."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch.nn.functional as F
from torch import Tensor, nn

MUSUBI = "HIJACK_PEER_MUSUBI"
COMFYUI_MUSUBI = "HIJACK_PEER_COMFYUI_MUSUBI"
Run = Callable[[Tensor], Tensor]


# -- musubi-tuner ----------------------------------------------------------------------


def no_musubi() -> str | None:
    """Why musubi-tuner cannot be measured, or None."""
    root = os.environ.get(MUSUBI)
    if not root:
        return f"no musubi-tuner; set {MUSUBI} to a checkout"
    return None if _source(root).is_dir() else f"{MUSUBI}: {root} is no checkout of it"


def musubi(variable: str = MUSUBI) -> ModuleType | None:
    """musubi-tuner's FP8 module, or None if there is no checkout.

    Progress bars are stood in for: they are not what is measured. So is NumPy where it
    is not installed; only the reader of files needs it.

    Args:
        variable: the environment variable that holds the path of a checkout.
    """
    root = os.environ.get(variable)
    if not root:
        return None
    if not _source(root).is_dir():
        raise SystemExit(f"{variable}: {root} is no checkout of musubi-tuner")
    progress: Any = types.ModuleType("tqdm")
    progress.tqdm = lambda iterable, **_: iterable
    stand_ins = {"tqdm": progress}
    if importlib.util.find_spec("numpy") is None:
        stand_ins["numpy"] = types.ModuleType("numpy")
    before = {name for name in sys.modules if name.startswith("musubi_tuner")}
    with mock.patch.dict(sys.modules, stand_ins):
        sys.path.insert(0, str(_source(root)))
        try:
            for name in before:  # another checkout
                del sys.modules[name]
            return importlib.import_module(
                "musubi_tuner.modules.fp8_optimization_utils"
            )
        finally:
            sys.path.pop(0)


def _source(root: str) -> Path:
    return Path(root) / "src"


def musubi_forward(linear: Any) -> Run | None:
    """musubi-tuner's own forward on the codes and scales of an FP8 layer.

    Args:
        linear: with a weight of `blockwise_fp8`, in blocks of one row.

    Returns:
        A function of the input, or None where musubi-tuner is not there or has no such
        blocks.
    """
    peer = musubi()
    scale = linear.weight_scale  # (N, K/C)
    if peer is None or scale.shape[0] != linear.weight.shape[0]:
        return None
    layer = SimpleNamespace(
        weight=linear.weight.qdata, scale_weight=scale[:, :, None], bias=None
    )
    run: Run = lambda x: peer.fp8_linear_forward_patch(layer, x)  # noqa: E731
    return run


# -- what PyTorch does itself ----------------------------------------------------------


def naive_forward(linear: Any, size: tuple[int, int]) -> Run:
    """Cast, multiply, product: what anybody would write.

    Args:
        linear: with a weight of `blockwise_fp8` whose blocks divide it.
        size: (R, C), the block size.
    """
    codes, scale = linear.weight.qdata, linear.weight_scale
    rows, cols = size

    def run(x: Tensor) -> Tensor:
        blocks = codes.to(x.dtype).unflatten(1, (-1, cols)).unflatten(0, (-1, rows))
        weight = blocks * scale.to(x.dtype)[:, None, :, None]
        return F.linear(x, weight.flatten(2).flatten(0, 1))

    return run


# -- formats of other libraries --------------------------------------------------------


def torchao(weight: Tensor, form: str) -> Run:
    """torchao's weight-only ``Int8WeightOnlyConfig`` or ``Float8WeightOnlyConfig``."""
    from torchao import quantization

    name = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}[form]
    model = nn.Sequential(_dense(weight))
    quantization.quantize_(model, getattr(quantization, name)())
    return _forward(model)


def bitsandbytes(weight: Tensor, form: str) -> Run:
    """bitsandbytes' ``Linear4bit`` of NF4, or ``Linear8bitLt``."""
    from bitsandbytes import nn as quantized

    n, k = weight.shape
    if form == "int8":
        layer = quantized.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
        layer.weight = quantized.Int8Params(
            weight.half(), requires_grad=False, has_fp16_weights=False
        )
    else:
        layer = quantized.Linear4bit(
            k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4"
        )
        layer.weight = quantized.Params4bit(
            weight.clone(), requires_grad=False, quant_type="nf4"
        )
    return _forward(layer.to(weight.device))


def comfy_kitchen(weight: Tensor, form: str) -> Run:
    """comfy-kitchen's ``QuantizedTensor`` as the weight of a product."""
    from comfy_kitchen.tensor import QuantizedTensor

    layout, words = {
        "int8": ("TensorWiseINT8Layout", {"per_channel": True}),
        "nvfp4": ("TensorCoreNVFP4Layout", {}),
        "fp8": ("TensorCoreFP8Layout", {}),
    }[form]
    quantized = QuantizedTensor.from_float(weight, layout, **words)
    return lambda x: F.linear(x, quantized)


def sdnq(weight: Tensor, form: str) -> Run:
    """SDNQ's layer, which decodes with its own functions."""
    from sdnq.quantizer import sdnq_post_load_quant

    name = {"int8": "int8", "fp8": "float8_e4m3fn"}[form]
    model = nn.Sequential(_dense(weight))
    quantized = sdnq_post_load_quant(model, weights_dtype=name, group_size=-1)
    return _forward(quantized)


#: Program to its module, its formats and how a layer of it is made.
LIBRARIES: dict[str, tuple[str, tuple[str, ...], Callable[[Tensor, str], Run]]] = {
    "torchao": ("torchao", ("int8", "fp8"), torchao),
    "comfy-kitchen": ("comfy_kitchen", ("int8", "nvfp4", "fp8"), comfy_kitchen),
    "bitsandbytes": ("bitsandbytes", ("int8", "nf4"), bitsandbytes),
    "SDNQ": ("sdnq", ("int8", "fp8"), sdnq),
}


def is_installed(module: str) -> bool:
    """Whether a library can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def _dense(weight: Tensor) -> nn.Linear:
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=False, dtype=weight.dtype, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def _forward(layer: Any) -> Run:
    run: Run = layer.__call__
    return run
