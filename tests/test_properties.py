"""Properties of units, blocks and plans at random: integers only, ranks simulated one after the other.

The pieces of all ranks tile every unit exactly once; all ranks of an axis plan the same collectives in the same order,
so that none can wait for one that never comes; every unit's sum is completed, judged once, and counted exactly once.
"""

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dist_agc
import oracle
from dist_agc.engine.plan import Plan
from dist_agc.frameworks._flat import FlatInterval, Span
from dist_agc.frameworks.fsdp1 import FlatShard
from dist_agc.model.blocks import Axis, Pieces, chunk, interval, sharded
from dist_agc.model.units import UnitRule
from ranks import Given, Rank, Sliced, check_complete, flattened, labels, mesh_axes, reduce_all, sent, unit_of_place

COUNTS: Counter[str] = Counter()
WANTED = {
    "canonical": 800,
    "interval": 1500,
    "large worlds": 30,
    "flat ranks": 1000,
    "meshes": 1500,
    "memory": 1000,
    "sliced and flattened": 1500,
    "values": 700,
}
# Each run draws the same, so CI need not draw all.
if not os.environ.get("DIST_AGC_AUDIT"):
    WANTED = {name: math.ceil(0.65 * count) for name, count in WANTED.items()}


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
    """Any rule that UnitRule takes: leading dims, then one run of neighbours; of a parameter that may have a dim seen
    as two, as those of a grouped ConvTranspose and of experts below or beside one another have."""
    shape, split = tuple(draw(st.lists(st.integers(0, largest), max_size=max_ndim))), None
    if draw(st.integers(0, 3)) == 0:
        shape = (*shape, 2, 3)[:4]
        split = draw(st.integers(0, min(2, len(shape) - 2)))
    leading = draw(st.integers(0, len(shape)))
    kept = list(range(leading))
    if leading + 1 < len(shape) and draw(st.booleans()):
        first = draw(st.integers(leading + 1, len(shape) - 1))
        kept += range(first, draw(st.integers(first, len(shape) - 1)) + 1)
    return UnitRule(shape, tuple(kept), split)


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
    cut = torch.zeros(max(rule.count, 1), dtype=torch.bool)
    for first, stop in pieces[0].cuts[0].runs.tolist() if pieces[0].cuts else ():
        cut[first:stop] = True
    assert bool((cut | (holders <= 1)).all()), "a unit on two ranks has no slot"
    if rule.canonical[1] == 1:
        assert torch.equal(cut, holders > 1), "a unit on one rank has a slot"


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
        plan = Plan([Given.of_pieces(f"p{i}", rule, every[i][rank]) for i, rule in enumerate(rules)], rules)
        seen.add(tuple(sent(axis) for axis in plan.axes))
    assert len(seen) == 1, "ranks plan different collectives"


# -------------------------------------------------------------------------------------------- ranks that reduce sums


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
            Rank.of(
                [Given.of_pieces(f"p{i}", r, pieces[i][rank]) for i, r in enumerate(rule_of)],
                [flat[part]] * len(rule_of),
            )
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
        rule = draw(rules(largest=5))
        ndim = len(rule.of_parameter)
        dims = st.none() | st.integers(0, ndim - 1) if ndim else st.none()
        parameters.append((rule, tuple(draw(dims) for _ in mesh)))
    return mesh, parameters


def refused(rule: UnitRule, mesh: tuple[int, ...], dims: Sequence[int | None]) -> bool:
    """Whether a dim that is seen as two is cut along two axes; or within a line, where the lines number no units."""
    at = rule.split
    if at is None or not math.prod(rule.shape) or (at in rule.kept) == (at + 1 in rule.kept):
        return False
    ranks = [size for size, dim in zip(mesh, dims, strict=True) if dim == at and size > 1]
    lines, inner = rule.shape[at : at + 2]
    borders = {chunk(lines * inner, ranks[0], r)[0] for r in range(ranks[0])} if ranks else set()
    return len(ranks) > 1 or (not at == rule.kept[0] == 0 and any(border % inner for border in borders))


