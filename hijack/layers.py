"""Quantized tensors in and out of one module: install, replace, restore, load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hijack.errors import (
    DTypeError,
    HijackError,
    NonFiniteError,
    SchemeError,
    ShapeError,
)
from hijack.formats.dialect import native_claim
from hijack.hooks import Layer, Wrapped, bind, dense_weight
from hijack.registry import default_registry
from hijack.safetensors_io.header import Header
from hijack.scheme import Scheme

Quantized = tuple[Tensor, dict[str, Tensor]]

#: Dtypes a dense weight may have.
DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def quantize_weight(
    scheme: Scheme, weight: Tensor, options: Mapping[str, Any], where: str
) -> Quantized:
    """Run ``scheme.quantize`` and check what it got and gave.

    Args:
        scheme: the scheme.
        weight: (N, ...) dense; a meta tensor gives zeroed meta tensors.
        options: the scheme's options.
        where: the layer, for messages.

    Raises:
        HijackError: naming the layer.
    """
    if weight.dtype not in DENSE_DTYPES:
        raise DTypeError(
            f"{where}: weight is {weight.dtype}, expected one of "
            f"{', '.join(str(d) for d in DENSE_DTYPES)}; dequantize it first"
        )
    if not weight.is_meta:
        _check_finite(weight, where)
    try:
        with torch.no_grad():
            if weight.is_meta:
                made = scheme.create_params(
                    tuple(weight.shape), weight.dtype, "meta", **options
                )
            else:
                made = scheme.quantize(weight.detach(), **options)
    except HijackError as error:
        raise type(error)(f"{where}: {error}") from error
    except Exception as error:
        raise SchemeError(
            f"{where}: scheme {scheme.name} cannot quantize a weight of shape "
            f"{tuple(weight.shape)} with options {dict(options)}; "
            f"{type(error).__name__}: {error}"
        ) from error
    return _checked(made, scheme, where)


def install(
    module: nn.Module, layer: Layer, qdata: Tensor, params: dict[str, Tensor]
) -> None:
    """Put quantized tensors into a module and bind its forward.

    Args:
        module: a dense module of class ``layer.base``.
        layer: what to remember of it; ``names`` is set here.
        qdata: the codes.
        params: the scheme's other tensors.

    Raises:
        SchemeError: if a parameter's name is already an attribute of the module.
    """
    for name in params:
        if name == "weight" or hasattr(module, name):
            raise SchemeError(
                f"scheme {layer.scheme.name}: parameter {name!r} is already an "
                f"attribute of {layer.base.__name__}; give it another name in quantize"
            )
    layer.names = tuple(params)
    set_tensors(module, qdata, params)
    module.__dict__["_hijack"] = layer
    bind(module)


def set_tensors(module: nn.Module, qdata: Tensor, params: Mapping[str, Tensor]) -> None:
    """Put quantized tensors in the place of those a module has."""
    codes = qdata if isinstance(qdata, nn.Parameter) else nn.Parameter(qdata, False)
    module._parameters["weight"] = codes
    module._buffers.update(params)


def restore(module: nn.Module, weight: nn.Parameter) -> None:
    """Undo `install`, leaving ``weight`` as the module's weight."""
    layer: Layer = module.__dict__.pop("_hijack")
    for name in layer.names:
        del module._buffers[name]
    module._parameters["weight"] = weight
    module.__class__ = layer.base


def take_tensors(
    module: Wrapped, state_dict: Mapping[str, Tensor], prefix: str, assign: bool
) -> dict[str, Tensor]:
    """Rewrite a state dict so that one wrapped module can load it under its own names.

    Args:
        module: the module; gets room for tensors of another shape or dtype.
        state_dict: full keys; the weight in any dialect of the scheme, dense, or none.
        prefix: the module's prefix, ending with a dot; "" for a root.
        assign: whether the tensors will be taken as they are instead of copied.

    Raises:
        HijackError: if the tensors do not fit the module or each other.
    """
    scheme, where = module._hijack.scheme, prefix[:-1] or "weight"
    header = Header.from_state_dict(state_dict)
    claim = scheme.recognise(header, prefix[:-1])
    if claim is None and all(
        prefix + name in state_dict for name in module._hijack.names
    ):
        claim = native_claim(prefix[:-1], scheme.name, module._hijack.names)
    key = prefix + "weight" if claim is None else claim.keys["weight"]
    weight = state_dict.get(key)
    if weight is None:
        return dict(state_dict)
    dense = weight.dtype in DENSE_DTYPES and weight.dtype != module.weight.dtype
    if claim is None or dense:
        used = {key}
        made = quantize_weight(scheme, weight, module._hijack.options, where)
    else:
        claim = claim.cropped(module._hijack.shape)
        used = set(claim.keys.values())
        answer = default_registry().create_params(module, scheme, prefix, state_dict)
        made = answer or scheme.decode(claim, state_dict)
    check_shape(scheme, made, module._hijack.shape, where)
    if assign or not _fits(module, made):
        device = None if assign else module.weight.device
        module._hijack.names = tuple(made[1])
        _replace(module, made, device)
    rest = {key: value for key, value in state_dict.items() if key not in used}
    native = {"weight": made[0], **made[1]}
    return rest | {prefix + name: tensor for name, tensor in native.items()}


