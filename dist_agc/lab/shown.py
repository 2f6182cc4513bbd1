"""What the demo shows of its runs in the terminal: every step as it comes, then a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .console.display import Display, percent
from .console.tables import show, table
from .training import Run, Step

PLAIN_LINES = 8  # of each run


class DemoDisplay(Display):
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
        rows = ([heading, *(cell(run) for run in runs)] for heading, cell in ROWS.items())
        show(self.console, table("Summary", ["", *(run.label for run in runs)], rows))


def figures(step: Step) -> str:
    clipped = "" if step.clip_fraction is None else f"  clipped {step.clip_fraction:6.1%}"
    return f"loss {step.loss:8.3g}  accuracy {step.accuracy:6.1%}{clipped}"


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
