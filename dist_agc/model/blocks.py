"""What one rank holds of one parameter: blocks of neighbouring units, and the cuts that leave units on several ranks.

Integers only: nothing here touches a tensor's values or a process group, so a plan for 16,384 ranks can be made on a
laptop with the code that runs on the cluster.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .units import UnitRule


@dataclass(frozen=True)
class Axis:
    """Ranks among which a parameter is cut, such as one row of a mesh axis.

    Two axes over the same ranks are one: they share a collective. ``group`` is None where there is only a plan.
    """

    ranks: tuple[int, ...]
    rank: int  # this process's place among ``ranks``
    group: Any = field(default=None, compare=False, repr=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def __hash__(self) -> int:  # often asked for, and ``ranks`` may be thousands
        return hash((self.ranks[0], self.ranks[-1], len(self.ranks), self.rank))


# Axes that cut a tensor, each with the dim that it cuts, the innermost axis first.
Along = Sequence[tuple[Axis, int]]


@dataclass(frozen=True)
class Block:
    """A part of the local tensor whose units are numbered without a gap from ``first_unit`` on.

    The part is ``local.narrow(0, start, length).unflatten(dim, sizes)``, or the local tensor itself where ``sizes`` is
    None. A norm over the dims ``reduced`` gives one number per unit, of shape ``kept``.
    """

    sizes: tuple[int, ...] | None
    reduced: tuple[int, ...]
    kept: tuple[int, ...]
    first_unit: int = 0
    start: int = 0
    length: int = 0
    dim: int = 0

    @property
    def units(self) -> int:
        return math.prod(self.kept)

    def part(self, local: Tensor) -> Tensor:
        """The elements alone, in the shape that they have in the local tensor."""
        if self.sizes is None or (self.start == 0 and self.length == local.shape[0]):
            return local
        return local.narrow(0, self.start, self.length)

    def view(self, local: Tensor) -> Tensor:
        part = self.part(local)
        return part if self.sizes is None or len(self.sizes) == 1 else part.unflatten(self.dim, self.sizes)


@dataclass(frozen=True, eq=False)
class Cut:
    """Units with pieces on more than one rank of ``axis``.

    ``runs``: half-open ranges of unit numbers, ascending and apart, int64 of shape (runs, 2). The same on every rank
    of the axis.
    """

    axis: Axis
    runs: Tensor

    @property
    def numbers(self) -> Tensor:
        """The number of every cut unit, ascending."""
        first, length = self.runs[:, 0], self.runs[:, 1] - self.runs[:, 0]
        before = length.cumsum(0) - length
        return torch.repeat_interleave(first - before, length) + torch.arange(int(length.sum()), device="cpu")


@dataclass(frozen=True, eq=False)
class Pieces:
    """How the local tensor falls into units, and who holds the rest.

    ``cuts``: along which axes units are cut, innermost axis first.
    ``distinct``: along which axes ranks hold different whole units, so that statistics add up over these.
    """

    blocks: tuple[Block, ...]
    cuts: tuple[Cut, ...] = ()
    distinct: tuple[Axis, ...] = ()

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All of these: whose ranks hold something else."""
        return (*(cut.axis for cut in self.cuts), *self.distinct)


def sharded(rule: UnitRule | None, local_shape: Sequence[int], cuts: Along = ()) -> Pieces:
    """What a rank holds of a tensor that keeps its dims, some of them shorter.

    Args:
        rule: the parameter's units; None where AGC leaves it alone, and only its gradient norm is wanted.
        local_shape: sizes of the local tensor.
        cuts: the axes along which it is cut.

    Raises ValueError where a dim that the rule sees as two is cut so that units cannot be told; on every rank alike.
    """
    shape = tuple(local_shape)
    if rule is None:
        return Pieces((Block(None, tuple(range(len(shape))), ()),), (), tuple(axis for axis, _ in cuts))
    rule = rule.joined
    if rule.split is not None:
        if not math.prod(rule.shape):
            return Pieces((), (), tuple(axis for axis, _ in cuts))
        along = [axis for axis, dim in cuts if dim == rule.split]
        if len(along) > 1:
            seen = rule.shape[rule.split : rule.split + 2]
            raise ValueError(f"dim {rule.split}, seen as {seen}, is sharded along more than one mesh axis")
        return (_grouped if rule.kept[0] == rule.split == 0 else _split)(rule, rule.split, shape, cuts, along)
    kept = tuple(shape[d] for d in rule.kept)
    # A block without elements stays where it has units: its rank passes on the sums of units cut along two axes.
    blocks = (Block(None, rule.reduced, kept),) if math.prod(kept) else ()
    # A rank without units has its cuts too: the order of collectives must not depend on what it holds.
    found = tuple(Cut(axis, _run(0, math.prod(kept))) for axis, dim in cuts if dim not in rule.kept)
    return Pieces(blocks, found, tuple(axis for axis, dim in cuts if dim in rule.kept))


