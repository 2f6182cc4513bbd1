"""The whole of clip() on the ranks of a made-up world: one thread a rank, real values, the real reductions.

Every layout that `dist_agc.frameworks.virtual` knows places the parameters. What is not real is the process group:
threads that meet add up their buffers. A rank that comes to another collective than the others, or to none, is an
error.
"""

import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracle
from dist_agc import AGCConfig, Clipper, ClipStats
from dist_agc.engine import execution
from dist_agc.frameworks import virtual
from dist_agc.frameworks._flat import FlatInterval
from dist_agc.model.blocks import Axis
from dist_agc.model.parameter import Parameter

# Layers of any shape: that the units of some are guessed is told; tests/test_guesses.py looks at that.
pytestmark = [
    pytest.mark.filterwarnings("ignore:dist_agc does not know the modules:UserWarning"),
    pytest.mark.filterwarnings("ignore:exclude=.* leaves out every parameter:UserWarning"),
]

EXAMPLES = 1500 if os.environ.get("DIST_AGC_AUDIT") else 1000
THRESHOLD = 1.0
TOLERANCE = {torch.float64: 2e-6, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# No module of these names is cut by tensor parallelism but for the first two, columnwise and rowwise.
NAMES = ("q_proj", "o_proj", "mlp", "norm")
LAYOUTS = ("fsdp1", "fsdp2", "hsdp", "tp+fsdp2", "tp+fsdp2", "zero1", "zero3")
FLAT, ZERO = ("fsdp1", "zero1", "zero3"), ("zero1", "zero3")


class Meeting:
    """Where the threads of one world meet for a collective: by the ranks of its axis."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._brought: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        self._barriers: dict[tuple[int, ...], threading.Barrier] = {}

    def all_reduce(self, buffer: Tensor, axis: Axis) -> Tensor:
        ranks = tuple(axis.ranks)
        with self._lock:
            brought = self._brought.setdefault(ranks, [])
            brought.append((axis.rank, buffer))
            barrier = self._barriers.setdefault(ranks, threading.Barrier(len(ranks), timeout=10))
        barrier.wait()
        assert sorted(rank for rank, _ in brought) == list(range(len(ranks)))
        assert len({(len(b), b.dtype) for _, b in brought}) == 1, "ranks send buffers of different lengths"
        total = torch.stack([b for _, b in sorted(brought, key=lambda pair: pair[0])]).sum(0)
        if barrier.wait() == 0:  # everybody has read
            brought.clear()
        barrier.wait()
        return total


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


# ------------------------------------------------------------------------------------------------------ what is drawn


@dataclass(frozen=True)
class Drawn:
    """One parameter: ``kept`` overrides the rule, ``groups`` makes it the weight of a ConvTranspose1d."""

    shape: tuple[int, ...]
    module: str
    kept: tuple[int, ...] | None
    groups: int
    pattern: str


@dataclass(frozen=True)
class Case:
    layout: str
    world: int
    part: int  # tensor-parallel ranks, or ranks of a shard
    dtype: torch.dtype
    on_nonfinite: str
    parameters: tuple[Drawn, ...]
    seed: int
    statistics: bool = True
    excluded: tuple[int, ...] = field(default=())


@st.composite
def drawn(draw: st.DrawFn, layout: str) -> Drawn:
    patterns = ["noise"] * 4 + ["none", "zero", "inf", "nan", "zero weight"]
    patterns += [] if layout in ZERO else ["none on one rank"] * 2  # DeepSpeed fills its partitions
    pattern = draw(st.sampled_from(patterns))
    if draw(st.integers(0, 5)) == 0:
        groups, each = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        shape = (groups * each, draw(st.integers(1, 3)), draw(st.integers(1, 3)))
        return Drawn(shape, draw(st.sampled_from(NAMES[2:])), None, groups, pattern)
    least = 0 if layout in FLAT else 1  # FSDP2 refuses parameters without dims
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=least, max_size=5)))
    if draw(st.integers(0, 12)) == 0 and shape:
        shape = (0, *shape[1:])
    module = draw(st.sampled_from(NAMES if len(shape) > 1 else NAMES[:1] + NAMES[2:]))
    kept = None
    if shape and draw(st.booleans()):
        leading = draw(st.sampled_from([0, *range(len(shape) + 1)]))
        run = range(leading + 1, draw(st.integers(leading + 1, max(leading + 1, len(shape)))))
        kept = (*range(leading), *run)
    return Drawn(shape, module, kept, 0, pattern)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layout = draw(st.sampled_from(LAYOUTS))
    world = draw(st.sampled_from([1, 2, 3, 4, 4]))
    part = draw(st.sampled_from([n for n in range(1, world + 1) if world % n == 0]))
    dtypes = [torch.float32, torch.float64] + ([] if layout in ZERO else [torch.bfloat16, torch.float16])
    parameters = tuple(draw(st.lists(drawn(layout), min_size=1, max_size=4)))
    on_nonfinite = draw(st.sampled_from(["keep", "keep", "zero", "raise"]))
    return Case(
        layout,
        world,
        part,
        draw(st.sampled_from(dtypes)),
        on_nonfinite,
        parameters,
        draw(st.integers(0, 9999)),
        on_nonfinite == "raise" or draw(st.integers(0, 3)) > 0,
        tuple(i for i in range(len(parameters)) if draw(st.integers(0, 9)) == 0),
    )


# ---------------------------------------------------------------------------------------------------------- the model


class Model(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(case.seed)
        self.layers = nn.ModuleList()
        self.rules: dict[str, oracle.Units] = {}
        self.drawn: dict[str, Drawn] = {}
        for i, one in enumerate(case.parameters):
            layer = nn.Module()
            owner = nn.ConvTranspose1d(one.shape[0], one.shape[1] * one.groups, one.shape[2], groups=one.groups) if (
                one.groups
            ) else nn.Module()  # fmt: skip
            weight = torch.randn(one.shape, generator=generator)
            size = torch.randn(one.shape[:1] + (1,) * (len(one.shape) - 1), generator=generator).exp()
            grad = torch.randn(one.shape, generator=generator) * size * 1.5
            if one.pattern == "zero weight":
                weight.zero_()
            if one.pattern == "zero":
                grad.zero_()
            elif one.pattern in ("inf", "nan") and grad.numel():
                grad.view(-1)[case.seed % grad.numel()] = float(one.pattern)
            owner.bias = None  # type: ignore[assignment]
            owner.weight = nn.Parameter(weight.to(case.dtype))
            owner.weight.grad = None if one.pattern == "none" else grad.to(case.dtype)
            layer.add_module(one.module, owner)
            self.layers.append(layer)
            name = f"layers.{i}.{one.module}.weight"
            self.drawn[name] = one
            default = () if len(one.shape) <= 1 else (1,) if one.groups else (0,)
            self.rules[name] = oracle.Units(default if one.kept is None else one.kept, max(one.groups, 1))


@dataclass
class Held:
    """What a rank holds of one parameter: the numbers of its elements, and the tensors that have them."""

    element: Tensor
    parameter: Parameter

    @property
    def name(self) -> str:
        return self.parameter.name

    def gradient(self) -> Tensor | None:
        grad = self.parameter.gradient()
        if grad is None or not isinstance(self.parameter, FlatInterval):
            return None if grad is None else grad.reshape(-1)
        span = self.parameter.span
        return grad[span.offset : span.offset + span.numel]


def elements(parameter: Parameter) -> Tensor:
    """The numbers of the elements of the parameter that a rank holds; its tensor is the whole one."""
    numbers = torch.arange(parameter.numel)
    if isinstance(parameter, FlatInterval):
        return numbers[parameter.span.start : parameter.span.stop]
    return parameter.local(numbers.view(parameter.shape)).reshape(-1)


def place(case: Case, model: Model, rank: int) -> list[Held]:
    """This rank's own copy of what it holds. Flat partitions have nan wherever no parameter lies."""
    sizes = {"hsdp": {"shard": case.part}, "tp+fsdp2": {"tensor": case.part}}.get(case.layout, {})
    mine, last = (
        virtual.parameters(model, case.layout, virtual.World(case.world, of, **sizes)) for of in (rank, case.world - 1)
    )
    spans = [p.span for p in mine if isinstance(p, FlatInterval)]
    one = nn.Parameter(
        torch.full((max((s.offset + s.numel for s in spans), default=0) + 3,), math.nan, dtype=case.dtype)
    )
    one.grad = torch.full_like(one, math.nan)
    held = []
    for parameter, of_last in zip(mine, last, strict=True):
        whole, numbers = parameter.tensor, elements(parameter)
        # The last rank has no gradient, and with it all that hold the same.
        missing = model.drawn[parameter.name].pattern == "none on one rank" and torch.equal(numbers, elements(of_last))
        grad = None if whole.grad is None or missing else whole.grad
        tensor = one
        if case.layout in ZERO and isinstance(parameter, FlatInterval):
            inside = slice(parameter.span.offset, parameter.span.offset + len(numbers))
            one.data[inside] = whole.detach().flatten()[numbers]
            one.grad[inside] = 0 if grad is None else grad.flatten()[numbers]
        elif case.layout in FLAT:
            tensor = nn.Parameter(whole.detach().flatten()[numbers])
            tensor.grad = None if grad is None else grad.flatten()[numbers]
        else:
            tensor = nn.Parameter(whole.detach().clone())
            tensor.grad = None if grad is None else grad.clone()
        held.append(Held(numbers, replace(parameter, tensor=tensor)))
    return held


def expected(case: Case, model: Model, ranks: Sequence[Sequence[Held]], exclude: Sequence[str]) -> oracle.Reference:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    grads: dict[str, Tensor | None] = {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        grad = None if parameter.grad is None else parameter.grad.clone()
        if grad is not None:
            having = torch.zeros(grad.numel(), dtype=torch.bool)
            for held in ranks:
                if held[i].gradient() is not None:
                    having[held[i].element] = True
            grad.view(-1)[~having] = 0  # what no rank has counts as zero
        grads[name] = grad
    return oracle.clip(
        weights, grads, model.rules, THRESHOLD, exclude=exclude, on_nonfinite=case.on_nonfinite.replace("raise", "keep")
    )


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=0.125), b.nan_to_num(nan=0.125))


