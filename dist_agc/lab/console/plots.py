"""The one style of all plots: the demo's, the report's, those of `bench` and of the study."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AGC, WITHOUT = "#1f6f8b", "#c8553d"
COLOURS = (AGC, WITHOUT, "#6b8e23", "#7a5195")  # of things that are alike
OTHER = "#b9c4c9"  # what is only there to be held against
INK, FAINT, GRID = "#2b2b2b", "#6a6a6a", "#e6e6e6"
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8.5, "labelcolor": INK}


def figure(width: float, height: float, title: str = "", subtitle: str = "") -> Figure:
    """An empty one, in inches. Not pyplot's: no window system is asked for, and no state is left behind."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.09)
    made = Figure(figsize=(width, height), dpi=150, facecolor="white", layout=layout)
    if title:  # empty lines keep the room that the subtitle takes
        made.suptitle(f"{title}\n\n", x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
        made.text(0.01, 1 - 0.42 / height, subtitle, fontsize=9, color=FAINT, va="top")
    return made


def dress(
    axes: Axes, heading: str = "", *, x: str = "", y: str = "", grid: Literal["x", "y"] = "y", size: float = 9
) -> None:
    """The look of every panel; `x` and `y` label its axes."""
    axes.set_title(heading, loc="left", fontsize=10.5, color=INK)
    axes.set_xlabel(x, fontsize=size, color=FAINT)
    axes.set_ylabel(y, fontsize=size, color=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=FAINT, labelsize=size)


def percent_axis(axes: Axes, values: Iterable[float] | None = None, *, decimals: int | None = 0) -> None:
    """Shares upwards, written in percent; from nothing to a little more than the largest of `values`."""
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=decimals))
    if values is not None:
        axes.set_ylim(0, min(1.03, max(0.05, 1.2 * max(values, default=0))))


def log_axis(axes: Axes, which: Literal["x", "y"], values: Iterable[float]) -> None:
    """Logarithmic, with plain numbers at its ticks: more of them where `values` do not reach far."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    values = [value for value in values if value > 0]
    reach = max(values) / min(values) if values else 1.0
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(5) if reach < 6 else LogLocator(subs=(1,) if reach > 100 else (1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axis.set_minor_formatter(NullFormatter())
