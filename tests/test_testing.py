"""The conformance kit finds each broken scheme; each of its assertions can fail."""

import ast
import dataclasses
import inspect
import math
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from hijack import testing
from hijack.testing import SchemeConformance, realistic_weight, registered, sqnr_db
from hijack.testing import tensors as _conformance
from hijack.testing.subjects import SUBJECTS
from tests import broken_schemes as broken


@dataclasses.dataclass(frozen=True)
class Case:
    """A defect, and the tests of the kit that find it."""

    scheme: type[hijack.Scheme]
    fails: frozenset[str]
    patch: Callable | None = None


def _case(scheme, *fails, patch=None):
    return Case(scheme, frozenset("test_" + name for name in fails), patch)


#: Every test that needs a module of a target type.
MODULE_TESTS = (
    "born_quantized",
    "compile_inside_a_parent",
    "deepcopy_is_independent",
    "file_round_trip",
    "forward_uses_the_dequantized_weight",
    "functional_call",
    "gradient_reaches_the_input",
    "non_finite_weight_is_refused",
    "other_modules_are_left_alone",
    "quantized_file",
    "safetensors_round_trip",
    "state_dict_round_trip",
    "to_dtype_leaves_codes_alone",
    "torch_save",
    "unwrap_leaves_nothing_behind",
)

CASES = (
    _case(broken.Coarse, "round_trip_keeps_the_floor"),
    _case(broken.Shrinking, "second_round_trip_changes_nothing"),
    _case(broken.OneDtype, "dtypes_are_those_asked_for", "to_dtype_leaves_codes_alone"),
    _case(broken.ImpreciseHalf, "dtypes_are_those_asked_for"),
    _case(broken.PadsOddWidths, "odd_shapes", "random_weights"),
    _case(broken.BadColumns, "odd_shapes", "random_weights"),
    _case(broken.IgnoresStrides, "strided_weight"),
    _case(broken.ZeroRows, "zeros_stay_zero"),
    _case(broken.ZeroTensor, "zeros_stay_zero"),
    _case(broken.FlipsLarge, "random_weights"),
    _case(broken.NotLocal, "blocks_are_independent"),
    _case(broken.WritesWeight, "arguments_are_left_alone"),
    _case(
        broken.CountsCalls, "arguments_are_left_alone", "to_dtype_leaves_codes_alone"
    ),
    _case(broken.Stamped, "same_weight_same_codes", "quantized_file"),
    _case(broken.ParameterScale, "tensors_can_be_kept"),
    _case(broken.Transposed, "tensors_can_be_kept", "safetensors_round_trip"),
    _case(broken.SharesMemory, "tensors_can_be_kept", "safetensors_round_trip"),
    _case(broken.WrongPlan, "shapes_are_known_beforehand", "quantized_file"),
    _case(broken.WrongBirth, "shapes_are_known_beforehand", "born_quantized"),
    _case(broken.ForgetsBias, "forward_uses_the_dequantized_weight"),
    _case(broken.CutsGradient, "gradient_reaches_the_input"),
    _case(broken.WrongGradient, "gradient_reaches_the_input"),
    _case(
        broken.Stale,
        "functional_call",
        "state_dict_round_trip",
        "unwrap_leaves_nothing_behind",
    ),
    _case(broken.BreaksGraph, "compile_inside_a_parent"),
    _case(broken.WrongCompiled, "compile_inside_a_parent"),
    _case(broken.OneOutputDtype, "to_dtype_leaves_codes_alone"),
    _case(
        broken.SpareBuffer,
        "state_dict_round_trip",
        "unwrap_leaves_nothing_behind",
        "file_round_trip",
    ),
    _case(broken.Locked, "torch_save"),
    _case(broken.ForgetsItself, "torch_save"),
    _case(broken.ClaimsAll, "other_modules_are_left_alone", "quantized_file"),
    _case(broken.ClaimsNone, "file_round_trip", "quantized_file"),
    _case(
        broken.Misreads,
        "born_quantized",
        "file_round_trip",
        "quantized_file",
        "state_dict_round_trip",
    ),
    _case(broken.TargetsForeign, "other_modules_are_left_alone"),
    _case(broken.TargetsUnknown, *MODULE_TESTS),
    _case(broken.Good, "to_dtype_leaves_codes_alone", patch=broken.cast_codes),
    _case(broken.Good, "deepcopy_is_independent", patch=broken.share_copies),
    _case(broken.Good, "non_finite_weight_is_refused", patch=broken.accept_nan),
    _case(
        broken.Good,
        "non_finite_weight_is_refused",
        "unwrap_leaves_nothing_behind",
        patch=broken.mark_modules,
    ),
    _case(broken.Good, "unwrap_leaves_nothing_behind", patch=broken.unwrap_zeros),
    _case(broken.Good, "safetensors_round_trip", patch=broken.load_zeros),
    _case(broken.Good, "born_quantized", patch=broken.build_dense),
)


class Kit(SchemeConformance):
    """What the broken schemes are held to."""

    min_sqnr_db = 20.0
    block_size = (1, -1)
    compile_backend = "eager"
    max_examples = 15


KIT_TESTS = sorted(name for name in dir(Kit) if name.startswith("test_"))
SOURCES = {_conformance.__file__, testing.__file__}


