"""Several registries in one process, and the first use of one from many threads."""

import asyncio
import io
import pickle
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hijack
from hijack.modules import dense_weight
from tests.plugin_folder import install, python


class Steps(hijack.Scheme):
    """Round to multiples of the largest magnitude; the base of two of one name."""

    name = "same"
    claims_unmarked = True
    steps = 0

    def quantize(self, weight):
        """One scale for each row, under a name of its own for each class."""
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-9) / self.steps
        return (weight / scale).round().to(torch.int8), {self.key: scale}

    def dequantize(self, qdata, params, dtype):
        """Multiply."""
        return (qdata.float() * params[self.key]).to(dtype)

    @property
    def key(self):
        """Name of the scale."""
        return f"scale_{self.steps}"


class Coarse(Steps):
    """Seven steps each way."""

    steps = 7


class Fine(Steps):
    """127 steps each way."""

    steps = 127


def registry_of(scheme):
    """A registry with one scheme."""
    registry = hijack.create_registry()
    registry.register(scheme)
    return registry


@pytest.fixture
def both():
    """Two registries, each with another scheme of one name."""
    return registry_of(Coarse()), registry_of(Fine())


def make(seed=0):
    """The same model each time, in any thread."""
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        nn.init.uniform_(tensor, -0.3, 0.3, generator=generator)
    return model


def distance(model):
    """How far a quantized model is from the dense one."""
    dense = make()
    return sum(
        float((dense_weight(m) - d.weight.detach()).norm())
        for m, d in zip(model, dense, strict=True)
    )


def everything(folder, registry, ways):
    """Wrap, build, save, identify, load, quantize, convert and compare.

    Args:
        folder: where files go.
        registry: passed on where ``ways`` is "argument", else it is in force already.
        ways: how the registry is chosen.

    Returns:
        Names of scale tensors that were seen, and distances from the dense model.
    """
    chosen = {"registry": registry} if ways == "argument" else {}
    folder.mkdir(exist_ok=True)
    names = ("dense", "saved", "quantized", "converted")
    dense, saved, quantized, converted = (folder / f"{n}.safetensors" for n in names)
    save_file(make().state_dict(), dense)
    wrapped = make()
    hijack.wrap_model(wrapped, "same", **chosen)
    single = hijack.wrap_module(nn.Linear(4, 4), "same", **chosen)
    with hijack.building("same", **chosen):
        built = nn.Linear(4, 4)
    hijack.save(wrapped, saved)
    found = hijack.identify(saved, **chosen)
    loaded = make(1)
    hijack.load(loaded, saved, **chosen)
    hijack.quantize_file(dense, quantized, "same", **chosen)
    hijack.convert_file(quantized, converted, "hijack", **chosen)
    seen = {key for m in (*wrapped, single, built, *loaded) for key in m.weight.params}
    seen |= {role for claim in found.layers.values() for role in claim.keys}
    files = (quantized, converted)
    for file in files:
        layers = hijack.identify(file, **chosen).claims()
        assert set(layers) == {"0", "1"}
        seen |= {role for claim in layers.values() for role in claim.keys}
    compared = [hijack.compare_files(dense, file, **chosen) for file in files]
    far = [distance(wrapped), distance(loaded)]
    errors = [c.layers[f"{layer}.weight"].rmse for c in compared for layer in "01"]
    return seen - {"weight"}, far, errors


@pytest.fixture
def checked(tmp_path, both):
    """What a registry must give, checked; numbers tell the two schemes apart."""

    def check(index, ways, name):
        registry = both[index]
        seen, far, errors = everything(tmp_path / name, registry, ways)
        assert seen == {registry.get("same").key}
        coarse = index == 0
        for distance_ in far:
            assert (distance_ > 0.1) == coarse, (name, distance_)
        for error in errors:
            assert (error > 0.005) == coarse, (name, error)

    return check


@pytest.mark.parametrize("index", [0, 1])
def test_a_registry_may_be_given(checked, index):
    """``registry=`` is enough for everything, also inside another one."""
    checked(index, "argument", "given")


@pytest.mark.parametrize("index", [0, 1])
def test_a_given_registry_outranks_the_one_in_force(checked, both, index):
    """As an argument does a default."""
    with hijack.use_registry(both[1 - index]):
        checked(index, "argument", "given")


@pytest.mark.parametrize("index", [0, 1])
def test_a_registry_may_be_in_force(checked, both, index):
    """``use_registry`` is enough for everything, and nests."""
    with hijack.use_registry(both[1 - index]):
        with hijack.use_registry(both[index]):
            checked(index, "context", "in_force")
        assert hijack.current_registry() is both[1 - index]
    assert hijack.current_registry() is hijack.default_registry()
    assert "same" not in hijack.schemes()


