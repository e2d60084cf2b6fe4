"""Which layers are quantized: patterns, usual ones of a model, and rules."""

import pytest
import torch
from torch import nn

from hijack import selection
from hijack.errors import CheckpointError
from hijack.layer_kinds import delicate, guess_owners, not_a_target
from hijack.model_families import ModelFamily
from hijack.safetensors_io.header import Header, TensorInfo
from hijack.selection import Rule
from schemes.blockwise_fp8 import SCHEME

MODEL = ("blocks.0.ffn.0", "blocks.0.ffn.2", "blocks.1.ffn.0", "blocks.1.attn", "head")
KNOWN = ("blocks.0.q", "blocks.0.k", "blocks.0.ffn.0", "blocks.0.mod", "head")
ALL = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TOY = ModelFamily("Toy", ("blocks.*",), ("*.mod",), "its makers", ())


def header(*layers, **others):
    """A checkpoint of layers with 2-D weights, and others of given infos."""
    infos = {f"{layer}.weight": TensorInfo("BF16", (8, 64)) for layer in layers}
    infos |= {f"{layer}.weight": info for layer, info in others.items()}
    return Header(infos, source="m.safetensors")


def choose(header, *patterns, targets=ALL, **words):
    """Choose for a scheme that quantizes all there is."""
    return selection.choose(header, targets, *patterns, **words)


def sizes(choice):
    """Layer to block size, None where no rule gives one."""
    return {layer: own.get("block_size") for layer, own in choice.layers.items()}


@pytest.fixture
def known(monkeypatch):
    """A header of a model whose usual patterns are known."""
    monkeypatch.setattr(selection, "detect_family", lambda keys: TOY)
    return header(*KNOWN)


#: A layer of many a model, the shape of its weight, and what it looks like.
DELICATE = {
    "embeddings.word_embeddings": ((30522, 384), "an embedding"),
    "embeddings.position_embeddings": ((512, 384), "a positional table"),
    "token_embedding": ((256384, 4096), "an embedding"),
    "blocks.0.pos_embedding.embedding": ((32, 64), "a positional table"),
    "model.embed_tokens": ((1000, 64), "an embedding"),
    "x_embedder": ((64, 64), "an embedding"),
    "t_embedder.mlp.0": ((64, 64), "an embedding"),
    "shared": ((32128, 64), "an embedding"),
    "mask_decoder.mask_tokens": ((4, 256), "an embedding"),
    "wpe": ((1024, 64), "an embedding"),
    "position_table": ((1024, 64), "a positional table"),
    "block.0.layer.0.SelfAttention.relative_attention_bias": (
        (32, 8),
        "a positional table",
    ),
    "blocks.0.norm1.linear": ((192, 64), "a norm or its modulation"),
    "blocks.0.adaLN_modulation.1": ((192, 64), "a norm or its modulation"),
    "blocks.0.img_mod.lin": ((192, 64), "a norm or its modulation"),
    "scale_shift_table": ((6, 64), "a norm or its modulation"),
    "lm_head": ((1000, 64), "a head"),
    "proj_out": ((64, 64), "a head"),
    "final_layer.linear": ((64, 64), "a head"),
    "model.layers.61.shared_head.head": ((1000, 64), "a head"),
    "mask_decoder.iou_head.layers.0": ((64, 64), "a head"),
    "cls.predictions.transform.dense": ((384, 384), "a head"),
    "vocab_projector": ((30522, 384), "a head"),
    "text_projection": ((64, 64), "a head"),
    "output_blocks.3.1.proj_in": ((64, 64), None),
    "blocks.0.to_heads": ((64, 64), None),
    "pooler.dense": ((384, 384), "a head"),
    "model.layers.3.mlp.gate": ((128, 2048), "a router"),
    "layers.3.block_sparse_moe.router.layer": ((8, 2048), "a router"),
    "model.layers.3.mlp.shared_expert_gate": ((1, 2048), "a router"),
    "layers.0.per_layer_input_gate": ((2560, 2048), None),
    "layers.0.mlp.shared_experts.up_proj": ((64, 64), None),
    "layers.3.router": ((8, 2048), "a router"),
    "blocks.0.ffn.gate.0": ((10240, 4096), None),
    "model.layers.3.mlp.gate_proj": ((11008, 4096), None),
    "encoder.layer.0.attention.output.dense": ((384, 384), None),
    "blocks.0.attn.to_out.0": ((64, 64), None),
    "transformer_blocks.0.ff.net.2": ((64, 256), None),
    "model.layers.0.self_attn.o_proj": ((64, 64), None),
    "blocks.7.modality_proj": ((64, 64), None),
    "blocks.0.mlp.fc1": ((256, 64), None),
}


