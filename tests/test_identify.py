"""identify: claims weighed, evidence kept, nothing ignored."""

import json

import pytest
import torch

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from hijack.checkpoint.identify import identify
from hijack.errors import AmbiguousError

FP8 = torch.float8_e4m3fn


class Claimant(hijack.Scheme):
    """Claims every layer that has a tensor named after it."""

    name = "claimant"
    certainty = hijack.Certainty.UNIQUE

    def quantize(self, weight, **options):
        """Not used here."""
        return weight, {self.name: weight}

    def dequantize(self, qdata, params, dtype):
        """Not used here."""
        return qdata.to(dtype)

    def match(self, header):
        """Claim with the certainty of the class."""
        for layer in header.layers():
            keys = {"weight": f"{layer}.weight", "mark": f"{layer}.mark"}
            if keys["mark"] in header.tensors:
                yield hijack.Claim(layer, self.name, "d", keys, None, self.certainty)


class Rival(Claimant):
    """The same claims under another name."""

    name = "rival"


class Surer(Claimant):
    """The same claims with a marker behind them."""

    name = "surer"
    certainty = hijack.Certainty.MARKED


def registry_of(*schemes):
    """A registry that knows only these."""
    registry = hijack.create_registry()
    for scheme in schemes:
        registry.register(scheme)
    return registry


def header(**tensors):
    """A header of tensors whose dots are written as two underscores."""
    named = {key.replace("__", "."): tensor for key, tensor in tensors.items()}
    return hijack.Header.from_state_dict(named)


def test_the_better_founded_claim_wins():
    """A marked claim beats one from key names."""
    found = identify(
        header(a__weight=torch.ones(2, 2), a__mark=torch.ones(1)),
        registry_of(Claimant(), Surer()),
    )
    assert found.claims()["a"].scheme == "surer"


def test_equal_claims_of_two_schemes_are_ambiguous():
    """The error names the layer, both schemes, and what to do."""
    found = identify(
        header(a__weight=torch.ones(2, 2), a__mark=torch.ones(1)),
        registry_of(Claimant(), Rival()),
    )
    assert set(found.ambiguous) == {"a"}
    assert found.layers == {}
    with pytest.raises(AmbiguousError, match=r"a: .*claimant, rival.*HIJACK_DISABLE"):
        found.claims()


MUSUBI = {
    "block": ((64, 2, 1), (1, 64)),
    "row": ((64, 1), (1, 128)),
    "tensor": ((), (64, 128)),
}


@pytest.mark.parametrize("kind", MUSUBI)
def test_musubi_scales_tell_the_block_size(kind):
    """Each of the three shapes gives its block size and its evidence."""
    shape, block_size = MUSUBI[kind]
    found = identify(
        header(x__weight=torch.ones(64, 128).to(FP8), x__scale_weight=torch.ones(shape))
    )
    claim = found.claims()["x"]
    assert (claim.scheme, claim.dialect) == ("blockwise_fp8", "musubi")
    assert claim.block_size == block_size
    assert "scale_weight" in claim.evidence[0]


def test_a_grid_that_does_not_divide_is_not_claimed():
    """The block size is never guessed: the scale is an orphan instead."""
    found = identify(
        header(x__weight=torch.ones(192, 256).to(FP8), x__weight_scale=torch.ones(5, 2))
    )
    assert found.layers == {}
    assert found.orphans == ("x.weight_scale",)
    assert found.unscaled == ("x",)


def test_layers_of_comfyui_are_named_and_left_alone():
    """A comfy_quant marker belongs to ComfyUI, and its scales are no orphans."""
    marker = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    found = identify(
        header(
            n__weight=torch.ones(4, 4).to(FP8),
            n__weight_scale=torch.tensor(1.0),
            n__input_scale=torch.tensor(1.0),
            n__comfy_quant=marker,
        )
    )
    assert found.native == ("n",)
    assert found.layers == {}
    assert found.orphans == ()


def test_scales_of_nobody_are_orphans_and_plain_casts_are_not():
    """A scale without a weight is reported; FP8 without a scale is only noted."""
    found = identify(
        header(a__weight_scale_inv=torch.ones(1), b__weight=torch.ones(2, 2).to(FP8))
    )
    assert found.orphans == ("a.weight_scale_inv",)
    assert found.unscaled == ("b",)


def test_a_dense_checkpoint_claims_nothing():
    """Ordinary weights, biases and norms are nobody's."""
    found = identify(header(a__weight=torch.ones(2, 2), a__bias=torch.ones(2)))
    assert (found.layers, found.orphans, found.unscaled) == ({}, (), ())


def test_the_report_is_json():
    """Every claim is there with its keys and evidence."""
    found = identify(
        header(x__weight=torch.ones(4, 4).to(FP8), x__scale_weight=torch.ones(4, 1))
    )
    report = json.loads(found.to_json())
    assert report["layers"]["x"]["block_size"] == [1, 4]
    assert report["layers"]["x"]["keys"]["scale_weight"] == "x.scale_weight"
    assert found.groups() == [("blockwise_fp8", "musubi", "1x4", 1)]
