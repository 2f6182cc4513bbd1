"""What the terminal shows: bars where it is one, plain lines where it is a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .launch import ALONE, Place

PLAIN_SECONDS = 30  # between lines of long work


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def console(here: Place | None, *, stderr: bool = False) -> Console:
    """What prints on rank 0 alone."""
    here = here or ALONE
    # Open MPI gives every process a terminal of its own, also where its output goes into a file.
    terminal = False if here.launcher == "mpirun" else None
    return Console(quiet=here.rank != 0, force_terminal=terminal, highlight=False, stderr=stderr)


@contextmanager
def work(console: Console, label: str, pieces: int) -> Iterator[Callable[[], None]]:
    """Yields what to call after every piece of work; shows how long the rest will take."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
    began = said = time.monotonic()
    numbers = count(1)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=pieces, left="")

        def advance() -> None:
            nonlocal said
            done, now = next(numbers), time.monotonic()
            seconds = (now - began) / done * (pieces - done)
            left = f"{seconds / 60:.0f} minutes left" if seconds > 90 else f"{seconds:.0f} seconds left"
            bar.update(task, completed=done, left=left)
            if not console.is_terminal and (done in (1, pieces) or now - said > PLAIN_SECONDS):
                said = now
                console.print(f"{label}  {done}/{pieces}, {left}", markup=False)

        yield advance


class Display:
    """What a long command prints."""

    def __init__(self, here: Place) -> None:
        self.console = console(here)

    def headline(self, title: str, settings: str) -> None:
        self.console.print(f"[bold]{title}[/bold]\n[dim]{settings}[/dim]\n")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def written(self, kind: str, path: Path) -> None:
        self.console.print(f"{kind:<11} {path}", markup=False, soft_wrap=True)  # a path that is cut cannot be copied
