"""The demo's plot: loss, accuracy and clip fraction over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from .training import Run

COLOURS = {"no-agc": "#c8553d", "agc": "#1f6f8b"}
INK, FAINT = "#2b2b2b", "#8a8a8a"


def comparison(runs: Sequence[Run], path: Path, *, title: str, subtitle: str) -> None:
    """Write a PNG with one panel each for loss, accuracy and clip fraction of all runs."""
    # Not pyplot: no window system is asked for, and no state is left behind.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 8.5), dpi=150, facecolor="white")
    figure.subplots_adjust(left=0.085, right=0.96, top=0.875, bottom=0.065, hspace=0.3)
    figure.text(0.085, 0.968, title, fontsize=14, fontweight="bold", color=INK, va="top")
    figure.text(0.085, 0.937, subtitle, fontsize=9.5, color=FAINT, va="top")
    loss, accuracy, clipped = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 2])
    for axes, heading in ((loss, "Loss"), (accuracy, "Accuracy"), (clipped, "Share of units that AGC clipped")):
        dress(axes, heading)
    _losses(loss, runs)
    _accuracies(accuracy, runs)
    _clip_fractions(clipped, runs)
    clipped.set_xlim(1, max(2, *(len(run.steps) for run in runs)))
    clipped.xaxis.get_major_locator().set_params(integer=True)
    clipped.set_xlabel("step", color=FAINT, fontsize=9)
    loss.legend(frameon=False, fontsize=9, loc="upper right", labelcolor=INK)
    figure.savefig(path)


def dress(axes: Axes, heading: str) -> None:
    """The look of every panel."""
    axes.set_title(heading, loc="left", fontsize=10.5, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=FAINT, labelsize=9)


def _line(run: Run) -> dict[str, Any]:
    return {"color": COLOURS[run.name], "linewidth": 1.6, "label": run.label, "solid_capstyle": "round"}


def _losses(axes: Axes, runs: Sequence[Run]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    # Losses without AGC reach 1e15: the panel ends where there is still something to read.
    seen = [step.loss for run in runs for step in run.steps if not step.diverged and step.loss > 0]
    top = 5 * seen[0] if seen else 10.0
    bottom = min(seen, default=1.0)
    axes.set_yscale("log")
    axes.set_ylim(bottom / 1.4, top)
    wide = top / bottom > 300
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for run in runs:
        # A line to far above the panel shows where a loss went that no axis has room for.
        axes.plot(
            [step.number for step in run.steps], [_drawable(step.loss, 1e6 * top) for step in run.steps], **_line(run)
        )
        if run.diverged:
            leaves = next(step.number for step in run.steps if not step.loss < top)
            axes.annotate(
                f"not finite from step {run.steps[-1].number} on",
                (leaves, top),
                xytext=(8, -4),
                textcoords="offset points",
                color=COLOURS[run.name],
                fontsize=9,
                va="top",
                bbox={"color": "white", "pad": 1},
            )


def _drawable(value: float, most: float) -> float:
    return min(value, most) if math.isfinite(value) else most


def _accuracies(axes: Axes, runs: Sequence[Run]) -> None:
    _percent_axis(axes, [step.accuracy for run in runs for step in run.steps])
    for run in runs:
        colour, last = COLOURS[run.name], run.steps[-1]
        axes.plot([step.number for step in run.steps], [step.accuracy for step in run.steps], **_line(run))
        if run.diverged:
            axes.plot(
                last.number, last.accuracy, marker="x", markersize=8, markeredgewidth=2, color=colour, clip_on=False
            )
        if run.test_accuracy is not None:
            axes.axhline(run.test_accuracy, color=colour, linewidth=1, linestyle=(0, (2, 3)))
    tested = [run for run in runs if run.test_accuracy is not None]
    for place, run in enumerate(reversed(tested)):
        # Below the curves, which end high; beside the lines two labels would lie upon each other.
        label = f"test data, {run.label}: {run.test_accuracy:.1%}"
        corner = {"transform": axes.transAxes, "ha": "right", "va": "bottom"}
        axes.text(0.99, 0.04 + 0.1 * place, label, color=COLOURS[run.name], fontsize=9, **corner)


def _clip_fractions(axes: Axes, runs: Sequence[Run]) -> None:
    shares = {run.name: [(s.number, s.clip_fraction) for s in run.steps if s.clip_fraction is not None] for run in runs}
    _percent_axis(axes, [share for points in shares.values() for _, share in points])
    for name, points in shares.items():
        if points:
            numbers, values = zip(*points, strict=True)
            axes.fill_between(numbers, values, color=COLOURS[name], alpha=0.18, linewidth=0)
            axes.plot(numbers, values, color=COLOURS[name], linewidth=1.4)


def _percent_axis(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(0, min(1.03, max(0.1, 1.2 * max(values, default=0))))
