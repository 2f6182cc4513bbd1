"""The report's figures, as SVG with its text kept as text: small ones, so that they can be read on a phone too."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import unescape
from itertools import cycle
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from ..lab.console.plots import COLOURS, FAINT, INK, dress, figure, log_axis, percent_axis
from ..lab.console.tables import folded
from .runs import PER_PARAMETER, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS, COLUMNS, ROWS = 400, 200, 60  # drawn at most
NAME = 58  # characters that fit above a row
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
    """Clip fraction over the steps of every parameter, or of the `ROWS` that are clipped most. The run has some.

    A name stands above its row: beside it, in so narrow a figure, there would be no room for either.
    """
    most = run.most_clipped(ROWS)
    series = {name: dict(run.series(PER_PARAMETER + name)) for name in run.parameters() if name in most}
    steps = sorted({step for values in series.values() for step in values})
    groups = _groups(steps, COLUMNS)
    labels = [folded(name, NAME).replace(" ", "") for name in series]
    lines = max(label.count("\n") for label in labels) + 1
    cells: list[list[float]] = []
    for values in series.values():
        cells += [[math.nan] * len(groups)] * lines
        means = ([values[s] for s in group if s in values] for group in groups)
        cells.append([fmean(found) if found else math.nan for found in means])
    height = 0.9 + 0.14 * len(cells)
    made, axes = _panel(height, "step")
    half = (steps[-1] - steps[0]) / max(1, len(groups) - 1) / 2 or 0.5
    extent = (steps[0] - half, steps[-1] + half, len(cells) - 0.5, -0.5)
    image = axes.imshow(cells, cmap="YlOrRd", aspect="auto", interpolation="nearest", vmin=0, vmax=1, extent=extent)
    for i, label in enumerate(labels, start=1):
        axes.text(extent[0], i * (lines + 1) - 1.6, label, fontsize=7, linespacing=1.15, va="bottom", color=INK)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    above: dict[str, Any] = {"location": "top", "fraction": 0.1 / height, "pad": 0.1 / height, "aspect": 30}
    bar = made.colorbar(image, ax=axes, ticks=[0, 0.5, 1], format="{x:.0%}", shrink=0.9, **above)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(labelsize=7, colors=FAINT)
    return _svg(made)


def histogram(runs: Sequence[Run]) -> str:
    """Share of units by ratio, the threshold marked; empty where no run has counted ratios."""
    found = [(run, run.ratios(), colour) for run, colour in zip(runs, cycle(COLOURS)) if run.ratios().parameters]
    if not found:
        return ""
    made, axes = _panel(2.1, "gradient / weight norm; outermost bars: all beyond")
    every_edge: list[float] = []
    at_the_top: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "va": "top", "fontsize": 8}
    for i, (run, counted, colour) in enumerate(found):
        totals, thresholds = counted.totals(), counted.thresholds
        between = [(a - b) / totals[0] for a, b in zip(totals, [*totals[1:], 0], strict=True)]
        step = thresholds[-1] / thresholds[-2] if len(thresholds) > 1 else 2.0
        edges = [thresholds[0] / step, *thresholds, thresholds[-1] * step]
        every_edge += edges
        axes.stairs(between, edges, color=colour, fill=True, alpha=0.45)
        if at := run.threshold:
            axes.axvline(at, color=colour, linewidth=1.2, linestyle=(0, (3, 2)))
            beyond_the_middle = at * at > edges[0] * edges[-1]
            side, x = ("right", at / 1.1) if beyond_the_middle else ("left", at * 1.1)
            axes.text(x, 0.98 - 0.1 * i, f"threshold {at:g}", color=colour, ha=side, **at_the_top)
    log_axis(axes, "x", every_edge)
    percent_axis(axes, decimals=None)
    return _svg(made)


def _groups(items: list[T], most: int) -> list[list[T]]:
    """At most so many groups of neighbours, all of one size but the last."""
    size = -(-len(items) // most)
    return [items[i : i + size] for i in range(0, len(items), size)]


def _panel(height: float, label: str) -> tuple[Figure, Axes]:
    from matplotlib.ticker import MaxNLocator

    made = figure(3.6, height)
    axes = made.add_subplot()
    dress(axes, x=label, size=8)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    return made, axes


def _svg(made: Figure) -> str:
    import matplotlib

    out = io.StringIO()
    # Text stays text: it can be searched and read aloud. No metadata: the same run gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "dist-agc"}):
        made.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    return TEXT.sub(_as_laid_out, text[text.index("<svg") :])


# In matplotlib's SVG: what is before the end of the tag, the size, the words.
TEXT = re.compile(r'(<text style="font-size: ([\d.]+)px;[^>]*)>([^<]+)')


def _as_laid_out(found: re.Match[str]) -> str:
    """As wide as the figure has room for, which was measured in one font, whatever font the reader has."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    tag, size, words = found.groups()
    width, _, _ = text_to_path.get_text_width_height_descent(unescape(words), FontProperties(size=float(size)), False)
    return f'{tag} textLength="{width:.2f}" lengthAdjust="spacingAndGlyphs">{words}'
