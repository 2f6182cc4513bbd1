"""`python docs/study`: its options, and the order in which its parts run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_agc.lab.console import launch, require

from .trials import FULL, PARTS, QUICK, Case, Study, mixed

if TYPE_CHECKING:
    from dist_agc.lab.console.display import Display

    from .claims import Finding
    from .results import Results

PROCESSES = 2  # that share a model in the sharded part


def _known(value: str | None) -> str | None:
    if value is not None and value not in PARTS:
        raise typer.BadParameter(f"{value!r} is not known; choose from: {', '.join(PARTS)}.")
    return value


def command(
    only: Annotated[
        str | None,
        typer.Option(callback=_known, metavar="|".join(PARTS), show_default="all three", help="One part of it."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny grid of short runs: shows that all of it works, answers nothing.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, show_default="3; 1 with --quick", help="Runs of every setting.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, show_default="one a core", help="Trials at a time, one thread each.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(show_default="runs/study or runs/study-quick", help="Folder for results, tables and plots."),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A Markdown page whose tables, between markers, are renewed."),
    ] = None,
) -> None:
    """Hold each claim that AGC came with against trainings on this machine.

    [bold]images[/bold]   a norm-free ResNet, a plain one without BatchNorm and one with
             BatchNorm on handwritten digits: batches of 128, 256 and 1024,
             thresholds of 0.01 to 0.32, learning rates up to divergence
    [bold]text[/bold]     a small GPT with AdamW: AGC, clip_grad_norm_, no clipping
    [bold]sharded[/bold]  some of these trainings sharded by FSDP2 over 2 processes and
             not sharded: losses, clipped units and weights must be the same

    Takes under an hour on 2 cores. Every result is in OUT/results.jsonl as
    soon as it is there: after Ctrl-C the same command goes on where it was,
    and --seeds 5 adds to what --seeds 3 has done.

    [bold]Examples[/bold]
      python docs/study --quick                     [dim]# 2 minutes, all parts[/dim]
      python docs/study                             [dim]# all of it[/dim]
      python docs/study --only text --seeds 5
      python docs/study --out docs/study --page docs/study.md
    """
    require("demo", "sklearn", "matplotlib")
    from dist_agc.lab.console.display import Display

    from .tables import marked

    if page is not None:
        marked(page.read_text(encoding="utf-8"))  # a page that cannot be filled is refused now, not in an hour
    study = QUICK if quick else FULL
    out = out or Path("runs/study-quick" if quick else "runs/study")
    here = launch.place()
    if here is not None:
        if only != "sharded":
            raise typer.BadParameter("the processes of a launcher run the sharded part: add --only sharded.")
        return _sharded(here, study, out)
    display = Display(launch.ALONE)
    parts = PARTS if only is None else (only,)
    try:
        if parts != ("sharded",):
            _trials(study, parts, seeds or (1 if quick else 3), jobs or os.cpu_count() or 1, out, display)
        if "sharded" in parts:
            _start_sharded(study, quick, out, display)
    except KeyboardInterrupt:
        display.say(f"Interrupted. What is done is in {out / 'results.jsonl'}; the same command goes on from there.")
        raise typer.Exit(launch.INTERRUPTED) from None
    _show(_results(study, out, display), out, page, display)


def _results(study: Study, out: Path, display: Display) -> Results:
    from .results import Results

    return Results(out / "results.jsonl", study, display.say)


def _trials(study: Study, parts: Sequence[str], seeds: int, jobs: int, out: Path, display: Display) -> None:
    from dist_agc.lab.console.display import work

    from . import pool

    results = _results(study, out, display)
    missing = []
    for part in parts:
        if wanted := study.trials(part, seeds):
            new = [trial for trial in wanted if trial not in results.trials]
            display.say(f"{part}: {len(wanted)} trials, {len(wanted) - len(new)} of them done before.")
            missing += new
    if missing:
        with work(display.console, "trials", len(missing)) as advance:
            for record in pool.results(study, mixed(missing), min(jobs, len(missing))):
                results.add(record)
                advance()


def _start_sharded(study: Study, quick: bool, out: Path, display: Display) -> None:
    """In processes of their own, unless all is there."""
    cases, missing = _cases(study, _results(study, out, display))
    display.say(f"sharded: {len(cases)} trainings, {len(cases) - len(missing)} of them done before.")
    if missing:
        options = ["--only", "sharded", "--out", str(out), *(["--quick"] if quick else [])]
        code = launch.torchrun(options, PROCESSES, program=Path(__file__).parent)
        if code == launch.INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise typer.Exit(code)


def _sharded(here: launch.Place, study: Study, out: Path) -> None:
    """What every process of the sharded part does."""
    from dist_agc.lab.console.display import Display

    from .sharded import compare

    display = Display(here)
    results = _results(study, out, display)
    try:
        for record in compare(here, study, _cases(study, results)[1], display.say):
            if here.rank == 0:
                results.add(record)
    except KeyboardInterrupt:
        sys.exit(launch.INTERRUPTED)


def _cases(study: Study, results: Results) -> tuple[list[Case], list[Case]]:
    """All, and those not done."""
    cases = study.cases()
    return cases, [case for case in cases if case not in results.cases]


def _show(results: Results, out: Path, page: Path | None, display: Display) -> None:
    from .cells import cells
    from .charts import draw
    from .claims import findings
    from .tables import fill, tables

    found = cells(results.trials)
    made = tables(results)
    text = "\n\n".join(f"## {name}\n\n{table}" for name, table in made.items())
    (out / "tables.md").write_text(f"{text}\n", encoding="utf-8")
    plots = draw(found, out)
    if page is not None:
        page.write_text(fill(page.read_text(encoding="utf-8"), made), encoding="utf-8")
    _print(findings(found), display)
    for kind, paths in (("Results", [results.path]), ("Tables", [out / "tables.md"]), ("Plot", plots)):
        for path in paths:
            display.written(kind, path)
    if page is not None:
        display.written("Page", page)


def _print(findings: Sequence[Finding], display: Display) -> None:
    from rich.markup import escape

    from dist_agc.lab.console.tables import show, table

    rows: list[list[str]] = []
    claim = None
    for finding in findings:
        if finding.claim != claim:
            claim = finding.claim
            rows.append([f"[bold]{claim}[/bold]", "", ""])
        rows.append([escape(finding.compared), escape(finding.figures), finding.verdict])
    headings = ["compared", "figures", "holds"]
    show(display.console, table("Claims", headings, rows, left=headings))
