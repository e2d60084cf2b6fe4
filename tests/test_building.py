"""Modules constructed quantized."""

import asyncio
import contextlib
import contextvars
import copy
import gc
import random
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hijack
from hijack.errors import ModuleError, SchemeError
from hijack.modules import Wrapped


class Bytes(hijack.Scheme):
    """One byte a weight, one scale a row."""

    name = "bytes_test"
    targets = (nn.Linear, nn.Embedding)

    def quantize(self, weight, levels=127, **options):
        """Round to a number of levels."""
        scale = weight.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / levels
        return (weight / scale).round().to(torch.int8), {"weight_scale": scale}

    def dequantize(self, qdata, params, dtype):
        """Multiply."""
        return (qdata.float() * params["weight_scale"]).to(dtype)


class Net(nn.Module):
    """A model that initialises its layers itself, and ties two weights."""

    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        for block in self.blocks:
            nn.init.xavier_uniform_(block.weight)
            nn.init.zeros_(block.bias)

    def forward(self, ids):
        """Embed and mix."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Largest(TorchDispatchMode):
    """Records the largest tensor made outside the meta device, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if type(t) is torch.Tensor and not t.is_meta:
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return out


@pytest.fixture
def constructors():
    """Checks at the end that every constructor is the original object."""
    owners = (nn.Module, nn.Linear, nn.Embedding)
    before = [vars(owner)["__init__"] for owner in owners]
    yield
    assert [vars(owner)["__init__"] for owner in owners] == before


@pytest.fixture
def scheme():
    """The scheme, not registered: building takes it as it is."""
    return Bytes()


def test_modules_are_born_quantized(scheme):
    """Targets have codes and scales of the right shapes; others are as usual."""
    with hijack.building(scheme):
        net = Net()
    assert isinstance(net.embed, Wrapped)
    assert all(isinstance(block, Wrapped) for block in net.blocks)
    assert net.blocks[0].weight_scale.shape == (8, 1)
    assert torch.equal(net.norm.weight, torch.ones(8))
    assert net(torch.tensor([[1, 2]])).shape == (1, 2, 8)


def test_no_dense_weight_is_ever_allocated(scheme):
    """The largest real tensor made while building is the codes of one layer."""
    with Largest() as seen, hijack.building(scheme):
        layer = nn.Linear(512, 256)
    assert layer.weight.qdata.dtype == torch.int8
    assert seen.bytes == 512 * 256


def test_a_built_model_loads_what_a_wrapped_one_saved(scheme):
    """Building and wrapping give the same keys, shapes and dtypes."""
    net = Net()
    hijack.wrap_model(net, scheme)
    with hijack.building(scheme):
        built = Net()
    built.load_state_dict(net.state_dict())
    ids = torch.tensor([[0, 4]])
    torch.testing.assert_close(built(ids), net(ids))


def test_patterns_choose_by_name(scheme):
    """Names count from the outermost module; the rest is initialised by its class."""
    with hijack.building(scheme, include="blocks.*", exclude="blocks.1"):
        net = Net()
    kinds = [isinstance(block, Wrapped) for block in net.blocks]
    assert kinds == [True, False, True]
    assert not isinstance(net.embed, Wrapped)
    assert net.embed.weight.std() > 0.1
    assert 0 < net.blocks[1].weight.abs().max() < 1


def test_options_reach_the_scheme(scheme):
    """building passes its options to quantize."""
    with hijack.building(scheme, levels=7):
        layer = nn.Linear(4, 4)
    assert layer.weight.options == {"levels": 7}


def test_constructors_are_restored(scheme):
    """After the context, also after an error, constructors are the original objects."""
    owners = (nn.Module, nn.Linear, nn.Embedding)
    before = [vars(owner)["__init__"] for owner in owners]
    with pytest.raises(TypeError, match="out_features"), hijack.building(scheme):
        nn.Linear(2)
    assert [vars(owner)["__init__"] for owner in owners] == before
    assert type(nn.Linear(2, 2)) is nn.Linear


def test_the_device_asked_for_is_kept(scheme):
    """A device argument, by name or by default, is where the codes lie."""
    with hijack.building(scheme):
        named = nn.Linear(4, 4, device="cpu")
        positional = nn.Linear(4, 4, True, "meta")
        with torch.device("meta"):
            ambient = nn.Linear(4, 4)
    assert named.weight.device.type == "cpu"
    assert positional.weight.is_meta
    assert ambient.weight.is_meta


def test_plugins_see_each_construction_once(scheme):
    """hijack_init is called once per object, when it has its quantized weight."""
    seen = []

    class Plugin:
        @hijack.hookimpl
        def hijack_init(self, module, scheme):
            seen.append((type(module).__name__, tuple(module.weight.shape), scheme))

    class Sub(nn.Linear):
        def __init__(self, n):
            super().__init__(n, n, bias=False)

    registry = hijack.create_registry()
    registry.add_plugin(Plugin(), "seeing")
    with hijack.building(scheme, registry=registry):
        nn.Linear(2, 3), Sub(4)  # dropped at once, and forgotten
        kept = nn.Linear(2, 3), Sub(4)
        assert seen == []
    assert seen == [("Linear", (3, 2), scheme), ("Sub", (4, 4), scheme)]
    assert all(isinstance(module, Wrapped) for module in kept)


