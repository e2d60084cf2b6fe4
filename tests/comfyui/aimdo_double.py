"""comfy_aimdo's native library in Python, so that dynamic VRAM runs without a GPU.

ComfyUI's and comfy_aimdo's own Python code runs; the native functions below it work on
ordinary memory, and the device is that of `device_double`. `install` sets it all up,
`MEMORY` says how much fits and what is there.
"""

import contextlib
import ctypes
import itertools
import mmap
import os
import types

import numpy as np
import torch
from device_double import DEVICE, OnDevice, start

#: Residency flags of comfy_aimdo's faults.
SUCCESS, OUT_OF_MEMORY = 0, 1
#: Memory that is not a weight's any more reads as this: NaN in every float format.
POISON = 0xFF


class Memory:
    """The device's memory for weights, and the host's buffers.

    Attributes:
        limit: bytes of weights that fit; None if all do.
        log: of how many faults the weight was there, came in, or did not fit.
    """

    def __init__(self):
        self.limit = None
        self.log = {"resident": 0, "loaded": 0, "refused": 0}
        self.vbars, self.casts, self.buffers, self.files = {}, {}, {}, {}
        self.serials, self.handles = itertools.count(1), itertools.count(1)

    def resident(self):
        """Bytes of weights on the device."""
        return sum(vbar.loaded() for vbar in self.vbars.values())

    def pinned(self):
        """How many weights are held because somebody uses them."""
        return sum(len(vbar.pinned) for vbar in self.vbars.values())

    def host_bytes(self):
        """Bytes of the host's buffers."""
        return sum(buffer.used for buffer in self.buffers.values())

    def evict(self, every=1):
        """Take every so-manieth weight off the device, as another model's need would.

        Returns:
            How many were there to take.
        """
        taken = 0
        for vbar in self.vbars.values():
            for offset in sorted(vbar.pages)[::every]:
                taken += vbar.evict(offset) > 0
        return taken

    def add(self, table, value):
        """A handle of a new value, never 0."""
        handle = next(self.handles)
        table[handle] = value
        return handle


class Block:
    """Memory that keeps its address; none is used until it is written."""

    def __init__(self, size):
        self.data = torch.empty(max(int(size), 1), dtype=torch.uint8)
        self.address = self.data.data_ptr()
        self.used = 0

    def grow(self, size):
        if self.used + size > self.data.numel():
            return False
        self.used += size
        return True


class VBar(Block):
    """One model's address space on the device; an allocation comes and goes whole."""

    def __init__(self, size):
        super().__init__(size)
        self.pages, self.pinned = {}, set()  # offset to (size, serial), offsets

    def loaded(self):
        return sum(size for size, _ in self.pages.values())

    def evict(self, offset):
        """Take one allocation away unless it is in use; how many bytes that frees."""
        if offset in self.pinned:
            return 0
        size, _ = self.pages.pop(offset)
        self.data[offset : offset + size] = POISON
        return size

    def fault(self, offset, size):
        """The serial number of an allocation's stay on the device; None if no room."""
        if offset in self.pages:
            MEMORY.log["resident"] += 1
        elif MEMORY.limit is not None and MEMORY.resident() + size > MEMORY.limit:
            MEMORY.log["refused"] += 1
            return None
        else:
            MEMORY.log["loaded"] += 1
            self.data[offset : offset + size] = POISON
            self.pages[offset] = (size, next(MEMORY.serials))
        self.pinned.add(offset)
        return self.pages[offset][1]


MEMORY = Memory()


# -- native functions ------------------------------------------------------------------


def vbar_allocate(context, size, device, pageout=None):
    assert not pageout, "aimdo 0.6 can report evictions; ComfyUI did not ask for it"
    return MEMORY.add(MEMORY.vbars, VBar(size))


def vbar_free(context, handle):
    del MEMORY.vbars[handle]


def vbar_get(context, handle):
    return MEMORY.vbars[handle].address


def vbar_fault(context, handle, offset, size, signature):
    serial = MEMORY.vbars[handle].fault(offset, size)
    if serial is None:
        return OUT_OF_MEMORY
    for index in range(len(signature)):
        signature[index] = serial
    return SUCCESS


def vbar_unpin(context, handle, offset, size):
    MEMORY.vbars[handle].pinned.discard(offset)
    return True


def vbar_loaded_size(context, handle):
    return MEMORY.vbars[handle].loaded()


def vbar_free_memory(context, handle, wanted):
    vbar, freed = MEMORY.vbars[handle], 0
    for offset in sorted(vbar.pages, reverse=True):
        if freed >= wanted:
            break
        freed += vbar.evict(offset)
    return freed


def hostbuf_allocate(prewarm, size, *flags):
    return MEMORY.add(MEMORY.buffers, Block(size))


def hostbuf_free(handle):
    del MEMORY.buffers[handle]


def hostbuf_get_raw_address(handle):
    return MEMORY.buffers[handle].address


def hostbuf_extend(handle, size, reallocate, register, delta):
    buffer = MEMORY.buffers[handle]
    if not buffer.grow(size):
        return None
    delta._obj.value = size
    return buffer.address


