"""Which layers are quantized: patterns, usual ones of a model, and rules."""

import pytest
import torch

import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from hijack.checkpoint import quantize_choice
from hijack.checkpoint.quantize_choice import Rule, choose
from hijack.errors import CheckpointError
from hijack.model_families import Architecture
from hijack.safetensors_io.header import Header, TensorInfo

MODEL = ("blocks.0.ffn.0", "blocks.0.ffn.2", "blocks.1.ffn.0", "blocks.1.attn", "head")
KNOWN = ("blocks.0.q", "blocks.0.k", "blocks.0.ffn.0", "blocks.0.mod", "head")
TOY = Architecture("Toy", ("blocks.*",), ("*.mod",), "its makers", ())


def header(*layers, **others):
    """A checkpoint of layers with 2-D weights, and others of given infos."""
    infos = {f"{layer}.weight": TensorInfo("BF16", (8, 64)) for layer in layers}
    infos |= {f"{layer}.weight": info for layer, info in others.items()}
    return Header(infos, source="m.safetensors")


def sizes(choice):
    """Layer to block size, None where no rule gives one."""
    return {layer: own.get("block_size") for layer, own in choice.layers.items()}


@pytest.fixture
def known(monkeypatch):
    """A header of a model whose usual patterns are known."""
    monkeypatch.setattr(quantize_choice, "detect_architecture", lambda header: TOY)
    return header(*KNOWN)


# -- patterns --------------------------------------------------------------------------


def test_every_matrix_of_a_model_nobody_knows_is_quantized():
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
    assert list(found.layers) == list(MODEL)
    assert found.architecture is None
    assert found.skipped == {
        "conv": "4 dimensions",
        "codes": "dtype I8",
        "none": "empty",
    }


def test_a_known_model_is_quantized_as_is_usual_for_it(known):
    """None in place of patterns takes the architecture's."""
    found = choose(known)
    assert found.architecture is TOY
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
    assert list(choose(header(*MODEL), include="default").layers) == list(MODEL)
    assert list(choose(header(*MODEL), exclude="default").layers) == list(MODEL)


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
        "head": None,
    }
    assert found.skipped == {"blocks.1.attn": "rule blocks.1.attn=skip"}


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


def test_a_rule_does_not_include_what_is_excluded(known):
    """One for everything leaves dense what is usually dense."""
    found = choose(known, rules="*=128x128")
    assert list(found.layers) == list(KNOWN[:3])
    assert set(sizes(found).values()) == {(128, 128)}


def test_patterns_that_are_in_vain_are_refused():
    """Those of include; exclude may name what another model has."""
    with pytest.raises(CheckpointError, match=r"pattern 'bloks\.\*' matches no layer"):
        choose(header(*MODEL), include="bloks.*")
    with pytest.raises(CheckpointError, match=r"left to quant.* 5 .*: excluded \(5\)"):
        choose(header(*MODEL), exclude="*")
    assert choose(header(*MODEL), exclude="bloks.*").layers.keys() == set(MODEL)