@pytest.mark.parametrize("ways", ["argument", "context"])
def test_threads_have_registries_of_their_own(checked, both, ways):
    """Eight at once, four of each."""
    failures = []
    start = threading.Barrier(8)

    def work(number):
        try:
            start.wait(30)
            with hijack.use_registry(both[number % 2]):
                checked(number % 2, ways, f"thread{number}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []


def test_tasks_have_registries_of_their_own(checked, both):
    """Tasks of one thread that take turns."""

    async def work(number):
        with hijack.use_registry(both[number % 2]):
            await asyncio.sleep(0)
            checked(number % 2, "context", f"task{number}")
            await asyncio.sleep(0)
            assert hijack.current_registry() is both[number % 2]

    async def together():
        await asyncio.gather(*(work(number) for number in range(4)))

    asyncio.run(together())


def test_register_and_unregister_act_on_the_registry_in_force(both):
    """So a test leaves nothing behind in the process."""

    class More(Coarse):
        name = "more"

    with hijack.use_registry(both[0]):
        scheme = hijack.register(More())
        assert set(hijack.schemes()) == {"same", "more"}
        assert hijack.current_registry().get("more") is scheme
    assert set(both[1].schemes()) == {"same"}
    with hijack.use_registry(both[0]):
        hijack.unregister("more")
    assert set(both[0].schemes()) == {"same"}


# -- pickles ---------------------------------------------------------------------------


def by_pickle(module):
    """Through ``pickle``."""
    text = pickle.dumps(module)
    return lambda: pickle.loads(text)


def by_torch(module):
    """Through ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(module, buffer)

    def load():
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return load


@pytest.mark.parametrize("saved", [by_pickle, by_torch])
def test_an_unpickled_module_has_the_scheme_that_is_registered(both, saved):
    """Of the same class and name; where there is none, one of its own that works."""
    model = make()
    hijack.wrap_model(model, "same", registry=both[0])
    load = saved(model)
    with hijack.use_registry(both[0]):
        again = load()
    assert all(layer.weight.scheme is both[0].get("same") for layer in again)
    with hijack.use_registry(both[1]):
        other = load()
    assert all(type(layer.weight.scheme) is Coarse for layer in other)
    x = torch.randn(2, 16)
    for twin in (again, other, load()):
        assert torch.equal(twin(x), model(x))
    with torch.no_grad():  # tensors of one scheme can be copied, whoever registered it
        other[0].weight.copy_(again[0].weight)


def test_an_unpickled_scheme_keeps_its_attributes(both):
    """One that is registered with others would decode to another weight."""

    class_ = Coarse
    mine, theirs = class_(), class_()
    mine.steps, theirs.steps = 3, 5
    layer = hijack.wrap_module(nn.Linear(16, 8), mine)
    with hijack.use_registry(registry_of(theirs)):
        again = by_pickle(layer)()
    assert again.weight.scheme.steps == 3
    assert torch.equal(dense_weight(again), dense_weight(layer))


def test_an_unpickled_module_is_that_of_plugins_in_force(both):
    """Plugins of the registry in force bind its forward."""

    def forward(module, input, weight, bias):
        return input

    class Plugin:
        @hijack.hookimpl
        def hijack_bind_forward(self, module, scheme):
            return forward

    layer = hijack.wrap_module(nn.Linear(4, 4), "same", registry=both[0])
    load = by_torch(layer)
    both[0].add_plugin(Plugin(), "identity")
    x = torch.randn(2, 4)
    with hijack.use_registry(both[0]):
        assert torch.equal(load()(x), x)
    with hijack.use_registry(both[1]):
        assert torch.equal(load()(x), layer(x))


# -- the first use ---------------------------------------------------------------------

SLOW_PLUGIN = """
import time
import torch
import hijack

time.sleep(0.5)

class Slow(hijack.Scheme):
    name = "{name}"

    def quantize(self, weight):
        return weight.half(), {{"one": torch.ones(1)}}

    def dequantize(self, qdata, params, dtype):
        return qdata.to(dtype) * params["one"]

@hijack.hookimpl
def hijack_register_schemes(registry):
    hijack.schemes()
    time.sleep(0.1)
    registry.register(Slow())
"""


FIRST_USE = """
import threading
import torch
import hijack

start, seen, failures = threading.Barrier(16), [], []

def work(number):
    try:
        start.wait()
        if number % 4 == 0:
            seen.append(sorted(hijack.schemes()))
        elif number % 4 == 1:
            hijack.wrap_module(torch.nn.Linear(4, 4), "two")
        elif number % 4 == 2:
            with hijack.building("one"):
                torch.nn.Linear(4, 4)
        else:
            hijack.default_registry().get("blockwise_fp8")
    except BaseException as error:
        failures.append(repr(error))

threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
assert all({"one", "two", "blockwise_fp8"} <= set(names) for names in seen), seen
print(len(seen))
"""


def test_the_first_use_from_many_threads_finds_everything(tmp_path):
    """Sixteen threads wait for the one that imports; none misses a scheme."""
    for name in ("one", "two"):
        install(tmp_path, name, SLOW_PLUGIN.format(name=name))
    assert python(tmp_path, FIRST_USE).strip() == "4"


def test_importing_a_plugin_while_another_thread_looks_for_it(tmp_path):
    """An import that registers a scheme and the search for plugins do not deadlock."""
    install(
        tmp_path,
        "one",
        SLOW_PLUGIN.format(name="one")
        + "\nhijack.register(type('O', (Slow,), {'name': 'o'})())\n",
    )
    out = python(
        tmp_path,
        """
        import importlib, threading
        import hijack

        def load():
            importlib.import_module("one_plugin")

        threads = [threading.Thread(target=t) for t in (load, hijack.schemes, load)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        print(sorted(set(hijack.schemes()) & {"one", "o"}))
        """,
    )
    assert out.strip() == "['o', 'one']"