@pytest.mark.parametrize("layer", DELICATE)
def test_the_delicate_layers_of_an_unknown_model_are_known_by_name(layer):
    """Embeddings, positions, norms, heads and routers; inner products are none."""
    shape, kind = DELICATE[layer]
    assert delicate(layer, shape) == kind


def test_the_delicate_layers_of_an_unknown_model_stay_dense_unless_named():
    """A pattern or a rule with a block size names them; what is left is told."""
    model = header("a.fc", "a.norm.linear", "lm_head")
    assert list(choose(model).layers) == ["a.fc"]
    assert list(choose(model, include="*").layers) == [
        "a.fc",
        "a.norm.linear",
        "lm_head",
    ]
    assert sizes(choose(model, rules=["lm_head=8x64"])) == {
        "a.fc": None,
        "lm_head": (8, 64),
    }


# -- patterns --------------------------------------------------------------------------


def test_the_inner_matrices_of_a_model_nobody_knows_are_quantized():
    """Other weights are left, and why is said of those that are not vectors."""
    found = choose(
        header(
            *MODEL,
            norm=TensorInfo("BF16", (8,)),
            conv=TensorInfo("BF16", (8, 4, 3, 3)),
            codes=TensorInfo("I8", (8, 8)),
            none=TensorInfo("BF16", (0, 8)),
        )
    )
    assert list(found.layers) == list(MODEL[:-1])
    assert found.family is None
    assert found.skipped == {
        "head": "the model is not known, and it looks like a head",
        "conv": "4 dimensions",
        "codes": "dtype I8",
        "none": "empty",
    }


def test_a_known_model_is_quantized_as_is_usual_for_it(known):
    """None in place of patterns takes the architecture's."""
    found = choose(known)
    assert found.family is TOY
    assert list(found.layers) == list(KNOWN[:3])
    usual = "not usual for Toy"
    assert found.skipped == {"blocks.0.mod": usual, "head": usual}


def test_the_usual_patterns_can_be_replaced_or_extended(known):
    """An empty list is none; the word default stands for them."""
    assert list(choose(known, exclude=()).layers) == list(KNOWN[:4])
    assert list(choose(known, include="*", exclude=()).layers) == list(KNOWN)
    more = choose(known, exclude=["default", "*.ffn.*"])
    assert list(more.layers) == list(KNOWN[:2])
    assert more.skipped["blocks.0.ffn.0"] == "excluded"
    wider = choose(known, include=["default", "head"], exclude=[])
    assert list(wider.layers) == list(KNOWN)
    assert choose(known, include="head").skipped["blocks.0.q"] == "not included"


def test_what_patterns_replace_is_told(known):
    """Unless default is among them, or they hold all that is usual."""
    assert choose(known).replaced == {}
    assert choose(known, exclude="head").replaced == {"exclude": ("*.mod",)}
    assert choose(known, include="head").replaced == {"include": ("blocks.*",)}
    for patterns in (["default", "head"], ["head", "*.mod"], []):
        assert choose(known, exclude=patterns).replaced == {}


def test_the_word_default_is_no_pattern_of_an_unknown_model():
    """There it stands for what is done without patterns."""
    usual = list(choose(header(*MODEL)).layers)
    assert list(choose(header(*MODEL), include="default").layers) == usual
    assert list(choose(header(*MODEL), exclude="default").layers) == usual
    everything = choose(header(*MODEL), include=["default", "head"])
    assert list(everything.layers) == list(MODEL)


def test_weights_of_more_dimensions_must_be_named(known):
    """By a pattern that is given, not by one that is usual."""
    conv = TensorInfo("BF16", (8, 4, 3, 3))
    model = header(*KNOWN, **{"blocks.0.conv": conv})
    assert choose(model).skipped["blocks.0.conv"] == "4 dimensions"
    assert "blocks.0.conv" in choose(model, include="blocks.*").layers
    assert "blocks.0.conv" in choose(model, include=["default", "*.conv"]).layers


# -- rules -----------------------------------------------------------------------------


def test_the_first_rule_that_matches_counts():
    """A pattern matches a layer, and the layers below a module."""
    rules = ["blocks.0.ffn.2=row", "blocks.*.ffn=128x128", "blocks.1.attn=skip"]
    found = choose(header(*MODEL), rules=rules)
    assert sizes(found) == {
        "blocks.0.ffn.0": (128, 128),
        "blocks.0.ffn.2": "row",
        "blocks.1.ffn.0": (128, 128),
    }
    assert found.skipped["blocks.1.attn"] == "rule blocks.1.attn=skip"


