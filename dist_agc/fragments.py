"""What one rank holds of one parameter, cut into blocks that each hold pieces of neighbouring units.

Integers only: nothing here touches a tensor's values or a process group, so a plan for 16,384 ranks can be made on a
laptop with the code that runs on the cluster.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

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


@dataclass(frozen=True)
class Block:
    """A part of the local tensor whose units are numbered without a gap from ``first_unit`` on.

    The part is ``local.narrow(0, start, length).unflatten(0, sizes)``, or the local tensor itself where ``sizes`` is
    None. A norm over the dims ``reduced`` gives one number per unit, of shape ``kept``.
    """

    sizes: tuple[int, ...] | None
    reduced: tuple[int, ...]
    kept: tuple[int, ...]
    first_unit: int = 0
    start: int = 0
    length: int = 0

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
        return part if self.sizes is None or len(self.sizes) == 1 else part.unflatten(0, self.sizes)


@dataclass(frozen=True, eq=False)
class Split:
    """Units with pieces on more than one rank of ``axis``.

    ``runs``: half-open ranges of unit numbers, ascending and apart, int64 of shape (runs, 2). The same on every rank
    of the axis.
    """

    axis: Axis
    runs: Tensor

    @property
    def units(self) -> int:
        return int((self.runs[:, 1] - self.runs[:, 0]).sum())


@dataclass(frozen=True, eq=False)
class Pieces:
    """How the local tensor falls into units, and who holds the rest.

    ``splits``: along which axes units are cut, innermost axis first.
    ``distinct``: along which axes ranks hold different whole units, so that statistics add up over these.
    """

    blocks: tuple[Block, ...]
    splits: tuple[Split, ...] = ()
    distinct: tuple[Axis, ...] = ()


@runtime_checkable
class Sums(Protocol):
    """How a layout whose gradients may come as each rank's share of a sum says so, and takes the sum."""

    def pending(self, grad: Tensor) -> tuple[Axis, ...]:
        """The axes along which the shares are still to be added up."""
        ...

    def settle(self, total: Tensor) -> None:
        """Put the sum in the place of this rank's share."""
        ...


