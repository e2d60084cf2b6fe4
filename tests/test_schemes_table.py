"""The table of how exact the schemes are has a row for every scheme there is."""

import torch

import hijack
from benchmarks import schemes as benchmark
from hijack.testing import registered
from tests.correct_schemes import PackedInt4


class Refusing(PackedInt4):
    """A scheme that declines everything."""

    name = "refusing"

    def declines(self, shape, **options):
        """Say so."""
        return "it declines all"


def test_every_scheme_has_a_row_and_none_is_skipped(tmp_path):
    """Also those of plugins; what cannot be measured says why in its row."""
    subject = benchmark.diffusion(tmp_path, 64, 8)
    with registered(PackedInt4()), registered(Refusing()):
        names = set(hijack.schemes())
        head, rule, *lines = benchmark.table(subject, tmp_path)
    assert head.count("|") == rule.count("|") == 8
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert {row[0] for row in rows} == names
    (refused,) = (row for row in rows if row[0] == "refusing")
    assert "it declines all" in refused[-1]
    (packed,) = (row for row in rows if row[0] == "packed_int4")
    assert packed[1] == "default"
    assert packed[-1] == "10 of 10"
    # 4 bits, and a float32 scale and a zero point of a byte for each 32 weights
    assert float(packed[2]) == 4 + (32 + 8) / 32


def test_what_a_row_says_is_right(tmp_path):
    """More bits are more exact in all that is measured."""
    subject = benchmark.diffusion(tmp_path, 64, 8)
    dense = subject.outputs(subject.source)
    assert torch.equal(dense, subject.outputs(subject.source))

    def row(name, words):
        return benchmark.measure(subject, name, words, tmp_path, dense)

    with registered(PackedInt4()):
        coarse, fine = (row("packed_int4", f"group={group}") for group in (64, 16))
        best = row("blockwise_fp8", "block_size=1x16 scale_search=32")
        assert coarse.sqnr < fine.sqnr < best.sqnr
        assert coarse.error > fine.error > best.error > 0
        assert coarse.cosine < fine.cosine < best.cosine < 1
        assert coarse.bits < fine.bits < best.bits
        assert "has no option 'grop'" in row("packed_int4", "grop=3")
