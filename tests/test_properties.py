"""Properties of units, fragments and plans at random: integers only, ranks simulated one after the other.

The pieces of all ranks tile every unit exactly once; all ranks of an axis plan the same collectives in the same order,
so that none can wait for one that never comes; and the stages complete every unit's sum and count it exactly once.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dist_agc
import oracle
from dist_agc.fragments import Axis, Block, Fragment, Pieces, chunk, interval, sharded, whole
from dist_agc.plan import Plan
from dist_agc.units import UnitRule

COUNTS: Counter[str] = Counter()
WANTED = {
    "canonical": 800,
    "interval": 1500,
    "large worlds": 30,
    "flat ranks": 1000,
    "meshes": 1500,
    "values": 700,
}


@pytest.fixture(scope="module", autouse=True)
def _counted() -> Iterator[None]:
    """CI shows how many examples ran, and a whole run has at least 5,000."""
    yield
    if set(COUNTS) == set(WANTED):
        print(f"\nproperty examples: {sum(COUNTS.values())} {dict(COUNTS)}")
        assert sum(COUNTS.values()) >= 5000


def examples(name: str, **arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``given``, the same examples in every run, counted."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def counted(**drawn: Any) -> None:
            COUNTS[name] += 1
            test(**drawn)

        run = given(**arguments)(counted)
        run = settings(
            max_examples=WANTED[name],
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        )(run)

        def wrapper() -> None:
            run()

        wrapper.__doc__ = test.__doc__
        return wrapper

    return decorate


# ------------------------------------------------------------------------------------------------------- strategies


@st.composite
def rules(draw: st.DrawFn, largest: int = 5, max_ndim: int = 5) -> UnitRule:
    """Any rule that UnitRule takes: leading dims, then one run of neighbours; or a grouped ConvTranspose."""
    shape = tuple(draw(st.lists(st.integers(0, largest), max_size=max_ndim)))
    if draw(st.integers(0, 5)) == 0:
        shape = tuple(max(1, s) for s in (*shape, 2, 3)[:4])
        if len(shape) >= 3:
            return UnitRule(shape, (0, 2), grouped=True)
    leading = draw(st.integers(0, len(shape)))
    kept = list(range(leading))
    if leading + 1 < len(shape) and draw(st.booleans()):
        first = draw(st.integers(leading + 1, len(shape) - 1))
        kept += range(first, draw(st.integers(first, len(shape) - 1)) + 1)
    return UnitRule(shape, tuple(kept))


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


# ------------------------------------------------------------------------------------------- units and one interval


@examples("canonical", rule=rules())
def test_the_canonical_form_has_every_unit_where_the_rule_says(rule: UnitRule) -> None:
    batch, outer, units, inner = rule.canonical
    numel = math.prod(rule.shape)
    assert batch * outer * units * inner == numel
    canonical = torch.arange(batch).view(-1, 1, 1, 1) * units + torch.arange(units).view(1, 1, -1, 1)
    assert torch.equal(canonical.expand(batch, outer, units, inner).reshape(-1), labels(rule).flatten())
    assert rule.count == (batch * units if numel else 0)


@st.composite
def flat_cuts(draw: st.DrawFn, most: int = 4) -> tuple[int, int]:
    """(ranks, where the parameter begins in the flat one): shards are equal, and may begin inside of it or before."""
    return draw(st.integers(1, most)), draw(st.integers(0, 40))


def flat_pieces(rule: UnitRule, ranks: int, shard: int, before: int, group: tuple[int, ...]) -> list[Pieces]:
    """Every rank's pieces of a parameter that begins ``before`` elements into a flat tensor cut into equal shards."""
    numel = math.prod(rule.shape)
    pieces = []
    for rank in range(ranks):
        start = min(max(shard * rank - before, 0), numel)
        stop = max(min(shard * (rank + 1) - before, numel), start)
        bounds = range(shard - before, numel, shard)
        offset = before + start - shard * rank if stop > start else 0
        pieces.append(interval(rule, start, stop, offset, bounds, Axis(group, rank)))
    return pieces


