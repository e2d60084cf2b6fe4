"""Several LoRAs on one layer of ComfyUI's: two products, and copies that are kept."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hijack.hosts.comfyui.linear import add_low_rank
from hijack.hosts.comfyui.lora import Patches

N, K = 24, 40
CPU = torch.device("cpu")


class LoRAAdapter:
    """What ComfyUI makes of a plain LoRA: up, down, alpha, and nothing unusual."""

    def __init__(self, rank, seed):
        random = torch.Generator().manual_seed(seed)
        self.up = torch.randn(N, rank, generator=random)
        self.down = torch.randn(rank, K, generator=random)
        self.weights = (self.up, self.down, 2.0, None, None, None)

    def delta(self, strength):
        """The difference it makes to the weight, (N, K)."""
        return self.up @ self.down * strength * 2.0 / len(self.down)


@pytest.fixture(autouse=True)
def comfyui(monkeypatch):
    """The one module of ComfyUI's that says what a plain LoRA is."""
    module = types.ModuleType("comfy.weight_adapter")
    module.LoRAAdapter = LoRAAdapter
    monkeypatch.setitem(sys.modules, "comfy.weight_adapter", module)


def make(*ranks, strength=0.5):
    """Patches of one LoRA for each rank, and the difference they make together."""
    adapters = [LoRAAdapter(rank, seed) for seed, rank in enumerate(ranks)]
    entries = [(strength, adapter, 1.0, None, None) for adapter in adapters]
    delta = sum((a.delta(strength) for a in adapters), torch.zeros(N, K))
    return Patches(entries, "x.weight", (N, K)), delta


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def products(self):
        """How many matrix products ran."""
        return sum(name in ("mm", "addmm", "bmm", "linear") for name in self.names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [[(4,)], [(4, 8), (2,)], [(3,), (), (5, 1), (7,)]])
def test_any_number_of_loras_is_two_products(groups, dtype):
    """However they are grouped; the sum is theirs within rounding."""
    made = [make(*ranks, strength=i + 0.5) for i, ranks in enumerate(groups)]
    patches = [patch for patch, _ in made]
    x, output = torch.randn(2, 3, K).to(dtype), torch.randn(2, 3, N).to(dtype)
    add_low_rank(output, x, patches)
    with Operations() as seen:
        got = add_low_rank(output, x, patches)
    assert seen.products() == 2
    assert "cat" not in seen.names
    delta = sum(delta for _, delta in made)
    wanted = output.float() + F.linear(x.float(), delta)
    # each product rounds its factors and its result to the dtype
    size = F.linear(x.float().abs(), delta.abs()).max() + output.abs().max()
    bound = 8 * torch.finfo(dtype).eps * float(size) * len(groups)
    assert (got.float() - wanted).abs().max() <= bound


def test_no_lora_is_no_product():
    """Nor one whose patches are of another kind."""
    output, x, (patches, _) = torch.randn(3, N), torch.randn(3, K), make()
    with Operations() as seen:
        assert add_low_rank(output, x, []) is output
        assert add_low_rank(output, x, [patches]) is output
    assert not seen.names


def test_a_lora_that_comes_or_goes_is_noticed():
    """What was kept is of the LoRAs that were there."""
    (first, one), (second, two), (third, three) = make(4), make(2), make(3, 1)
    x, zeros = torch.randn(5, K), torch.zeros(5, N)
    for patches, delta in (
        ([first], one),
        ([first, second], one + two),
        ([first, third], one + three),
        ([second, first], one + two),
        ([first], one),
        ([first, second, third], one + two + three),
    ):
        got = add_low_rank(zeros, x, patches)
        torch.testing.assert_close(got, F.linear(x, delta))


def test_copies_are_dropped_with_those_of_their_layer():
    """All are kept by patches of the layer, and made again when they are needed."""
    patches = [make(4)[0], make(2)[0]]
    down, up = patches[0].low_rank(CPU, torch.float32, (patches[1],))
    assert (tuple(down.shape), tuple(up.shape)) == ((6, K), (N, 6))
    again, _ = patches[0].low_rank(CPU, torch.float32, (patches[1],))
    assert again is down
    for patch in patches:
        patch.drop_copies()
        assert not patch._ready
    again, _ = patches[0].low_rank(CPU, torch.float32, (patches[1],))
    assert again is not down
    assert torch.equal(again, down)


def test_copies_made_in_inference_mode_let_gradients_pass():
    """A host samples in inference mode, and somebody trains afterwards."""
    patches, _ = make(4)
    with torch.inference_mode():
        add_low_rank(torch.zeros(3, N), torch.randn(3, K), [patches])
    x = torch.randn(3, K, requires_grad=True)
    add_low_rank(torch.zeros(3, N), x, [patches]).sum().backward()
    assert x.grad is not None