@examples("meshes", case=meshes(), seed=st.integers(0, 999))
def test_meshes_reduce_every_unit_and_count_it_once(case: Any, seed: int) -> None:
    """And what cannot be cut so is refused, by every rank alike."""
    mesh, parameters = case
    generator = torch.Generator().manual_seed(seed)
    for rule, dims in parameters:
        said = [refusal(rule, mesh, dims, rank) for rank in range(math.prod(mesh))]
        assert said == [refused(rule, mesh, dims)] * len(said)
    parameters = [(rule, dims) for rule, dims in parameters if not refused(rule, mesh, dims)]
    rule_of = [rule for rule, _ in parameters]
    values = [torch.randint(1, 1000, rule.of_parameter, generator=generator) for rule in rule_of]
    world, mine = [], []
    for rank in range(math.prod(mesh)):
        parameters_here, local_values, local_labels = [], [], []
        for i, (rule, dims) in enumerate(parameters):
            (held, marks), cuts = cut_along(mesh, rank, dims, values[i], labels(rule).view(rule.of_parameter))
            pieces = sharded(rule, held.shape, cuts)
            parameters_here.append(Given.of_pieces(f"p{i}", rule, pieces))
            local_values.append(held)
            local_labels.append(marks)
        world.append(Rank.of(parameters_here, local_values))
        mine.append(local_labels)
    reduce_all(world)
    for rank, known in zip(world, mine, strict=True):
        check_complete(rank, rule_of, known, values)


def cut_along(
    mesh: tuple[int, ...], rank: int, dims: Sequence[int | None], *tensors: Tensor
) -> tuple[list[Tensor], list[tuple[Axis, int]]]:
    """What a rank holds of tensors of one shape, and the axes that cut them, innermost first."""
    found, cuts = list(tensors), []
    for axis, dim in zip(mesh_axes(mesh, rank), dims, strict=True):  # outermost first, as DTensor shards
        if dim is not None and axis.size > 1:
            start, stop = chunk(found[0].shape[dim], axis.size, axis.rank)
            found = [tensor.narrow(dim, start, stop - start) for tensor in found]
            cuts.append((axis, dim))
    return found, cuts[::-1]


def refusal(rule: UnitRule, mesh: tuple[int, ...], dims: Sequence[int | None], rank: int) -> bool:
    (held,), cuts = cut_along(mesh, rank, dims, torch.empty(rule.of_parameter))
    try:
        sharded(rule, held.shape, cuts)
    except ValueError as error:
        assert rule.split is not None and f"dim {rule.split}, seen as" in str(error)
        return True
    return False


# ------------------------------------------------------------------------------- flattened in the order of the memory


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[UnitRule, tuple[int, ...]]:
    """A rule, and the order of the parameter's dims in memory, the outermost first."""
    rule = draw(rules(largest=4).filter(lambda r: math.prod(r.shape)))
    return rule, tuple(draw(st.permutations(range(len(rule.of_parameter)))))


@examples("memory", case=laid_out(), cut=flat_cuts())
def test_what_fsdp1_flattens_in_memory_order_tiles_every_unit_exactly_once(case: Any, cut: tuple[int, int]) -> None:
    """Every element is in one unit's piece, whichever ranks have it; only an order that mixes dims is refused."""
    (rule, order), (ranks, before) = case, cut
    shape, numel = rule.of_parameter, math.prod(rule.shape)
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim], step = step, step * shape[dim]
    places = torch.arange(numel).as_strided(shape, strides).reshape(-1)
    unit_at = torch.empty(numel, dtype=torch.int64).scatter_(0, places, labels(rule).reshape(-1))
    shard = max(1, -(-(before + numel + 3) // ranks))
    numbers: dict[int, int] = {}  # of a unit, by the number that the blocks give it
    covered, holders, cut_units = torch.zeros(numel, dtype=torch.int64), Counter(), set()
    for rank in range(ranks):
        parameter = FlatShard(
            names=("p",), tensor=torch.empty(0), shape=shape, default=rule, span=Span.cut(numel, before, shard, rank),
            axis=Axis(tuple(range(ranks)), rank), strides=tuple(strides), held=shard,
        )  # fmt: skip
        try:
            pieces = parameter.pieces(rule)
        except ValueError:
            assert order != tuple(range(len(shape))), "a contiguous parameter is refused"
            return
        local = torch.arange(shard * rank - before, shard * (rank + 1) - before)
        held = set()
        for block in pieces.blocks:
            element = block.view(local).reshape(-1)
            assert bool(((element >= 0) & (element < numel)).all()), "a block reaches beyond its parameter"
            covered[element] += 1
            said = unit_of_place(block).reshape(-1).tolist()
            for number, unit in zip(said, unit_at[element].tolist(), strict=True):
                assert numbers.setdefault(number, unit) == unit, "a block mixes units"
            held |= set(said)
        holders.update(held)
        cut_units = {int(n) for found in pieces.cuts for n in found.numbers}
    assert bool((covered == 1).all()), "every element belongs to exactly one piece"
    assert len(set(numbers.values())) == len(numbers) == rule.count, "a unit has two numbers"
    assert {number for number, times in holders.items() if times > 1} <= cut_units, "a unit on two ranks has no slot"


# ------------------------------------------------------------------- sliced along mesh axes, then flattened and cut


@st.composite
def sliced(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Sliced], bool]:
    """(mesh, parameters, whether each is cut by itself, as ZeRO 3 does, or beside the others, as ZeRO 1 and FSDP1)"""
    mesh = draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 2), (2, 3), (4, 2), (2, 2, 2), (3, 2, 2), (2, 1, 3)]))
    parameters = []
    for _ in range(draw(st.integers(1, 4))):
        rule = draw(rules(largest=4, max_ndim=4))
        dims = st.none() | st.integers(0, len(rule.shape) - 1) if rule.shape and rule.split is None else st.none()
        along = tuple(draw(dims) for _ in mesh[1:])
        shape = list(rule.shape)
        for size, dim in zip(mesh[1:], along, strict=True):
            if dim is not None:
                shape[dim] *= size
        parameters.append(Sliced(UnitRule(tuple(shape), rule.kept, rule.split), along))
    return mesh, parameters, draw(st.booleans())


