"""The conformance kit finds each broken scheme; each of its assertions can fail."""

import ast
import dataclasses
import inspect
import math
import random
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import hijack
import hijack.testing
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from hijack.testing import SchemeConformance, realistic_weight, registered, sqnr_db
from hijack.testing.subjects import SUBJECTS
from tests import broken_schemes as broken
from tests import correct_schemes as correct


@dataclasses.dataclass(frozen=True)
class Case:
    """A defect, and the tests of the kit that find it."""

    scheme: Callable
    finds: tuple[str, ...]
    patch: Callable | None = None
    kit: type | None = None

    def __str__(self):
        made = self.patch if self.patch is not None else self.scheme
        return f"{made.__name__}-{'-'.join(self.finds)}"


def _case(scheme, *finds, patch=None, kit=None):
    return Case(scheme, finds, patch, kit)


class Kit(SchemeConformance):
    """What the broken schemes are held to."""

    min_sqnr_db = 20.0
    compile_backend = "eager"
    max_examples = 15


class RowKit(Kit):
    """For schemes that are said to have a scale for each row."""

    block_size = (1, -1)


class LowKit(Kit):
    """For schemes of four bits."""

    min_sqnr_db = 15.0


#: A defect is realistic, and one of its kind: others of the kind are found alike.
CASES = (
    # how exact
    _case(broken.Coarse, "round_trip_keeps_the_floor"),
    _case(broken.Shrinking, "second_round_trip_changes_nothing"),
    _case(broken.OneDtype, "dtypes_are_those_asked_for"),
    _case(broken.ImpreciseHalf, "dtypes_are_those_asked_for", "every_input_is_taken"),
    _case(broken.BadColumns, "every_block_keeps_the_floor", "random_weights"),
    _case(broken.LastBlockUnscaled, "every_block_keeps_the_floor"),
    _case(broken.LastRowsLost, "every_block_keeps_the_floor"),
    _case(broken.LastColumnsLost, "every_block_keeps_the_floor"),
    _case(broken.ShortBlockRounded, "every_block_keeps_the_floor"),
    _case(broken.SignedPeak, "every_kind_of_weight_keeps_the_floor"),
    _case(broken.WrongNarrow, "every_kind_of_weight_keeps_the_floor"),
    _case(broken.OverflowsHalf, "extreme_values"),
    _case(broken.NoLeastScale, "extreme_values"),
    _case(broken.Clips, "extreme_values"),
    _case(broken.IgnoresStrides, "strided_weight"),
    _case(broken.ZeroRows, "zeros_stay_zero", "every_kind_of_weight_keeps_the_floor"),
    _case(broken.ZeroTensor, "zeros_stay_zero"),
    _case(broken.FlipsLarge, "random_weights"),
    _case(broken.NotLocal, "blocks_are_independent", kit=RowKit),
    _case(broken.WrongBlockSize, "block_size_is_that_of_the_scales"),
    _case(broken.TransposedBlockSize, "block_size_is_that_of_the_scales"),
    _case(broken.BlockSizeNeedsData, "block_size_is_that_of_the_scales"),
    _case(broken.OneScaleForAll, "rows_are_quantized_alone"),
    # memory
    _case(broken.WritesWeight, "arguments_are_left_alone"),
    _case(broken.CountsCalls, "arguments_are_left_alone"),
    _case(broken.ViewOfWeight, "results_are_their_own", "tensors_can_be_kept"),
    _case(broken.BufferedCodes, "results_are_their_own", "layers_do_not_share"),
    _case(broken.BufferedWeight, "results_are_their_own"),
    _case(broken.Remembers, "results_are_their_own"),
    _case(broken.RemembersByIdentity, "dequantize_sees_what_is_there"),
    _case(broken.RemembersByIdentity, "new_tensors_are_seen", "state_dict_round_trip"),
    _case(
        broken.RemembersByAddress,
        "dequantize_sees_what_is_there",
        "new_tensors_are_seen",
    ),
    _case(broken.KeepsDense, "nothing_is_kept_alive"),
    _case(broken.KeepsCodes, "nothing_is_kept_alive", "layers_can_be_freed"),
    _case(broken.KeepsModules, "layers_can_be_freed"),
    _case(broken.Stamped, "same_weight_same_codes", "quantized_file"),
    _case(broken.RandomOffsets, "same_weight_same_codes"),
    _case(broken.ParameterScale, "tensors_can_be_kept"),
    _case(broken.Transposed, "tensors_can_be_kept"),
    _case(broken.ScaleElsewhere, "tensors_can_be_kept"),
    _case(broken.BigView, "tensors_can_be_kept"),
    _case(broken.SharesMemory, "tensors_can_be_kept"),
    # what is known beforehand, and options
    _case(broken.WrongPlan, "shapes_are_known_beforehand"),
    _case(broken.WrongBirth, "shapes_are_known_beforehand", "born_quantized"),
    _case(broken.WrongPlanForHalf, "shapes_are_known_beforehand"),
    _case(broken.WrongPlanForOdd, "shapes_are_known_beforehand"),
    _case(broken.WrongDenseShape, "dense_shape_is_what_decodes", kit=LowKit),
    _case(broken.DenseShapeNeedsData, "dense_shape_is_what_decodes", kit=LowKit),
    _case(broken.DeclinesInNoWords, "declines_says_why"),
    _case(broken.DeclinesAll, "declines_says_why"),
    _case(broken.DeclinesSometimes, "other_modules_are_left_alone"),
    _case(broken.QuantizesLessThanItTakes, "every_block_keeps_the_floor"),
    _case(broken.WrongDefault, "options_are_declared"),
    _case(broken.Undeclared, "options_are_declared"),
    _case(
        broken.LevelsOnSelf,
        "options_are_in_the_tensors_or_told",
        "files_hold_everything",
    ),
    _case(
        broken.few_levels,
        "options_are_in_the_tensors_or_told",
        "files_hold_everything",
    ),
    _case(broken.TableOnSelf, "layers_do_not_share"),
    _case(broken.OptionLosesAll, "options_are_in_the_tensors_or_told"),
    _case(broken.WrongOptionsOf, "options_of_reproduce", "files_hold_everything"),
    _case(broken.OptionsOfNeedData, "options_of_reproduce"),
    _case(
        broken.RequantizeForgets, "requantize_keeps_the_layer", "files_hold_everything"
    ),
    _case(broken.RequantizeCoarse, "requantize_keeps_the_layer"),
    _case(broken.RequantizeAtRandom, "requantize_keeps_the_layer"),
    _case(broken.RequantizeSeededBadly, "requantize_keeps_the_layer"),
    _case(broken.RequantizeSmaller, "requantize_keeps_the_layer"),
    # surroundings
    _case(broken.CpuTable, "tensors_stay_on_their_device"),
    _case(broken.CpuConstant, "tensors_stay_on_their_device"),
    _case(broken.CpuSigns, "tensors_stay_on_their_device"),
    _case(broken.DefaultDtype, "defaults_of_torch_do_not_matter"),
    _case(broken.DefaultDevice, "defaults_of_torch_do_not_matter"),
    _case(broken.SetsThreads, "state_of_the_process_is_left_alone"),
    _case(broken.TurnsGradientsOff, "state_of_the_process_is_left_alone"),
    _case(broken.SeedsEverything, "state_of_the_process_is_left_alone"),
    _case(broken.DrawsInPython, "state_of_the_process_is_left_alone"),
    _case(broken.CreatesAtRandom, "state_of_the_process_is_left_alone"),
    _case(broken.PeakOnSelf, "threads_do_not_meet"),
    _case(broken.ScratchForAll, "threads_do_not_meet"),
    # forwards
    _case(broken.ForgetsBias, "forward_uses_the_dequantized_weight"),
    _case(broken.CutsGradient, "gradient_reaches_the_input"),
    _case(broken.WrongGradient, "gradient_reaches_the_input"),
    _case(broken.StridedGradient, "gradient_reaches_the_input"),
    _case(broken.GradientOfOnes, "gradient_reaches_the_input"),
    _case(broken.BiasWithoutGradient, "bias"),
    _case(broken.StaleBias, "bias"),
    _case(broken.OldBias, "bias"),
    _case(broken.BiasOfOneDtype, "bias"),
    _case(broken.Stale, "functional_call", "unwrap_leaves_nothing_behind"),
    _case(broken.Stale, "file_round_trip", "files_hold_everything"),
    _case(broken.StaleForward, "new_tensors_are_seen", "state_dict_round_trip"),
    _case(broken.ReadsModule, "forward_is_a_function_of_its_arguments"),
    _case(broken.ReadsModuleBias, "forward_is_a_function_of_its_arguments"),
    _case(broken.OneOutputDtype, "to_dtype_leaves_codes_alone"),
    _case(broken.HalfIsScaled, "every_input_is_taken"),
    _case(broken.DoubleIsNarrow, "every_input_is_taken"),
    _case(broken.IgnoresInputStrides, "every_input_is_taken"),
    _case(broken.IgnoresOffset, "every_input_is_taken"),
    _case(broken.NoVectors, "every_input_is_taken"),
    _case(broken.NoTokens, "every_input_is_taken"),
    _case(broken.FewTokens, "every_input_is_taken"),
    _case(broken.TakesAnyWidth, "wrong_inputs_are_refused"),
    _case(broken.AutocastBlind, "autocast"),
    _case(broken.AutocastTwice, "autocast"),
    _case(broken.WrongInInference, "grad_modes"),
    _case(broken.StaysOff, "grad_modes"),
    _case(broken.InferenceTable, "grad_modes"),
    _case(broken.TurnsGradientsOn, "grad_modes"),
    _case(broken.TrainsScale, "nothing_requires_a_gradient"),
    _case(broken.LeaksGradient, "nothing_requires_a_gradient"),
    _case(broken.ScalesInput, "forward_leaves_its_arguments_alone"),
    _case(broken.WritesBias, "forward_leaves_its_arguments_alone"),
    _case(broken.SharedOutput, "forward_leaves_its_arguments_alone"),
    _case(broken.OwnOutput, "forward_leaves_its_arguments_alone"),
    _case(broken.KnownOutput, "forward_leaves_its_arguments_alone"),
    _case(broken.OneWeightForAShape, "layers_do_not_share"),
    _case(broken.SpareBuffer, "one_forward_for_all", "state_dict_round_trip"),
    _case(broken.ScalesBiasWhenBound, "one_forward_for_all"),
    _case(broken.ForwardForEach, "one_forward_for_all", "compiled_once_for_all"),
    _case(broken.MethodForward, "one_forward_for_all"),
    _case(broken.ObjectForward, "one_forward_for_all"),
    _case(broken.NamesVary, "one_forward_for_all"),
    _case(broken.KnowsOnlyLinear, "forward_uses_the_dequantized_weight"),
    _case(broken.OldSignature, "forward_uses_the_dequantized_weight"),
    _case(broken.ReplacesForward, "forward_uses_the_dequantized_weight"),
    _case(broken.ConvolvesPlainly, "forward_uses_the_dequantized_weight"),
    _case(broken.LooksUpPlainly, "forward_uses_the_dequantized_weight"),
    _case(broken.TransposesPlainly, "forward_uses_the_dequantized_weight"),
    # compiled
    _case(broken.BreaksGraph, "compile_inside_a_parent"),
    _case(broken.WrongCompiled, "compile_inside_a_parent"),
    _case(broken.WrongCompiledHalf, "compile_inside_a_parent"),
    _case(broken.WrongCompiledGradient, "gradient_through_compiled"),
    _case(broken.WrongForMany, "compiled_once_for_all"),
    _case(broken.CompiledAnew, "compiled_once_for_all"),
    _case(broken.Blocks, "inductor_on_ragged_widths"),
    # copies and files
    _case(broken.Locked, "torch_save"),
    _case(broken.ForgetsItself, "torch_save"),
    _case(broken.NamedBias, "state_dict_round_trip", "file_round_trip"),
    _case(broken.ClaimsAll, "layers_of_others_are_not_claimed"),
    _case(broken.ClaimsFits, "layers_of_others_are_not_claimed"),
    _case(broken.AnyInt8, "layers_of_others_are_not_claimed"),
    _case(broken.ClaimsNone, "file_round_trip", "quantized_file"),
    _case(broken.Unread, "file_round_trip"),
    _case(broken.Inverse, "file_round_trip"),
    _case(broken.OutputOfAFile, "file_round_trip"),
    _case(broken.Refuses, "file_round_trip"),
    _case(broken.ForgetsSign, "dialects_spell_what_they_read", "file_round_trip"),
    _case(broken.OtherOnMeta, "dialects_spell_what_they_read"),
    _case(broken.WritesOtherOnMeta, "dialects_spell_what_they_read"),
    _case(broken.NeedsOptions, "convert_file"),
    _case(broken.TrustsOptions, "convert_file"),
    _case(broken.AnyDtype, "unfitting_layers_are_not_claimed"),
    _case(broken.AnyShape, "unfitting_layers_are_not_claimed"),
    _case(broken.ScaleIsOptional, "unfitting_layers_are_not_claimed"),
    _case(broken.LikenessByDtype, "likeness_tells_layers_apart"),
    _case(broken.LikenessByNames, "likeness_tells_layers_apart"),
    _case(broken.TargetsForeign, "other_modules_are_left_alone"),
    _case(broken.TargetsUnknown, "forward_uses_the_dequantized_weight"),
    # hijack itself
    _case(broken.Good, "to_dtype_leaves_codes_alone", patch=broken.cast_codes),
    _case(broken.Good, "deepcopy_is_independent", patch=broken.share_copies),
    _case(broken.Good, "non_finite_weight_is_refused", patch=broken.accept_nan),
    _case(broken.PassesNan, "non_finite_weight_is_refused"),
    _case(
        broken.Good,
        "non_finite_weight_is_refused",
        "unwrap_leaves_nothing_behind",
        patch=broken.mark_modules,
    ),
    _case(broken.Good, "unwrap_leaves_nothing_behind", patch=broken.unwrap_zeros),
    _case(broken.Good, "safetensors_round_trip", patch=broken.load_zeros),
    _case(broken.Good, "born_quantized", patch=broken.build_dense),
    _case(broken.Good, "born_quantized", patch=broken.load_other_codes),
    _case(broken.Good, "state_dict_round_trip", patch=broken.load_other_codes),
)

