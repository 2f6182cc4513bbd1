"""The report's figures, as SVG with its text kept as text: small ones, so that they can be read on a phone too."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from ..console.plots import COLOURS, FAINT, dress, figure, log_axis, percent_axis
from .runs import PER_PARAMETER, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS, COLUMNS, ROWS = 400, 200, 60  # drawn at most


def lines(runs: Sequence[Run], key: str, *, percent: bool = False, log: bool = False) -> str | None:
    """One value over the steps, a line a run; None where no run has it. Bands show what thinning hides."""
    series = [(i, run.series(key)) for i, run in enumerate(runs)]
    series = [(i, [(x, y) for x, y in points if not log or y > 0]) for i, points in series]
    if not any(points for _, points in series):
        return None
    made, axes = _panel(3.6, 2.1, "step")
    for i, points in series:
        if points:
            colour = COLOURS[i % len(COLOURS)]
            steps, mean, low, high = _thinned(points)
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(steps, mean, color=colour, linewidth=1.3, marker="." if len(steps) < 3 else "")
    values = [y for _, points in series for _, y in points]
    if log:
        log_axis(axes, "y", values)
    if percent:
        percent_axis(axes, values)
    return _svg(made)


def heat_map(run: Run) -> str | None:
    """Clip fraction of every parameter over the steps, of those clipped most where there are more than `ROWS`; None
    where there are no statistics per parameter."""
    names = run.parameters()
    if not names:
        return None
    series = {name: dict(run.series(PER_PARAMETER + name)) for name in names}
    if len(names) > ROWS:
        most = set(sorted(names, key=lambda name: fmean(series[name].values()), reverse=True)[:ROWS])
        names = [name for name in names if name in most]
    steps = sorted({step for name in names for step in series[name]})
    groups = _groups(len(steps), COLUMNS)
    cells = [
        [fmean(v) if (v := [series[n][s] for s in steps[g] if s in series[n]]) else math.nan for g in groups]
        for n in names
    ]
    made, axes = _panel(3.6, 0.7 + 0.13 * len(names), "step")
    half = (steps[-1] - steps[0]) / max(1, len(groups) - 1) / 2 or 0.5
    image = axes.imshow(
        cells,
        aspect="auto",
        interpolation="nearest",
        cmap="YlOrRd",
        vmin=0,
        vmax=1,
        extent=(steps[0] - half, steps[-1] + half, len(names) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(names)), [shortened(name, 22) for name in names], fontsize=7)
    axes.grid(False)
    bar = made.colorbar(image, ax=axes, ticks=[0, 0.5, 1], fraction=0.05, pad=0.02, format="{x:.0%}")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(labelsize=7, colors=FAINT)
    return _svg(made)


def histogram(runs: Sequence[Run]) -> str | None:
    """Share of units by ratio, the threshold marked; None where no run has counted ratios."""
    counts = [(i, run, run.ratios()) for i, run in enumerate(runs)]
    counts = [entry for entry in counts if entry[2].parameters]
    if not counts:
        return None
    made, axes = _panel(3.6, 2.1, "gradient norm / weight norm (outermost bars: all beyond)")
    for i, run, counted in counts:
        totals, thresholds = counted.totals(), counted.thresholds
        between = [(a - b) / totals[0] for a, b in zip(totals, [*totals[1:], 0], strict=True)]
        step = thresholds[-1] / thresholds[-2] if len(thresholds) > 1 else 2.0
        edges = [thresholds[0] / step, *thresholds, thresholds[-1] * step]
        axes.stairs(between, edges, color=COLOURS[i % len(COLOURS)], fill=True, alpha=0.45, label=run.name)
        if run.threshold is not None:
            axes.axvline(run.threshold, color=COLOURS[i % len(COLOURS)], linewidth=1.2, linestyle=(0, (3, 2)))
            axes.annotate(
                f"threshold {run.threshold:g}",
                (run.threshold, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(3, -2 - 10 * i),
                textcoords="offset points",
                va="top",
                fontsize=8,
                color=COLOURS[i % len(COLOURS)],
            )
    axes.set_xscale("log")
    percent_axis(axes, decimals=None)
    return _svg(made)


def shortened(name: str, length: int) -> str:
    """The name with its middle left out where it is long: both ends tell most."""
    if len(name) <= length:
        return name
    return f"{name[: length // 2 - 1]}…{name[len(name) - length + length // 2 :]}"


def _panel(width: float, height: float, label: str) -> tuple[Figure, Axes]:
    made = figure(width, height)
    axes = made.add_subplot()
    dress(axes, x=label, size=8)
    return made, axes


def _groups(count: int, most: int) -> list[slice]:
    """At most ``most`` slices of neighbours."""
    size = -(-count // most)
    return [slice(i, min(count, i + size)) for i in range(0, count, max(1, size))]


def _thinned(points: list[tuple[float, float]]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, mean, least and largest of neighbours."""
    groups = [points[g] for g in _groups(len(points), POINTS)]
    values = [[y for _, y in group] for group in groups]
    steps = [group[len(group) // 2][0] for group in groups]
    return steps, [fmean(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def _svg(made: Figure) -> str:
    import matplotlib

    out = io.StringIO()
    # Text stays text: it can be searched, read aloud and is set in the reader's own font. No metadata: the same run
    # gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "dist-agc"}):
        made.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    return text[text.index("<svg") :]