def test_a_pattern_does_not_match_a_part_of_a_name():
    """``ffn`` is not ``ffn_norm``."""
    assert not Rule.parse("blocks.*.ffn=64").matches("blocks.0.ffn_norm")
    assert Rule.parse("blocks.*.ffn=64").matches("blocks.0.ffn.2.inner")


def test_a_rule_may_say_the_dtype_of_a_dense_layer():
    """Of any layer with a floating weight; its own dtype is no change."""
    rules = ["head=f32", "norm=f32", "blocks.0=bf16"]
    found = choose(header(*MODEL, norm=TensorInfo("F16", (8,))), rules=rules)
    assert found.casts == {"head": torch.float32, "norm": torch.float32}
    assert list(found.layers) == ["blocks.1.ffn.0", "blocks.1.attn"]
    assert found.skipped["blocks.0.ffn.2"] == "rule blocks.0=bf16"
    codes = header(*MODEL, codes=TensorInfo("I8", (8, 8)))
    with pytest.raises(CheckpointError, match=r"codes: is I8, expected a dense float"):
        choose(codes, rules="codes=bf16")


@pytest.mark.parametrize(
    "text", ["", "blocks.*", "=row", "blocks=", "a=1x2x3", "a=int8"]
)
def test_rules_that_say_nothing_are_refused(text):
    """With what was expected."""
    with pytest.raises(CheckpointError, match="expected PATTERN=SIZE such as"):
        choose(header(*MODEL), rules=[text])


def test_an_error_names_layers_that_would_be_quantized(known):
    """They are what a rule or a pattern should have been for."""
    model = header("head", *KNOWN[:4], norm=TensorInfo("BF16", (8,)))
    with pytest.raises(
        CheckpointError, match=r"are such as blocks\.0\.q, blocks\.0\.k"
    ):
        choose(model, rules="bloks.*=row")
    norm_first = Header(dict(reversed(model.tensors.items())), source="m.safetensors")
    with pytest.raises(CheckpointError, match=r"are such as blocks\.0\.mod, blocks"):
        choose(norm_first, include="bloks.*")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            ["bloks.*=row"],
            r"'bloks\.\*=row', of m\.safetensors, matches no layer; layers",
        ),
        (["head=row", "head=skip"], "'head=skip'.* none of the 1 layers it matches"),
        (["blocks.1=row"], r"'blocks\.1=row'.* none of the 2 .*they stay dense"),
    ],
)
def test_rules_that_are_in_vain_are_refused(rules, message):
    """They match nothing, come too late, or name layers that stay dense."""
    with pytest.raises(CheckpointError, match=message):
        choose(header(*MODEL), exclude="blocks.1.*", rules=rules)


def test_patterns_may_come_from_an_iterator(known):
    """They are gone through more than once, and none is lost."""
    choice = choose(known, iter(["blocks.*"]), iter(["*.mod", "*.ffn.0"]))
    assert list(choice.layers) == ["blocks.0.q", "blocks.0.k"]


@pytest.mark.parametrize("option", ["include", "exclude", "rules"])
@pytest.mark.parametrize("value", [3, [None], b"blocks.*", [b"blocks.*"]])
def test_patterns_that_are_no_texts_are_refused(option, value):
    """The error names the option."""
    name = option.removesuffix("s")
    with pytest.raises(CheckpointError, match=f"^{name}: got .*, expected a text"):
        choose(header(*MODEL), **{option: value})


def test_a_rule_does_not_include_what_is_excluded(known):
    """One for everything leaves dense what is usually dense."""
    found = choose(known, rules="*=128x128")
    assert list(found.layers) == list(KNOWN[:3])
    assert set(sizes(found).values()) == {(128, 128)}


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_patterns_that_are_in_vain_are_refused(option):
    """A pattern that matches nothing is a typo, or meant for another model."""
    with pytest.raises(
        CheckpointError,
        match=rf"{option}: pattern 'bloks\.\*' matches no layer of m\.safetensors; "
        r"layers are such as blocks\.\d\.",
    ):
        choose(header(*MODEL), **{option: ["blocks.0.*", "bloks.*"]})


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("bloks.*", "blocks.*"),
        ("blocks.0", "blocks.0.*"),
        ("blocks.0.ffn.0.weight", "blocks.0.ffn.0"),
        ("*.fnn.*", "*.ffn.*"),
        ("ffn.0", "*.ffn.0"),
        ("zzz", None),
    ],
)
@pytest.mark.parametrize("option", ["include", "exclude", "rules"])
def test_the_pattern_that_was_meant_is_guessed(option, pattern, meant):
    """A guess is shown only if it matches a layer."""
    words = {option: f"{pattern}=skip" if option == "rules" else pattern}
    names = ["blocks.0.ffn.0", "blocks.1.attn.q"]
    if option == "rules" and pattern == "blocks.0":
        return  # a rule means the layers of a module too
    with pytest.raises(CheckpointError) as caught:
        choose(header(*names), **words)
    hint = str(caught.value).partition("; did you mean ")[2]
    assert hint == ("" if meant is None else f"{meant!r}?")


