"""Where each part of a model goes when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from hijack.errors import CheckpointError

#: A device for all, or name of a module or parameter to device; "" is the whole model.
DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device]


Place = TypeVar("Place")


def place_of(name: str, places: Mapping[str, Place]) -> Place | None:
    """The place of the longest name in a map that a name is in; None if it has none."""
    while name not in places:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return places[name]


class Devices:
    """The device of each name, by the longest name in the map that it is in.

    Args:
        device_map: as accelerate has them, without ``disk``; None for no device.
        model: what it is for.

    Raises:
        CheckpointError: if a name in the map is none of the model's, or a device is
            none.
    """

    def __init__(self, device_map: DeviceMap | None, model: nn.Module) -> None:
        if device_map is None:
            device_map = {}
        elif not isinstance(device_map, Mapping):
            device_map = {"": device_map}
        self._map = {name: _device(d, name) for name, d in device_map.items()}
        known = {name for name, _ in model.named_modules(remove_duplicate=False)}
        known.update(name for name, _ in model.named_parameters(remove_duplicate=False))
        known.update(name for name, _ in model.named_buffers(remove_duplicate=False))
        for name in self._map:
            if name not in known:
                raise CheckpointError(
                    f"device_map: got the name {name!r}, which the model does not "
                    "have, expected names of its modules and parameters, or '' for all"
                )

    def of(self, name: str) -> torch.device | None:
        """The device of a module, parameter or buffer; None if the map does not say."""
        return place_of(name, self._map)

    def move(self, model: nn.Module) -> None:
        """Move what is elsewhere, such as buffers that are in no checkpoint."""
        if not self._map:
            return
        for name, module in model.named_modules():
            device = self.of(name)
            own = [*module._parameters.values(), *module._buffers.values()]
            if device is None or device.type == "meta":
                continue
            if any(t is not None and not _is_there(t, device) for t in own):
                module._apply(
                    lambda t, device=device: t if t.is_meta else t.to(device),
                    recurse=False,
                )


def _is_there(tensor: torch.Tensor, device: torch.device) -> bool:
    same_type = tensor.device.type == device.type
    return tensor.is_meta or (same_type and device.index in (None, tensor.device.index))


def _device(device: Any, name: str) -> torch.device:
    if device == "disk":
        raise CheckpointError(
            f"device_map: {name!r}: got 'disk', expected a device; weights that are "
            "loaded to the CPU stay in the file until they are used; to offload them "
            "to other files, call accelerate.disk_offload after hijack.load"
        )
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise CheckpointError(
            f"device_map: {name!r}: got {device!r}, expected a device such as 'cpu' "
            f"or 'cuda:0'; {str(error).splitlines()[0]}"
        ) from error