def _grouped(rule: UnitRule, _: int, shape: tuple[int, ...], cuts: Along, along: Sequence[Axis]) -> Pieces:
    """`sharded` where the rule's first two dims are one dim of the tensor and the first numbers units. That dim may be
    cut anywhere (``along``): a rank holds the tail of one group, whole ones, and the head of another."""
    groups, per_group = rule.shape[:2]
    size, channels = groups * per_group, tuple(shape[d - 1] for d in rule.kept[1:])
    start, stop = chunk(size, along[0].size, along[0].rank) if along else (0, size)
    if stop - start != shape[0]:
        raise ValueError(f"{shape[0]} local rows where torch.chunk gives {stop - start}")
    units = math.prod(channels)  # of a group
    blocks = [
        Block((lines, rows), rule.reduced, (lines, *channels), group * units, first - start, lines * rows)
        for group, lines, first, rows in _lines(start, stop, per_group)
    ]
    found = []
    for axis, dim in cuts:
        step = max(-(-size // axis.size), 1)
        if dim == 0 and len(runs := _cut_runs(range(step, size, step), size, per_group, units)):
            found.append(Cut(axis, runs))
        elif dim and dim + 1 not in rule.kept:
            found.append(Cut(axis, _run(0, groups * units)))
    distinct = tuple(axis for axis, dim in cuts if dim == 0 or dim + 1 in rule.kept)
    return Pieces(tuple(blocks if units else ()), tuple(found), distinct)


def _split(rule: UnitRule, dim: int, shape: tuple[int, ...], cuts: Along, along: Sequence[Axis]) -> Pieces:
    """`sharded` where the rule sees dim ``dim`` as two. It may be cut (``along``) between the lines of the first."""
    size, inner = rule.shape[dim] * rule.shape[dim + 1], rule.shape[dim + 1]
    start, stop = chunk(size, along[0].size, along[0].rank) if along else (0, size)
    # Of the borders between any ranks, not of this one's: all have to come to the same answer.
    within = along and (step := -(-size // along[0].size)) < size and step % inner
    if within or stop - start != shape[dim]:
        raise ValueError(f"dim {dim}, seen as {rule.shape[dim : dim + 2]}, is not cut between its lines")
    sizes, rows = (shape[dim] // inner, inner), shape[0]
    viewed = (*shape[:dim], *sizes, *shape[dim + 1 :])
    whole = sharded(UnitRule(rule.shape, rule.kept), viewed, [(axis, d + (d > dim)) for axis, d in cuts])
    return replace(whole, blocks=tuple(replace(b, sizes=sizes, length=rows, dim=dim) for b in whole.blocks))


def chunk(size: int, pieces: int, index: int) -> tuple[int, int]:
    """The half-open range that ``torch.chunk``, and so ``Shard``, gives to one of ``pieces`` ranks; maybe empty."""
    step = -(-size // pieces)
    return min(size, step * index), min(size, step * (index + 1))


def _lines(start: int, stop: int, length: int) -> Iterable[tuple[int, int, int, int]]:
    """Cut [start, stop) at the multiples of ``length``: (line, lines, first element, elements per line)."""
    while start < stop:
        line, within = divmod(start, length)
        if within == 0 and stop - start >= length:
            lines = (stop - start) // length
            yield line, lines, start, length
            start += lines * length
        else:
            end = min(stop, (line + 1) * length)
            yield line, 1, start, end - start
            start = end


def interval(
    rule: UnitRule,
    start: int,
    stop: int,
    offset: int,
    bounds: range,
    axis: Axis,
    across: Along = (),
    *,
    aligned: bool = True,
) -> Pieces:
    """Blocks of the elements [start, stop) of a flattened tensor, as FSDP1 and ZeRO hold them.

    Args:
        rule: the units of the tensor that was flattened: the parameter, or this rank's slice of it (see ``across``).
        start, stop: what this rank holds of it, in elements.
        offset: where they begin in the tensor that holds them.
        bounds: the borders between the ranks of ``axis`` in elements of the tensor, the same on every rank; those
            outside of it do no harm.
        axis: the ranks that hold the other intervals.
        across: the axes along which the parameter was sliced before it was flattened, as tensor parallelism does. Their
            ranks hold the same interval of their own slices.
        aligned: False: they may hold other intervals, and slices of other sizes. What is cut along which axis does not
            depend on the borders then, since every rank has to come to the same collectives.

    Example:
        >>> rows = UnitRule((4, 10), (0,))
        >>> pieces = interval(rows, 15, 40, 0, range(15, 40, 25), Axis((0, 1), 1))
        >>> [(block.first_unit, block.sizes) for block in pieces.blocks]   # the tail of row 1, then rows 2 and 3
        [(1, (1, 1, 1, 5)), (2, (1, 1, 2, 10))]
        >>> pieces.cuts[0].runs.tolist()
        [[1, 2]]
    """
    blocks = [
        Block(sizes, (1, 3), (sizes[0], sizes[2]), first_unit, offset + at - start, math.prod(sizes))
        for first_unit, sizes, at in _boxes(rule, start, stop)
    ]
    _, outer, units, inner = rule.canonical
    # The lines that a border cuts or leaves whole: elements of one, units in it. With an outer dim a line is a batch: a
    # border inside a batch cuts nearly every unit of it. All of them are listed then, which also makes the blocks that
    # one rank holds of one unit meet in one slot.
    length, count = (inner, 1) if outer == 1 else (outer * units * inner, units)
    held = _run(start // length * count, -(-stop // length) * count) if stop > start else _run(0, 0)
    spread = [a for a, dim in across if dim not in rule.kept and a.size > 1]
    if spread and not aligned:
        # Any two ranks may hold pieces of any unit: all of them have a slot along either axis.
        held = _run(0, math.prod(rule.shape[d] for d in rule.kept))
    cuts = [Cut(a, held) for a in spread]
    runs = held if spread and not aligned else _cut_runs(bounds, math.prod(rule.shape), length, count)
    if axis.size > 1 and (len(runs) or not aligned):
        cuts.append(Cut(axis, runs))
    apart = [*(a for a, dim in across if dim in rule.kept), axis]
    return Pieces(tuple(blocks), tuple(cuts), tuple(a for a in apart if a.size > 1))


def _boxes(rule: UnitRule, start: int, stop: int) -> Iterable[tuple[int, tuple[int, int, int, int], int]]:
    """The elements [start, stop) as boxes: (first unit, sizes as in the canonical form, first element)."""
    _, outer, units, inner = rule.canonical
    if outer == 1:  # rows: batches of rows are just more rows
        for row, rows, at, width in _lines(start, stop, inner):
            yield row, (1, 1, rows, width), at
        return
    line = units * inner
    for b, batches, at, count in _lines(start, stop, outer * line):
        if count == outer * line:
            yield b * units, (batches, outer, units, inner), at
            continue
        for _, lines, at_line, length in _lines(at, at + count, line):
            if length == line:
                yield b * units, (1, lines, units, inner), at_line
                continue
            for u, columns, at_unit, width in _lines(at_line, at_line + length, inner):
                yield b * units + u % units, (1, 1, columns, width), at_unit


def _cut_runs(bounds: range, size: int, length: int, count: int) -> Tensor:
    """The runs of units that ``bounds`` cut, of ``size`` elements in lines of ``length`` with ``count`` units each."""
    inside = bounds[bisect_right(bounds, 0) : bisect_left(bounds, size)]
    borders = torch.arange(inside.start, inside.stop, inside.step, device="cpu")
    lines = torch.unique_consecutive(borders[borders % length != 0] // length)
    gap = lines.diff() != 1
    edge = torch.ones(min(len(lines), 1), dtype=torch.bool, device="cpu")
    first, last = lines[torch.cat([edge, gap])], lines[torch.cat([gap, edge])]
    return torch.stack([first * count, (last + 1) * count], dim=1)


def _run(first: int, stop: int) -> Tensor:
    return torch.tensor([[first, stop]], device="cpu")