def test_nothing_left_to_quantize_is_refused():
    """With the reasons, and how many layers each has."""
    with pytest.raises(CheckpointError, match=r"left to quant.* 5 .*: excluded \(5\)"):
        choose(header(*MODEL), exclude="*")


# -- types of modules ------------------------------------------------------------------


def test_layers_of_no_target_stay_dense():
    """What a file does not say is guessed from shape and name."""
    model = header("embed_tokens", "blocks.0.q", conv=TensorInfo("BF16", (8, 4, 3, 3)))
    linear = choose(model, include="*", targets=(nn.Linear,))
    assert list(linear.layers) == ["blocks.0.q"]
    assert linear.skipped == {
        "embed_tokens": "looks like Embedding; the scheme quantizes Linear",
        "conv": "looks like Conv2d; the scheme quantizes Linear",
    }
    table = choose(model, targets=(nn.Embedding,))
    assert list(table.layers) == ["embed_tokens"]
    everything = choose(model, include="*")
    assert list(everything.layers) == ["embed_tokens", "blocks.0.q", "conv"]


@pytest.mark.parametrize(
    ("name", "biased", "owner"),
    [
        ("model.embed_tokens", False, nn.Embedding),
        ("model.embed_tokens._orig_mod", False, nn.Embedding),
        ("block.0.SelfAttention.relative_attention_bias", False, nn.Embedding),
        ("text_model.embeddings.token_embedding", False, nn.Embedding),
        ("shared", False, nn.Embedding),
        ("transformer.wte", False, nn.Embedding),
        ("visual.pos_embed", False, nn.Embedding),
        ("y_embedder.embedding_table", False, nn.Embedding),
        ("text_embedding.0", True, nn.Linear),
        ("time_embedding", True, nn.Linear),
        ("t_embedder.mlp.0", False, nn.Linear),
        ("x_embedder", False, nn.Linear),
        ("blocks.0.attn.to_q", False, nn.Linear),
        ("", False, nn.Linear),
    ],
)
def test_embeddings_are_told_by_their_names(name, biased, owner):
    """By the last word of it; an embedding has no bias."""
    assert guess_owners(name, 2, biased) == (owner,)


def test_subclasses_and_types_nobody_can_guess_are_targets():
    """A scheme for modules of its own may own any weight."""

    class Own(nn.Linear):
        pass

    class Unheard(nn.Module):
        pass

    linear = guess_owners("a", 2, False)
    assert not_a_target(linear, (Own,)) is None
    assert not_a_target(linear, (nn.Conv2d, Unheard)) is None
    assert not_a_target(linear, (nn.Module,)) is None
    assert not_a_target(guess_owners("a", 4, True), (nn.ConvTranspose2d,)) is None
    assert not_a_target(guess_owners("a", 6, True), (nn.Linear,)) is not None
    assert not_a_target(linear, (nn.Embedding, nn.Conv2d)) == (
        "looks like Linear; the scheme quantizes Embedding, Conv2d"
    )


# -- in ComfyUI ------------------------------------------------------------------------


def test_a_model_in_comfyui_gets_the_layers_of_a_file():
    """Of every family that is known, and of one that is not."""
    from hijack.hosts.comfyui.lazy_tensor import LazyTensor
    from hijack.hosts.comfyui.quantize import Quantizer, Recipe
    from hijack.model_families import model_families
    from hijack.quantized import QuantizationConfig

    endings = ("to_q", "norm_q", "img_mod.1", "mlp.0", "modulation.lin", "head", "emb")
    unknown = ModelFamily("", ("blocks.*",), (), "", ("blocks.0.own",))
    for family in (*model_families(), unknown):
        stems = {pattern.strip("*.") for pattern in family.include}
        names = {f"{stem}.0.{end}" for stem in stems for end in endings}
        names |= set(family.signature)
        model = header(*sorted(names))
        expected = choose(model, targets=(nn.Linear,)).layers
        tensors = {
            key: LazyTensor(info.shape, torch.bfloat16, lambda: None)
            for key, info in model.tensors.items()
        }
        quantizer = Quantizer(Recipe(QuantizationConfig.of(SCHEME, {})), None)
        marked = quantizer.mark(tensors, "model")
        quantized = {key for key, lazy in marked.items() if lazy.quantize is not None}
        assert quantized == {f"{layer}.weight" for layer in expected}
        assert quantizer.total == len(expected)
