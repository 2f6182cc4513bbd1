"""The stages of a pipeline, of which each rank holds some: patterns and statistics are about all of them.

Clipping itself needs nothing of other stages: a unit lies within one. Ranks compare once, at `attach`, what they have,
and from then on add their statistics up once a step. What is counted follows from that one comparison, so that every
rank sends the same length whatever its stages do.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

from ..config import AGCConfig
from ..model.blocks import Axis, Pieces
from ..model.names import matching, near
from ..model.parameter import Parameter
from ..model.units import UnitRule
from ..stats import ClipStats, largest_of
from .collectives import all_reduce, exchange
from .plan import LARGEST, STATISTICS


class _Row(NamedTuple):
    """One parameter of one rank."""

    name: str
    units: int | None  # None where it is excluded
    trains: bool
    counted: bool  # not counted by another stage
    left_alone: bool  # not by the user's settings


@dataclass(frozen=True)
class _Said:
    """What a rank tells the others."""

    problem: str = ""
    settings: str = ""
    matched: tuple[tuple[str, str, bool], ...] = ()  # (setting, pattern, whether it names something here)
    names: tuple[str, ...] = ()  # every name that a pattern may use
    rows: tuple[_Row, ...] = ()


class Stages:
    """What the ranks of ``axis`` hold, of which ``said`` is this rank's. Made within `meeting`.

    Raises:
        ValueError: a pattern names nothing on any stage.
        RuntimeError: another stage has given up, or has other settings.
    """

    def __init__(self, axis: Axis, said: _Said, config: AGCConfig) -> None:
        every = exchange(said, axis)
        _raise_problems(every, axis)
        self._axis, self._told = axis, False
        rows = [(rank, row) for rank, said in enumerate(every) for row in said.rows if row.counted]
        governed = [(rank, row) for rank, row in rows if row.units is not None and row.trains]
        excluded = [(rank, row) for rank, row in rows if row.units is None]
        places, often = [*governed, *excluded], Counter(row.name for _, row in rows)
        names = [row.name if often[row.name] == 1 else f"pipeline{rank}.{row.name}" for rank, row in places]
        self._names, self._dry_run = names, config.dry_run
        self._units = {name: row.units or 0 for name, (_, row) in zip(names, governed, strict=False)}
        self._own = {row.name: row.units for row in said.rows}
        self._place = {row.name: at for at, (rank, row) in enumerate(places) if rank == axis.rank}
        self._elsewhere = {row.name for row in every[axis.rank].rows if not row.counted}
        all_rows = [row for said in every for row in said.rows]
        if all(row.units is None for row in all_rows) and not all(row.left_alone for row in all_rows):
            warnings.warn(
                f"exclude={config.exclude!r} leaves out every parameter of every stage, so AGC clips nothing.",
                UserWarning,
                stacklevel=6,
            )

    def complete(self, stats: ClipStats) -> ClipStats:
        """The statistics of all stages. One all-reduce; all ranks must call it, once a step. Waits for no device."""
        width = len(self._names) * STATISTICS
        rows, top = stats.placed(self._place, len(self._names))
        buffer = rows.new_zeros(width + self._axis.size * top.numel())
        buffer[:width] = rows.flatten()
        buffer[width:].view(-1, *LARGEST)[self._axis.rank] = top
        total = all_reduce(buffer, self._axis)
        self._tell_new(stats)  # not before, since it may be made an error
        sums, tops = total[:width].view(-1, STATISTICS), total[width:].view(-1, *LARGEST)
        largest, excluded = partial(largest_of, [tops]), self._names[len(self._units) :]
        return ClipStats(self._units, sums, largest, self._names, excluded, dry_run=self._dry_run)

    def _tell_new(self, stats: ClipStats) -> None:
        if self._told:
            return
        new = [name for name in stats.names if name not in self._place and name not in self._elsewhere]
        grown = [name for name, units in stats.unit_counts.items() if self._own.get(name, units) != units]
        if new or grown:
            self._told = True
            what = f"{new[0]!r} trains" if new else f"{grown[0]!r} has {stats.unit_counts[grown[0]]} units"
            without = "without it" if new else f"by the {self._own[grown[0]]} that it had"
            warnings.warn(
                f"{what} since AGC was attached. It is clipped, and the statistics of the pipeline are {without}: call "
                ".remove() on the handle and attach again, on all ranks, to have it in them.",
                UserWarning,
                stacklevel=3,
            )


@dataclass(frozen=True)
class Brought:
    """What one rank brings to a meeting. ``held``: by ``id``, what its optimizers hold. ``options``: settings beside
    ``config``."""

    parameters: Sequence[Parameter]
    rules: Sequence[UnitRule | None]
    config: AGCConfig
    held: Collection[int]
    options: Mapping[str, Any]


Meet = Callable[[Brought], Stages]


@contextmanager
def meeting(axis: Axis | None) -> Iterator[Meet | None]:
    """Within, the ranks of ``axis`` set up what they have, and then meet: the function makes their `Stages`.

    Where one cannot be set up the others are told why, and do not wait for it.
    """
    if axis is None:
        yield None
        return
    met = False

    def meet(brought: Brought) -> Stages:
        nonlocal met
        said = _said(axis, brought)
        met = True
        return Stages(axis, said, brought.config)

    try:
        yield meet
    except Exception as problem:
        if not met:
            exchange(_Said(problem=str(problem)), axis)
        raise


def _said(axis: Axis, brought: Brought) -> _Said:
    config, pairs = brought.config, list(zip(brought.parameters, brought.rules, strict=True))
    for p, rule in pairs:
        found = p.pieces(rule) if p.trains else Pieces(())
        for other in (*p.copies, *found.axes):
            if len({*other.ranks} & {*axis.ranks}) > 1:
                raise ValueError(
                    f"ranks {list(axis.ranks)} shall hold different stages of a pipeline, and parameter {p.name!r} of "
                    f"one stage is shared by ranks {list(other.ranks)}: give pipeline= the group of the ranks that "
                    "each hold another stage, such as mesh['pp'].get_group()."
                )
    names = [p.names for p, _ in pairs]
    patterns = [("exclude", pattern) for pattern in config.exclude]
    patterns += [("units", pattern) for pattern in config.units] if isinstance(config.units, dict) else []
    return _Said(
        # In another order, what is excluded is the same.
        settings=repr(sorted({**asdict(config), "exclude": sorted(config.exclude), **brought.options}.items())),
        matched=tuple((setting, p, bool(matching(p, names, setting, checked=False))) for setting, p in patterns),
        names=tuple(name for of_one in names for name in of_one),
        rows=tuple(
            _Row(
                p.name,
                rule and rule.count,
                p.trains and id(p.tensor) in brought.held,
                not p.counted_elsewhere,
                p.left_alone,
            )
            for p, rule in pairs
        ),
    )


def _raise_problems(every: Sequence[_Said], axis: Axis) -> None:
    for rank, said in zip(axis.ranks, every, strict=True):
        if said.problem:
            raise RuntimeError(f"AGC was attached on no stage of the pipeline, because of rank {rank}: {said.problem}")
    for rank, said in zip(axis.ranks, every, strict=True):
        if said.settings != every[0].settings:
            raise RuntimeError(
                f"the stages of a pipeline have different settings: rank {axis.ranks[0]} has {every[0].settings}, rank "
                f"{rank} has {said.settings}. Give every rank the same."
            )
    for of_pattern in zip(*(said.matched for said in every), strict=True):
        setting, pattern, _ = of_pattern[0]
        if not any(found for _, _, found in of_pattern):
            names = [name for said in every for name in said.names]
            raise ValueError(f"{setting}: {pattern!r} matches no parameter of any stage; {near(pattern, names)}")
