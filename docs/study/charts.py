"""The study's plots."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_agc.lab.console.plots import AGC, COLOURS, LEGEND, WITHOUT, dress, figure, log_axis, percent_axis

from .cells import Cell, Cells, Setting, best
from .networks import NETWORKS
from .trials import NONE, Clipping

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Small thresholds, which clip most, are darkest.
SHADES = ("#0b3c4d", AGC, "#3f93ad", "#6fb3c8", "#a3d0de", "#cbe5ec")
NORM = ("#6b4a00", "#b8860b", "#e2b85c")
TOO = COLOURS[3]  # AGC of the last layer too


def draw(found: Cells, folder: Path) -> list[Path]:
    """Every plot for which there are results."""
    networks = [n for n in NETWORKS if n != "gpt" and any(s.network == n for s in found)]
    shallow = [n for n in networks if not n.endswith("-deep")]
    deep = [n for n in networks if n.endswith("-deep")]
    written = []
    for name, plot in (
        ("rates.png", _rates(found, shallow) if shallow else None),
        ("rates-deep.png", _rates(found, deep) if deep else None),
        ("thresholds.png", _thresholds(found) if "nf" in networks else None),
        ("text.png", _text(found) if any(s.network == "gpt" for s in found) else None),
    ):
        if plot is not None:
            plot.savefig(folder / name)
            written.append(folder / name)
    return written


def _colour(clipping: Clipping, among: Iterable[Clipping]) -> str:
    if clipping == NONE:
        return WITHOUT
    shades = NORM if clipping.kind == "norm" else SHADES
    same = sorted({c for c in among if c.kind == clipping.kind})
    return shades[round(same.index(clipping) * (len(shades) - 1) / max(1, len(same) - 1))]


def _curves(axes: Axes, found: Cells, settings: Sequence[Setting], among: Sequence[Clipping], sign: float) -> None:
    """Medians over the learning rate, with the range over the seeds as a band."""
    for setting in settings:
        cells = [cell for cell in found[setting] if math.isfinite(cell.range[0])]
        rates = [cell.lr for cell in cells]
        look: dict[str, Any] = {"color": _colour(setting.clipping, among)}
        # Without clipping: a broad line below the others, seen where they run together.
        width, level = (3.2, 2) if setting.clipping == NONE else (1.4, 3)
        medians = [sign * cell.median for cell in cells]
        axes.plot(rates, medians, **look, label=str(setting.clipping), linewidth=width, zorder=level, marker=".")
        low, high = ([sign * cell.range[end] for cell in cells] for end in (0, 1))
        axes.fill_between(rates, low, high, **look, alpha=0.13, linewidth=0)
    log_axis(axes, "x", [cell.lr for setting in settings for cell in found[setting]])


def _legend(made: Figure, panels: Iterable[Axes], most: int = 7) -> None:
    """One for all panels, below them."""
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    where: dict[str, Any] = {"loc": "outside lower center", "ncols": min(most, len(lines))}
    made.legend(lines.values(), lines.keys(), **where, **LEGEND)


def _rates(found: Cells, networks: Sequence[str]) -> Figure:
    shown = [s for s in found if s.network in networks and s.clipping.kind in ("none", "agc")]
    batches = sorted({s.batch for s in shown})
    side_by_side = len(batches) == 1
    rows, columns = (1, len(networks)) if side_by_side else (len(networks), len(batches))
    subtitle = "peak learning rate across, test accuracy upwards; median and range over the seeds"
    made = figure(10, 1.5 + 2.6 * rows, "Accuracy over the learning rate", subtitle)
    panels = made.subplots(rows, columns, squeeze=False, sharey=True, sharex=False if side_by_side else "row")
    panels = panels.flatten().tolist()
    for axes, (network, batch) in zip(panels, product(networks, batches), strict=True):
        settings = [s for s in shown if (s.network, s.batch) == (network, batch)]
        axes.set_visible(bool(settings))
        dress(axes, f"{NETWORKS[network].label}\nbatch {batch}")
        _curves(axes, found, settings, [s.clipping for s in shown], sign=1)
        percent_axis(axes, [1])
    _legend(made, panels)
    return made


def _thresholds(found: Cells) -> Figure:
    from matplotlib.ticker import NullLocator

    batches = sorted({s.batch for s in found if s.network == "nf"})
    subtitle = "clipping threshold across, test accuracy upwards, each at its best learning rate; median and range"
    made = figure(10, 4.2, f"Which threshold? {NETWORKS['nf'].label}", subtitle)
    panels = made.subplots(1, len(batches), squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        dress(axes, f"batch {batch}")
        for kind, look, label in (("agc", AGC, "last layer left out"), ("agc+last", TOO, "last layer clipped too")):
            points = {s.clipping.at: best(found[s]) for s in found if _is(s, batch, kind)}
            if points:
                _error_bars(axes, points, look, label)
        without = found.get(Setting("nf", batch, NONE))
        if without:
            top = best(without)
            axes.axhline(top.median, color=WITHOUT, linewidth=1.4, label=str(NONE))
            axes.axhspan(*top.range, color=WITHOUT, alpha=0.13, linewidth=0)
        axes.set_xscale("log")
        ticks = sorted({s.clipping.at for s in found if s.network == "nf" and s.clipping.kind == "agc"})
        axes.set_xticks(ticks, [f"{at:g}" for at in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        percent_axis(axes, decimals=1)
    _legend(made, panels)
    return made


def _is(setting: Setting, batch: int, kind: str) -> bool:
    return (setting.network, setting.batch, setting.clipping.kind) == ("nf", batch, kind)


def _error_bars(axes: Axes, points: dict[float, Cell], colour: str, label: str) -> None:
    medians = [cell.median for cell in points.values()]
    reach = [
        [cell.median - cell.range[0] for cell in points.values()],
        [cell.range[1] - cell.median for cell in points.values()],
    ]
    axes.errorbar(
        list(points), medians, yerr=reach, color=colour, marker="o", markersize=4, linewidth=1.4, capsize=3, label=label
    )


def _text(found: Cells) -> Figure:
    settings = [s for s in found if s.network == "gpt"]
    subtitle = (
        "peak learning rate of AdamW across, test loss upwards (nats a character); median and range over the seeds"
    )
    made = figure(8.5, 5, "Small GPT: AGC, the global norm, and no clipping", subtitle)
    axes = made.subplots()
    dress(axes, "")
    _curves(axes, found, settings, [s.clipping for s in settings], sign=-1)
    _legend(made, [axes], 4)  # long labels
    return made