def hostbuf_truncate(handle, size, unregister):
    MEMORY.buffers[handle].used = size
    return True


def hostbuf_read_file_slice(handle, device, file, start, size, offset, stream, target):
    buffer = MEMORY.buffers[handle]
    buffer.used = max(buffer.used, offset + size)
    data = os.pread(file, size, start)
    ctypes.memmove(buffer.address + offset, data, size)
    if target:
        ctypes.memmove(target, data, size)
    return True


def hostbuf_file_reader_read(device, file, start, size, stream, target, cold):
    ctypes.memmove(target, os.pread(file, size, start), size)
    return True


def vrambuf_create(device, size):
    return MEMORY.add(MEMORY.casts, Block(size))


def vrambuf_get(handle):
    return MEMORY.casts[handle].address


def vrambuf_destroy(handle):
    del MEMORY.casts[handle]
    return True


def model_mmap_allocate(path):
    file = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(file, 0, prot=mmap.PROT_READ)  # who writes here is killed
    return MEMORY.add(MEMORY.files, (file, np.frombuffer(mapped, np.uint8)))


def model_mmap_get(handle):
    return MEMORY.files[handle][1].ctypes.data


def model_mmap_get_file_handle(handle):
    return MEMORY.files[handle][0]


def model_mmap_deallocate(handle):
    os.close(MEMORY.files.pop(handle)[0])


def get_devctx(device):
    return 1


def get_total_vram_usage(context):
    return MEMORY.resident()


def nothing(*_):
    """What needs no doing here, and succeeds."""
    return True


def unused(*_):
    """What comfy_aimdo declares and ComfyUI does not call."""
    raise NotImplementedError("the double of comfy_aimdo has no such function yet")


UNUSED = "hostbuf_file_writer_write xfer_file_write"
NOTHING = (
    "vbar_prioritize vbar_deprioritize vbar_set_watermark vbar_set_watermark_limit "
    "vbars_reset_watermark_limits vbar_get_nr_pages vbar_get_watermark "
    "vbar_get_residency vbars_analyze hostbuf_register hostbuf_unregister "
    "hostbuf_file_reader_cleanup vrambuf_grow model_mmap_bounce aimdo_analyze"
)
NATIVE = (
    *(vbar_allocate, vbar_free, vbar_get, vbar_fault, vbar_unpin, vbar_loaded_size),
    *(vbar_free_memory, hostbuf_allocate, hostbuf_free, hostbuf_get_raw_address),
    *(hostbuf_extend, hostbuf_truncate, hostbuf_read_file_slice),
    *(hostbuf_file_reader_read, vrambuf_create, vrambuf_get, vrambuf_destroy),
    *(model_mmap_allocate, model_mmap_get, model_mmap_get_file_handle),
    *(model_mmap_deallocate, get_devctx, get_total_vram_usage),
)


def library():
    """An object like the loaded library; argument types can be declared on it."""

    def declarable(function):
        return lambda *args: function(*args)

    named = {function.__name__: declarable(function) for function in NATIVE}
    rest = {name: declarable(nothing) for name in NOTHING.split()}
    rest |= {name: declarable(unused) for name in UNUSED.split()}
    return types.SimpleNamespace(**rest, **named)


# -- set-up ----------------------------------------------------------------------------


def tensor_at(address, size, device):
    """Bytes of memory as a tensor of the device."""
    if not size:
        return torch.empty(0, dtype=torch.uint8, device=device)
    data = (ctypes.c_uint8 * size).from_address(address)
    return OnDevice(torch.frombuffer(data, dtype=torch.uint8))


class Stream(contextlib.nullcontext):
    """A stream whose work is done when it is asked for."""

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


def prepare():
    """Put the double in place of the native library; before ComfyUI is imported."""
    import comfy_aimdo.control

    comfy_aimdo.control.lib = library()
    comfy_aimdo.control.devctxs = [get_devctx(0)]
    import comfy_aimdo.torch

    comfy_aimdo.torch.get_tensor_from_raw_ptr = tensor_at
    start()
    prepare_cuda()


def prepare_cuda():
    """What ComfyUI asks the driver for, of a card of 64 GB."""
    size = 64 << 30
    registered = types.SimpleNamespace(
        cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0
    )
    used = {"active_bytes.all.current": 0, "reserved_bytes.all.current": 0}
    torch.cuda.cudart = lambda: registered
    torch.cuda.memory_stats = lambda *_: used
    torch.cuda.mem_get_info = lambda *_: (size - MEMORY.resident(), size)


def enable():
    """Turn on dynamic VRAM as ComfyUI's ``main.py`` does."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    management = comfy.model_management
    management.get_torch_device = lambda: DEVICE
    management.vram_state = management.VRAMState.NORMAL_VRAM
    management.MAX_PINNED_MEMORY = 1 << 40
    management.NUM_STREAMS = 2
    management.STREAMS[DEVICE] = [Stream(), Stream()]
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    comfy.memory_management.aimdo_allocator = "any but None, before 0.20"
