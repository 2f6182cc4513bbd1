"""`dist-agc advise`: what each threshold would clip, beside what was published."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import require
from .runs import Counted, Run, read

if TYPE_CHECKING:
    from rich.table import Table

# (from this batch size on, threshold, who says so)
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
        int | None,
        typer.Option(min=1, help="Samples in one step, over all processes: marks the row that fits."),
    ] = None,
) -> None:
    """Show what share of units each threshold would clip, from the ratios that a run has counted.

    Best from a run that clips nothing, [dim]AGCConfig(dry_run=True)[/dim], that writes [dim]dist_agc.ratios(model)
    .as_dict()[/dim] every 100 steps or so: docs/logging.md.
    """
    require("cli", "rich")
    from rich.console import Console

    console = Console(highlight=False)
    found = False
    for run in read(files):
        counted = run.ratios()
        if counted.parameters:
            found = True
            console.print(_table(run, counted))
    if not found:
        raise typer.BadParameter(
            "no line has agc/ratios: write dist_agc.ratios(model).as_dict() before clipping, every 100 steps or so."
        )
    for least, threshold, source in PUBLISHED:
        fits = batch_size is not None and batch_size >= least and not _larger(batch_size, least)
        console.print(f"{'→' if fits else ' '} {threshold:<13} {source}", style="bold" if fits else None)
    if batch_size is not None and batch_size > 4096:
        console.print("  Nothing was published for batches above 4096.")
    console.print(f"\n{WARNING}", soft_wrap=False)


def _larger(batch_size: int, least: int) -> bool:
    """Whether a row for larger batches fits too."""
    return any(other > least and batch_size >= other for other, _, _ in PUBLISHED)


def shares(counted: Counted) -> list[tuple[float, float, float]]:
    """(threshold, share of all units above it, share of parameters with any unit above it)."""
    rows = counted.parameters.values()
    units, *above = counted.totals()
    return [
        (value, total / units, sum(row[k] > 0 for row in rows) / len(rows))
        for k, (value, total) in enumerate(zip(counted.thresholds, above, strict=True), start=1)
    ]


def _table(run: Run, counted: Counted) -> Table:
    from rich.table import Table

    title = f"{run.name}: {counted.lines} steps measured, {counted.totals()[0] // counted.lines:,} units"
    if counted.left_out:
        title += f"; {counted.left_out} with other thresholds left out"
    table = Table(title=title)
    for heading in ("threshold", "units clipped", "parameters touched"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for value, of_units, of_parameters in shares(counted):
        used = "← this run's" if run.threshold is not None and abs(run.threshold / value - 1) < 1e-6 else ""
        table.add_row(f"{value:.4g}", f"{of_units:.2%}", f"{of_parameters:.0%}", used or "▇" * round(20 * of_units))
    return table
