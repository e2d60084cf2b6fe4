"""A second device for machines that have none: its tensors live in ordinary memory.

To Python such a tensor is on ``DEVICE``; what is computed with it is computed by the
CPU's kernels, so results can be compared bit for bit with those of the CPU. As on a
real accelerator, moving a tensor copies it, and tensors of both devices do not mix.
"""

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

# What torch has for devices that are written in Python; once in a process.
backend_registration._setup_privateuseone_for_python_backend("pretended")
#: Not "cpu" and not "cuda", so nobody takes a short cut for either.
DEVICE = torch.device("pretended", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten
#: What may take tensors of both devices.
MIXING = {aten.copy_, aten.to, aten._to_copy, aten.index, aten.index_put_}
MOVES = {aten.to, aten._to_copy}


class OnDevice(torch.Tensor):
    """A tensor on `DEVICE`; ``inner`` holds its data."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self):
        return f"OnDevice({self.inner})"


PLAIN = (torch.Tensor, torch.nn.Parameter, OnDevice)


class Device(TorchDispatchMode):
    """While this is entered, tensors can be made on and moved to `DEVICE`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class Generator(torch.Generator):
    """A generator for any device; that of `DEVICE` draws what the CPU's would."""

    def __new__(cls, device=CPU):
        device = torch.device(device)
        return super().__new__(cls, CPU if device == DEVICE else device)


def start():
    """Turn the device on, for the life of the process."""
    torch.Generator = Generator
    Device().__enter__()


def dispatch(func, args, kwargs):
    """Run one operator of torch on the CPU, and say on which device its result is."""
    values = list(_leaves((args, tuple(kwargs.values()))))
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if any(type(tensor) not in PLAIN for tensor in tensors):
        return NotImplemented  # of a subclass of its own, which will ask us again
    packet = func.overloadpacket
    if packet is aten._has_compatible_shallow_copy_type:
        return False  # a module that is moved gets new parameters
    _check_one_device(packet, tensors)
    kwargs = {name: _map(_to_cpu, value) for name, value in kwargs.items()}
    result = func(*_map(_to_cpu, tuple(args)), **kwargs)
    _check_shapes(func, tensors)
    target = _target(func, values, tensors)
    outer = {id(_to_cpu(tensor)): tensor for tensor in reversed(tensors)}

    def label(value):
        if not isinstance(value, torch.Tensor):
            return value
        same = outer.get(id(value))
        if same is not None and same.device == target:
            return same
        moved = packet in MOVES and tensors[0].device != target
        if (same is not None or moved) and _shares(value, tensors):
            value = value.clone()
        return OnDevice(value) if target == DEVICE else value

    return _map(label, result)


def _leaves(value):
    if type(value) in (list, tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _map(function, value):
    if type(value) in (list, tuple):
        return type(value)(_map(function, item) for item in value)
    return function(value)


def _to_cpu(value):
    if isinstance(value, OnDevice):
        return value.inner
    return CPU if isinstance(value, torch.device) and value == DEVICE else value


def _target(func, values, tensors):
    """The device a result is on: the one asked for, or that of the arguments."""
    asked = [value for value in values if isinstance(value, torch.device)]
    if asked:
        return asked[0]
    if func is aten.to.other:
        return tensors[1].device
    if func.overloadpacket is aten.copy_:
        return tensors[0].device
    return DEVICE if any(type(tensor) is OnDevice for tensor in tensors) else CPU


def _shares(value, tensors):
    storages = [_to_cpu(tensor).untyped_storage().data_ptr() for tensor in tensors]
    return value.untyped_storage().data_ptr() in storages


def _check_one_device(packet, tensors):
    """As on a real device: only a scalar may come from the CPU."""
    devices = {str(tensor.device) for tensor in tensors if tensor.ndim}
    if len(devices) > 1 and packet not in MIXING:
        raise RuntimeError(
            f"{packet}: expected all tensors on one device; got {sorted(devices)}"
        )


def _check_shapes(func, tensors):
    for tensor in tensors if func._schema.is_mutable else ():
        if type(tensor) is OnDevice and tensor.shape != tensor.inner.shape:
            raise NotImplementedError(f"{func}: this double cannot change a shape")
