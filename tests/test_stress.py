"""Everything at once, in threads, tasks and processes: results stay exact, and nothing
that was touched is different afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import multiprocessing
import random
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import hijack
import hijack.hosts
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from hijack.hosts import manager
from hijack.hosts.adapter import Probe
from hijack.patching import Patch

pytestmark = pytest.mark.thorough

THREADS, ROUNDS = 8, 30
NAME = "blockwise_fp8"
#: What hijack changes for a while, or may be thought to.
TOUCHED = (nn.Module, nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TOUCHED += (torch.Tensor, nn.Parameter, F, torch, torch.nn.init)


class Doubled(hijack.Scheme):
    """Half of the weight, which is exact."""

    targets = (nn.Linear,)

    def __init__(self, name):
        self.name = name

    def quantize(self, weight):
        """Half of it."""
        return weight / 2, {"factor": torch.tensor(2.0)}

    def dequantize(self, qdata, params, dtype):
        """Twice that."""
        return (qdata * params["factor"]).to(dtype)


class LowRank(nn.Module):
    """A layer with a LoRA beside it, as trainers put it there."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down, self.up = torch.ones(2, 64) / 64, torch.ones(64, 2)

    def forward(self, x):
        """What the layer computes, and the LoRA's part."""
        return self.layer(x) + x @ self.down.t() @ self.up.t()


class Host:
    """A host of one module with two functions, already imported."""

    NAME = "stress_host"
    MODULE = "stress_host"
    SUPPORTED = ("1.0", "2.0")
    PROBES = (Probe("stress_host.first", ("x",)), Probe("stress_host.second", ("x",)))

    def get_version(self):
        """Any."""
        return "1.0"

    def patches(self):
        """Both functions say that they were patched."""

        def tagged(original):
            return lambda x: ("patched", original(x))

        module = sys.modules[self.MODULE]
        return [Patch(module, name, tagged) for name in ("first", "second")]

    def live(self):
        """No models."""
        return 0


@pytest.fixture
def host(monkeypatch):
    """The host, known to hijack."""
    module = types.ModuleType(Host.MODULE)
    exec("def first(x):\n    return x\ndef second(x):\n    return x", vars(module))
    monkeypatch.setitem(sys.modules, Host.MODULE, module)
    monkeypatch.setattr(manager, "_CONTROLS", dict(manager._CONTROLS))
    hijack.hosts.add_host(Host())
    return module


@pytest.fixture
def untouched(host):
    """Whatever a test does, everything is the same object afterwards."""
    before = [(owner, dict(vars(owner))) for owner in (*TOUCHED, host)]
    schemes = set(hijack.schemes())
    yield
    hijack.unpatch(Host.NAME)
    for owner, attributes in before:
        now = dict(vars(owner))
        assert now.keys() == attributes.keys(), owner
        changed = [name for name, value in now.items() if value is not attributes[name]]
        assert not changed, owner
    assert set(hijack.schemes()) == schemes


@pytest.fixture
def files(tmp_path):
    """A dense file, a quantized one, and what a model loaded from it computes."""
    torch.manual_seed(0)
    dense, quantized = tmp_path / "dense.safetensors", tmp_path / "q.safetensors"
    save_file(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).state_dict(), dense)
    hijack.quantize_file(dense, quantized)
    model = network()
    hijack.load(model, quantized)
    x = torch.randn(3, 64)
    return dense, quantized, x, hijack.unwrap(model)(x).detach()


def network():
    """A small model."""
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def close(actual, expected):
    """Equal but for the order of sums."""
    return torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)


# -- what is done ----------------------------------------------------------------------


def register(files, number):
    """A scheme of one's own comes and goes."""
    scheme = Doubled(f"doubled_{number}")
    hijack.register(scheme)
    try:
        layer = hijack.wrap_module(nn.Linear(8, 8), scheme.name)
        assert layer.weight.scheme is scheme
    finally:
        hijack.unregister(scheme.name)


def use_registry(files, number):
    """A registry of one's own is seen by nobody else."""
    registry = hijack.create_registry()
    registry.register(Doubled("mine"))
    with hijack.use_registry(registry):
        layer = nn.Linear(8, 8)
        x = torch.randn(2, 8)
        expected = layer(x)
        assert close(hijack.wrap_module(layer, "mine")(x), expected)
    assert "mine" not in hijack.schemes()


def build(files, number):
    """Modules are quantized from birth inside the context alone."""
    assert type(nn.Linear(4, 4).weight) is nn.Parameter
    with hijack.building(NAME):
        model = network()
    assert not model[0].weight.is_meta
    assert all(isinstance(m.weight, hijack.QuantizedTensor) for m in model)
    hijack.load(model, files[1])
    assert close(model(files[2]), files[3])
    assert nn.Linear(4, 4).weight.device.type == "cpu"


