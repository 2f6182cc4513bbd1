"""`dist-agc report`: one HTML file that shows what AGC did in a run, or in two."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import cycle
from pathlib import Path
from statistics import fmean, median
from string import Template
from typing import Annotated

import typer

from ..lab.console import require
from ..lab.console.plots import COLOURS
from . import figures
from .runs import PER_PARAMETER, Run, is_number, read

WORD = 26  # letters that fit in a line, on a phone too
WORST = 15  # rows of the table of the parameters clipped most

PAGE = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))


def command(
    files: Annotated[list[Path], typer.Argument(metavar="RUN.jsonl [OTHER.jsonl]", help="One line of JSON per step.")],
    out: Annotated[Path | None, typer.Option(help="The file to write.", show_default="RUN.html")] = None,
) -> None:
    """Write one HTML file, with nothing to load from anywhere, that shows what AGC did.

    Clip fraction, gradient norm and loss over time, a heat map of parameters and steps, the distribution of ratios
    with the threshold marked, the parameters clipped most, the settings. Several runs, in one file or in two, are laid
    over each other. docs/logging.md says what the lines hold.
    """
    require("cli", "matplotlib")
    target = out or files[0].with_suffix(".html")
    text = page(read(files), " and ".join(path.stem for path in files))
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"cannot write {target}: {error.strerror}.", param_hint="--out") from None
    typer.echo(f"{target}  ({len(text) / 1024:.0f} KiB)")


def page(runs: Sequence[Run], title: str) -> str:
    """The whole report: headings and what is below them. Without a figure, its heading is left out too."""
    panels = [
        ("Runs", _summary(runs)),
        (f"Share of units {_clipped(runs)}", figures.lines(runs, "agc/clip_fraction")),
        ("Gradient norm before clipping", figures.lines(runs, "agc/grad_norm", log=True)),
        ("Loss", figures.lines(runs, "loss", log=True)),
        ("Largest ratio of gradient to weight norm", figures.lines(runs, "agc/max_ratio", log=True)),
    ]
    missing = "No ratios were counted: write <code>dist_agc.ratios(model).as_dict()</code> too."
    ratios = figures.histogram(runs) or _note(missing)
    for run in runs:
        if left_out := run.ratios().left_out:
            ratios += _note(f"{left_out} lines of {_name(run.name)} with other thresholds are left out.")
    panels.append(("How large are the ratios?", ratios))
    for run in runs:
        if every := len(run.parameters()):
            some = f"The {figures.ROWS} parameters that {'would be' if run.dry else 'are'} clipped most, of {every}."
            heat_map = figures.heat_map(run) + (_note(some) if every > figures.ROWS else "")
            panels.append((f"Share of units {_clipped([run])}, by parameter: {run.name}", heat_map))
            panels.append((f"{'Would be clipped' if run.dry else 'Clipped'} most: {run.name}", _worst(run)))
        elif run.values("agc/clip_fraction"):
            hint = "Statistics by parameter are not in this run: write <code>as_dict(per_parameter=True)</code> too."
            panels.append((f"By parameter: {run.name}", _note(hint)))
    panels.append(("Settings", _settings(runs)))
    sections = [f"<section><h2>{_name(heading)}</h2>{body}</section>" for heading, body in panels if body]
    dry = [run.name for run in runs if run.dry]
    said = _note(f"Dry: {_name(', '.join(dry))} measured what AGC would clip, and clipped nothing.") if dry else ""
    heading = f"AGC: {title}"
    return PAGE.substitute(title=escape(heading), heading=_name(heading), dry=said, sections="\n".join(sections))


def _clipped(runs: Sequence[Run]) -> str:
    dry = [run.dry for run in runs]
    return "that would be clipped" if all(dry) else "clipped (in dry runs: would be clipped)" if any(dry) else "clipped"


def _name(text: str) -> str:
    """Where a line is too short for a name, it breaks after dots, and inside long words after underscores."""
    words = re.split(r"(?<=[./:])", text)
    parts = (part for word in words for part in ([word] if len(word) <= WORD else re.split(r"(?<=[_-])", word)))
    return "<wbr>".join(map(escape, parts))


def _note(text: str) -> str:
    return f"<p>{text}</p>"


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Cells are HTML already, those of the head too."""
    first = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div><table>{f'<tr>{first}</tr>' if head else ''}{body}</table></div>"


