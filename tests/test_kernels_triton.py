"""Triton's kernels: their results, and what a forward of theirs costs."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from schemes._kernels import buffers
from schemes._kernels.block_scaled import BlockScaled

pytest.importorskip("triton", reason="triton is not installed")
INTERPRETED = Path(__file__).with_name("triton_interpreted.py")
#: Kernels whose interpretation takes long.
LONG = ("TestProducts", "TestInputs", "TestQuantize")


@pytest.mark.parametrize(
    "kernels",
    [
        "TestDecode",
        "TestJoined",
        *(pytest.param(name, marks=pytest.mark.thorough) for name in LONG),
    ],
)
def test_kernels_in_the_interpreter(kernels, tmp_path):
    """On CPU tensors kernels compute what their definitions say."""
    # Triton reads the variable when it is imported, so that a process is needed
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-x", f"{INTERPRETED}::{kernels}"],
        cwd=INTERPRETED.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Counted(TorchDispatchMode):
    """Operations that start something on a device, or wait for one."""

    #: They change no memory: on a GPU nothing is launched.
    FREE = ("aten::view", "aten::slice", "aten::t", "aten::transpose", "aten::detach")
    FREE += ("aten::as_strided", "aten::empty", "aten::new_empty", "aten::alias")

    def __init__(self):
        super().__init__()
        self.operations, self.allocations = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.allocations += name in ("aten::empty", "aten::new_empty")
        if name not in self.FREE:
            self.operations.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """Launches of kernels, which are recorded instead of made."""
    from schemes._kernels.triton import _decode, gemm, gemv

    found = []
    for module in (_decode, gemm, gemv):
        monkeypatch.setattr(
            module, "launch", lambda kernel, *rest, **_: found.append((kernel, rest))
        )
    buffers.release()
    yield found
    buffers.release()


def fp8_weight(n, k):
    """A weight in 1 x 64 blocks."""
    return BlockScaled(
        torch.zeros(n, k, dtype=torch.float8_e4m3fn), torch.ones(n, k // 64), (1, 64)
    )


@pytest.mark.parametrize("bias", [False, True])
def test_many_inputs_cost_one_launch_more_than_a_dense_layer(launches, bias):
    """One kernel decodes, one operation multiplies, and nothing waits or allocates."""
    from schemes._kernels.triton import linear

    weight = fp8_weight(256, 192)
    x = torch.randn(512, 192).bfloat16()
    offsets = torch.zeros(256).bfloat16() if bias else None
    linear(x, weight, offsets)
    launches.clear()
    with Counted() as counted:
        linear(x, weight, offsets)
    assert [kernel.fn.__name__ for kernel, _ in launches] == ["decode_kernel"]
    assert counted.operations == ["aten::addmm" if bias else "aten::mm"]
    assert counted.allocations == 0
    with Counted() as dense:
        F.linear(x, torch.zeros(256, 192).bfloat16(), offsets)
    assert counted.operations == dense.operations[-1:]


def test_decoding_moves_three_bytes_a_weight(launches):
    """The kernel gets each code once, and a number of 16 bits for it; and scales."""
    from schemes._kernels.triton import linear

    weight = fp8_weight(256, 192)
    linear(torch.randn(512, 192).bfloat16(), weight, None)
    tensors = [value for value in launches[0][1] if isinstance(value, torch.Tensor)]
    out, codes, scale = tensors
    moved = out.nbytes + codes.nbytes
    assert moved == 3 * 256 * 192
    assert scale.nbytes * 16 == codes.nbytes
    # each program has a tile of its own, and none is left out
    assert launches[0][1][0] * 4096 == 256 * 256  # 192 columns are padded to 256


@pytest.mark.parametrize(("m", "name"), [(1, "gemv_kernel"), (9, "gemm_kernel")])
def test_few_inputs_cost_one_launch(launches, m, name):
    """The weight is never dense; in steady state only the output is allocated."""
    from schemes._kernels.triton import linear

    weight = fp8_weight(256, 1024)
    x = torch.randn(m, 1024).bfloat16()
    linear(x, weight, None)
    launches.clear()
    with Counted() as counted:
        linear(x, weight, None)
    assert [kernel.fn.__name__ for kernel, _ in launches] == [name]
    assert counted.operations == []
    assert counted.allocations == 1


def buffer(numel, dtype=torch.bfloat16, **options):
    """Memory of the CPU that calls share."""
    return buffers.shared("test", numel, dtype, torch.device("cpu"), **options)


def test_layers_share_one_buffer(launches):
    """Memory grows to the largest layer, and smaller ones take a part of it."""
    small = buffer(256)
    large = buffer(1024)
    again = buffer(256)
    assert again.data_ptr() == large.data_ptr() != small.data_ptr()
    assert buffer(256, torch.float32).dtype == torch.float32
    with torch.inference_mode():
        made = buffer(1152)
    assert buffer(1152).zero_().data_ptr() == made.data_ptr()


def test_threads_have_buffers_of_their_own(launches):
    """What one thread decodes is not overwritten before it has multiplied."""
    mine, theirs = buffer(256), []
    worker = threading.Thread(target=lambda: theirs.append(buffer(256)))
    worker.start()
    worker.join()
    assert theirs[0].data_ptr() != mine.data_ptr()


def test_counters_are_zeros_whatever_was_there(launches):
    """Also when they become more."""
    assert not buffer(10, torch.int32, zeros=True).any()
    assert not buffer(100, torch.int32, zeros=True).any()


def test_captured_graphs_have_memory_of_their_own(launches, monkeypatch):
    """What a CUDA graph was captured with is never freed because a buffer grows."""
    kept = buffer(256)
    monkeypatch.setattr(buffers, "_is_capturing", lambda device: True)
    first, second = buffer(256), buffer(256)
    assert len({kept.data_ptr(), first.data_ptr(), second.data_ptr()}) == 3


def test_reasons_to_refuse():
    """What cannot be taken is refused in a sentence, without importing Triton."""
    from schemes._kernels.triton import refuses

    weight = fp8_weight(8, 64)
    assert "on cpu" in refuses(weight, torch.bfloat16)
    there = weight._replace(codes=FakeTensor("cuda", weight.codes.dtype))
    assert "torch.float64" in refuses(there, torch.float64)
    other = there._replace(codes=FakeTensor("cuda", torch.int32))
    assert "codes are torch.int32" in refuses(other, torch.bfloat16)
    odd = there._replace(table=torch.zeros(16), size=(1, 9), scale=torch.ones(1, 3))
    odd = odd._replace(codes=FakeTensor("cuda", torch.uint8))
    assert "9 columns" in refuses(odd, torch.bfloat16)


class FakeTensor:
    """A device and a dtype."""

    def __init__(self, device, dtype):
        self.device, self.dtype = torch.device(device), dtype


def test_schemes_import_without_triton():
    """The package is there without Triton, and says that it is missing."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import schemes._kernels.triton as kernels, torch\n"
        "print(kernels._refuses_machine(torch.device('cuda')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=INTERPRETED.parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "triton cannot be imported" in done.stdout
    assert "install triton" in done.stdout
