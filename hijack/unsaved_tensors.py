"""Tensors that no checkpoint holds, such as tables of positions, on the meta device.

A model that is built on meta has them there too, and nothing loads them. A module
computes them when it is constructed. So it is constructed again, where all arguments of
its constructor can be read off it, as attributes of the same names; and what it then is
must be what it was, so that arguments that mean something else are found out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hijack.safetensors_io.header import join

#: Arguments of constructors that change no numbers that are computed in float32.
_ANYWHERE = {"device"}


def unsaved_on_meta(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The tensors on meta that are in no state dict.

    Args:
        model: any module.

    Yields:
        The name of each, its module, and what it is called there.
    """
    for name, module in model.named_modules():
        unsaved = module._non_persistent_buffers_set
        held = {key: module._buffers.get(key) for key in unsaved} | vars(module)
        for key, value in held.items():
            if isinstance(value, Tensor) and value.is_meta:
                yield join(name, key), module, key


def recompute_unsaved(
    module: nn.Module, device: torch.device | None = None
) -> dict[str, Tensor] | None:
    """What a module's constructor computes, by what the module calls it.

    Args:
        module: with tensors on meta that are in no state dict, and no others.
        device: where the result shall be; None is the CPU.

    Returns:
        All its tensors that are in no state dict; None if they cannot be known.
    """
    if any(True for _ in module.children()) or any(True for _ in module.parameters()):
        return None
    arguments = _arguments(module)
    if arguments is None:
        return None
    fresh = type(module).__new__(type(module))
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            fresh.__init__(**arguments)  # type: ignore[misc]
    except Exception:
        return None
    mine, theirs = _tensors(module), _tensors(fresh)
    if mine.keys() != theirs.keys() or not _is_alike(module, fresh):
        return None
    if any(
        (mine[k].shape, mine[k].dtype) != (t.shape, t.dtype) for k, t in theirs.items()
    ):
        return None
    return {key: tensor.to(device or "cpu") for key, tensor in theirs.items()}


def _arguments(module: nn.Module) -> dict[str, Any] | None:
    """The arguments that a module was constructed with, if it has kept them all."""
    arguments = {}
    try:
        parameters = inspect.signature(type(module)).parameters.values()
    except (TypeError, ValueError):
        return None
    for parameter in parameters:
        if parameter.name in _ANYWHERE and parameter.default is not parameter.empty:
            continue
        named = parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if not named or parameter.name not in vars(module):
            return None
        arguments[parameter.name] = vars(module)[parameter.name]
    return arguments


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    held = {**vars(module), **module._buffers}
    return {key: t for key, t in held.items() if isinstance(t, Tensor)}


def _is_alike(module: nn.Module, fresh: nn.Module) -> bool:
    """Whether a module still has what its constructor has set, but for tensors.

    Others may have set more on it since.
    """
    mine, theirs = _plain_attributes(module), _plain_attributes(fresh)
    try:
        return all(key in mine and bool(mine[key] == theirs[key]) for key in theirs)
    except (RuntimeError, ValueError):  # arrays do not compare so
        return False


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    own = vars(nn.Module()).keys()
    return {
        key: value
        for key, value in vars(module).items()
        if key not in own and not isinstance(value, Tensor) and not callable(value)
    } | {"not persistent": module._non_persistent_buffers_set}
