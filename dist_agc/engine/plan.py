"""The order of the units, whole ones first, and each cut unit's slot in one packed buffer per axis.

Made once from structure alone: never from which gradients exist, so every rank of an axis has the same number of
collectives, of the same length, in the same order, and none can wait for one that never comes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..model.blocks import Axis, Block, Cut
from ..model.parameter import Parameter
from ..model.units import UnitRule

STATISTICS = 3  # sums kept per parameter: clipped units, non-finite units, squared gradient


@dataclass(eq=False)
class Slots:
    """Where numbers go into the slots of an axis, or come from.

    ``source[i]`` goes to ``slot[i]``. Both are positions, int64; slots ascend, and may repeat: ``distinct`` has each
    once, and ``lengths`` how often it stands there (None: once).
    """

    source: Tensor
    slot: Tensor
    distinct: Tensor = field(init=False)
    lengths: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        distinct, lengths = self.slot.unique_consecutive(return_counts=True)
        repeat = len(distinct) < len(self.slot)
        self.distinct, self.lengths = (distinct, lengths) if repeat else (self.slot, None)


@dataclass(frozen=True, eq=False)
class AxisPlan:
    """One all-reduce: the squares of units cut along an axis, and the counts of what was judged before it.

    The buffer is ``[weight squares | gradient squares | counts | one largest ratio per rank]``.

    Args:
        axis: the ranks that take part.
        slots: units cut along the axis, in all.
        pieces: from the local units to the slots, for units that no earlier axis cuts.
        carried: by earlier axis (its place in the plan), from its slots to these: sums that it did not complete.
        complete: the slots whose unit no later axis cuts: its sums are complete here. Ascending; None is all of them.
        owners: (governed parameter, how many complete slots) in the order of the slots.
        local: the local units that are complete here (``source``), and the place of each in ``complete``.
        reported: parameters whose counts add up along this axis here.
    """

    axis: Axis
    slots: int
    pieces: Slots
    carried: tuple[tuple[int, Slots], ...]
    complete: Tensor | None
    owners: tuple[tuple[int, int], ...]
    local: Slots
    reported: tuple[int, ...]

    def numel(self, *, weights: bool = True, columns: int = STATISTICS) -> int:
        """Numbers in the buffer; ``weights=False`` where the weight norms are reused, ``columns``: counts a parameter.

        Without squares and counts nothing is sent at all.
        """
        squares = self.slots * (2 if weights else 1)
        return squares + (columns * len(self.reported) + self.axis.size if columns else 0)


class Plan:
    """The parameters of one execution, the order of their units, and the axes that complete the cut ones.

    ``parameters``: the governed ones first; the rest (excluded) only add to the gradient norm.
    ``blocks``: those of governed parameters, whole ones first. Block i covers ``offsets[i]:offsets[i + 1]`` of the
    vector of local units and belongs to parameter ``owners[i]``. The first ``whole`` local units are whole.
    ``others``: (block, parameter) of the excluded parameters.
    """

    def __init__(self, parameters: Sequence[Parameter], rules: Sequence[UnitRule | None]) -> None:
        placed = [(p, rule, p.pieces(rule)) for p, rule in zip(parameters, rules, strict=True)]
        placed.sort(key=lambda entry: entry[1] is None)
        self.parameters = [p for p, _, _ in placed]
        self.rules = [rule for _, rule, _ in placed if rule is not None]
        self.governed = len(self.rules)
        pieces = [found for _, _, found in placed]
        # By parameter, every axis whose ranks hold something of it.
        self.every_axis = [
            tuple(dict.fromkeys((*(cut.axis for cut in found.cuts), *found.distinct, *p.copies)))
            for p, found in zip(self.parameters, pieces, strict=True)
        ]
        self.others = [(b, i) for i, found in enumerate(pieces) if i >= self.governed for b in found.blocks]
        cuts = [{c.axis: c for c in found.cuts} if i < self.governed else {} for i, found in enumerate(pieces)]
        distinct = [found.distinct for found in pieces]
        every = [*dict.fromkeys(a for c, d in zip(cuts, distinct, strict=True) for a in (*c, *d))]
        axes = _ordered(every, cuts, distinct)
        # Which of a parameter's axes cut it, in the order of the plan.
        cut_along = [[axis for axis in axes if axis in found] for found in cuts]
        blocks = [
            (b, i, [axis for axis in cut_along[i] if _cuts(cuts[i][axis], b)])
            for i, found in enumerate(pieces[: self.governed])
            for b in found.blocks
        ]
        blocks.sort(key=lambda entry: bool(entry[2]))
        self.blocks = [b for b, _, _ in blocks]
        self.owners = [i for _, i, _ in blocks]
        self.offsets = [0, *itertools.accumulate(b.units for b in self.blocks)]
        whole_blocks = sum(not along for _, _, along in blocks)
        self.whole = self.offsets[whole_blocks]
        self.whole_units = [0] * self.governed  # by governed parameter
        for b, i, _ in blocks[:whole_blocks]:
            self.whole_units[i] += b.units
        self.axes = _Axes(self, [along for _, _, along in blocks], axes, cuts, distinct).plans()

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


class _Axes:
    """Makes the `AxisPlan` of every axis."""

    def __init__(
        self,
        plan: Plan,
        along: list[list[Axis]],
        axes: list[Axis],
        cuts: list[dict[Axis, Cut]],
        distinct: Sequence[tuple[Axis, ...]],
    ) -> None:
        self.plan, self.along, self.axes, self.cuts, self.distinct = plan, along, axes, cuts, distinct
        self.place = {axis: i for i, axis in enumerate(axes)}
        # By axis and parameter, the first slot of its cut units.
        self.base: list[dict[int, int]] = []
        for axis in axes:
            sizes = [(i, found[axis].units) for i, found in enumerate(cuts) if axis in found]
            starts = itertools.accumulate((n for _, n in sizes), initial=0)
            self.base.append({i: start for (i, _), start in zip(sizes, starts, strict=False)})

    def plans(self) -> list[AxisPlan]:
        # A parameter's counts are known once its last cut is healed, and can only be added up from then on.
        known = [max((self.place[a] for a in found), default=-1) for found in self.cuts]
        made = []
        for here, axis in enumerate(self.axes):
            reported = [i for i, d in enumerate(self.distinct) if axis in d and known[i] <= here]
            made.append(self._plan(axis, tuple(reported)))
        for here, axis in enumerate(self.axes):  # only where axes cut each other's parameters both ways round
            late = [i for i, d in enumerate(self.distinct) if axis in d and known[i] > here]
            if late:
                none = Slots(_cat([]), _cat([]))
                made.append(AxisPlan(axis, 0, none, (), None, (), none, tuple(late)))
        return made

    def _plan(self, axis: Axis, reported: tuple[int, ...]) -> AxisPlan:
        here, plan = self.place[axis], self.plan
        first, last = [], []  # (positions of local units, their slots) whose first, whose last cut is this axis
        for b, (block, i, along) in enumerate(zip(plan.blocks, plan.owners, self.along, strict=True)):
            if axis not in along:
                continue
            units = torch.arange(block.first_unit, block.first_unit + block.units, device="cpu")
            position = torch.arange(plan.offsets[b], plan.offsets[b + 1], device="cpu")
            slot = _slot_of(self.cuts[i][axis].runs, units) + self.base[here][i]
            first += [(position, slot)] if along[0] == axis else []
            last += [(position, slot)] if along[-1] == axis else []
        carried: dict[int, list[tuple[Tensor, Tensor]]] = {}
        owners, complete, slots = [], [], 0
        for i, start in self.base[here].items():
            count = self.cuts[i][axis].units
            slots, slot = slots + count, torch.arange(start, start + count, device="cpu")
            done = torch.ones_like(slot, dtype=torch.bool)
            if len(self.cuts[i]) > 1:
                done = self._hand_on(i, here, slot, carried)
            owners.append((i, int(done.sum())))
            complete.append(slot[done])
        ready, pieces = _cat(complete), _joined(first)
        if len(ready) == slots and not carried:
            local = pieces
        else:
            place = torch.full((slots,), -1, device="cpu")
            place[ready] = torch.arange(len(ready), device="cpu")
            local = _joined(last)
            local = Slots(local.source, place[local.slot])
            assert bool((local.slot >= 0).all()), "a unit whose last cut is this axis is complete after it"
        return AxisPlan(
            axis,
            slots,
            pieces,
            tuple((before, _joined(found)) for before, found in sorted(carried.items())),
            ready if len(ready) < slots else None,
            tuple(owners),
            local,
            reported,
        )

    def _hand_on(self, i: int, here: int, slot: Tensor, carried: dict[int, list[tuple[Tensor, Tensor]]]) -> Tensor:
        """What earlier axes hand on to the slots of parameter i; returns which of them no later axis cuts."""
        units = _units(self.cuts[i][self.axes[here]].runs)
        elsewhere = {self.place[a]: cut for a, cut in self.cuts[i].items() if self.place[a] != here}
        waiting = torch.ones_like(units, dtype=torch.bool)
        for before in sorted((k for k in elsewhere if k < here), reverse=True):  # the latest one has the whole sum
            inside = _inside(elsewhere[before].runs, units) & waiting
            waiting &= ~inside
            source = _slot_of(elsewhere[before].runs, units[inside]) + self.base[before][i]
            carried.setdefault(before, []).append((source, slot[inside]))
        done = torch.ones_like(units, dtype=torch.bool)
        for after in (k for k in elsewhere if k > here):
            done &= ~_inside(elsewhere[after].runs, units)
        return done


def _cuts(cut: Cut, block: Block) -> bool:
    """Whether the block's units are cut; all of them are or none is, since blocks begin and end where cuts do."""
    inside = _inside(cut.runs, torch.arange(block.first_unit, block.first_unit + block.units, device="cpu"))
    assert bool(inside.all()) or not bool(inside.any()), "a block of whole and cut units"
    return bool(inside.any())


