"""The look of the tables that commands print, which are at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.columns import Columns as ListedColumns
from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.padding import Padding
from rich.table import Table

ENDLESS = 10_000  # columns

# By heading: a name in a record, and how what it holds is written.
Columns = Mapping[str, tuple[str, Callable[[Any], str]]]


def table(title: str, headings: Sequence[str], rows: Iterable[Iterable[str]], *, left: Sequence[str] = ()) -> Table:
    """Numbers stand on the right; the first column on the left, and those that ``left`` names."""
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        words = heading in (headings[0], *left)
        made.add_column(heading, justify="left" if words else "right", no_wrap=heading not in left)
    for row in rows:
        made.add_row(*row)
    return made


def of_records(title: str, columns: Columns, records: Iterable[Mapping[str, Any]]) -> Table:
    """The same of records; a dash where one has nothing of this name."""
    cells = (
        [write(record[name]) if record.get(name) is not None else "–" for name, write in columns.values()]
        for record in records
    )
    return table(title, [*columns], cells)


def show(console: Console, made: Table) -> None:
    """Print it, denser where it would be wider than the console. A row is a line: only a terminal has a right edge.

    In a terminal that is too narrow for the columns, cells stand behind their headings, row by row.
    """
    if console.measure(made, options=console.options.update(max_width=ENDLESS)).maximum > console.width:
        made.padding = 0
    if not console.is_terminal:
        console = Console(file=console.file, quiet=console.quiet, highlight=False, width=ENDLESS)
    with console.capture() as printed:
        console.print(made)
    if "…" not in printed.get():
        console.print(made)
        return
    console.print(f"[bold]{made.title or ''}[/bold]\n")
    headings = [column.header for column in made.columns[1:]]
    for first, *others in zip(*(column.cells for column in made.columns), strict=True):
        cells = [f"{heading} {cell}".strip() for heading, cell in zip(headings, others, strict=True) if cell]
        console.print(first, Padding(ListedColumns(cells, padding=(0, 2)), (0, 0, 1, 2)))


def short(number: float) -> str:
    """Of how many there are, three digits; k, M and G are thousands, millions and billions. At most five characters."""
    unit, suffix = pick_unit_and_suffix(int(number), ["", "k", "M", "G", "T", "P"], 1000)
    value = number / unit
    return f"{value:.0f}{suffix}" if value >= 100 else f"{value:.3g}{suffix}"


def folded(text: str, width: int, at: str = ".") -> str:
    """The text in lines of at most ``width``, broken after ``at`` where it can be; later lines stand further in."""
    lines, room = [], width
    while len(text) > room:
        cut = text.rfind(at, 0, room) + 1 or room
        lines.append(text[:cut])
        text, room = text[cut:], max(width - 4, 1)
    return "\n    ".join([*lines, text])
