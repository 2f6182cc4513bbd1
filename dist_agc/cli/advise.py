"""`dist-agc advise`: what each threshold would clip, beside what was published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .runs import Counted, Run, read
from .tables import table

# (from this batch size on, threshold, who says so); of the rows that fit a batch size, the first one is meant
PUBLISHED = (
    (1024, "0.01", "Brock et al. 2021, for batches of 1024 to 4096"),
    (257, "up to 0.08", "Brock et al. 2021: slightly better than 0.01 for batches smaller than 1024"),
    (0, "0.16 or more", "Thakur, for batches of 128 and 256"),
)
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
    """Show what share of units each threshold would clip, from the ratios that a run has counted.

    Best from a run that clips nothing, [dim]AGCConfig(dry_run=True)[/dim], that writes [dim]dist_agc.ratios(model)
    .as_dict()[/dim] every 100 steps or so: docs/logging.md.
    """
    console = Console(highlight=False)
    measured = [(run, counted) for run in read(files) if (counted := run.ratios()).parameters]
    if not measured:
        raise typer.BadParameter(
            "no line has agc/ratios: write dist_agc.ratios(model).as_dict() before clipping, every 100 steps or so."
        )
    for run, counted in measured:
        _print(console, run, counted)
    fitting = next((row for row in PUBLISHED if batch_size is not None and batch_size >= row[0]), None)
    for row in PUBLISHED:
        _, threshold, source = row
        arrow, style = ("→", "bold") if row is fitting else (" ", None)
        console.print(f"{arrow} {threshold:<13} {source}", style=style)
    if batch_size is not None and batch_size > 4096:
        console.print("  Nothing was published for batches above 4096.")
    console.print(f"\n{WARNING}")


def shares(counted: Counted) -> list[tuple[float, float, float]]:
    """(threshold, share of all units above it, share of parameters with any unit above it)."""
    rows = counted.parameters.values()
    units, *above = counted.totals()
    return [
        (value, total / units, sum(row[k] > 0 for row in rows) / len(rows))
        for k, (value, total) in enumerate(zip(counted.thresholds, above, strict=True), start=1)
    ]


def _print(console: Console, run: Run, counted: Counted) -> None:
    title = f"{run.name}: {counted.lines} steps measured, {counted.totals()[0] // counted.lines:,} units"
    if counted.left_out:
        title += f"; {counted.left_out} with other thresholds left out"
    rows = []
    for value, of_units, of_parameters in shares(counted):
        own = run.threshold is not None and abs(run.threshold / value - 1) < 1e-6
        note = "← this run's" if own else "▇" * round(20 * of_units)
        rows.append((f"{value:.4g}", f"{of_units:.2%}", f"{of_parameters:.0%}", note))
    console.print(table(title, ["threshold", "units clipped", "parameters touched", ""], rows, left=[""]))