def check_tiling(rule: UnitRule, pieces: Sequence[Pieces], shard: int, before: int) -> None:
    numel = math.prod(rule.shape)
    flat_labels, covered = labels(rule).flatten(), torch.zeros(numel, dtype=torch.int64)
    holders = torch.zeros(max(rule.count, 1), dtype=torch.int64)
    for rank, here in enumerate(pieces):
        # What the rank holds, as numbers of elements of the parameter; anything else in its shard is -1.
        local = torch.arange(shard * rank - before, shard * (rank + 1) - before)
        local = torch.where((local >= 0) & (local < numel), local, -1)
        for block in here.blocks:
            element = block.view(local).reshape(-1)
            assert bool((element >= 0).all()), "a block reaches beyond its parameter"
            covered[element] += 1
            assert torch.equal(flat_labels[element], unit_of_place(block).reshape(-1))
        held = [block.view(local).reshape(-1) for block in here.blocks]
        if held:
            holders[flat_labels[torch.cat(held)].unique()] += 1
    assert bool((covered == 1).all()), "every element belongs to exactly one piece"
    split = torch.zeros(max(rule.count, 1), dtype=torch.bool)
    for first, stop in pieces[0].splits[0].runs.tolist() if pieces[0].splits else ():
        split[first:stop] = True
    assert bool((split | (holders <= 1)).all()), "a unit on two ranks has no slot"
    if rule.canonical[1] == 1:
        assert torch.equal(split, holders > 1), "a unit on one rank has a slot"


