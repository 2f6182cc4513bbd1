"""`dist-agc advise`: what each threshold would clip, beside what was published."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..lab.console import display
from ..lab.console.tables import show, table
from .runs import Counted, Run, read

# (from this batch size on, threshold, as it was said, who says so); of those that fit a batch size, the first is meant
PUBLISHED = (
    (1024, 0.01, "0.01", "Brock et al. 2021, for batches of 1024 to 4096"),
    (257, 0.08, "up to 0.08", "Brock et al. 2021, for smaller batches: slightly better"),
    (0, 0.16, "0.16 or more", "Thakur, for batches of 128 and 256"),
)
# Shares of clipped units at the best settings of docs/study.md, and one in their middle.
FEW, SOME, MANY = 0.01, 0.1, 0.6
WARNING = (
    "The published figures come from SGD on ResNets without normalisation. For other optimizers and models they are a "
    "place to start looking, no more. AGC did not help a plain ResNet without BatchNorm (0.01, batch 1024; Thakur)."
)


def command(
    files: Annotated[list[Path], typer.Argument(metavar="RUN.jsonl", help="One line of JSON per step.")],
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples in one step, over all processes: marks the row that fits.")
    ] = None,
) -> None:
    """Show what share of units each threshold would clip, from the ratios that a run has counted, and where to start.

    Best from a run that clips nothing, [dim]AGCConfig(dry_run=True)[/dim], and that writes
    [dim]dist_agc.ratios(model).as_dict()[/dim] every 100 steps or so: docs/logging.md.
    """
    console = display.console(None)
    measured = [(run, counted) for run in read(files) if (counted := run.ratios()).parameters]
    if not measured:
        raise typer.BadParameter(
            "no line has agc/ratios: write dist_agc.ratios(model).as_dict() before clipping, every 100 steps or so."
        )
    for run, counted in measured:
        _print(console, run, counted)
    fitting = _fitting(batch_size)
    for row in PUBLISHED:
        _, _, said, source = row
        arrow, style = ("→", "bold") if row is fitting else (" ", None)
        console.print(f"{arrow} {said:<13} {source}", style=style)
    if batch_size is not None and batch_size > 4096:
        console.print("  Nothing was published for batches above 4096.")
    for run, counted in measured:
        threshold, why = start(shares(counted), batch_size)
        of = f"{escape(run.name)}: start" if len(measured) > 1 else "Start"
        console.print(f"\n[bold]{of} with {threshold:.3g}:[/bold] {why}")
    console.print(f"\n{WARNING}")


def _fitting(batch_size: int | None) -> tuple[int, float, str, str] | None:
    return next((row for row in PUBLISHED if batch_size is not None and batch_size >= row[0]), None)


def start(measured: Sequence[tuple[float, float, float]], batch_size: int | None) -> tuple[float, str]:
    """One of the thresholds of `shares`, and why: the published one, unless it clips next to nothing, or nearly all."""
    would = {value: of_units for value, of_units, _ in measured}
    usable = [value for value, share in would.items() if FEW <= share <= MANY]
    not_too_many = [value for value, share in would.items() if share <= MANY]
    usable = usable or not_too_many[:1] or [max(would)]
    fitting = _fitting(batch_size)
    if fitting is None:
        chosen = min(usable, key=lambda value: abs(math.log(max(would[value], 1e-9) / SOME)))
        why = [f"it would clip {would[chosen]:.1%} of the units of this run; a threshold should clip some, not most."]
        why.append("--batch-size sets it beside what was published.")
    else:
        _, published, said, _ = fitting
        near = min(would, key=lambda value: abs(math.log(value / published)))
        chosen = min(usable, key=lambda value: abs(math.log(value / near)))
        why = [f"it would clip {would[chosen]:.1%} of the units of this run."]
        if chosen == near:
            why.append(f"For such batches {said} was published.")
        elif would[near] > MANY:
            why.append(f"For such batches {said} was published, but {near:g} would clip {would[near]:.1%}: nearly all.")
        else:
            why.append(f"For such batches {said} was published, but {near:g} would clip {would[near]:.1%}: hardly any.")
    if would[chosen] > MANY:
        why.append("That is nearly all: count larger thresholds, dist_agc.ratios(model, thresholds).")
    if would[chosen] < FEW:
        why.append("That is hardly any: AGC may do nothing for this run.")
    return chosen, " ".join(why)


def shares(counted: Counted) -> list[tuple[float, float, float]]:
    """(threshold, share of all units above it, share of parameters with any unit above it)."""
    rows = counted.parameters.values()
    units, *above = counted.totals()
    return [
        (value, total / units, sum(row[k] > 0 for row in rows) / len(rows))
        for k, (value, total) in enumerate(zip(counted.thresholds, above, strict=True), start=1)
    ]


def _print(console: Console, run: Run, counted: Counted) -> None:
    name = f"{run.name}, a dry run" if run.dry else run.name
    title = f"{name}: {counted.lines} steps measured, {counted.totals()[0] // counted.lines:,} units"
    if counted.left_out:
        title += f"; {counted.left_out} with other thresholds left out"
    rows = []
    for value, of_units, of_parameters in shares(counted):
        own = run.threshold is not None and abs(run.threshold / value - 1) < 1e-6
        note = "← this run's" if own else "▇" * round(20 * of_units)
        rows.append((f"{value:.4g}", f"{of_units:.2%}", f"{of_parameters:.0%}", note))
    show(console, table(escape(title), ["threshold", "units clipped", "parameters touched", ""], rows, left=[""]))
