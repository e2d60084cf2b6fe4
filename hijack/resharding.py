"""Weights of models that are sharded already: gathered, replaced, sharded again.

FSDP2 keeps what it needs to know of a parameter beside the module, and nothing public
tells it that the parameter is another one now. Its record is found by the hook that it
leaves on the module, and is filled in anew, as ``fully_shard`` filled it in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hijack.quantized import QuantizedTensor
from hijack.sharding import shard_of


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; asking imports nothing."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Any) -> Tensor:
    """A tensor, gathered from all processes if it is sharded; all must ask for it."""
    with torch.no_grad():
        return tensor.full_tensor() if is_distributed(tensor) else tensor  # type: ignore[no-any-return]


def like(tensor: Tensor, model: Any) -> Tensor:
    """The part of a whole tensor that this process holds, distributed as another is.

    Args:
        tensor: the same in every process; nothing is sent.
        model: a DTensor; for any other tensor the first one is returned.
    """
    if not is_distributed(model):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor, model.device_mesh, model.placements, src_data_rank=None
    )


def is_gathered(module: nn.Module) -> bool:
    """Whether FSDP shards a module's weight, but has gathered it at the moment."""
    weight = module._parameters.get("weight")
    return _fsdp_param(module) is not None and not is_distributed(weight)


def replace_weight(module: nn.Module, weight: nn.Parameter) -> Callable[[], None]:
    """Give a module another weight, sharded as the one it has is.

    Args:
        module: with a parameter ``weight``.
        weight: whole, the same in every process.

    Returns:
        What gives the module its old weight again.
    """
    old: Any = module._parameters["weight"]
    record = _fsdp_param(module)
    state = None if record is None else dict(vars(record))

    def undo() -> None:
        module._parameters["weight"] = old
        if state is not None:
            vars(record).clear()
            vars(record).update(state)

    if not is_distributed(old):
        module._parameters["weight"] = weight
    elif _is_part_of(old, weight):
        pass  # another module that shares the weight has been given it
    elif record is None:
        module._parameters["weight"] = nn.Parameter(
            like(weight, old), weight.requires_grad
        )
    else:
        _record_again(record, weight)
    return undo


# -- details ---------------------------------------------------------------------------


def _fsdp_param(module: nn.Module) -> Any:
    """FSDP's record of a module's weight, or None if FSDP does not shard it."""
    for hook in module._load_state_dict_post_hooks.values():
        for cell in getattr(hook, "__closure__", None) or ():
            record = cell.cell_contents
            info = getattr(record, "_module_info", None)
            if getattr(info, "param_name", None) == "weight":
                return record
    return None


def _is_part_of(parameter: Any, weight: Any) -> bool:
    """Whether a distributed parameter holds a shard of this very quantized weight."""
    shard = shard_of(parameter)
    if shard is None or not isinstance(weight, QuantizedTensor):
        return False
    return all(shard.weight.params.get(n) is t for n, t in weight.params.items())


def _record_again(record: Any, weight: nn.Parameter) -> None:
    placement, mesh = record.fsdp_placement, record.mesh_info
    known = inspect.signature(record._init_sharded_param).parameters
    given: dict[str, Any] = {
        "param": weight.to(record.device) if not weight.is_meta else weight,
        "device": record.device,
        "shard_placement_fn": lambda _: placement,
        "mesh_info": mesh,  # which not every torch asks for
    }
    record._init_sharded_param(**{n: v for n, v in given.items() if n in known})
    if record.post_forward_mesh_info:
        record._init_sharded_post_forward_param_metadata(weight)
    record._init_extensions()
    record.all_gather_outputs = []
    vars(record).pop("_unsharded_param", None)
    if hasattr(record, "orig_dtype"):  # a forward has set it
        record.init_dtype_attrs(record.mp_policy)
