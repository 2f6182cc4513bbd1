"""Charts of `bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .console.plots import AGC, FAINT, INK, LEGEND, OTHER, dress, figure, log_axis

if TYPE_CHECKING:
    from ..lab.growing import Curve
    from .timing import Method


def bars(results: Mapping[float, Sequence[Method]], path: Path, *, title: str, subtitle: str) -> None:
    """Write a PNG with one panel per share of clipped units and one bar per method."""
    rows = max(sum(m.call is not None for m in found) for found in results.values())
    made = figure(8.5, 1.4 + len(results) * (0.45 + 0.32 * rows), title, subtitle)
    panels = made.subplots(len(results), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (share, found) in zip(panels, results.items(), strict=True):
        ran = [m for m in found if m.call is not None]
        times = [1e3 * m.typical for m in ran]
        drawn = axes.barh([m.name for m in ran], times, color=[AGC if "dist_agc" in m.name else OTHER for m in ran])
        axes.bar_label(drawn, labels=[f"{t:.1f}" for t in times], padding=4, fontsize=8.5, color=INK)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        dress(axes, f"{share:.0%} of units clipped", x="milliseconds, median" if axes is panels[-1] else "", grid="x")
        axes.tick_params(axis="y", colors=INK)
    made.savefig(path)


def growth(curves: Sequence[Curve], path: Path) -> None:
    """Write a PNG with one log-log panel per curve, beside a line of slope 1."""
    rows = -(-len(curves) // 2)
    made = figure(9, 3.25 * rows)
    panels = made.subplots(rows, 2).flatten()
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    for axes, curve in zip(panels, curves, strict=False):
        sizes, seconds = zip(*curve.points, strict=True)
        times = [1e3 * s for s in seconds]
        axes.plot(sizes, times, marker="o", color=AGC)
        straight = [times[-1] * size / sizes[-1] for size in sizes]
        axes.plot(sizes, straight, color=FAINT, linestyle="--", linewidth=1, label="linear")
        log_axis(axes, "x", sizes)
        log_axis(axes, "y", times)
        dress(axes, f"{curve.what}: power {curve.power:.2f}", x=curve.against, y="CPU milliseconds")
        axes.legend(loc="upper left", **LEGEND)  # curves rise; to look for the best place is slow, and says so
    made.savefig(path)