KIT_TESTS = sorted(name for name in dir(Kit) if name.startswith("test_"))
SOURCES = {str(f) for f in Path(hijack.testing.__file__).parent.glob("*.py")}
CHECKS = ("expect", "_expect_same", "_expect_floor")


def failures(case, folder, names):
    """Run tests of the kit: name to the exception it raised."""
    raised, kit = {}, case.kit or Kit
    for name in names:
        test = getattr(kit(), name)
        wanted = "tmp_path" in inspect.signature(test).parameters
        (folder / name).mkdir()
        arguments = {"tmp_path": folder / name} if wanted else {}
        with pytest.MonkeyPatch.context() as patch, process_as_it_was():
            if case.patch is not None:
                case.patch(patch)
            try:
                test(case.scheme(), **arguments)
            except Exception as error:
                raised[name] = error
    return raised


class process_as_it_was(torch.enable_grad):  # noqa: N801 - reads like one
    """Undo what broken schemes do to all."""

    def __enter__(self):
        super().__enter__()
        self.threads, self.random = torch.get_num_threads(), random.getstate()

    def __exit__(self, *error):
        torch.set_num_threads(self.threads)
        random.setstate(self.random)
        super().__exit__(*error)


def assertions():
    """Where the kit asserts: (file, first line, last line) of each assertion."""
    found = set()
    for file in SOURCES:
        for node in ast.walk(ast.parse(Path(file).read_text())):
            called = getattr(node, "func", None)
            name = getattr(called, "id", getattr(called, "attr", ""))
            if name in CHECKS:
                found.add((file, node.lineno, node.end_lineno))
    return found


