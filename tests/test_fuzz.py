"""Damaged checkpoints: each is read, or refused in words."""

import json
import warnings
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file

import hijack
from hijack.checkpoint.compare import compare_files
from hijack.errors import CheckpointError, HeaderError, ShapeError
from hijack.lora.files import Loras
from hijack.safetensors_io.reader import open_tensors, read_header
from hijack.text import excerpt
from schemes._blocks import infer_block_size
from tests.fuzz.case import Case
from tests.fuzz.check import Checker
from tests.fuzz.fuzz import make
from tests.fuzz.mutate import mutate
from tests.fuzz.seeds import dense, seeds

CORPUS = sorted((Path(__file__).parent / "fuzz" / "corpus").iterdir())


@pytest.fixture(scope="module")
def cases():
    """The files mutations start from."""
    return seeds()


@pytest.fixture(scope="module")
def checker(cases, tmp_path_factory):
    """What runs a case; what torch brings in when first used is there already."""
    checker = Checker(tmp_path_factory.mktemp("fuzz"), cases)
    for case in cases[::3]:
        checker.run(case, Random(1))
    return checker


@pytest.mark.parametrize("folder", CORPUS, ids=lambda folder: folder.name)
def test_what_once_failed_is_refused_in_words(folder, checker):
    """Every file of the corpus ends in success or a HijackError."""
    assert explain(checker.run(Case.read(folder), Random(0))) == ""


def test_the_corpus_is_small():
    """All of it together is less than one picture."""
    sizes = [path.stat().st_size for folder in CORPUS for path in folder.iterdir()]
    assert 0 < sum(sizes) < 100_000


def test_mutated_files_are_read_or_refused(cases, checker):
    """Three hundred, the same each time; how long they take is not judged here."""
    found = run(cases, checker, range(300))
    assert found["problems"] == {}
    assert found["ok"] > 100
    assert found["refused"] > 100


@pytest.mark.thorough
def test_many_mutated_files_are_read_or_refused(cases, checker):
    """Three thousand others."""
    assert run(cases, checker, range(1000, 4000))["problems"] == {}


def test_a_case_is_the_same_each_time(cases):
    """A number stands for one file, so that a failure can be looked at again."""
    for number in range(50):
        one, two = (make(cases, 0, number)[0] for _ in range(2))
        assert one.files == two.files


def test_a_seed_is_never_changed(cases):
    """Mutations are made to a copy."""
    case = cases[0]
    before = dict(case.files)
    for number in range(50):
        mutate(case, Random(number))
    assert case.files == before


def test_a_failure_is_seen(cases, checker, monkeypatch):
    """What is no HijackError is a problem, with its traceback."""

    def fail(*_, **__):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr("tests.fuzz.check.hijack.identify", fail)
    assert "on purpose" in checker.run(cases[0], Random(0)).problem


def test_names_that_no_file_can_have_are_refused(tmp_path):
    """A shard's name that is too long, or no text, does not end in an OSError."""
    index = tmp_path / "model.safetensors.index.json"
    for name, words in (("1" * 3000, "cannot be read"), ("\ud800", "names the shard")):
        index.write_text(json.dumps({"weight_map": {"a": name}}), "utf-8")
        with pytest.raises(HeaderError, match=words) as refused:
            read_header(index)
        assert len(str(refused.value)) < 300 + len(str(index))


def test_a_weight_without_elements_has_no_blocks():
    """Its sides may be as long as a file likes, and would be believed."""
    for marker in (None, (2, 1, 0)):
        with pytest.raises(ShapeError, match="expected a weight with elements"):
            infer_block_size((2**22 + 1, 0), (2**21 + 1, 0), marker)


def test_packed_rows_that_torch_cannot_hold_are_refused():
    """Two 4-bit numbers are one element of torch's; a row of one would be none."""
    path = next(path for path in CORPUS if path.name == "packed_rows_of_one")
    header = read_header(path / "model.safetensors")
    key = next(key for key, info in header.tensors.items() if info.dtype == "F4")
    with pytest.raises(CheckpointError, match=r"end within a byte|not known to torch"):
        open_tensors(header)[key]


def test_packed_codes_are_not_compared():
    """Codes that share a byte are no numbers that torch could subtract."""
    path = next(path for path in CORPUS if path.name == "packed_weight")
    with pytest.raises(CheckpointError, match="no weight in common"):
        compare_files(path / "model.safetensors", path / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["scheme_surrogate", "params_surrogate", "params_long", "block_size_long"]
)
def test_nothing_a_file_says_makes_a_message_that_cannot_be_shown(name):
    """Halves of letters are escaped, and what is long is cut short."""
    path = next(path for path in CORPUS if path.name == name) / "model.safetensors"
    text = hijack.identify(path).as_table(verbose=True)
    assert text.encode().decode() == text
    assert len(text) < 1000 + 3 * len(str(path))
    assert r"\ud800" in text or "..." in text


def test_text_that_can_be_shown_is_not_changed():
    """Escapes are for what is not printable."""
    assert excerpt("q says é") == "q says é"
    assert excerpt("\x1b[31m\n\ud800") == r"\x1b[31m\n\ud800"
    assert excerpt(["x"] * 500, 9) == "['x', 'x'..."


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora_alpha_complex", "C64 .*expected one number"),
        ("lora_alpha_packed", "F4 .*expected one number"),
        ("lora_alpha_of_400_digits", "alpha is nan, expected a finite number"),
        ("lora_packed", "F4, expected floating point numbers"),
        ("lora_kronecker_of_no_dimension", "do not fit each other"),
        ("lora_outer_product", "do not fit each other"),
    ],
)
def test_damaged_loras_are_refused_before_anything_is_computed(name, words, tmp_path):
    """From dtypes and shapes alone, whatever torch itself would say of them."""
    path = next(path for path in CORPUS if path.name == name)
    save_file(dense(), tmp_path / "dense.safetensors")
    header = read_header(tmp_path / "dense.safetensors")
    with pytest.raises(CheckpointError, match=words):
        Loras.open([path / "model.safetensors"], header)


@pytest.mark.parametrize("strict", [True, False])
def test_a_tensor_never_takes_the_place_of_one_a_layer_is_read_from(strict):
    """Another dialect's tensor beside a layer is refused before the model changes."""
    path = next(path for path in CORPUS if path.name == "names_of_two_dialects")
    model = torch.nn.Module()
    model.a = torch.nn.Linear(3, 3, bias=False)
    words = "keys do not match" if strict else "expected a layer in one dialect"
    with pytest.raises(CheckpointError, match=words):
        hijack.load(model, path / "model.safetensors", strict=strict)
    assert type(model.a) is torch.nn.Linear


def run(cases, checker, numbers):
    """What became of some cases; only what is wrong on any machine is a problem."""
    problems, steps = {}, []
    for number in numbers:
        case, random = make(cases, 0, number)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outcome = checker.run(case, random)
        if text := explain(outcome):
            problems[number] = text
        steps += outcome.steps.values()
    ok = steps.count("ok")
    return {"problems": problems, "ok": ok, "refused": len(steps) - ok}


def explain(outcome):
    """The problem, unless it is only about time, which tests do not judge."""
    timed = outcome.problem.startswith("took") and "s of CPU" in outcome.problem
    return "" if timed else outcome.problem


@pytest.fixture(autouse=True)
def one_thread():
    """Small files; threads would cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
