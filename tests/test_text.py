"""Text that people read: nothing in a file can pass for something else in it."""

import ast
import logging
from pathlib import Path

import pytest
import torch

import hijack
from hijack import text
from hijack.checkpoint.convert import ConvertReport
from hijack.metrics import QuantizationError
from hijack.options import Option

ROOT = Path(hijack.__file__).parent
NAME = "a\x1b[2J\nWARNING: hijack: \u202eb"
SHOWN = r"a\x1b[2J\nWARNING: hijack: \u202eb"


def test_a_name_cannot_forge_a_line_of_the_log(caplog):
    """Newlines and escape sequences are shown, by any logger of ours."""
    log = text.logger("hijack.anything")
    assert text.logger("hijack.anything") is log
    with caplog.at_level(logging.INFO, "hijack"):
        log.warning("hijack: no scheme reads %s, one of %d", NAME, 2)
        log.info("hijack: 100 %% of " + SHOWN)
    assert caplog.messages == [
        f"hijack: no scheme reads {SHOWN}, one of 2",
        f"hijack: 100 %% of {SHOWN}",
    ]


@pytest.mark.parametrize(
    "path", [p for p in ROOT.rglob("*.py") if p.name != "text.py"], ids=lambda p: p.name
)
def test_no_module_has_a_logger_of_another_kind(path):
    """Each comes from the one function that escapes what it is given."""
    tree = ast.parse(path.read_text("utf-8"))
    names = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    assert "getLogger" not in names


def test_reports_are_one_line_of_letters():
    """The worst layer of a conversion is named by the file."""
    error = QuantizationError(0.1, 1.0, 0.5, 10)
    report = ConvertReport({NAME: None}, (), {NAME: error}, {}, (), 1, 1)
    assert SHOWN in str(report)
    assert str(report).isprintable()


def test_columns_are_straight_with_wide_letters():
    """Chinese letters take two columns of a terminal."""
    lines = text.table(["layer", "dB"], [["\u5c42.0", "1.5"], ["block", "12.5"]])
    assert lines.splitlines() == [
        "layer    dB",
        "-----  ----",
        "\u5c42.0    1.5",
        "block  12.5",
    ]


def test_numbers_are_for_people():
    """In powers of 1000, and never 1000.0 of a smaller unit."""
    assert text.bytes_text(999) == "999 bytes"
    assert text.bytes_text(999_949) == "999.9 kB"
    assert text.bytes_text(999_950) == "1.0 MB"
    assert text.bytes_text(20_430_000_000) == "20.4 GB"
    assert text.count_text(0) == "0"
    assert text.count_text(12_100_000_000) == "12.1 billion"
    assert text.count_text(10**16) == "10000.0 trillion"


@pytest.mark.parametrize("word", text.DTYPE_WORDS)
def test_dtypes_have_short_words(word):
    """Everywhere an option is a dtype; torch's own names go on working."""
    option = Option("dtype", "dtype")
    dtype = getattr(torch, text.DTYPE_WORDS[word])
    assert option.parse(word) is option.parse(option.text(dtype)) is dtype
