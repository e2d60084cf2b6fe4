"""Pictures of what was measured; needs matplotlib, of the extra ``cli``."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hijack.checkpoint.compare import Comparison
from hijack.errors import CheckpointError

#: Weights that are named in the picture.
NAMED = 5


def draw_comparison(found: Comparison, path: Path) -> None:
    """The signal-to-noise ratio of every weight, in file order, the worst named.

    Args:
        found: what to draw; weights that are equal are left out, those that hold NaN or
            inf are only named.
        path: the PNG to write.

    Raises:
        CheckpointError: if it cannot be written.
    """
    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [
        (number, key, loss)
        for number, (key, loss) in enumerate(found.layers.items())
        if math.isfinite(loss.sqnr)
    ]
    worst = sorted(points, key=lambda point: point[2].sqnr)[:NAMED]
    axes.scatter([p[0] for p in points], [p[2].sqnr for p in points], s=10)
    for rank, (number, key, loss) in enumerate(worst, 1):
        label = f"{rank}  {key}  {loss.sqnr:.1f} dB"
        axes.scatter([number], [loss.sqnr], s=18, color="tab:red", label=label)
        axes.annotate(
            str(rank), (number, loss.sqnr), xytext=(5, 4), textcoords="offset points"
        )
    for key in found.broken[:NAMED]:
        axes.scatter([], [], marker="x", color="black", label=f"{key}  NaN or inf")
    if worst or found.broken:
        axes.legend(title="worst", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    equal = sum(loss.largest == 0 for loss in found.layers.values())
    axes.set_xlabel(f"weight, in file order ({equal} of {len(found.layers)} are equal)")
    axes.set_ylabel("SQNR, dB (higher is better)")
    axes.set_title(f"{Path(found.other).name} against {Path(found.reference).name}")
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written; {error.strerror}") from error
