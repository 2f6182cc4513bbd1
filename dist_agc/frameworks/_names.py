"""The entries of what an engine trains, taken one by one, and names for the experts of other ranks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from ..model.names import Entry


class Names:
    """Entries by ``id`` of their parameters. ``left``: those that nobody took yet.

    Args:
        lists: matches the name of a list of experts, and the place in it.
        experts: the entries of experts, of which every expert-parallel rank holds as many.
    """

    def __init__(self, entries: Iterable[Entry], lists: re.Pattern[str], experts: Iterable[Entry]) -> None:
        self.left = {id(entry.tensor): entry for entry in entries}
        self._lists = lists
        self._local: dict[str, int] = {}  # how many experts this rank holds, by the name of their list
        for found in filter(None, (lists.match(entry.name) for entry in experts)):
            self._local[found[1]] = max(self._local.get(found[1], 0), int(found[2]) + 1)

    def take(self, parameter: Tensor, missing: str) -> Entry:
        """ValueError: nobody knows it, or it was taken; ``missing`` says so."""
        if id(parameter) not in self.left:
            raise ValueError(missing)
        return self.left.pop(id(parameter))

    def expert(self, entry: Entry, rank: int) -> Entry:
        """The parameter that an expert-parallel rank has where this rank has ``entry``."""
        matches = [(name, self._lists.match(name)) for name in entry.names]
        names = [
            f"{m[1]}{self._local[m[1]] * rank + int(m[2])}{name[m.end() :]}" if m else f"{name}@{rank}"
            for name, m in matches
        ]
        return replace(entry, names=tuple(names))
