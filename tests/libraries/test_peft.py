"""PEFT: every method over quantized layers is right, or refused with a sentence."""

import contextlib
import copy
import functools
import inspect
import typing
import warnings

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

import hijack
from hijack.errors import HijackError, ReadOnlyError
from hijack.quantized import QuantizedTensor

TARGETS = ["a", "b"]


class Net(nn.Module):
    """Two layers that are quantized and adapted, and one that is neither."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


def base(dtype=torch.float32, scheme="blockwise_fp8"):
    torch.manual_seed(0)
    model = Net().to(dtype)
    hijack.wrap_model(model, scheme, include=TARGETS)
    return model


def exact(dtype=torch.float32, scheme="blockwise_fp8"):
    """The dense model with the same numbers."""
    return hijack.unwrap(base(dtype, scheme))


def language_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    hijack.wrap_model(model, "blockwise_fp8", include=["*_proj"])
    return model


def inputs(dtype=torch.float32):
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).to(dtype)


def bits(model):
    """Everything that a model computes with, as bytes."""
    state = model.state_dict()
    return {
        key: tensor.detach().reshape(-1).view(torch.uint8).clone()
        for key, tensor in state.items()
    }


def assert_same_bits(model, before):
    now = bits(model)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key], before[key]) for key in before)


def off_by(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


# -- every method ----------------------------------------------------------------------

#: Arguments that a method's configuration takes if it has such a parameter.
SIZES = {
    **{"target_modules": TARGETS, "feedforward_modules": [], "total_step": 10},
    **{"r": 4, "init_r": 4, "target_r": 2, "block_size": 8, "boft_block_size": 4},
    **{
        "num_vectors": 16,
        "vector_length": 8,
        "n_frequency": 20,
        "num_virtual_tokens": 4,
    },
    **{"num_layers": 2, "token_dim": 64, "num_attention_heads": 2},
    **{"num_transformer_submodules": 1, "adapter_len": 4, "adapter_layers": 2},
}
OWN_SIZES = {"OFT": {"r": 0, "oft_block_size": 8}, "VBLORA": {"r": 2}}


def config_of(kind, language):
    method = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = inspect.signature(method).parameters
    sizes = {**SIZES, **OWN_SIZES.get(kind.name, {})}
    if language:
        sizes |= {
            "target_modules": ["q_proj", "v_proj"],
            "task_type": TaskType.CAUSAL_LM,
        }
    given = {name: value for name, value in sizes.items() if name in known}
    return method(**given)


def adapted(kind, model, language=False):
    """A model with an adapter that does something."""
    torch.manual_seed(1)
    model = get_peft_model(model, config_of(kind, language)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.05 * noise.to(parameter.dtype)
    return model


@functools.cache
def control(kind):
    """Why PEFT itself cannot have a method around the dense model, or its output."""
    with warnings.catch_warnings():  # asked before any test runs
        warnings.simplefilter("ignore")
        try:
            with torch.no_grad():
                return adapted(kind, exact())(inputs())
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]


#: Methods for any model; the others are tried with a language model.
ANY = [k for k in PEFT_TYPE_TO_TUNER_MAPPING if not isinstance(control(k), str)]
OTHERS = [k for k in PEFT_TYPE_TO_CONFIG_MAPPING if k not in ANY]


@pytest.fixture(params=ANY, ids=lambda kind: kind.name)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    try:
        return adapted(kind, base())
    except (HijackError, ValueError) as error:
        message = str(error)
    # PEFT's own refusal names the layer, ours says what to do
    assert "scheme=blockwise_fp8" in message or "unwrap" in message
    pytest.skip(f"refused: {message[:90]}")


#: Methods that write to a copy of the weight in each forward.
WRITES = {"SHIRA"}


def test_forward_and_gradients(kind, model):
    """They are those of the decoded model, or the forward is refused."""
    x = inputs()
    if kind.name in WRITES:
        with pytest.raises(ReadOnlyError, match="unwrap"):
            model(x)
        return
    torch.testing.assert_close(model(x), control(kind), rtol=1e-5, atol=1e-5)
    dense, gradients = adapted(kind, exact()), []
    for one in (model, dense):
        one(x).square().sum().backward()
        gradients.append(
            [p.grad for p in one.parameters() if p.grad is not None and p.requires_grad]
        )
    assert len(gradients[0]) == len(gradients[1]) > 0
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_merge_is_refused_and_changes_nothing(kind, model):
    """Unless it needs no write to the weights."""
    before = bits(model)
    try:
        merged = copy.deepcopy(model).merge_and_unload()
    except (ReadOnlyError, NotImplementedError):
        assert_same_bits(model, before)
        return
    assert off_by(merged(inputs()), control(kind)) < 1e-5


def test_a_merge_that_is_asked_for_rounds(kind, model):
    """To numbers of the scheme, and to nothing else."""
    with hijack.requantizing():
        try:
            merged = copy.deepcopy(model).merge_and_unload()
        except (ReadOnlyError, NotImplementedError) as error:
            pytest.skip(f"refused: {str(error)[:90]}")
    assert off_by(merged(inputs()), control(kind)) < 0.1
    assert isinstance(merged.a.weight, QuantizedTensor)


def test_unload_gives_the_base_bit_for_bit(kind, model):
    """Nothing of an adapter stays."""
    unloaded = model.unload() if hasattr(model, "unload") else model
    assert_same_bits(unloaded, bits(base()))


def test_a_dense_merge_is_exact(kind):
    """After ``hijack.unwrap``, which is always possible."""
    with contextlib.suppress(HijackError, ValueError):
        model = adapted(kind, base())
        hijack.unwrap(model)
        with torch.no_grad():
            torch.testing.assert_close(
                model(inputs()), control(kind), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.name)
def test_methods_for_language_models(kind):
    """Those that want more of a model than layers."""
    tokens = torch.arange(1, 9)[None]
    try:
        dense = adapted(kind, hijack.unwrap(language_model()), language=True)
        with torch.no_grad():
            wanted = dense(input_ids=tokens).logits
    except Exception as error:
        pytest.skip(f"the dense model fails: {type(error).__name__}: {error}"[:120])
    model = adapted(kind, language_model(), language=True)
    with torch.no_grad():
        got = model(input_ids=tokens).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


# -- LoRA in all its variants ----------------------------------------------------------


def initialisations():
    hints = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    names = [n for hint in typing.get_args(hints) for n in typing.get_args(hint)]
    return [*(name.partition("[")[0] for name in names), "pissa_niter_4"]


FLAGS = [
    name
    for name, parameter in inspect.signature(LoraConfig).parameters.items()
    if parameter.default is False and name != "inference_mode"
]
VARIANTS = {
    **{f"init {name}": {"init_lora_weights": name} for name in initialisations()},
    **{name: {name: True} for name in FLAGS},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora(variant):
    """Those that change the weight at the start are refused, all others are exact."""

    def make(model):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=TARGETS, **VARIANTS[variant])
        return get_peft_model(model, config)

    try:
        dense = make(exact())
        wanted = dense(inputs())
    except Exception as error:
        pytest.skip(f"the dense model fails: {type(error).__name__}: {error}"[:120])
    try:
        got = make(base())(inputs())
    except ReadOnlyError as error:
        message = str(error)
        with hijack.requantizing():  # the rest of the weight, rounded
            model = make(base())
        assert "unwrap" in message
        assert off_by(model(inputs()), base()(inputs())) < 0.1
        return
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["blockwise_fp8", "nvfp4", "nf4", "int8", "w4a8"])
@pytest.mark.parametrize("upcast", [True, False])
def test_adapters_have_the_compute_dtype(scheme, upcast):
    """Their first numbers are those of a dense model, not rounded to FP8."""
    pairs = []
    for build in (base, exact):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=TARGETS)
        pairs.append(
            get_peft_model(
                build(torch.bfloat16, scheme), config, autocast_adapter_dtype=upcast
            )
        )
    expected = torch.float32 if upcast else torch.bfloat16
    for (name, got), (_, wanted) in zip(
        *(model.named_parameters() for model in pairs), strict=True
    ):
        if "lora_" in name:
            assert got.dtype == expected
            assert torch.equal(got, wanted)
    x = inputs(torch.bfloat16)
    torch.testing.assert_close(pairs[0](x), pairs[1](x), rtol=0.02, atol=0.02)


class Mixed(nn.Module):
    """An embedding and convolutions."""

    def __init__(self):
        super().__init__()
        self.emb, self.conv1 = nn.Embedding(16, 64), nn.Conv1d(64, 64, 3, padding=1)
        self.conv2, self.out = nn.Conv2d(4, 8, 3), nn.Linear(64, 8)

    def forward(self, tokens):
        hidden = self.conv1(self.emb(tokens).transpose(1, 2)).transpose(1, 2)
        return self.out(hidden).sum() + self.conv2(hidden.reshape(1, 4, -1, 16)).sum()


@pytest.mark.parametrize("dora", [False, True])
def test_layers_of_other_kinds_are_adapted(dora):
    """Their adapters are made by the class of the layer."""
    names = ["emb", "conv1", "conv2", "out"]
    results = []
    for dense in (False, True):
        torch.manual_seed(0)
        model = Mixed()
        hijack.wrap_model(model, "blockwise_fp8", include=names)
        before = bits(model)
        if dense:
            hijack.unwrap(model)
        torch.manual_seed(1)
        config = LoraConfig(
            r=4, target_modules=names, use_dora=dora, init_lora_weights=False
        )
        adapted = get_peft_model(model, config)
        adapted(torch.arange(16)[None]).backward()
        trained = [p.grad for p in adapted.parameters() if p.requires_grad]
        results.append(trained)
        if not dense:
            assert_same_bits(adapted.unload(), before)
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


# -- several adapters, files -----------------------------------------------------------


def lora(model, **kwargs):
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **kwargs)
    torch.manual_seed(4)
    return get_peft_model(model, config)


def test_adapters_are_added_set_weighted_and_deleted():
    """Each step computes what the dense model computes."""
    model, dense = lora(base()), lora(exact())
    steps = (
        lambda m: m.add_adapter("second", copy.deepcopy(m.peft_config["default"])),
        lambda m: m.set_adapter("second"),
        lambda m: m.add_weighted_adapter(["default", "second"], [0.5, 2.0], "sum"),
        lambda m: m.set_adapter("sum"),
        lambda m: m.base_model.set_adapter(["default", "second"]),
        lambda m: m.delete_adapter("second"),
    )
    for step in steps:
        for one in (model, dense):
            torch.manual_seed(5)
            step(one)
        torch.testing.assert_close(
            model(inputs()), dense(inputs()), rtol=1e-5, atol=1e-5
        )
    with model.disable_adapter():
        torch.testing.assert_close(model(inputs()), base()(inputs()))


def test_adapters_are_saved_and_loaded(tmp_path):
    """Into a new quantized base, a dense one, and beside another adapter."""
    model, before = lora(base()), bits(base())
    model.save_pretrained(tmp_path / "lora")
    wanted = model(inputs())
    again = PeftModel.from_pretrained(base(), tmp_path / "lora")
    dense = PeftModel.from_pretrained(exact(), tmp_path / "lora")
    beside = lora(base())
    beside.load_adapter(tmp_path / "lora", "loaded")
    beside.set_adapter("loaded")
    for one in (again, dense, beside):
        torch.testing.assert_close(one(inputs()), wanted, rtol=1e-5, atol=1e-5)
    assert_same_bits(again.unload(), before)


def test_training_changes_adapters_alone():
    """A step gives what it gives over the dense model."""
    results = []
    for model in (lora(base()), lora(exact())):
        frozen = bits(model.get_base_model().head)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs()).square().mean().backward()
            optimizer.step()
        assert_same_bits(model.get_base_model().head, frozen)
        results.append(model(inputs()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_an_unmerge_has_to_be_asked_for_too():
    """It rounds as well, and does not give back what was before."""
    model = lora(base())
    with hijack.requantizing():
        model.merge_adapter()
        merged = copy.deepcopy(model)
        model.unmerge_adapter()
    with pytest.raises(ReadOnlyError, match="requantizing"):
        merged.unmerge_adapter()
    with model.disable_adapter():
        assert 0 < off_by(model(inputs()), base()(inputs())) < 0.1


def test_a_merge_with_what_is_no_number_is_refused():
    """int8 would store it as a number."""
    for scheme in ("blockwise_fp8", "int8"):
        model = lora(base(scheme=scheme))
        model.base_model.model.a.lora_B["default"].weight.data.fill_(float("nan"))
        with hijack.requantizing(), pytest.raises((HijackError, ValueError)):
            model.merge_adapter()


def test_training_a_quantized_weight_is_refused():
    """By ``modules_to_save``, and by hand."""
    config = LoraConfig(r=4, target_modules=["a"], modules_to_save=["b"])
    with pytest.raises(ReadOnlyError, match="cannot train"):
        get_peft_model(base(), config)
    with pytest.raises(ReadOnlyError, match="cannot train"):
        base().requires_grad_(True)


def test_layers_that_are_dense_can_be_saved_whole():
    """``modules_to_save`` on one beside quantized ones."""
    config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["head"])
    model = get_peft_model(base(), config)
    model(inputs()).sum().backward()
    assert model.base_model.model.head.modules_to_save.default.weight.grad is not None


# -- adapters first --------------------------------------------------------------------


def test_wrapping_after_adapters_finds_layers_by_their_names():
    """And leaves adapters dense, whatever the patterns say."""
    torch.manual_seed(0)
    plain = Net()
    wanted = lora(copy.deepcopy(plain))
    hijack.wrap_model(plain, "blockwise_fp8", include=["a", "b"])
    inside = "base_model.model"
    for kwargs in (
        {"include": ["a", "b"]},
        {"exclude": ["head"]},
        {"include": [f"{inside}.a.base_layer", f"{inside}.b*"]},
    ):
        model = copy.deepcopy(wanted)
        report = hijack.wrap_model(model, "blockwise_fp8", **kwargs)
        assert report.layers == (f"{inside}.a.base_layer", f"{inside}.b.base_layer")
        assert "adapter" in report.skipped[f"{inside}.a.lora_A.default"]
        torch.testing.assert_close(
            model(inputs()), lora(copy.deepcopy(plain))(inputs())
        )
        assert_same_bits(model.unload(), bits(plain))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer."])
@pytest.mark.parametrize("inject", [False, True])
def test_a_base_loads_under_its_adapters(prefix, inject, tmp_path):
    """Its names are found inside of them; the adapters stay."""
    from safetensors.torch import load_file, save_file

    path = tmp_path / "base.safetensors"
    hijack.save(base(), path)
    renamed = {prefix + key: tensor for key, tensor in load_file(path).items()}
    save_file(renamed, path)
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    torch.manual_seed(9)
    other = Net()
    if inject:
        torch.manual_seed(4)
        model = inject_adapter_in_model(config, other)
    else:
        model = lora(other)
    report = hijack.load(model, path)
    assert len(report.layers) == 2
    assert len(report.forwards()) == 2
    assert all(name.endswith("base_layer") for name in report.layers)
    torch.testing.assert_close(model(inputs()), lora(base())(inputs()))


def test_saving_a_model_with_adapters_loses_none(tmp_path):
    """They are in the file under their names, and load again."""
    path, model = tmp_path / "all.safetensors", lora(base())
    hijack.save(model, path)
    again = lora(Net())
    hijack.load(again, path)
    torch.testing.assert_close(again(inputs()), model(inputs()))
    with pytest.raises(HijackError, match="lora_A"):
        hijack.load(Net(), path)