def _run(runs: Tensor, units: Tensor) -> Tensor:
    """The last run that begins no later than each unit; -1 where none does."""
    return torch.searchsorted(runs[:, 0].contiguous(), units, right=True) - 1


def _inside(runs: Tensor, units: Tensor) -> Tensor:
    if not len(runs):
        return torch.zeros_like(units, dtype=torch.bool)
    run = _run(runs, units)
    return (run >= 0) & (units < runs[:, 1][run.clamp(min=0)])


def _slot_of(runs: Tensor, units: Tensor) -> Tensor:
    """The place of units that lie in ``runs`` among all that do."""
    first, stop = runs[:, 0], runs[:, 1]
    run = _run(runs, units)
    return (torch.cumsum(stop - first, 0) - (stop - first))[run] + units - first[run]


def _units(runs: Tensor) -> Tensor:
    first, length = runs[:, 0], runs[:, 1] - runs[:, 0]
    before = torch.cumsum(length, 0) - length
    return torch.repeat_interleave(first - before, length) + torch.arange(int(length.sum()), device="cpu")


def _joined(found: list[tuple[Tensor, Tensor]]) -> Slots:
    source, slot = _cat([a for a, _ in found]), _cat([b for _, b in found])
    order = torch.argsort(slot, stable=True)
    return Slots(source[order], slot[order])


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device="cpu")


def _ordered(axes: list[Axis], cuts: Sequence[dict[Axis, Cut]], distinct: Sequence[tuple[Axis, ...]]) -> list[Axis]:
    """An order of the axes from structure alone, so that ranks that share an axis agree on it.

    An axis that cuts some of a parameter's units and leaves others whole comes after the parameter's other cuts: a
    rank holds only some of the cut units. Where it can be had, an axis along which a parameter is counted, too, comes
    after all that cut it.
    """
    must: dict[Axis, set[Axis]] = {axis: set() for axis in axes}
    should: dict[Axis, set[Axis]] = {axis: set() for axis in axes}
    for cut, apart in zip(cuts, distinct, strict=True):
        for axis in apart:
            (must if axis in cut else should)[axis].update(other for other in cut if other != axis)
    ordered: list[Axis] = []
    while len(ordered) < len(axes):
        left = [axis for axis in axes if axis not in ordered]
        free = [axis for axis in left if must[axis] <= {*ordered}]
        assert free, "axes that each cut what the other has cut before"
        ordered.append(next((axis for axis in free if should[axis] <= {*ordered}), free[0]))
    return ordered