@examples("sliced and flattened", case=sliced(), seed=st.integers(0, 999))
def test_slices_that_are_flattened_reduce_every_unit_and_count_it_once(case: Any, seed: int) -> None:
    """Tensor parallelism under ZeRO: columnwise, rowwise and copied parameters side by side, cut anywhere in a row."""
    mesh, parameters, alone = case
    generator = torch.Generator().manual_seed(seed)
    rule_of = [p.rule for p in parameters]
    values = [torch.randint(1, 1000, rule.shape, generator=generator) for rule in rule_of]
    marks = [labels(rule).view(rule.shape) for rule in rule_of]
    world, mine = [], []
    for rank in range(math.prod(mesh)):
        found, (flat, known) = flattened(mesh, parameters, rank, (values, marks), alone=alone)
        world.append(Rank.of(found, [flat] * len(found)))
        mine.append([known] * len(found))
    reduce_all(world)
    for rank, known in zip(world, mine, strict=True):
        check_complete(rank, rule_of, known, values)


def test_collectives_of_columnwise_and_rowwise_parameters() -> None:
    """A rowwise one is whole along the tensor-parallel axis before rows that ranks of the other cut can be completed;
    a columnwise one is counted along it only after that. So the axis has a second, short collective for the counts."""
    column, row = Sliced(UnitRule((6, 5), (0,)), (0,)), Sliced(UnitRule((5, 6), (0,)), (1,))
    copied = Sliced(UnitRule((7,), ()), (None,))
    wanted = {  # (ranks, slots, parameters that are counted)
        "column": [((0, 2), 1, 1), ((0, 1), 0, 1)],
        "row": [((0, 1), 3, 0), ((0, 2), 1, 1)],
        "copied": [((0, 2), 1, 1)],
        "column row copied": [((0, 1), 3, 0), ((0, 2), 3, 3), ((0, 1), 0, 1)],
    }
    for names, axes in wanted.items():
        parameters = [{"column": column, "row": row, "copied": copied}[name] for name in names.split()]
        found, _ = flattened((2, 2), parameters, 0, ([torch.zeros(p.rule.shape) for p in parameters],), alone=True)
        plan = Plan(found, [p.default for p in found])
        assert [(tuple(a.axis.ranks), a.slots, len(a.reported)) for a in plan.axes] == axes, names


def test_a_grouped_weight_cannot_be_sliced_and_flattened() -> None:
    shape = (4, 3, 2)
    parameter = FlatInterval(
        names=("up",), tensor=torch.empty(0), shape=shape, default=UnitRule((2, 2, 3, 2), (0, 2), split=0),
        span=Span(), across=((Axis((0, 1), 0), 1),), sliced=(4, 3, 1),
    )  # fmt: skip
    with pytest.raises(ValueError, match="'up', seen as .* is sliced"):
        parameter.pieces(parameter.default)


# --------------------------------------------------------------------------------------------------- values, one rank


class One(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


@examples(
    "values",
    rule=rules(largest=4).filter(lambda r: r.split is None),
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