def check(case: Case, threads: ThreadPoolExecutor, seen: dict[str, int]) -> None:
    model = Model(case)
    names = list(model.rules)
    exclude = tuple(names[i] for i in case.excluded)
    units = {name: one.kept for name, one in model.drawn.items() if one.kept is not None}
    config = AGCConfig(
        clipping_threshold=THRESHOLD,
        exclude=exclude,
        units=units or None,
        on_nonfinite=case.on_nonfinite,  # type: ignore[arg-type]
        statistics=case.statistics,
    )
    ranks = [place(case, model, rank) for rank in range(case.world)]
    want = expected(case, model, ranks, exclude)
    before = [[None if (g := h.gradient()) is None else g.clone() for h in held] for held in ranks]
    meeting = Meeting()
    threads_of_world = [threads.submit(clip, [h.parameter for h in held], config, meeting) for held in ranks]
    ends = [future.result(timeout=30) for future in threads_of_world]
    raises = case.on_nonfinite == "raise" and want.nonfinite_units > 0
    assert all(isinstance(end, FloatingPointError) == raises for end in ends), ends
    floor = torch.finfo(case.dtype).smallest_normal * 1e-2  # fp16 has subnormals within reach
    for held, olds, end in zip(ranks, before, ends, strict=True):
        for one, old in zip(held, olds, strict=True):
            grad = one.gradient()
            assert (grad is None) == (old is None)
            if grad is None or old is None:
                continue
            if raises or one.name in exclude:
                assert same(grad, old), f"{one.name} was changed"
                continue
            if one.name not in want.grads:
                assert not grad.any(), "a partition without a gradient is zero and stays so"
                continue
            wanted = want.grads[one.name].flatten()[one.element]
            close = torch.allclose(grad.double(), wanted, rtol=TOLERANCE[case.dtype], atol=floor, equal_nan=True)
            assert close, f"{one.name}: {grad}, expected {wanted}"
        if isinstance(end, ClipStats):
            counted = (end.units, int(end.clipped_units), int(end.nonfinite_units))
            assert counted == (want.units, want.clipped_units, want.nonfinite_units)
            assert float(end.grad_norm) == pytest.approx(want.grad_norm, rel=1e-5, nan_ok=True)
            assert float(end.max_ratio) == pytest.approx(want.max_ratio, rel=1e-5)
            for name, of in want.per_parameter.items():
                assert int(end.per_parameter[name].clipped_units) == of.clipped_units, name
        else:
            assert raises or (end is None and not case.statistics)
    flat = next((h.parameter.tensor for held in ranks for h in held if case.layout in ZERO), None)
    assert flat is None or (flat.grad is not None and bool(flat.grad[-3:].isnan().all())), "padding was written"
    seen["units"] = seen.get("units", 0) + want.units
    seen["clipped"] = seen.get("clipped", 0) + want.clipped_units
    seen[case.layout] = seen.get(case.layout, 0) + 1


def clip(parameters: Sequence[Parameter], config: AGCConfig, meeting: Meeting) -> ClipStats | FloatingPointError | None:
    _here.meeting = meeting
    try:
        return Clipper.of(parameters, config).clip()
    except FloatingPointError as error:
        return error


_here = threading.local()


def test_every_layout_gives_the_oracles_gradients(threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "all_reduce", lambda buffer, axis: _here.meeting.all_reduce(buffer, axis))
    seen: dict[str, int] = {}

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(case=cases())
    def run(case: Case) -> None:
        check(case, threads, seen)

    run()
    print(f"\nsimulated worlds: {seen}")
    assert 0.1 * seen["units"] < seen["clipped"] < 0.9 * seen["units"]
    assert min(seen.get(name, 0) for name in LAYOUTS) > EXAMPLES // 20
