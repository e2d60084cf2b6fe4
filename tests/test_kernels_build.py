"""Triton's kernels build for every GPU that users have, without one being here."""

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton

from benchmarks.triton_resources import TARGETS, cases, compile_case

CASES = list(cases())
RELEASE = tuple(int(number) for number in triton.__version__.split(".")[:2])
#: Shared memory of a program, in bytes, that every GPU of the kind has.
SHARED = {"sm75": 65536, "gfx942": 65536, "gfx1100": 65536}
LEAST_SHARED = 101376


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Nothing is taken from earlier runs, and nothing stays."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check(case, target):
    """Compile a kernel, and look at what it takes."""
    try:
        resources = compile_case(case, target)
    except Exception as error:
        if "ROCm linker" in str(error):
            pytest.skip("older Tritons have no linker for AMD's GPUs with them")
        raise
    where = f"{case.name} for {target}"
    if RELEASE >= (3, 7):  # older compilers may take more registers
        assert resources.spills == 0, where
    assert resources.shared <= SHARED.get(target, LEAST_SHARED), where
    # subnormal numbers must not be flushed: codes would be decoded to zero
    # older Tritons flush in divisions, where it makes no difference to FP8 and int8
    assert ".ftz" not in resources.text.replace("div.rn.ftz", "div.rn"), where
    return resources


@pytest.mark.parametrize("target", ["sm75", "sm90", "gfx1100"])
def test_the_reference_format_builds(target):
    """FP8 with 1 x 64 blocks is decoded on old and new GPUs of both vendors."""
    for case in CASES:
        if case.name in ("decode e4m3 1x64 bf16", "gemv 1 e4m3 1x64 bf16"):
            check(case, target)


@pytest.mark.thorough
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", sorted({case.name.split()[0] for case in CASES}))
def test_every_kernel_builds_without_spills(kernel, target):
    """All kernels fit the registers and the shared memory of all GPUs."""
    for case in CASES:
        if case.name.split()[0] == kernel and target not in case.without:
            check(case, target)


def test_codes_are_read_sixteen_bytes_at_a_time():
    """Decoding moves no more than it must: vectors in, vectors out, and no FP8 type."""
    case = next(case for case in CASES if case.name == "decode e4m3 1x64 bf16")
    text = check(case, "sm80").text
    # 4096 codes for 128 threads, of which each reads and writes 16 bytes at a time
    assert len(re.findall(r"ld\.global\.v4\.b32", text)) == 2
    assert len(re.findall(r"st\.global\.v4\.b32", text)) == 4
    assert "e4m3" not in text


@pytest.mark.parametrize("name", ["decode e4m3 1x64 fp32", "output fp32"])
def test_products_and_sums_are_rounded_one_by_one(name):
    """Where results have torch's bits, no product is fused with a sum."""
    case = next(case for case in CASES if case.name == name)
    text = check(case, "sm80").text
    assert "mul.f32" in text or "mul.rn.f32" in text
    assert "fma.rn.f32" not in text