@examples("interval", rule=rules(), cut=flat_cuts())
def test_flat_shards_tile_every_unit_exactly_once(rule: UnitRule, cut: tuple[int, int]) -> None:
    ranks, before = cut
    shard = max(1, -(-(before + math.prod(rule.shape) + 3) // ranks))
    pieces = flat_pieces(rule, ranks, shard, before, tuple(range(ranks)))
    check_tiling(rule, pieces, shard, before)


@examples(
    "large worlds",
    rules=st.lists(rules(largest=9, max_ndim=4), min_size=1, max_size=2),
    ranks=st.sampled_from([64, 257, 1024, 4096]),
)
def test_large_worlds_tile_and_plan_alike(rules: list[UnitRule], ranks: int) -> None:
    group, before = tuple(range(ranks)), 0
    total = sum(math.prod(rule.shape) for rule in rules)
    shard = max(1, -(-total // ranks))
    every: list[list[Pieces]] = []
    for rule in rules:
        every.append(flat_pieces(rule, ranks, shard, before, group))
        check_tiling(rule, every[-1], shard, before)
        before += math.prod(rule.shape)
    seen = set()
    for rank in {0, 1, ranks // 3, ranks // 2, ranks - 2, ranks - 1}:
        plan = Plan([fragment(f"p{i}", rule, every[i][rank]) for i, rule in enumerate(rules)])
        seen.add(tuple((s.axis.ranks, s.slots, s.owners, s.reported, s.numel()) for s in plan.stages))
    assert len(seen) == 1, "ranks plan different collectives"


# -------------------------------------------------------------------------------------------- ranks that reduce sums


def fragment(name: str, rule: UnitRule | None, pieces: Pieces) -> Fragment:
    return Fragment(name, rule, pieces, torch.empty(0), lambda tensor: tensor, 0)


@dataclass
class Rank:
    """One rank's plan and what it knows: the sum of every local unit, and how many units it has counted."""

    plan: Plan
    sums: Tensor
    final: Tensor
    counted: Tensor
    stage: int = 0

    @classmethod
    def of(cls, fragments: Sequence[Fragment], locals_: Sequence[Tensor]) -> "Rank":
        plan = Plan(fragments)
        sums = []
        for i, (owner, block) in enumerate(zip(plan.owners, plan.blocks, strict=True)):
            assert plan.offsets[i] == sum(len(s) for s in sums)
            view = block.view(locals_[owner])
            sums.append((view.sum(block.reduced) if block.reduced else view).reshape(-1))
        local = torch.cat(sums) if sums else torch.zeros(0, dtype=torch.int64)
        split = torch.zeros(len(local), dtype=torch.bool)
        for stage in plan.stages:
            split[stage.local] = True
        counted = torch.zeros(len(plan.fragments), dtype=torch.int64)
        for i, owner in enumerate(plan.owners):
            counted[owner] += int((~split[plan.offsets[i] : plan.offsets[i + 1]]).sum())
        return cls(plan, local, local.clone(), counted)


def reduce_all(ranks: Sequence[Rank]) -> None:
    """Run every rank's stages. A collective happens when all ranks of its axis have come to it; else it is a hang."""
    while any(rank.stage < len(rank.plan.stages) for rank in ranks):
        waiting = {i: r.plan.stages[r.stage] for i, r in enumerate(ranks) if r.stage < len(r.plan.stages)}
        at = {rank: stage.axis.ranks for rank, stage in waiting.items()}
        ready = next((ranks for ranks in at.values() if all(at.get(other) == ranks for other in ranks)), None)
        assert ready is not None, f"hang: {[(i, s.axis.ranks) for i, s in waiting.items()]}"
        stages = [waiting[i] for i in ready]
        assert len({(s.numel(), s.slots, s.owners, s.reported) for s in stages}) == 1
        total, counts = torch.zeros(stages[0].slots, dtype=torch.int64), 0
        for i, stage in zip(ready, stages, strict=True):
            total.index_add_(0, stage.slot, ranks[i].sums[stage.local])
            counts = counts + ranks[i].counted[list(stage.reported)]
        for i, stage in zip(ready, stages, strict=True):
            rank = ranks[i]
            rank.counted[list(stage.reported)] = counts
            rank.final[stage.local] = total[stage.slot]
            if len(stage.passing):
                rank.sums[stage.local] = total[stage.slot]
            here = torch.ones(stage.slots, dtype=torch.int64)
            here[stage.passing] = 0
            at = 0
            for owner, slots in stage.owners:
                rank.counted[owner] += here[at : at + slots].sum()
                at += slots
            rank.stage += 1


def check_complete(
    rank: Rank, rule_of: Sequence[UnitRule], local_labels: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    """Every local unit has the sum of the whole unit, and each parameter's units were counted once."""
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


@examples(
    "flat ranks",
    rule_of=st.lists(rules(largest=4), min_size=1, max_size=4),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_flat_shards_reduce_every_unit_and_count_it_once(rule_of: list[UnitRule], ranks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randint(1, 1000, rule.shape, generator=generator) for rule in rule_of]
    shard = max(1, -(-(sum(v.numel() for v in values) + 2) // ranks))
    flat, marks = (
        torch.cat([t.flatten() for t in ts] + [torch.full((shard * ranks,), -1)])
        for ts in (values, list(map(labels, rule_of)))
    )
    begin = [0, *itertools.accumulate(v.numel() for v in values)]
    pieces = [
        flat_pieces(rule, ranks, shard, at, tuple(range(ranks))) for rule, at in zip(rule_of, begin, strict=False)
    ]
    world, mine = [], []
    for rank in range(ranks):
        part = slice(shard * rank, shard * (rank + 1))
        world.append(
            Rank.of([fragment(f"p{i}", r, pieces[i][rank]) for i, r in enumerate(rule_of)], [flat[part]] * len(rule_of))
        )
        mine.append([marks[part]] * len(rule_of))
    reduce_all(world)
    for rank, known in zip(world, mine, strict=True):
        check_complete(rank, rule_of, known, values)


@st.composite
def meshes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[UnitRule, tuple[int | None, ...]]]]:
    """A mesh of up to 8 ranks, and parameters with the dim that each mesh axis shards (None: copies)."""
    mesh = draw(st.sampled_from([(1,), (2,), (3,), (4,), (2, 2), (1, 4), (2, 3), (4, 2), (2, 1, 2), (2, 2, 2)]))
    parameters = []
    for _ in range(draw(st.integers(1, 4))):
        rule = draw(rules(largest=5).filter(lambda r: not r.grouped))
        dims = st.none() | st.integers(0, len(rule.shape) - 1) if rule.shape else st.none()
        parameters.append((rule, tuple(draw(dims) for _ in mesh)))
    return mesh, parameters


def mesh_axes(mesh: tuple[int, ...], rank: int) -> list[Axis]:
    grid = torch.arange(math.prod(mesh)).view(mesh)
    place = [int(c) for c in (grid == rank).nonzero()[0]]
    axes = []
    for axis in range(len(mesh)):
        ranks = tuple(int(r) for r in grid[tuple(slice(None) if a == axis else place[a] for a in range(len(mesh)))])
        axes.append(Axis(ranks, place[axis]))
    return axes


@examples("meshes", case=meshes(), seed=st.integers(0, 999))
def test_meshes_reduce_every_unit_and_count_it_once(case: Any, seed: int) -> None:
    mesh, parameters = case
    generator = torch.Generator().manual_seed(seed)
    rule_of = [rule for rule, _ in parameters]
    values = [torch.randint(1, 1000, rule.shape, generator=generator) for rule in rule_of]
    world, mine = [], []
    for rank in range(math.prod(mesh)):
        axes, fragments, local_values, local_labels = mesh_axes(mesh, rank), [], [], []
        for i, (rule, dims) in enumerate(parameters):
            held, marks, cuts = values[i], labels(rule), []
            for axis, dim in zip(axes, dims, strict=True):  # outermost first, as DTensor shards
                if dim is not None and axis.size > 1:
                    start, stop = chunk(held.shape[dim], axis.size, axis.rank)
                    held, marks = held.narrow(dim, start, stop - start), marks.narrow(dim, start, stop - start)
                    cuts.append((axis, dim))
            pieces = sharded(rule, held.shape, cuts[::-1]) if cuts else whole(rule)
            fragments.append(fragment(f"p{i}", rule, pieces))
            local_values.append(held)
            local_labels.append(marks)
        world.append(Rank.of(fragments, local_values))
        mine.append(local_labels)
    reduce_all(world)
    for rank, known in zip(world, mine, strict=True):
        check_complete(rank, rule_of, known, values)


# --------------------------------------------------------------------------------------------------- values, one rank


class One(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


@examples(
    "values",
    rule=rules(largest=4).filter(lambda r: not r.grouped),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    pattern=st.sampled_from(["noise", "none", "zero", "inf", "nan", "zero weight"]),
    on_nonfinite=st.sampled_from(["keep", "zero"]),
    seed=st.integers(0, 9999),
)
def test_one_process_gives_the_oracles_gradients(
    rule: UnitRule, dtype: torch.dtype, pattern: str, on_nonfinite: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = One(torch.randn(rule.shape, generator=generator).to(dtype))
    grad = (torch.randn(rule.shape, generator=generator) * 4).to(dtype)
    if pattern == "zero weight":
        nn.init.zeros_(model.weight)
    if pattern == "zero":
        grad.zero_()
    elif pattern in ("inf", "nan") and grad.numel():
        grad.view(-1)[seed % grad.numel()] = float(pattern)
    model.weight.grad = None if pattern == "none" else grad
    before = {"weight": None if model.weight.grad is None else grad.clone()}
    expected = oracle.clip(
        {"weight": model.weight}, before, {"weight": oracle.Units(rule.kept)}, 2.0, on_nonfinite=on_nonfinite
    )
    stats = dist_agc.apply_agc(
        model, 2.0, units={"weight": rule.kept} if rule.shape else None, on_nonfinite=on_nonfinite
    )
    assert stats is not None
    assert (stats.units, int(stats.nonfinite_units)) == (expected.units, expected.nonfinite_units)
    if model.weight.grad is None:
        return
    close = {torch.float64: 2e-6, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    want = expected.grads["weight"]
    # fp16 has subnormals within reach: one of them is as near as it can get.
    floor = torch.finfo(dtype).smallest_normal
    assert torch.allclose(model.weight.grad.double(), want, rtol=close, atol=floor * 1e-2, equal_nan=True)
    if dtype in (torch.float32, torch.float64):
        assert int(stats.clipped_units) == expected.clipped_units
