"""`dist-agc report`: one HTML file that shows what AGC did in a run, or in two."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Annotated

import typer

from ..console import require
from .runs import PER_PARAMETER, Run, is_number, read

WORST = 15

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ margin: 0 auto; max-width: 72rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: #2b2b2b;
  background: #fff; }}
h1 {{ font-size: 1.4rem; margin: .2rem 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.05rem; margin: 0 0 .3rem; }}
main {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }}
section {{ border: 1px solid #ddd; border-radius: .5rem; padding: .8rem; min-width: 0; }}
section.wide {{ grid-column: 1 / -1; }}
svg {{ display: block; width: 100%; height: auto; font-family: system-ui, sans-serif; }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; }}
th, td {{ text-align: right; padding: .2rem .5rem; border-bottom: 1px solid #eee; font-variant-numeric: tabular-nums; }}
th {{ color: #555; font-weight: 600; }}
th:first-child, td:first-child {{ text-align: left; overflow-wrap: anywhere; min-width: 7rem; }}
.scroll {{ overflow-x: auto; }}
.note {{ color: #555; font-size: .9rem; margin: .3rem 0; }}
.key {{ display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .4rem; }}
code {{ font-size: .9em; overflow-wrap: anywhere; }}
</style>
<h1>{title}</h1>
<p class="note">Adaptive Gradient Clipping scales a unit's gradient down where it is large beside the unit's weights; a
unit is the fan-in of one output.</p>
<main>
{sections}
</main></html>
"""


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
    """The whole report."""
    from . import figures

    panels = [
        ("Share of units clipped", figures.lines(runs, "agc/clip_fraction", percent=True)),
        ("Gradient norm before clipping", figures.lines(runs, "agc/grad_norm", log=True)),
        ("Loss", figures.lines(runs, "loss", log=True)),
        ("Largest ratio of gradient to weight norm", figures.lines(runs, "agc/max_ratio", log=True)),
    ]
    sections = [_section("Runs", _summary(runs), wide=True)]
    sections += [_section(heading, svg) for heading, svg in panels if svg is not None]
    histogram = figures.histogram(runs)
    if histogram is None:
        histogram = _note("No ratios were counted: write <code>dist_agc.ratios(model).as_dict()</code> too.")
    for run in runs:
        if left_out := run.ratios().left_out:
            histogram += _note(f"{left_out} lines of {html.escape(run.name)} with other thresholds are left out.")
    sections.append(_section("How large are the ratios?", histogram))
    for run in runs:
        svg = figures.heat_map(run)
        if svg is not None:
            if (every := len(run.parameters())) > figures.ROWS:
                svg += _note(f"The {figures.ROWS} parameters that are clipped most, of {every}.")
            sections.append(_section(f"Share of units clipped, by parameter: {run.name}", svg))
            sections.append(_section(f"Clipped most: {run.name}", _worst(run)))
        elif run.series("agc/clip_fraction"):
            hint = "Statistics by parameter are not in this run: write <code>as_dict(per_parameter=True)</code> too."
            sections.append(_section(f"By parameter: {run.name}", _note(hint)))
    sections.append(_section("Settings", _settings(runs), wide=True))
    return _PAGE.format(title=html.escape(f"AGC: {title}"), sections="\n".join(sections))


def _section(heading: str, body: str, *, wide: bool = False) -> str:
    return f"<section{' class=wide' if wide else ''}><h2>{html.escape(heading)}</h2>{body}</section>"


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    first = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{f"<tr>{first}</tr>" if head else ""}{body}</table></div>'


def _summary(runs: Sequence[Run]) -> str:
    """A column a run: rows are what there is to compare."""
    from ..console.plots import COLOURS

    columns = []
    for i, run in enumerate(runs):
        clip = [y for _, y in run.series("agc/clip_fraction")]
        norms = [y for _, y in run.series("agc/grad_norm")]
        units = [y for _, y in run.series("agc/units")]
        columns.append(
            [
                f'<span class="key" style="background:{COLOURS[i % len(COLOURS)]}"></span>{html.escape(run.name)}',
                "–" if run.threshold is None else f"{run.threshold:g}",
                f"{max(units):,.0f}" if units else "–",
                f"{fmean(clip):.1%}" if clip else "–",
                f"{median(norms):.3g}" if norms else "–",
                f"{sum(y > 0 for _, y in run.series('agc/nonfinite_units'))}",
                _step(run.lines[-1]["step"]),
                _last_loss(run),
            ]
        )
    names = ["threshold", "units", "clipped, mean", "gradient norm, median", "steps with inf or nan", "last step"]
    rows = zip(["", *names, "last loss"], *columns, strict=True)
    return _table([], rows)


def _step(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.6g}"  # some count epochs


def _last_loss(run: Run) -> str:
    """Of the last line that says something of it; evaluations may have lines of their own."""
    losses = [line["loss"] for line in run.lines if "loss" in line]
    if not losses:
        return "–"
    return f"{losses[-1]:.4g}" if is_number(losses[-1]) else "not finite"


def _worst(run: Run) -> str:
    counted = run.ratios()
    rows = []
    for name in run.parameters():
        shares = [y for _, y in run.series(PER_PARAMETER + name)]
        norms = [y for _, y in run.series(f"agc/grad_norm/{name}")]
        if shares:
            rows.append((fmean(shares), max(shares), name, max(norms, default=0.0), counted.parameters.get(name)))
    rows.sort(key=lambda row: (-row[0], -row[1], row[2]))
    return _table(
        ["parameter", "mean", "at most", "norm at most", "ratio at most"],
        (
            [
                f"<code>{html.escape(name)}</code>",
                f"{mean:.1%}",
                f"{top:.1%}",
                f"{norm:.3g}",
                _reach(counted.thresholds, counts),
            ]
            for mean, top, name, norm, counts in rows[:WORST]
        ),
    )


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
    cells = ([name, *(repr(run.settings.get(name, "–")) for run in runs)] for name in names)
    return _table(["", *(run.name for run in runs)], ([html.escape(cell) for cell in row] for row in cells))
