"""The report's figures, as SVG with its text kept as text: small ones, so that they can be read on a phone too."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import cycle
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from ..lab.console.plots import COLOURS, FAINT, dress, figure, log_axis, percent_axis
from .runs import PER_PARAMETER, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS, COLUMNS, ROWS = 400, 200, 60  # drawn at most
T = TypeVar("T")


def lines(runs: Sequence[Run], key: str, *, log: bool = False) -> str:
    """One value over the steps, a line a run, upwards in percent or logarithmic; empty where no run has it."""
    series = [[(step, y) for step, y in run.series(key) if y > 0 or not log] for run in runs]
    if not any(series):
        return ""
    made, axes = _panel(2.1, "step")
    for points, colour in zip(series, cycle(COLOURS)):
        if points:
            groups = _groups(points, POINTS)
            steps = [group[len(group) // 2][0] for group in groups]
            values = [[y for _, y in group] for group in groups]
            # The line is the mean of neighbours; the band shows what that hides.
            axes.fill_between(steps, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.2, linewidth=0)
            axes.plot(steps, [*map(fmean, values)], color=colour, linewidth=1.3, marker="." if len(steps) < 3 else "")
    values = [y for points in series for _, y in points]
    if log:
        log_axis(axes, "y", values)
    else:
        percent_axis(axes, values)
    return _svg(made)


def heat_map(run: Run) -> str:
    """Clip fraction over the steps of every parameter, or of the `ROWS` that are clipped most. The run has some."""
    most = run.most_clipped(ROWS)
    series = {name: dict(run.series(PER_PARAMETER + name)) for name in run.parameters() if name in most}
    steps = sorted({step for values in series.values() for step in values})
    groups = _groups(steps, COLUMNS)
    cells = [
        [fmean(found) if (found := [values[s] for s in group if s in values]) else math.nan for group in groups]
        for values in series.values()
    ]
    made, axes = _panel(0.7 + 0.13 * len(series), "step")
    half = (steps[-1] - steps[0]) / max(1, len(groups) - 1) / 2 or 0.5
    extent = (steps[0] - half, steps[-1] + half, len(series) - 0.5, -0.5)
    image = axes.imshow(cells, cmap="YlOrRd", aspect="auto", interpolation="nearest", vmin=0, vmax=1, extent=extent)
    axes.set_yticks(range(len(series)), [_shortened(name) for name in series], fontsize=7)
    axes.grid(False)
    bar = made.colorbar(image, ax=axes, ticks=[0, 0.5, 1], fraction=0.05, pad=0.02, format="{x:.0%}")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(labelsize=7, colors=FAINT)
    return _svg(made)


def histogram(runs: Sequence[Run]) -> str:
    """Share of units by ratio, the threshold marked; empty where no run has counted ratios."""
    found = [(run, run.ratios(), colour) for run, colour in zip(runs, cycle(COLOURS)) if run.ratios().parameters]
    if not found:
        return ""
    made, axes = _panel(2.1, "gradient norm / weight norm (outermost bars: all beyond)")
    at_the_top: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "va": "top", "fontsize": 8}
    for i, (run, counted, colour) in enumerate(found):
        totals, thresholds = counted.totals(), counted.thresholds
        between = [(a - b) / totals[0] for a, b in zip(totals, [*totals[1:], 0], strict=True)]
        step = thresholds[-1] / thresholds[-2] if len(thresholds) > 1 else 2.0
        edges = [thresholds[0] / step, *thresholds, thresholds[-1] * step]
        axes.stairs(between, edges, color=colour, fill=True, alpha=0.45)
        if at := run.threshold:
            axes.axvline(at, color=colour, linewidth=1.2, linestyle=(0, (3, 2)))
            axes.text(1.1 * at, 0.98 - 0.1 * i, f"threshold {at:g}", color=colour, **at_the_top)
    axes.set_xscale("log")
    percent_axis(axes, decimals=None)
    return _svg(made)


def _shortened(name: str) -> str:
    """The name with its middle left out where it is long: both ends tell most."""
    return name if len(name) <= 22 else f"{name[:10]}…{name[-11:]}"


def _groups(items: list[T], most: int) -> list[list[T]]:
    """At most so many groups of neighbours, all of one size but the last."""
    size = -(-len(items) // most)
    return [items[i : i + size] for i in range(0, len(items), size)]


def _panel(height: float, label: str) -> tuple[Figure, Axes]:
    made = figure(3.6, height)
    axes = made.add_subplot()
    dress(axes, x=label, size=8)
    return made, axes


def _svg(made: Figure) -> str:
    import matplotlib

    out = io.StringIO()
    # Text stays text: it can be searched and read aloud. No metadata: the same run gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "dist-agc"}):
        made.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    return text[text.index("<svg") :]
