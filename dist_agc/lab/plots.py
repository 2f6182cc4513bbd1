"""The demo's plot: loss, accuracy and clip fraction over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console.plots import AGC, LEGEND, WITHOUT, dress, figure, log_axis, percent_axis
from .training import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"no-agc": WITHOUT, "agc": AGC}


def comparison(runs: Sequence[Run], path: Path, *, title: str, subtitle: str) -> None:
    """Write a PNG with one panel each for loss, accuracy and clip fraction of all runs."""
    made = figure(8.5, 8.5, title, subtitle)
    loss, accuracy, clipped = made.subplots(3, 1, sharex=True, height_ratios=[3, 3, 2])
    dress(loss, "Loss")
    dress(accuracy, "Accuracy")
    dress(clipped, "Share of units that AGC clipped", x="step")
    _losses(loss, runs)
    _accuracies(accuracy, runs)
    _clip_fractions(clipped, runs)
    clipped.set_xlim(1, max(2, *(len(run.steps) for run in runs)))
    clipped.xaxis.get_major_locator().set_params(integer=True)
    loss.legend(loc="upper right", **LEGEND)
    made.savefig(path)


def _line(run: Run) -> dict[str, Any]:
    return {"color": COLOURS[run.name], "linewidth": 1.6, "label": run.label, "solid_capstyle": "round"}


def _losses(axes: Axes, runs: Sequence[Run]) -> None:
    # Losses without AGC reach 1e15: the panel ends where there is still something to read.
    seen = [step.loss for run in runs for step in run.steps if not step.diverged and step.loss > 0]
    top = 5 * seen[0] if seen else 10.0
    bottom = min(seen, default=1.0)
    log_axis(axes, "y", (bottom, top))
    axes.set_ylim(bottom / 1.4, top)
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
    percent_axis(axes, [step.accuracy for run in runs for step in run.steps])
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
    percent_axis(axes, [share for points in shares.values() for _, share in points])
    for name, points in shares.items():
        if points:
            numbers, values = zip(*points, strict=True)
            axes.fill_between(numbers, values, color=COLOURS[name], alpha=0.18, linewidth=0)
            axes.plot(numbers, values, color=COLOURS[name], linewidth=1.4)