def test_a_target_without_a_weight_is_built_as_usual():
    """A target type may have modules with nothing to quantize."""

    class Anything(Bytes):
        targets = (nn.Module,)

    with hijack.building(Anything()):
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert isinstance(net[0], Wrapped)
    assert type(net[1]) is nn.ReLU
    assert net(torch.zeros(1, 4)).shape == (1, 4)


def test_modules_dropped_inside_are_forgotten(scheme):
    """A module that is garbage before the context ends is not settled."""
    with hijack.building(scheme):
        nn.Linear(4, 4)
        gc.collect()
        kept = nn.Linear(3, 3)
    assert isinstance(kept, Wrapped)


def test_threads_build_for_themselves(scheme):
    """What another thread constructs meanwhile is dense, and nothing stays patched."""
    owners = (nn.Module, nn.Linear, nn.Embedding)
    before = [vars(owner)["__init__"] for owner in owners]
    inside, constructed = threading.Barrier(3), threading.Barrier(3)
    kinds, failures = {}, []

    def work(number, building):
        try:
            with building or contextlib.nullcontext():
                inside.wait(30)
                net = Net()
                constructed.wait(30)
            kinds[number] = isinstance(net.embed, Wrapped)
            assert net(torch.tensor([[1, 2]])).shape == (1, 2, 8)
        except BaseException as error:
            failures.append(error)

    contexts = [hijack.building(scheme), None, hijack.building(scheme)]
    workers = [threading.Thread(target=work, args=pair) for pair in enumerate(contexts)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert failures == []
    assert kinds == {0: True, 1: False, 2: True}
    assert [vars(owner)["__init__"] for owner in owners] == before


def test_contexts_nest(scheme):
    """The innermost that targets a module builds it."""

    class Rows(Bytes):
        name = "rows_test"
        targets = (nn.Embedding,)

    with hijack.building(scheme):
        outer = nn.Linear(2, 2)
        with hijack.building(Rows()):
            embed, linear = nn.Embedding(3, 2), nn.Linear(2, 2)
        assert embed.weight.scheme.name == "rows_test"
    assert [m.weight.scheme.name for m in (outer, linear)] == ["bytes_test"] * 2


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_in_vain_is_an_error_at_the_end(scheme, option, constructors):
    """If anything was constructed that it could be meant for."""
    words = rf"{option}: pattern 'block\.\*' .* did you mean 'blocks\.\*'"
    with (
        pytest.raises(ModuleError, match=words),
        hijack.building(scheme, **{option: "block.*"}),
    ):
        kept = Net()
    assert kept.embed.weight.is_meta
    with hijack.building(scheme, exclude="norm"):
        net = Net()
    assert isinstance(net.embed, Wrapped)
    with hijack.building(scheme, exclude="block.*"):
        nn.LayerNorm(2)


def test_a_refused_layer_leaves_all_of_them_alone(constructors):
    """The scheme refuses the second of three; none has become quantized by then."""

    class Picky(Bytes):
        def create_params(self, shape, dtype, device=None, /, **options):
            if shape == (3, 3):
                raise SchemeError("not this one")
            return super().create_params(shape, dtype, device, **options)

    told = []

    class Plugin:
        @hijack.hookimpl
        def hijack_init(self, module, scheme):
            told.append(module)

    registry = hijack.create_registry()
    registry.add_plugin(Plugin(), "told")
    with (
        pytest.raises(SchemeError, match="not this one"),
        hijack.building(Picky(), registry=registry),
    ):
        net = nn.Sequential(*(nn.Linear(n, n) for n in (2, 3, 4)))
    assert not any(isinstance(module, Wrapped) for module in net)
    assert told == []


# -- contexts that overlap -------------------------------------------------------------


def is_dense(module):
    """Whether a module is as its class makes it, with values."""
    return not isinstance(module, Wrapped) and not module.weight.is_meta


def test_contexts_end_in_any_order(scheme, constructors):
    """The first to begin ends first; each builds what was constructed in it."""
    first, second = hijack.building(scheme), hijack.building(scheme, exclude="*")
    first.__enter__()
    early = nn.Linear(2, 2)
    second.__enter__()
    between = nn.Linear(2, 2)
    first.__exit__(None, None, None)
    late = nn.Linear(2, 2)
    second.__exit__(None, None, None)
    assert isinstance(early, Wrapped)
    assert is_dense(between)
    assert is_dense(late)


def test_a_context_may_end_in_another_context(scheme, constructors):
    """As in a generator that is closed elsewhere; its modules get their weights."""
    building, inside = hijack.building(scheme), contextvars.copy_context()

    def begin():
        building.__enter__()
        return nn.Linear(2, 2)

    layer = inside.run(begin)
    building.__exit__(None, None, None)
    assert isinstance(layer, Wrapped)
    with hijack.building(scheme):
        assert is_dense(inside.run(nn.Linear, 2, 2))


def test_a_task_that_outlives_its_context_builds_as_usual(scheme, constructors):
    """It inherits a context that has ended, while another keeps the patch in place."""

    async def main():
        ended = asyncio.Event()

        async def child():
            await ended.wait()
            return nn.Linear(2, 2)

        with hijack.building(scheme):
            task = asyncio.create_task(child())
            await asyncio.sleep(0)
        with hijack.building(scheme):
            ended.set()
            return await task

    assert is_dense(asyncio.run(main()))


def test_what_an_inner_context_leaves_out_is_no_other_s(scheme, constructors):
    """It is initialised by its own class, with values."""
    with hijack.building(scheme), hijack.building(scheme, exclude="*"):
        layer = nn.Linear(2, 2)
    assert is_dense(layer)


def test_another_program_s_patch_is_left_alone(scheme, constructors):
    """It came while a context was open, and goes after it; ours goes then too."""
    original = vars(nn.Linear)["__init__"]
    with hijack.building(scheme):
        ours = nn.Linear.__init__

        def theirs(self, *args, **kwargs):
            ours(self, *args, **kwargs)

        nn.Linear.__init__ = theirs
    assert vars(nn.Linear)["__init__"] is theirs
    assert is_dense(nn.Linear(2, 2))
    nn.Linear.__init__ = ours
    assert is_dense(nn.Linear(2, 2))
    with hijack.building(scheme):
        layer = nn.Linear(2, 2)
    assert isinstance(layer, Wrapped)
    assert vars(nn.Linear)["__init__"] is original


def test_threads_and_tasks_at_once(scheme, constructors):
    """Each gets what it asked for, in hundreds of contexts that overlap at random."""
    failures = []

    async def build(seed):
        rng = random.Random(seed)
        for _ in range(12):
            wanted = rng.random() < 0.6
            context = hijack.building(scheme) if wanted else contextlib.nullcontext()
            with context:
                await asyncio.sleep(rng.random() / 2000)
                net = Net()
                await asyncio.sleep(rng.random() / 2000)
                if rng.random() < 0.3:
                    with hijack.building(scheme, exclude="*"):
                        await asyncio.sleep(0)
                        inner = nn.Linear(2, 2)
                    assert is_dense(inner)
            assert isinstance(net.embed, Wrapped) == wanted
            assert net(torch.tensor([[1, 2]])).shape == (1, 2, 8)
            assert is_dense(nn.Linear(2, 2))

    async def many(seed):
        await asyncio.gather(*(build(seed * 10 + n) for n in range(4)))

    def work(seed):
        try:
            asyncio.run(many(seed))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert failures == []


def test_copies_are_quantized_like_the_original(scheme, constructors):
    """Encoders copy their first layer, and no constructor runs for the copies."""
    layer = nn.TransformerEncoderLayer
    with hijack.building(scheme, exclude="*linear1"):
        net = nn.TransformerEncoder(layer(8, 2, batch_first=True), 2)
        alone = copy.deepcopy(net.layers[0].linear2)
    for part in (*net.layers, net.layers[1].linear1):
        assert not any(tensor.is_meta for tensor in part.parameters())
    assert all(isinstance(part.linear2, Wrapped) for part in net.layers)
    assert isinstance(alone, Wrapped)
    assert not isinstance(net.layers[1].linear1, Wrapped)
    assert net.layers[0].linear2.weight is not net.layers[1].linear2.weight
    assert vars(alone).keys() == vars(net.layers[0].linear2).keys()
    assert not any("call" in key for key in vars(alone) if "hook" not in key)


@pytest.mark.parametrize("include", ["*", "body"])
def test_weights_that_are_shared_stay_shared(scheme, include, constructors):
    """Quantized or left out, so that a file needs only one of them."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body = nn.Embedding(8, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 8, bias=False)
            self.head.weight = self.embed.weight

    with hijack.building(scheme, include=include):
        net = Tied()
    assert net.head.weight is net.embed.weight
    assert isinstance(net.head, Wrapped) == (include == "*")
    assert not net.head.weight.is_meta


def test_what_is_left_of_a_failed_context_is_an_ordinary_module(scheme, constructors):
    """Nothing of the context stays on it."""
    kept = []

    def build():
        with hijack.building(scheme):
            kept.append(nn.Linear(4, 4))
            raise KeyError

    with pytest.raises(KeyError):
        build()
    assert vars(kept[0]).keys() == vars(nn.Linear(4, 4)).keys()
