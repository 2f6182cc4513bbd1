"""The order of the units, whole ones first, and each cut unit's slot in one packed buffer per axis.

Made once from structure alone: never from which gradients exist, so every rank of an axis has the same number of
collectives, of the same length, in the same order, and none can wait for one that never comes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.blocks import Axis, Block, Pieces
from ..model.parameter import Parameter
from ..model.units import UnitRule

STATISTICS = 3  # sums kept per parameter: clipped units, non-finite units, squared gradient
LARGEST = (2, 2)  # of all ratios, and of those above eps: the largest, and the place of its parameter in the plan


class Slots(NamedTuple):
    """Where numbers go into the slots of an axis, or come from.

    ``source[i]`` goes to ``slot[i]``. Both are positions, int64; slots ascend, and may repeat: ``distinct`` has each
    once, and ``lengths`` how often it stands there (None: once).
    """

    source: Tensor
    slot: Tensor
    distinct: Tensor
    lengths: Tensor | None

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> Slots:
        """Of several (source, slot), in any order."""
        source, slot = _cat([a for a, _ in pairs]), _cat([b for _, b in pairs])
        order = torch.argsort(slot, stable=True)
        source, slot = source[order], slot[order]
        distinct, lengths = slot.unique_consecutive(return_counts=True)
        return cls(source, slot, distinct, lengths) if len(distinct) < len(slot) else cls(source, slot, slot, None)

    def to(self, device: torch.device) -> Slots:
        return self._make(None if tensor is None else tensor.to(device) for tensor in self)

    def add(self, values: Tensor, into: Tensor) -> None:
        """Fill the slots. One that several numbers go to gets their sum, always in the same order and without atomics:
        copies of a model that are summed apart stay equal to the last bit."""
        values = values.index_select(0, self.source)
        if self.lengths is not None:
            values = torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True, initial=0)
        into.index_copy_(0, self.distinct, values)


@dataclass(frozen=True, eq=False)
class AxisPlan:
    """One all-reduce: the squares of units cut along an axis, and the counts of what was judged before it.

    The buffer is ``[weight squares | gradient squares | counts | the largest ratios of each rank]``.
    """

    axis: Axis  # the ranks that take part
    slots: int  # units cut along the axis, in all
    pieces: Slots  # from the local units to the slots, for units that no earlier axis cuts
    # By earlier axis (its place in the plan), from its slots to these: sums that it did not complete.
    carried: tuple[tuple[int, Slots], ...]
    # The slots whose unit no later axis cuts: its sums are complete here. Ascending; None is all of them.
    complete: Tensor | None
    owners: tuple[tuple[int, int], ...]  # (governed parameter, how many complete slots) in the order of the slots
    local: Slots  # the local units that are complete here (``source``), and the place of each in ``complete``
    reported: tuple[int, ...]  # parameters whose counts add up along this axis here

    def numel(self, columns: int = STATISTICS) -> int:
        """Numbers in the buffer. ``columns``: counts a parameter."""
        largest = math.prod(LARGEST) * self.axis.size
        return 2 * self.slots + (columns * len(self.reported) + largest if columns else 0)


# The cuts of one parameter by axis: its first slot there, and the units that are cut, in the order of their slots.
# An axis is known by its place in the plan, and the earliest comes first.
_Cuts = dict[int, tuple[int, Tensor]]


class Plan:
    """The parameters of one execution, the order of their units, and the axes that complete the cut ones.

    ``parameters``: the governed ones first; the rest (excluded) only add to the gradient norm.
    ``blocks``: those of governed parameters, whole ones first. Block i covers ``offsets[i]:offsets[i + 1]`` of the
    vector of local units and belongs to parameter ``owners[i]``. The first ``whole`` local units are whole.
    ``others``: (block, parameter) of the excluded parameters.
    """

    def __init__(self, parameters: Sequence[Parameter], rules: Sequence[UnitRule | None]) -> None:
        placed = sorted(zip(parameters, rules, strict=True), key=lambda pair: pair[1] is None)
        self.parameters = [p for p, _ in placed]
        self.rules = [rule for _, rule in placed if rule is not None]
        self.governed = len(self.rules)
        pieces = [p.pieces(rule) for p, rule in placed]
        self.shared: dict[Axis, list[int]] = {}  # by axis, the parameters of which its ranks hold something
        self.copied: set[int] = set()  # those of which nothing is ever sent: their ranks hold the same and know all
        for i, (p, found) in enumerate(zip(self.parameters, pieces, strict=True)):
            if not (found.cuts or found.distinct or p.may_be_share):
                self.copied.add(i)
            for axis in dict.fromkeys((*found.axes, *p.copies)):
                self.shared.setdefault(axis, []).append(i)
        self.others = [(b, i) for i, found in enumerate(pieces) if i >= self.governed for b in found.blocks]
        axes = _ordered(pieces)
        place, ends = {axis: at for at, axis in enumerate(axes)}, [0] * len(axes)
        cuts: list[_Cuts] = []
        for found in pieces:
            numbers = {place[cut.axis]: cut.numbers for cut in found.cuts}
            cuts.append({at: (ends[at], numbers[at]) for at in sorted(numbers)})
            for at, cut in numbers.items():
                ends[at] += len(cut)
        blocks = [
            (b, i, {at: first + n for at, (first, cut) in cuts[i].items() if (n := _place(b, cut)) is not None})
            for i, found in enumerate(pieces[: self.governed])
            for b in found.blocks
        ]
        blocks.sort(key=lambda entry: bool(entry[2]))
        self.blocks = [b for b, _, _ in blocks]
        self.owners = [i for _, i, _ in blocks]
        self.offsets = [0, *itertools.accumulate(b.units for b in self.blocks)]
        self.whole_units = [0] * self.governed  # by governed parameter
        for b, i, slots in blocks:
            self.whole_units[i] += 0 if slots else b.units
        self.whole = sum(self.whole_units)
        along = [slots for _, _, slots in blocks]
        counted = [[i for i, found in enumerate(pieces) if axis in found.distinct] for axis in axes]
        # A parameter's counts are known once its last cut is healed, and can only be added up from then on.
        known = [max(cut, default=-1) for cut in cuts]
        self.axes = [
            self._axis(axis, at, along, cuts, tuple(i for i in counted[at] if known[i] <= at))
            for at, axis in enumerate(axes)
        ]
        for at, axis in enumerate(axes):  # only where axes cut each other's parameters both ways round
            if late := tuple(i for i in counted[at] if known[i] > at):
                self.axes.append(AxisPlan(axis, 0, Slots.of([]), (), None, (), Slots.of([]), late))

    def _axis(
        self, axis: Axis, at: int, along: Sequence[dict[int, int]], cuts: Sequence[_Cuts], reported: tuple[int, ...]
    ) -> AxisPlan:
        """The plan of the axis at this place. ``along``: by block, the slot of its first unit along each axis."""
        first, last = [], []  # local units and their slots, whose first, whose last cut is this axis
        for block, offset, slots in zip(self.blocks, self.offsets, along, strict=False):
            if at in slots:
                pair = _range(offset, block.units), _range(slots[at], block.units)
                first += [pair] if at == min(slots) else []
                last += [pair] if at == max(slots) else []
        handed: dict[int, list[tuple[Tensor, Tensor]]] = {}  # what earlier axes hand on: their slots, and these
        owners, done, total = [], [], 0
        for i, cut in enumerate(cuts):
            if at not in cut:
                continue
            start, units = cut[at]
            slot, waiting = _range(start, len(units)), torch.ones_like(units, dtype=torch.bool)
            for before in sorted((axis for axis in cut if axis < at), reverse=True):  # the latest has the whole sum
                start_there, there = cut[before]
                both = torch.isin(units, there) & waiting
                waiting &= ~both
                source = torch.searchsorted(there, units[both]) + start_there
                handed.setdefault(before, []).append((source, slot[both]))
            later = [there for after, (_, there) in cut.items() if after > at]
            done.append(slot[~torch.isin(units, _cat(later))] if later else slot)
            owners.append((i, len(done[-1])))
            total += len(units)
        pieces, complete = Slots.of(first), _cat(done)
        carried = tuple((before, Slots.of(handed[before])) for before in sorted(handed))
        if len(complete) == total and not carried:
            return AxisPlan(axis, total, pieces, (), None, tuple(owners), pieces, reported)
        local = Slots.of(last)
        assert bool(torch.isin(local.slot, complete).all()), "a unit is complete after its last cut"
        local = Slots.of([(local.source, torch.searchsorted(complete, local.slot))])
        some = complete if len(complete) < total else None
        return AxisPlan(axis, total, pieces, carried, some, tuple(owners), local, reported)

    def governed_now(self) -> list[tuple[int, Parameter, UnitRule]]:
        """The governed parameters that train now, with their places: one that was frozen since counts no more."""
        pairs = zip(self.parameters, self.rules, strict=False)
        return [(i, p, rule) for i, (p, rule) in enumerate(pairs) if p.trains]

    @property
    def local_units(self) -> int:
        """Units of which this rank has a piece, each piece counted."""
        return self.offsets[-1]

    @property
    def units(self) -> int:
        """Units of all governed parameters, over all ranks."""
        return sum(rule.count for rule in self.rules)

    @property
    def slots(self) -> int:
        return sum(axis.slots for axis in self.axes)


def _ordered(pieces: Sequence[Pieces]) -> list[Axis]:
    """An order of the axes from structure alone, so that ranks that share an axis agree on it.

    An axis that cuts some of a parameter's units and leaves others whole comes after the parameter's other cuts: a
    rank holds only some of the cut units. Where it can be had, an axis along which a parameter is counted, too, comes
    after all that cut it.
    """
    left = dict.fromkeys(axis for found in pieces for axis in found.axes)
    must: dict[Axis, set[Axis]] = {axis: set() for axis in left}
    should: dict[Axis, set[Axis]] = {axis: set() for axis in left}
    for found in pieces:
        cut = {cut.axis for cut in found.cuts}
        for axis in found.distinct:
            (must if axis in cut else should)[axis] |= cut - {axis}
    ordered: list[Axis] = []
    while left:
        free = [axis for axis in left if must[axis] <= {*ordered}]
        assert free, "axes that each cut what the other has cut before"
        ordered.append(next((axis for axis in free if should[axis] <= {*ordered}), free[0]))
        del left[ordered[-1]]
    return ordered


def _place(block: Block, cut: Tensor) -> int | None:
    """The place of the block's first unit among the ``cut`` ones; None where none of its units is cut."""
    ends = torch.tensor([block.first_unit, block.first_unit + block.units], device="cpu")
    first, stop = torch.searchsorted(cut, ends).tolist()
    assert stop - first in (0, block.units), "a block of whole and cut units"  # blocks begin and end where cuts do
    return first if stop > first else None


def _range(first: int, length: int) -> Tensor:
    return torch.arange(first, first + length, device="cpu")


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *parts])
