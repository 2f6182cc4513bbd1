"""Charts of `bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .growing import Curve
    from .timing import Method

INK, FAINT, OURS, OTHER = "#2b2b2b", "#8a8a8a", "#1f6f8b", "#b9c4c9"


def bars(results: Mapping[float, Sequence[Method]], path: Path, *, title: str, subtitle: str) -> None:
    """Write a PNG with one panel per share of clipped units and one bar per method."""
    from matplotlib.figure import Figure

    rows = max(sum(m.call is not None for m in found) for found in results.values())
    figure = Figure(figsize=(8.5, 1.1 + len(results) * (0.45 + 0.32 * rows)), dpi=150, layout="constrained")
    figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.supxlabel(f"milliseconds, median   ({subtitle})", fontsize=8.5, color=FAINT)
    panels = figure.subplots(len(results), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (share, found) in zip(panels, results.items(), strict=True):
        ran = [m for m in found if m.call is not None]
        times = [1e3 * m.typical for m in ran]
        drawn = axes.barh([m.name for m in ran], times, color=[OURS if "dist_agc" in m.name else OTHER for m in ran])
        axes.bar_label(drawn, labels=[f"{t:.1f}" for t in times], padding=4, fontsize=8.5, color=INK)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_title(f"{share:.0%} of units clipped", loc="left", fontsize=10, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=8.5)
    figure.savefig(path)


def growth(curves: Sequence[Curve], path: Path) -> None:
    """Write a PNG with one log-log panel per curve, beside a line of slope 1."""
    from matplotlib.figure import Figure

    rows = -(-len(curves) // 2)
    figure = Figure(figsize=(9, 3.25 * rows), dpi=150, layout="constrained")
    panels = figure.subplots(rows, 2).flatten()
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    for axes, curve in zip(panels, curves, strict=False):
        sizes, seconds = zip(*curve.points, strict=True)
        axes.loglog(sizes, [1e3 * s for s in seconds], marker="o", color=OURS)
        straight = [1e3 * seconds[-1] * size / sizes[-1] for size in sizes]
        axes.loglog(sizes, straight, color=FAINT, linestyle="--", linewidth=1, label="linear")
        axes.set_title(f"{curve.what}: power {curve.power:.2f}", loc="left", fontsize=10.5, color=INK)
        axes.set_xlabel(curve.against, color=FAINT, fontsize=9)
        axes.set_ylabel("CPU milliseconds", color=FAINT, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", colors=FAINT, labelsize=8.5)
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)
    figure.savefig(path)
