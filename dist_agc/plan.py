"""Which units are split, and each one's slot in one packed buffer per axis.

Made once from structure alone: never from which gradients exist, so every rank of an axis has the same number of
collectives, of the same length, in the same order, and none can wait for one that never comes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .fragments import Axis, Fragment, Split

STATISTICS = 3  # sums kept per parameter: clipped units, non-finite units, squared gradient


@dataclass(frozen=True, eq=False)
class Stage:
    """One all-reduce: the squares of split units, and the statistics of whole ones.

    The buffer is ``[weight squares | gradient squares | statistics | one largest ratio per rank]``.

    Args:
        axis: the ranks that take part.
        slots: split units, in all.
        owners: (governed fragment, how many slots) in the order of the slots.
        local: positions in the vector of local units whose squares go into the buffer.
        slot: the slot of each of them.
        passing: slots whose unit is cut along a later axis too, so that its sums are not complete yet.
        reported: fragments whose statistics add up along this axis here.
    """

    axis: Axis
    slots: int
    owners: tuple[tuple[int, int], ...]
    local: Tensor
    slot: Tensor
    passing: Tensor
    reported: tuple[int, ...]
    statistics: bool

    def numel(self, *, weights: bool = True) -> int:
        """Numbers in the buffer; ``weights=False`` where the weight norms are reused."""
        squares = self.slots * (2 if weights else 1)
        return squares + (STATISTICS * len(self.reported) + self.axis.size if self.statistics else 0)


class Plan:
    """The fragments of this rank, the vector of their units, and the stages that complete the sums.

    ``governed`` fragments come first in ``fragments``; the rest (excluded) only add to the gradient norm.
    ``split``: positions, in the vector of local units, of those whose sums are not complete on this rank.
    Block i covers ``offsets[i]:offsets[i + 1]`` of the vector of local units, and belongs to ``owners[i]``.
    """

    def __init__(self, fragments: Sequence[Fragment], *, statistics: bool = True) -> None:
        self.governed = [f for f in fragments if f.rule is not None]
        self.fragments = self.governed + [f for f in fragments if f.rule is None]
        self.blocks = [block for f in self.governed for block in f.pieces.blocks]
        self.owners = [i for i, f in enumerate(self.governed) for _ in f.pieces.blocks]
        self.offsets = [0, *itertools.accumulate(block.units for block in self.blocks)]
        self.stages = self._make_stages(statistics)
        self.split = _cat([stage.local for stage in self.stages]).unique()

    @property
    def local_units(self) -> int:
        return self.offsets[-1]

    @property
    def units(self) -> int:
        """Units of all governed parameters, over all ranks."""
        return sum(f.rule.count for f in self.governed if f.rule is not None)

    def units_per_fragment(self) -> list[int]:
        """This rank's units (pieces counted) of each governed fragment, in order."""
        counts = [0] * len(self.governed)
        for owner, block in zip(self.owners, self.blocks, strict=True):
            counts[owner] += block.units
        return counts

    def _make_stages(self, statistics: bool) -> list[Stage]:
        splits = [{s.axis: s for s in f.pieces.splits} if f.rule is not None else {} for f in self.fragments]
        distinct = [f.pieces.distinct if statistics else () for f in self.fragments]
        axes = _order(
            list(dict.fromkeys(a for s, d in zip(splits, distinct, strict=True) for a in (*s, *d))), splits, distinct
        )
        place = {axis: i for i, axis in enumerate(axes)}
        # A parameter's statistics are known once its last cut is healed, and can only be added up from then on.
        known = [max((place[a] for a in s), default=-1) for s in splits]
        stages = []
        for axis in axes:
            here = place[axis]
            reported = [i for i, d in enumerate(distinct) if axis in d and known[i] <= here]
            stages.append(self._stage(axis, splits, place, tuple(reported), statistics))
        for axis in axes:  # only where axes cut each other's parameters both ways round
            late = [i for i, d in enumerate(distinct) if axis in d and known[i] > place[axis]]
            if late:
                stages.append(self._stage(axis, [{} for _ in splits], place, tuple(late), statistics))
        return stages

    def _stage(
        self,
        axis: Axis,
        splits: list[dict[Axis, Split]],
        place: dict[Axis, int],
        reported: tuple[int, ...],
        statistics: bool,
    ) -> Stage:
        owners, local, slot, passing, base = [], [], [], [], 0
        block_at = 0
        for i, fragment in enumerate(self.governed):
            blocks = range(block_at, block_at + len(fragment.pieces.blocks))
            block_at = blocks.stop
            split = splits[i].get(axis)
            if split is None:
                continue
            for b in blocks:
                block = self.blocks[b]
                unit = torch.arange(block.first_unit, block.first_unit + block.units, device="cpu")
                inside, at = _slots(split.runs, unit)
                local.append(inside + self.offsets[b])
                slot.append(at + base)
            for later in (s for a, s in splits[i].items() if place[a] > place[axis]):
                unit = torch.cat([torch.arange(int(a), int(b), device="cpu") for a, b in split.runs])
                inside, _ = _slots(later.runs, unit)
                passing.append(inside + base)
            owners.append((i, split.units))
            base += split.units
        return Stage(axis, base, tuple(owners), _cat(local), _cat(slot), _cat(passing), reported, statistics)


def _slots(runs: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """Which of ``units`` (ascending numbers) lie in ``runs``, as positions, and the slot of each of those."""
    first, stop = runs[:, 0].contiguous(), runs[:, 1]
    run = torch.searchsorted(first, units, right=True) - 1
    inside = torch.nonzero((run >= 0) & (units < stop[run.clamp(min=0)])).flatten()
    run, units = run[inside], units[inside]
    before = torch.cumsum(stop - first, 0) - (stop - first)
    return inside, before[run] + units - first[run]


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device="cpu")


def _order(axes: list[Axis], splits: Sequence[dict[Axis, Split]], distinct: Sequence[tuple[Axis, ...]]) -> list[Axis]:
    """The axes in an order in which, where it can be had, every parameter is complete before it is counted.

    It follows from structure alone, so ranks that share an axis agree on it.
    """
    before = {axis: set() for axis in axes}
    for cut, apart in zip(splits, distinct, strict=True):
        for first in cut:
            for second in apart:
                if second != first:  # an axis that cuts some units and leaves others whole comes after the other cuts
                    before[second].add(first)
    ordered: list[Axis] = []
    while len(ordered) < len(axes):
        left = [axis for axis in axes if axis not in ordered]
        ordered.append(next((axis for axis in left if not before[axis] - set(ordered)), left[0]))
    return ordered
