"""Tensors that no checkpoint holds, such as tables of positions, on the meta device.

A model that is built on meta has them there too, and nothing loads them. A module
computes them when it is constructed. So it is constructed again, or a module that it is
in, where all arguments of the constructor can be read off it: as attributes of the same
names, or from its ``config``. What a module then is must be what it was, so that
arguments that mean something else are found out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: An argument that changes no numbers.
_ANYWHERE = "device"


def unsaved_on_meta(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The tensors on meta that are in no state dict.

    Args:
        model: any module.

    Yields:
        The name of the module, and what it calls the tensor.
    """
    for name, module in model.named_modules():
        for key, value in _tensors(module).items():
            if value.is_meta:
                yield name, key


def recompute_unsaved(
    model: nn.Module, names: Iterable[str]
) -> dict[str, dict[str, Tensor]]:
    """What the constructors of modules compute that is in no state dict.

    Args:
        model: any module.
        names: of the modules that are asked for.

    Returns:
        Name of a module to its tensors by their names, on the CPU; without modules
        whose tensors cannot be known.
    """
    found: dict[str, dict[str, Tensor]] = {}
    fresh: dict[str, nn.Module | None] = {}
    for name in names:
        module = model.get_submodule(name)
        for owner in _owners(name):
            if owner not in fresh:
                fresh[owner] = _constructed_again(model.get_submodule(owner))
            again = fresh[owner]
            tensors = None if again is None else _same(module, again, name, owner)
            if tensors is not None:
                found[name] = tensors
                break
    return found


# -- details ---------------------------------------------------------------------------


def _owners(name: str) -> Iterator[str]:
    """A module and those it is in, the innermost first."""
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


class _EmptyOnMeta(TorchFunctionMode):
    """Has nothing allocated that is only there to be loaded."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("out") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _constructed_again(module: nn.Module) -> nn.Module | None:
    """A module constructed with the same arguments; None if they are not known."""
    arguments = _arguments(module)
    if arguments is None:
        return None
    fresh = type(module).__new__(type(module))
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), _EmptyOnMeta():
            fresh.__init__(**arguments)  # type: ignore[misc]
    except Exception:  # whatever a constructor of somebody else does
        return None
    return fresh


def _arguments(module: nn.Module) -> dict[str, Any] | None:
    """The arguments that a module was constructed with, if it has kept them all."""
    arguments = {}
    config = getattr(module, "config", None)
    kept = {**(config if isinstance(config, Mapping) else {}), **vars(module)}
    try:
        parameters = inspect.signature(type(module)).parameters.values()
    except (TypeError, ValueError):
        return None
    for parameter in parameters:
        if parameter.name == _ANYWHERE and parameter.default is not parameter.empty:
            continue
        named = (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if parameter.name == "config" and "config" not in vars(module) and config:
            arguments["config"] = config
        elif parameter.kind in named and parameter.name in kept:
            arguments[parameter.name] = kept[parameter.name]
        else:
            return None
    return arguments


def _same(
    module: nn.Module, again: nn.Module, name: str, owner: str
) -> dict[str, Tensor] | None:
    """The tensors of a module in one that was constructed again, if they are alike."""
    try:
        fresh = again.get_submodule(name[len(owner) :].lstrip("."))
    except AttributeError:
        return None
    mine, theirs = _tensors(module), _tensors(fresh)
    if mine.keys() != theirs.keys() or not _is_alike(module, fresh):
        return None
    if any(
        t.is_meta or (mine[key].shape, mine[key].dtype) != (t.shape, t.dtype)
        for key, t in theirs.items()
    ):
        return None
    return theirs


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that are in no state dict."""
    unsaved = module._non_persistent_buffers_set
    held = {**vars(module), **{key: module._buffers.get(key) for key in unsaved}}
    return {key: t for key, t in held.items() if isinstance(t, Tensor)}


def _is_alike(module: nn.Module, fresh: nn.Module) -> bool:
    """Whether a module still has what its constructor has set, but for tensors.

    Others may have set more on it since.
    """
    mine, theirs = _plain_attributes(module), _plain_attributes(fresh)
    try:
        alike = all(key in mine and bool(mine[key] == theirs[key]) for key in theirs)
    except (RuntimeError, ValueError):  # arrays do not compare so
        return False
    return alike and type(module) is type(fresh)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    own = vars(nn.Module()).keys()
    return {
        key: value
        for key, value in vars(module).items()
        if key not in own and not isinstance(value, Tensor) and not callable(value)
    } | {"not persistent": module._non_persistent_buffers_set}