def wrap(files, number):
    """There and back, with a deep copy and a LoRA in between."""
    model = network()
    hijack.load(model, files[0])
    kept = {name: set(vars(m)) for name, m in model.named_modules()}
    hijack.wrap_model(model, NAME)
    assert close(model(files[2]), files[3])
    assert close(copy.deepcopy(model)(files[2]), files[3])
    lora = LowRank(model[0])
    low_rank = files[2] @ lora.down.t() @ lora.up.t()
    assert close(lora(files[2]), model[0](files[2]) + low_rank)
    hijack.unwrap(model)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == kept
    assert close(model(files[2]), files[3])


def load(files, number):
    """A file, then the state dict of what was loaded."""
    model, other = network(), network()
    hijack.load(model, files[1])
    hijack.load(other, model.state_dict())
    assert close(other(files[2]), files[3])
    hijack.wrap_model(fresh := network(), NAME)
    fresh.load_state_dict(model.state_dict())
    assert close(fresh(files[2]), files[3])


def quantize(files, number):
    """To a file of one's own, which says the same as the others'."""
    path = files[1].with_name(f"{number}.safetensors")
    hijack.quantize_file(files[0], path)
    assert hijack.identify(path).groups() == hijack.identify(files[1]).groups()
    model = network()
    hijack.load(model, path)
    assert close(model(files[2]), files[3])
    path.unlink()


def patch(files, number):
    """Patched or not, the host answers whole."""
    if number % 2:
        hijack.patch(Host.NAME)
    else:
        hijack.unpatch(Host.NAME)
    module = sys.modules[Host.MODULE]
    for answer in (module.first(number), module.second(number)):
        assert answer in (number, ("patched", number))


WORK = (register, use_registry, build, wrap, load, quantize, patch)


def work(files, seed, rounds=ROUNDS, pieces=WORK):
    """Random work; each piece checks its own result."""
    chance = random.Random(seed)
    for step in range(rounds):
        chance.choice(pieces)(files, seed * 1000 + step)


# -- how it is done --------------------------------------------------------------------


@pytest.mark.usefixtures("untouched")
def test_threads_do_everything_at_once(files):
    """Each gets its own results, and all that was touched is as it was."""
    barrier = threading.Barrier(THREADS)

    def run(seed):
        barrier.wait()
        work(files, seed)

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(run, seed) for seed in range(THREADS)]:
            done.result()


@pytest.mark.usefixtures("untouched")
def test_one_model_computes_in_many_threads(files):
    """Forwards share nothing but the weight."""
    model = network()
    hijack.load(model, files[1])
    layers = LowRank(model[0]), model
    expected = [layer(files[2]) for layer in layers]
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [
            (pool.submit(layers[n % 2], files[2]), expected[n % 2]) for n in range(400)
        ]
        assert all(close(job.result(), right) for job, right in jobs)


@pytest.mark.usefixtures("untouched")
def test_tasks_enter_and_leave_in_any_order(files):
    """Contexts that overlap, and end otherwise than they began, see their own."""

    async def built(number):
        chance = random.Random(number)
        await asyncio.sleep(chance.random() / 100)
        with hijack.building(NAME) if number % 2 else contextlib.nullcontext():
            await asyncio.sleep(chance.random() / 100)
            model = network()
            await asyncio.sleep(chance.random() / 100)
        assert isinstance(model[0].weight, hijack.QuantizedTensor) == bool(number % 2)
        assert not model[0].weight.is_meta
        WORK[number % len(WORK)](files, number)

    async def main():
        await asyncio.gather(*map(built, range(60)))

    asyncio.run(main())


def child(files, model, seed, pieces, failed):
    """What a child process does; it says whether anything went wrong."""
    torch.set_num_threads(1)  # the threads of the parent are not here
    try:
        assert close(model(files[2]), files[3])
        work(files, seed, rounds=8, pieces=pieces)
    except BaseException as error:
        failed.put(repr(error))


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_inherit_or_are_given_a_model(files, start):
    """A fork goes on with what is there; a spawned process unpickles a model."""
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start}")
    model = network()
    hijack.load(model, files[1])
    context = multiprocessing.get_context(start)
    failed = context.SimpleQueue()
    pieces = WORK if start == "fork" else WORK[:-1]  # the host is in this process alone
    processes = [
        context.Process(target=child, args=(files, model, 100 + n, pieces, failed))
        for n in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    assert failed.empty(), failed.get()