def failures(case, folder):
    """Run every test of the kit: name to the exception it raised."""
    raised = {}
    for name in KIT_TESTS:
        test = getattr(Kit(), name)
        wanted = "tmp_path" in inspect.signature(test).parameters
        (folder / name).mkdir()
        arguments = {"tmp_path": folder / name} if wanted else {}
        with pytest.MonkeyPatch.context() as patch:
            if case.patch is not None:
                case.patch(patch)
            try:
                test(case.scheme(), **arguments)
            except Exception as error:
                raised[name] = error
    return raised


def assertions():
    """Where the kit asserts: (file, first line, last line) of each assertion."""
    found = set()
    for file in SOURCES:
        for node in ast.walk(ast.parse(Path(file).read_text())):
            called = getattr(node, "func", None)
            name = getattr(called, "id", getattr(called, "attr", ""))
            if name in ("expect", "_expect_same"):
                found.add((file, node.lineno, node.end_lineno))
    return found


@pytest.fixture(scope="module")
def hits():
    """The assertions that failed so far."""
    return set()


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: c.patch.__name__ if c.patch else c.scheme.__name__
)
def test_kit_finds_the_defect(case, tmp_path, hits):
    """Each defect fails the tests made for it, and no others."""
    raised = failures(case, tmp_path)
    for error in raised.values():
        if isinstance(error, AssertionError):
            frames = traceback.extract_tb(error.__traceback__)
            hits |= {(f.filename, f.lineno) for f in frames if f.filename in SOURCES}
    assert set(raised) == case.fails, raised


def test_every_assertion_can_fail(hits):
    """Each assertion of the kit was the one that found some defect above."""
    if len(hits) == 0:
        pytest.skip("needs the tests above to have run")
    unproven = [
        f"{Path(file).name}:{first}"
        for file, first, last in assertions()
        if not any(file == f and first <= line <= last for f, line in hits)
    ]
    assert not unproven


def test_every_kit_test_has_a_defect():
    """Each test of the kit is failed by some broken scheme."""
    assert set(KIT_TESTS) == set().union(*(case.fails for case in CASES))


@pytest.mark.parametrize("scheme", [broken.Good, broken.Bound])
def test_kit_passes_a_good_scheme(scheme, tmp_path):
    """The schemes the broken ones derive from pass."""
    assert failures(_case(scheme), tmp_path) == {}


class TestOneByN(SchemeConformance):
    """The reference scheme in 1 x 64 blocks, as musubi-tuner writes them."""

    min_sqnr_db = 31.0
    block_size = (1, 64)

    @pytest.fixture
    def scheme(self):
        """The registered scheme."""
        return hijack.schemes()["blockwise_fp8"]


class TestRaggedBlocks(TestOneByN):
    """The reference scheme in blocks that divide nothing."""

    block_size = (32, 48)
    options = {"block_size": (32, 48), "scale_dtype": torch.float16}


class TestPerTensor(TestOneByN):
    """The reference scheme with one scale for all."""

    min_sqnr_db = 28.0
    block_size = None
    options = {"block_size": "tensor", "scale_dtype": torch.float32}


class TestInductor(SchemeConformance):
    """A scheme of two methods, compiled for real."""

    min_sqnr_db = 20.0
    compile_backend = "inductor"

    @pytest.fixture
    def scheme(self):
        """Int8."""
        return broken.Good()


def test_sqnr_of_a_known_error():
    """A tenth of the amplitude is 20 dB; equality and failure are infinite."""
    signal = torch.ones(100)
    assert sqnr_db(signal, signal * 1.1) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(signal, signal.clone()) == math.inf
    assert sqnr_db(signal, signal[:50]) == -math.inf
    assert sqnr_db(signal, signal * math.nan) == -math.inf
    assert sqnr_db(signal * 0, signal) == -math.inf


def test_realistic_weight_has_outliers():
    """Outliers are there when asked for, and the seed decides."""
    plain, heavy = (realistic_weight((64, 256), outliers=o) for o in (False, True))
    assert 0.01 < plain.std() < 0.04
    assert heavy.abs().max() > 2 * plain.abs().max()
    assert torch.equal(plain, realistic_weight((64, 256)))
    assert not torch.equal(plain, realistic_weight((64, 256), seed=1))


def test_subjects_are_made_under_any_default_device():
    """The kit's random numbers come from the CPU's generator, also for a GPU."""
    with torch.device("meta"):
        assert torch.equal(
            realistic_weight((64, 256)).cpu(), realistic_weight((64, 256))
        )
        inputs = [make()[1] for makers in SUBJECTS.values() for make in makers]
    assert all(x.device.type == "cpu" for x in inputs if x.is_floating_point())


def test_registered_gives_the_name_back():
    """A scheme registered for a while makes room for the one that had its name."""
    first, second = broken.Good(), broken.Good()
    with registered(first):
        origin = first.origin
        with registered(second):
            assert hijack.schemes()["broken"] is second
            with registered(second):
                pass
            assert hijack.schemes()["broken"] is second
        assert hijack.schemes()["broken"] is first
        assert first.origin == origin
    assert "broken" not in hijack.schemes()


def test_unknown_targets_can_be_given_subjects():
    """An author with targets of his own supplies modules and inputs."""

    class Own(Kit):
        def subjects(self, scheme):
            return [(nn.Bilinear(6, 5, 4), torch.zeros(2, 6))]

    assert Own().subjects(broken.TargetsUnknown())[0][0].weight.shape == (4, 6, 5)
