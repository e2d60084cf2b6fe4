"""Plots; they need matplotlib, of the extra ``cli``."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hijack.checkpoint.compare import Comparison

#: Weights that are labelled in the plot.
LABELLED = 5


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Plot the signal-to-noise ratio of every weight, and label the worst.

    Args:
        comparison: what to draw; equal weights are left out, those with NaN or inf are
            only in the legend.
        path: the PNG to write.
    """
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
        label = f"{rank}  {key}  {error.sqnr:.1f} dB"
        axes.scatter([number], [error.sqnr], s=18, color="tab:red", label=label)
        axes.annotate(
            str(rank), (number, error.sqnr), xytext=(5, 4), textcoords="offset points"
        )
    for key in comparison.broken[:LABELLED]:
        axes.scatter([], [], marker="x", color="black", label=f"{key}  NaN or inf")
    if worst or comparison.broken:
        axes.legend(title="worst", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    equal = sum(error.max_abs_error == 0 for error in comparison.layers.values())
    axes.set_xlabel(
        f"weight, in file order ({equal} of {len(comparison.layers)} are equal)"
    )
    axes.set_ylabel("SQNR, dB (higher is better)")
    axes.set_title(
        f"{Path(comparison.other).name} against {Path(comparison.reference).name}"
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