@pytest.fixture(scope="module")
def hits():
    """The assertions that failed so far."""
    return set()


@pytest.fixture(scope="module")
def tried():
    """The cases that were tried so far, in this process."""
    return []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kit_finds_the_defect(case, tmp_path, hits, tried):
    """Each defect fails the tests made for it."""
    names = [f"test_{name}" for name in case.finds]
    raised = failures(case, tmp_path, names)
    tried.append(case)
    for error in raised.values():
        if isinstance(error, AssertionError):
            frames = traceback.extract_tb(error.__traceback__)
            hits |= {(f.filename, f.lineno) for f in frames if f.filename in SOURCES}
    assert sorted(raised) == sorted(names), raised


def test_every_assertion_can_fail(hits, tried):
    """Each assertion of the kit was the one that found some defect above."""
    if len(tried) < len(CASES):
        pytest.skip("needs all of the tests above to have run, in one process")
    unproven = [
        f"{Path(file).name}:{first}"
        for file, first, last in sorted(assertions())
        if not any(file == f and first <= line <= last for f, line in hits)
    ]
    assert not unproven


def test_every_kit_test_has_a_defect():
    """Each test of the kit is failed by some broken scheme."""
    found = {f"test_{name}" for case in CASES for name in case.finds}
    assert set(KIT_TESTS) == found