@dataclass(frozen=True, eq=False)
class Fragment:
    """What this rank holds of one parameter, and where its weight and gradient are found.

    Args:
        name: the parameter's fully qualified name.
        rule: its units; None where AGC leaves the parameter alone.
        pieces: the blocks of the local tensor.
        holder: the tensor that an optimizer holds: the parameter, or a flat one with many parameters in it.
        local: gives the plain local tensor of the holder or of the holder's gradient.
        numel: elements of the whole parameter, over all ranks.
        copies: along which axes every rank holds the same. Nothing is sent along them but the one check that ranks
            agree, because copies that are clipped differently drift apart.
        sums: where gradients of copies may come as each rank's share of a sum.
    """

    name: str
    rule: UnitRule | None
    pieces: Pieces
    holder: Tensor
    local: Callable[[Tensor], Tensor]
    numel: int
    copies: tuple[Axis, ...] = ()
    sums: Sums | None = None

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Every axis whose ranks hold something of this parameter."""
        return tuple(dict.fromkeys((*(s.axis for s in self.pieces.splits), *self.pieces.distinct, *self.copies)))


def whole(rule: UnitRule) -> Pieces:
    """All of a parameter, as DDP and plain modules hold it."""
    return blocks_of_rows(rule, 0, rule.shape[0] * rule.shape[1] if rule.grouped else None, rule.shape)


def excluded(ndim: int, axes: Iterable[Axis], span: tuple[int, int] | None = None) -> Pieces:
    """One block for the gradient norm of a parameter that AGC leaves alone, cut along ``axes``.

    ``span``: where it begins in a flat local tensor, and its length there.
    """
    block = Block(None, tuple(range(ndim)), ()) if span is None else Block((span[1],), (0,), (), 0, *span)
    return Pieces((block,), (), tuple(axis for axis in axes if axis.size > 1))


def blocks_of_rows(rule: UnitRule, start: int, stop: int | None, local_shape: Sequence[int]) -> Pieces:
    """Blocks of a local tensor that keeps the parameter's dims, some of them shorter.

    ``local_shape`` has the local sizes of the dims of ``rule.shape``. A grouped rule's first two dims are one dim of
    the tensor, of which this rank holds the rows [start, stop): head of a group, whole groups, tail of a group.
    """
    shape = tuple(local_shape)
    if not rule.grouped:
        # A block without elements stays where it has units: its rank passes on the sums of units cut along two axes.
        kept = tuple(shape[d] for d in rule.kept)
        return Pieces((Block(None, rule.reduced, kept),) if math.prod(kept) else ())
    assert stop is not None
    per_group, channels = rule.shape[1], shape[2]
    blocks = []
    if channels:
        for group, groups, first, rows in _lines(start, stop, per_group):
            blocks.append(
                Block((groups, rows), rule.reduced, (groups, channels), group * channels, first - start, groups * rows)
            )
    return Pieces(tuple(blocks))


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


def interval(rule: UnitRule, start: int, stop: int, offset: int, bounds: range, axis: Axis) -> Pieces:
    """Blocks of the elements [start, stop) of the flattened parameter, as FSDP1 and ZeRO hold them.

    ``offset`` is where they begin in the flat local tensor. ``bounds`` are the borders between the ranks of ``axis``
    in elements of the parameter, the same on every rank; those outside of it do no harm.

    Example:
        >>> rows = UnitRule((4, 10), (0,))
        >>> pieces = interval(rows, 15, 40, 0, range(15, 40, 25), Axis((0, 1), 1))
        >>> [(block.first_unit, block.sizes) for block in pieces.blocks]   # the tail of row 1, then rows 2 and 3
        [(1, (1, 1, 1, 5)), (2, (1, 1, 2, 10))]
        >>> pieces.splits[0].runs.tolist()
        [[1, 2]]
    """
    batch, outer, units, inner = rule.canonical
    blocks = []

    def add(first_unit: int, sizes: tuple[int, int, int, int], at: int) -> None:
        b, _, u, _ = sizes
        blocks.append(Block(sizes, (1, 3), (b, u), first_unit, offset + at - start, math.prod(sizes)))

    if outer == 1:  # rows: batches of rows are just more rows
        for row, rows, at, width in _lines(start, stop, max(inner, 1)):
            add(row, (1, 1, rows, width), at)
    else:
        line = units * inner
        for b, batches, at, count in _lines(start, stop, max(outer * line, 1)):
            if count == outer * line:
                add(b * units, (batches, outer, units, inner), at)
                continue
            for _, lines, at_line, length in _lines(at, at + count, line):
                if length == line:
                    add(b * units, (1, lines, units, inner), at_line)
                    continue
                for u, columns, at_unit, width in _lines(at_line, at_line + length, inner):
                    add(b * units + u % units, (1, 1, columns, width), at_unit)
    runs = split_runs(rule, bounds)
    return Pieces(
        tuple(blocks),
        (Split(axis, runs),) if len(runs) and axis.size > 1 else (),
        (axis,) if axis.size > 1 else (),
    )


def split_runs(rule: UnitRule, bounds: range) -> Tensor:
    """The runs of units that the borders ``bounds`` cut.

    With an outer dim, a border inside a batch cuts nearly every unit of that batch; all of them are listed then, which
    also makes the blocks that one rank holds of one unit meet in one slot.
    """
    _, outer, units, inner = rule.canonical
    length, count = (inner, 1) if outer == 1 else (outer * units * inner, units)
    inside = bounds[bisect_right(bounds, 0) : bisect_left(bounds, math.prod(rule.shape))]
    borders = torch.arange(inside.start, inside.stop, inside.step, device="cpu")
    return _runs(borders[borders % length != 0] // length, count) if len(inside) else _runs(borders, count)


def _runs(numbers: Tensor, count: int) -> Tensor:
    """Ascending numbers, each standing for ``count`` neighbouring units, as the fewest runs of units."""
    numbers = torch.unique_consecutive(numbers)
    gap = numbers.diff() != 1
    edge = torch.ones(min(len(numbers), 1), dtype=torch.bool, device="cpu")
    first, last = numbers[torch.cat([edge, gap])], numbers[torch.cat([gap, edge])]
    return torch.stack([first * count, (last + 1) * count], dim=1)


def chunk(size: int, pieces: int, index: int) -> tuple[int, int]:
    """The half-open range that ``torch.chunk``, and so ``Shard``, gives to one of ``pieces`` ranks; maybe empty."""
    step = -(-size // pieces)
    return min(size, step * index), min(size, step * (index + 1))


def sharded(
    rule: UnitRule, local_shape: Sequence[int], cuts: Sequence[tuple[Axis, int]], rows: tuple[int, int] | None = None
) -> Pieces:
    """Blocks of a DTensor's local tensor.

    Args:
        rule: the parameter's units.
        local_shape: sizes of the local tensor.
        cuts: (axis, tensor dim) for every mesh axis that shards a dim, innermost axis first.
        rows: for a grouped rule, the rows of dim 0 that this rank holds.

    Raises:
        ValueError: a grouped rule whose dim 0 is cut along more than one axis.
    """
    kept = (0, 1) if rule.grouped else rule.kept
    distinct = tuple(dict.fromkeys(axis for axis, dim in cuts if dim in kept))
    if not rule.grouped:
        base = blocks_of_rows(rule, 0, None, local_shape)
        count = math.prod(local_shape[d] for d in rule.kept)
        # A rank without units has its splits too: the order of collectives must not depend on what it holds.
        splits = [Split(axis, _all(count)) for axis, dim in cuts if dim not in rule.kept]
        return Pieces(base.blocks, tuple(splits), distinct)
    groups, per_group = rule.shape[:2]
    assert rows is not None
    base = blocks_of_rows(rule, *rows, (groups, per_group, *local_shape[1:]))
    channels = local_shape[1]
    splits = []
    for axis, dim in cuts:
        if dim == 0:
            if sum(d == 0 for _, d in cuts) > 1:
                raise ValueError("dim 0 of a grouped ConvTranspose weight is sharded along more than one mesh axis")
            borders = torch.tensor([chunk(groups * per_group, axis.size, i)[1] for i in range(axis.size)], device="cpu")
            runs = _runs(borders[borders % per_group != 0] // per_group, channels)
            if len(runs):
                splits.append(Split(axis, runs))
        elif dim != 1:  # dim 1 numbers channels, the others are summed over
            splits.append(Split(axis, _all(groups * channels)))
    return Pieces(base.blocks, tuple(splits), distinct)


def _all(count: int) -> Tensor:
    return torch.tensor([[0, count]], device="cpu")
