"""The ranks of a made-up world, one after the other: what each holds, and the collectives that its plan makes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dist_agc.engine.plan import AxisPlan, Plan
from dist_agc.frameworks._flat import FlatInterval, Span
from dist_agc.model.blocks import Axis, Block, Pieces
from dist_agc.model.parameter import Parameter
from dist_agc.model.units import UnitRule


def labels(rule: UnitRule) -> Tensor:
    """The number of every element's unit, straight from the definition."""
    numbers = torch.zeros(rule.shape, dtype=torch.int64)
    for dim in rule.kept:
        along = [1] * len(rule.shape)
        along[dim] = rule.shape[dim]
        numbers = numbers * rule.shape[dim] + torch.arange(rule.shape[dim]).view(along)
    return numbers


def unit_of_place(block: Block) -> Tensor:
    """For every place of the block's view, the unit that the block says it belongs to."""
    assert block.sizes is not None
    kept = iter(block.kept)
    shape = [1 if d in block.reduced else next(kept) for d in range(len(block.sizes))]
    return (torch.arange(block.units).view(shape) + block.first_unit).expand(block.sizes)


def mesh_axes(mesh: tuple[int, ...], rank: int) -> list[Axis]:
    grid = torch.arange(math.prod(mesh)).view(mesh)
    place = [int(c) for c in (grid == rank).nonzero()[0]]
    axes = []
    for axis in range(len(mesh)):
        ranks = tuple(int(r) for r in grid[tuple(slice(None) if a == axis else place[a] for a in range(len(mesh)))])
        axes.append(Axis(ranks, place[axis]))
    return axes


@dataclass(frozen=True, eq=False, kw_only=True)
class Given(Parameter):
    """A parameter of which the pieces are given."""

    given: Pieces

    @classmethod
    def of_pieces(cls, name: str, rule: UnitRule, given: Pieces) -> "Given":
        return cls(names=(name,), tensor=torch.empty(0), shape=rule.shape, default=rule, given=given)

    def pieces(self, rule: UnitRule | None) -> Pieces:
        assert rule is self.default
        return self.given


def sent(axis: AxisPlan) -> tuple[object, ...]:
    """What every rank of an axis has to have alike."""
    return tuple(axis.axis.ranks), axis.slots, axis.owners, axis.reported, axis.numel()


@dataclass
class Rank:
    """One rank's plan and what it knows: the sum of every local unit, how often it was judged and on which sum, the
    sums in the slots of every axis that it has been to, and how many units it has counted."""

    plan: Plan
    sums: Tensor
    judged: Tensor
    final: Tensor
    counted: Tensor
    slots: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, parameters: Sequence[Parameter], locals_: Sequence[Tensor]) -> "Rank":
        plan = Plan(parameters, [p.default for p in parameters])
        sums = []
        for i, (owner, block) in enumerate(zip(plan.owners, plan.blocks, strict=True)):
            assert plan.offsets[i] == sum(len(s) for s in sums)
            view = block.view(locals_[owner])
            sums.append((view.sum(block.reduced) if block.reduced else view).reshape(-1))
        local = torch.cat(sums) if sums else torch.zeros(0, dtype=torch.int64)
        judged = torch.zeros_like(local)
        judged[: plan.whole] += 1  # whole units: their sums are complete without any collective
        return cls(plan, local, judged, local.clone(), torch.tensor(plan.whole_units, dtype=torch.int64))

    def next(self) -> AxisPlan | None:
        return self.plan.axes[len(self.slots)] if len(self.slots) < len(self.plan.axes) else None

    def brings(self, axis: AxisPlan) -> Tensor:
        """The slots that it adds up with the other ranks of the axis."""
        slots = torch.zeros(axis.slots, dtype=torch.int64)
        given = [(axis.pieces, self.sums), *((found, self.slots[before]) for before, found in axis.carried)]
        for found, values in given:
            slots.index_add_(0, found.slot, values[found.source])
        into = torch.cat([found.slot.unique() for found, _ in given])
        assert len(into) == len(into.unique()), "a slot is filled twice"
        return slots

    def takes(self, axis: AxisPlan, total: Tensor, counts: Tensor) -> None:
        self.slots.append(total)
        self.counted[list(axis.reported)] = counts
        complete = total if axis.complete is None else total[axis.complete]
        assert sum(count for _, count in axis.owners) == len(complete)
        assert len({owner for owner, _ in axis.owners}) == len(axis.owners), "two counts are added to one row"
        self.judged.index_add_(0, axis.local.source, torch.ones_like(axis.local.source))
        self.final[axis.local.source] = complete[axis.local.slot]
        for owner, count in axis.owners:
            self.counted[owner] += count