@pytest.mark.parametrize(
    "scheme",
    [broken.Good, broken.Bound, broken.Leveled, broken.Grouped, broken.Spelled],
)
def test_kit_passes_a_good_scheme(scheme, tmp_path):
    """The schemes the broken ones derive from pass."""
    names = [name for name in KIT_TESTS if "inductor" not in name]
    assert failures(_case(scheme), tmp_path, names) == {}


class TestPackedInt4(SchemeConformance):
    """Packed and padded codes, with a zero point."""

    min_sqnr_db = 19.0
    block_size = (1, 32)

    @pytest.fixture
    def scheme(self):
        """Two codes in a byte."""
        return correct.PackedInt4()


class TestRotatedInt8(SchemeConformance):
    """A forward that rotates the input."""

    min_sqnr_db = 30.0
    min_idempotence_db = 40.0

    @pytest.fixture
    def scheme(self):
        """Hadamard."""
        return correct.RotatedInt8()


class TestLowRankInt8(SchemeConformance):
    """A forward that quantizes the input, and so is no product with the weight."""

    min_sqnr_db = 30.0
    min_idempotence_db = 40.0
    min_forward_db = 25.0

    @pytest.fixture
    def scheme(self):
        """A low-rank part."""
        return correct.LowRankInt8()


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
