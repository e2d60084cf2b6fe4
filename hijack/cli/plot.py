"""The demo's picture; it needs matplotlib, of the extra ``cli``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


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