def recreate(module: nn.Module) -> None:
    """Initialise a wrapped module anew, as its class initialises a dense one."""
    layer: Layer = module.__dict__["_hijack"]
    made = default_registry().create_params(module, layer.scheme)
    if made is None:
        blank = torch.empty_like(dense_weight(module), dtype=layer.dtype)
        standin: Any = layer.base.__new__(layer.base)
        standin.__dict__.update(module.__dict__)
        weight = nn.Parameter(blank, layer.requires_grad)
        standin.__dict__["_parameters"] = {**module._parameters, "weight": weight}
        standin.reset_parameters()
        made = quantize_weight(
            layer.scheme, weight.detach(), layer.options, layer.base.__name__
        )
    _replace(module, made, None)


def dense_shape(scheme: Scheme, made: Quantized) -> tuple[int, ...] | None:
    """Shape of the weight that codes decode to; None where only real data tells."""
    qdata, params = made
    try:
        dense = scheme.dequantize(
            qdata.to("meta"),
            {name: t.to("meta") for name, t in params.items()},
            torch.float32,
        )
    except Exception:
        return None
    return tuple(dense.shape)


# -- details ---------------------------------------------------------------------------


def _replace(module: nn.Module, made: Quantized, device: torch.device | None) -> None:
    layer: Layer = module.__dict__["_hijack"]
    qdata, params = made
    for name in layer.names:
        module._buffers.pop(name, None)
    if device is not None:
        qdata = torch.empty_like(qdata, device=device)
        params = {n: torch.empty_like(t, device=device) for n, t in params.items()}
    layer.names = tuple(params)
    set_tensors(module, qdata, params)


def _fits(module: Wrapped, made: Quantized) -> bool:
    mine = {"weight": module.weight, **module._buffers}
    theirs = {"weight": made[0], **made[1]}
    return set(made[1]) == set(module._hijack.names) and all(
        (old := mine[name]) is not None
        and old.shape == new.shape
        and old.dtype == new.dtype
        for name, new in theirs.items()
    )


def _check_finite(weight: Tensor, where: str) -> None:
    # In parts: what torch makes on the way is as large as the weight itself.
    parts = torch.split(weight.detach().reshape(-1), 1 << 20)
    bad = sum(part.numel() - int(torch.isfinite(part).sum()) for part in parts)
    if bad:
        raise NonFiniteError(
            f"{where}: weight holds inf or NaN; got {bad} non-finite "
            f"of {weight.numel()} values, expected none; repair or exclude the layer"
        )


def _checked(made: Any, scheme: Scheme, where: str) -> Quantized:
    """Refuse what is not ``(Tensor, {str: Tensor})``, before it is in a module."""
    good = (
        isinstance(made, tuple)
        and len(made) == 2
        and isinstance(made[0], Tensor)
        and isinstance(made[1], Mapping)
        and all(
            isinstance(name, str) and name.isidentifier() and isinstance(t, Tensor)
            for name, t in made[1].items()
        )
    )
    if not good:
        raise SchemeError(
            f"{where}: scheme {scheme.name}: quantize gave {type(made).__name__}, "
            "expected (tensor, {name: tensor}) with identifiers as names"
        )
    qdata, params = made
    return qdata.detach(), {name: t.detach() for name, t in params.items()}


def check_shape(
    scheme: Scheme, made: Quantized, expected: tuple[int, ...], where: str
) -> None:
    """Refuse codes that decode to a weight of another shape than the module's.

    Raises:
        ShapeError: naming both shapes.
    """
    shape = dense_shape(scheme, made)
    if shape is not None and shape != tuple(expected):
        raise ShapeError(
            f"{where}: {scheme.name} codes decode to a weight of shape {shape}, the "
            f"module expects {tuple(expected)}; is this the right model for the file?"
        )