def reduce_all(ranks: Sequence[Rank]) -> None:
    """Run every rank's axes. A collective happens when all ranks of its axis have come to it; else it is a hang."""
    while any(rank.next() for rank in ranks):
        waiting = {i: axis for i, rank in enumerate(ranks) if (axis := rank.next())}
        at = {i: tuple(axis.axis.ranks) for i, axis in waiting.items()}
        ready = next((meet for meet in at.values() if all(at.get(other) == meet for other in meet)), None)
        assert ready is not None, f"hang: {at}"
        assert len({sent(waiting[i]) for i in ready}) == 1, "ranks send other things"
        total = torch.stack([ranks[i].brings(waiting[i]) for i in ready]).sum(0)
        counts = torch.stack([ranks[i].counted[list(waiting[i].reported)] for i in ready]).sum(0)
        for i in ready:
            ranks[i].takes(waiting[i], total, counts)


def check_complete(
    rank: Rank, rule_of: Sequence[UnitRule], local_labels: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    """Every local unit was judged once, on the sum of the whole unit; each parameter's units were counted once."""
    assert bool((rank.judged == 1).all()), f"judged {rank.judged.tolist()} times"
    for at, (owner, block) in enumerate(zip(rank.plan.owners, rank.plan.blocks, strict=True)):
        rule = rule_of[owner]
        total = torch.zeros(max(rule.count, 1), dtype=torch.int64)
        total.index_add_(0, labels(rule).flatten(), values[owner].flatten())
        view = block.view(local_labels[owner])
        if view.numel() == 0:
            continue
        reduced = block.reduced
        unit = view.amin(reduced) if reduced else view
        assert torch.equal(unit, view.amax(reduced) if reduced else view), "a block mixes units"
        final = rank.final[rank.plan.offsets[at] : rank.plan.offsets[at + 1]]
        assert torch.equal(final, total[unit.reshape(-1)])
    for rule, counted in zip(rule_of, rank.counted.tolist(), strict=True):
        assert counted == rule.count or rule.count == 0, "a tensor without elements has nothing to clip"


@dataclass(frozen=True)
class Sliced:
    """A parameter, and the dim along which each axis but the first slices it (None: copies). Ranks of the first axis
    share the flattened slices. Slices are equal, as frameworks that slice before they flatten ask for."""

    rule: UnitRule
    dims: tuple[int | None, ...]

    def across(self, axes: Sequence[Axis]) -> tuple[tuple[Axis, int], ...]:
        """Innermost first."""
        return tuple((axis, dim) for axis, dim in zip(axes, self.dims, strict=True) if dim is not None)[::-1]

    def of(self, whole: Tensor, axes: Sequence[Axis]) -> Tensor:
        """The slice that a rank at these places has."""
        for axis, dim in zip(axes, self.dims, strict=True):
            if dim is not None:
                size = whole.shape[dim] // axis.size
                whole = whole.narrow(dim, axis.rank * size, size)
        return whole


def flattened(
    mesh: tuple[int, ...],
    parameters: Sequence[Sliced],
    rank: int,
    tensors: Sequence[Sequence[Tensor]],
    *,
    alone: bool,
) -> tuple[list[FlatInterval], list[Tensor]]:
    """What a rank of a mesh holds of parameters: as the plan sees it, and each list of whole ``tensors`` flat.

    ``alone``: each is cut by itself, as ZeRO 3 does, or beside the others, as ZeRO 1 and FSDP1 do. What is no
    parameter's is -1.
    """
    first, *others = mesh_axes(mesh, rank)
    slices = [[p.of(t, others) for p, t in zip(parameters, whole, strict=True)] for whole in tensors]
    sizes = [t.numel() for t in slices[0]]
    at, base, found, held = 0, 0, [], []
    shard = -(-(sum(sizes) + 2) // first.size)
    for i, (parameter, numel) in enumerate(zip(parameters, sizes, strict=True)):
        if alone:
            shard = -(-numel // first.size)
            span = Span.cut(numel, 0, shard, first.rank, base)
        else:
            span = Span.cut(numel, at, shard, first.rank)
        found.append(
            FlatInterval(
                names=(f"p{i}",),
                tensor=torch.empty(0),
                shape=parameter.rule.shape,
                default=parameter.rule,
                span=span,
                axis=first,
                across=parameter.across(others),
                sliced=None if parameter.rule.split is not None else tuple(slices[0][i].shape),
            )
        )
        at, base = at + numel, base + shard
    for some in slices:
        flat = [t.flatten() for t in some]
        if alone:
            padded = [torch.cat([t, t.new_full((-len(t) % first.size,), -1)]) for t in flat]
            held.append(torch.cat([t.chunk(first.size)[first.rank] if len(t) else t for t in padded]))
        else:
            rest = torch.full((shard * first.size - sum(sizes),), -1)
            held.append(torch.cat([*flat, rest])[shard * first.rank : shard * (first.rank + 1)])
    return found, held
