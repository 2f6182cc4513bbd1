"""The look of the tables that commands print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

# By heading: a name in a record, what its number is divided by, and how it is written; "" for text.
Columns = Mapping[str, tuple[str, float, str]]


def table(title: str, headings: Sequence[str], rows: Iterable[Iterable[str]], *, left: Sequence[str] = ()) -> Table:
    """Numbers stand on the right; the first column on the left, and those that ``left`` names."""
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        words = heading in (headings[0], *left)
        made.add_column(heading, justify="left" if words else "right", no_wrap=heading == headings[0])
    for row in rows:
        made.add_row(*row)
    return made


def of_records(title: str, columns: Columns, records: Iterable[Mapping[str, Any]]) -> Table:
    """The same of records; a dash where one has nothing of this name."""
    rows = ([(record.get(name), unit, form) for name, unit, form in columns.values()] for record in records)
    cells = (["–" if x is None else f"{x / unit:{form}}" if form else x for x, unit, form in row] for row in rows)
    return table(title, [*columns], cells)