def _summary(runs: Sequence[Run]) -> str:
    """A column a run."""
    keys = [f'<span style="background:{c}"></span>{_name(r.name)}' for r, c in zip(runs, cycle(COLOURS))]
    return _table([["", *keys], *([heading, *map(cell, runs)] for heading, cell in COMPARED.items())])


def _of(summary: Callable[[list[float]], float], values: list[float], form: str) -> str:
    return format(summary(values), form) if values else "–"


def _last_loss(run: Run) -> str:
    """Of the last line that says something of it; evaluations may have lines of their own."""
    losses = [line["loss"] for line in run.lines if "loss" in line]
    if not losses:
        return "–"
    return f"{losses[-1]:.4g}" if is_number(losses[-1]) else "not finite"


def _largest(run: Run) -> str:
    """The largest ratio of the run, and the parameter that had it where the line says so."""
    lines = [line for line in run.lines if is_number(line.get("agc/max_ratio"))]
    if not lines:
        return "–"
    most = max(lines, key=lambda line: line["agc/max_ratio"])
    where = most.get("agc/max_ratio_parameter")
    return f"{most['agc/max_ratio']:.3g}" + (f" in <code>{_name(where)}</code>" if isinstance(where, str) else "")


COMPARED: dict[str, Callable[[Run], str]] = {
    "threshold": lambda run: "–" if run.threshold is None else f"{run.threshold:g}",
    "units": lambda run: _of(max, run.values("agc/units"), ",.0f"),
    "clipped, mean": lambda run: (run.dry * "would clip ") + _of(fmean, run.values("agc/clip_fraction"), ".1%"),
    "gradient norm, median": lambda run: _of(median, run.values("agc/grad_norm"), ".3g"),
    "largest ratio": _largest,
    "steps with inf or nan": lambda run: str(sum(y > 0 for y in run.values("agc/nonfinite_units"))),
    "last step": lambda run: f"{round(run.lines[-1]['step'], 4):,.12g}",  # some count epochs
    "last loss": _last_loss,
}


def _worst(run: Run) -> str:
    counted, rows = run.ratios(), []
    for name in run.most_clipped(WORST):
        shares, norms = run.values(PER_PARAMETER + name), run.values(f"agc/grad_norm/{name}")
        numbers = [f"{fmean(shares):.1%}", f"{max(shares):.1%}", f"{max(norms, default=0.0):.3g}"]
        ratio = _reach(counted.thresholds, counted.parameters.get(name))
        rows.append([f"<code>{_name(name)}</code>", *numbers, ratio])
    return _table(rows, ["parameter", "mean", "at most", "norm at most", "ratio at most"])


def _reach(thresholds: Sequence[float], counts: Sequence[int] | None) -> str:
    """Between which thresholds the largest ratio lies."""
    if counts is None:
        return "–"
    passed = sum(count > 0 for count in counts[1:])
    if passed == len(thresholds):
        return f"&gt; {thresholds[-1]:.2g}"
    return f"{'&lt;' if passed == 0 else '≤'} {thresholds[passed]:.2g}"


def _settings(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    if not names:
        return _note('The file says nothing of the settings: a line may have them under <code>"settings"</code>.')
    rows = ([name, *(repr(run.settings.get(name, "–")) for run in runs)] for name in names)
    return _table(([_name(cell) for cell in row] for row in rows), ["", *(_name(run.name) for run in runs)])
