"""The look of the tables that commands print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table


def table(title: str, headings: Sequence[str], rows: Iterable[Iterable[str]], *, left: Sequence[str] = ()) -> Table:
    """Numbers stand on the right; the first column on the left, and those that ``left`` names."""
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        words = heading in (headings[0], *left)
        made.add_column(heading, justify="left" if words else "right", no_wrap=heading == headings[0])
    for row in rows:
        made.add_row(*row)
    return made
