"""What the terminal shows: bars where it is one, plain lines where it is a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from .launch import Place
from .training import Run, Step

PLAIN_LINES = 8  # of each run
PLAIN_SECONDS = 30  # between lines of long work


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def figures(step: Step) -> str:
    clipped = "" if step.clip_fraction is None else f"  clipped {step.clip_fraction:6.1%}"
    return f"loss {step.loss:8.3g}  accuracy {step.accuracy:6.1%}{clipped}"


def console(here: Place | None, *, stderr: bool = False) -> Console:
    """What prints on rank 0 alone."""
    # Open MPI gives every process a terminal of its own, also where its output goes into a file.
    terminal = False if here is not None and here.launcher == "mpirun" else None
    return Console(quiet=here is not None and here.rank != 0, force_terminal=terminal, highlight=False, stderr=stderr)


@contextmanager
def work(console: Console, label: str, pieces: int) -> Iterator[Callable[[], None]]:
    """Yields what to call with every piece of work that is done; shows how long the rest will take."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
    began = said = time.monotonic()
    done = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=pieces, left="")

        def advance() -> None:
            nonlocal done, said
            done += 1
            now = time.monotonic()
            seconds = (now - began) / done * (pieces - done)
            left = f"{seconds / 60:.0f} minutes left" if seconds > 90 else f"{seconds:.0f} seconds left"
            bar.update(task, completed=done, left=left)
            if not console.is_terminal and (done in (1, pieces) or now - said > PLAIN_SECONDS):
                said = now
                console.print(f"{label}  {done}/{pieces}, {left}", markup=False)

        yield advance


class Display:
    """Everything the command prints."""

    def __init__(self, here: Place) -> None:
        self.console = console(here)

    def headline(self, title: str, settings: str) -> None:
        self.console.print(f"[bold]{title}[/bold]\n[dim]{settings}[/dim]\n")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def written(self, kind: str, path: Path) -> None:
        self.console.print(f"{kind:<11} {path}", markup=False, soft_wrap=True)  # a path that is cut cannot be copied

    @contextmanager
    def progress(self, label: str, steps: int) -> Iterator[Callable[[Step], None]]:
        """Yields what to call with every step."""
        label = f"{label:<11}"
        if self.console.is_terminal:
            room = self.console.width - 68  # for the bar, beside the text
            columns = TextColumn("{task.description}"), BarColumn(max(8, min(40, room))), MofNCompleteColumn()
            with Progress(*columns, TextColumn("{task.fields[figures]}"), console=self.console) as bar:
                task = bar.add_task(label, total=steps, figures="")

                def show(step: Step) -> None:
                    note = "  [red]diverged[/red]" if step.diverged else ""
                    bar.update(task, completed=step.number, figures=figures(step) + note)

                yield show
        else:
            every = max(1, steps // PLAIN_LINES)

            def show(step: Step) -> None:
                if step.number % every == 0 or step.number in (1, steps) or step.diverged:
                    note = "  diverged" if step.diverged else ""
                    self.say(f"{label}  step {step.number:4}/{steps}  {figures(step)}{note}")

            yield show

    def table(self, runs: Sequence[Run]) -> None:
        """One column per run: narrow terminals have room for that."""
        table = Table("", *(run.label for run in runs), title="Summary", title_justify="left", title_style="bold")
        for heading, cell in ROWS.items():
            table.add_row(heading, *(cell(run) for run in runs))
        self.console.print(table)


def _outcome(run: Run) -> str:
    if run.diverged:
        return f"[red]diverged at step {run.steps[-1].number}[/red]"
    return "[red]worse than at its start[/red]" if run.failed else "[green]trained[/green]"


def _clipped(summary: Callable[[list[float]], float]) -> Callable[[Run], str]:
    def cell(run: Run) -> str:
        fractions = [step.clip_fraction for step in run.steps if step.clip_fraction is not None]
        return percent(summary(fractions) if fractions else None)

    return cell


ROWS: dict[str, Callable[[Run], str]] = {
    "outcome": _outcome,
    "steps": lambda run: str(run.steps[-1].number),
    "loss, last batch": lambda run: f"{run.steps[-1].loss:.3g}",
    "accuracy, last batch": lambda run: percent(run.steps[-1].accuracy),
    "accuracy, test data": lambda run: percent(run.test_accuracy),
    "units clipped, mean": _clipped(fmean),
    "units clipped, most": _clipped(max),
}
