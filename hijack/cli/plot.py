"""Plots; they need matplotlib, of the extra ``cli``."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hijack.checkpoint.compare import Comparison

#: Weights that are labelled in the plot.
LABELLED = 5
#: Fonts with letters that matplotlib's own lacks, one or the other on every system.
FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Microsoft YaHei",
    "SimHei",
    "Yu Gothic",
    "Malgun Gothic",
    "PingFang SC",
    "Hiragino Sans",
    "Arial Unicode MS",
    "Segoe UI",
)


@contextlib.contextmanager
def plain_text() -> Iterator[None]:
    """Draw names as they are: ``$`` is a letter, and fonts are those that have it."""
    with matplotlib.rc_context({"text.parse_math": False, "font.family": _families()}):
        yield


def drawable(text: str) -> str:
    """Text with escapes for letters that no font here has."""
    return "".join(
        c if c.isprintable() and ord(c) in _letters() else ascii(c)[1:-1] for c in text
    )


@functools.cache
def _families() -> list[str]:
    installed = set(font_manager.fontManager.get_font_names())
    return ["DejaVu Sans", *(name for name in FONTS if name in installed)]


@functools.cache
def _letters() -> frozenset[int]:
    """Every letter that one of the fonts has."""
    fonts = map(font_manager.findfont, _families())
    return frozenset(
        letter for path in fonts for letter in font_manager.get_font(path).get_charmap()
    )


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Plot the signal-to-noise ratio of every weight, and label the worst.

    Args:
        comparison: what to draw; equal weights are left out, those with NaN or inf are
            only in the legend.
        path: the PNG to write.
    """
    with plain_text():
        _draw(comparison, path)


def _draw(comparison: Comparison, path: Path) -> None:
    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [
        (number, key, error)
        for number, (key, error) in enumerate(comparison.layers.items())
        if math.isfinite(error.sqnr)
    ]
    worst = sorted(points, key=lambda point: point[2].sqnr)[:LABELLED]
    axes.scatter([p[0] for p in points], [p[2].sqnr for p in points], s=10)
    for rank, (number, key, error) in enumerate(worst, 1):
        label = f"{rank}  {drawable(key)}  {error.sqnr:.1f} dB"
        axes.scatter([number], [error.sqnr], s=18, color="tab:red", label=label)
        axes.annotate(
            str(rank), (number, error.sqnr), xytext=(5, 4), textcoords="offset points"
        )
    for key in comparison.broken[:LABELLED]:
        label = f"{drawable(key)}  NaN or inf"
        axes.scatter([], [], marker="x", color="black", label=label)
    if worst or comparison.broken:
        axes.legend(title="worst", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    equal = sum(error.max_abs_error == 0 for error in comparison.layers.values())
    axes.set_xlabel(
        f"weight, in file order ({equal} of {len(comparison.layers)} are equal)"
    )
    axes.set_ylabel("SQNR, dB (higher is better)")
    names = (Path(comparison.other).name, Path(comparison.reference).name)
    axes.set_title(" against ".join(map(drawable, names)))
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


def draw_demo(
    formats: Mapping[str, Sequence[float]],
    lora: Mapping[str, float],
    host: Mapping[str, float],
    path: Path,
) -> None:
    """Draw the angles that the demo found; every axis begins at zero.

    Args:
        formats: format to the angle of each sentence to its float32 embedding.
        lora: model to the mean angle between sentences and their translations.
        host: state of the host to the mean angle of what it computes.
        path: the PNG to write.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, width_ratios=(1.4, 1.1, 0.8))
    # Okabe and Ito's colours are told apart by colour-blind readers too
    shown: Sequence[tuple[str, str, Mapping[str, float | Sequence[float]]]] = (
        ("quantized: turned away from float32", "#0072B2", formats),
        ("LoRA: German from English", "#E69F00", lora),
        ("FP8 file in a host", "#009E73", host),
    )
    for axes, (title, colour, angles) in zip(panels, shown, strict=True):
        for place, values in enumerate(angles.values()):
            each = [values] if isinstance(values, float) else values
            bars = axes.bar([place], [sum(each) / len(each)], color=colour, alpha=0.6)
            axes.bar_label(bars, fmt="%.1f", label_type="center")
            if len(each) > 1:
                axes.scatter([place] * len(each), each, s=6, color="black", zorder=3)
        names = [name.replace(" ", "\n") for name in angles]
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("degrees, lower is better\n(bars: mean; dots: sentences)")
    figure.savefig(path, format="png", dpi=120)
