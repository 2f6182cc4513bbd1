"""Every unit is judged once on every rank that knows it, and on its complete norm: a spy at the rule."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from dist_agc import AGCConfig, Clipper, ClipStats
from dist_agc.engine import execution
from dist_agc.frameworks import virtual
from dist_agc.frameworks._flat import FlatInterval
from dist_agc.model.names import entries
from dist_agc.model.parameter import Parameter
from dist_agc.model.units import UnitRule
from ranks import Sliced, flattened
from test_simulated_ranks import Meeting

THRESHOLD = 1.0
WORLD = 4

# By name: shape, dims that number units, and the dim that tensor parallelism slices.
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], int | None]] = {
    "layers.0.q_proj.weight": ((8, 5), (0,), 0),
    "layers.0.q_proj.bias": ((8,), (), 0),
    "layers.0.o_proj.weight": ((5, 8), (0,), 1),
    "layers.0.o_proj.bias": ((5,), (), None),
    "layers.1.experts.weight": ((3, 4, 5), (0, 2), None),
    "layers.1.mlp.weight": ((7, 3), (1,), None),
    "layers.1.norm.weight": ((9,), (), None),
}


class Model(nn.Module):
    """Gradients whose norms are all different, so that a unit is known by its norm."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, (shape, kept, _) in SHAPES.items():
            owner: nn.Module = self
            *path, attribute = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            size = torch.randn([shape[d] if d in kept else 1 for d in range(len(shape))], generator=generator).exp()
            weight = nn.Parameter(torch.randn(shape, generator=generator))
            weight.grad = torch.randn(shape, generator=generator) * size
            owner.register_parameter(attribute, weight)


UNITS = {name: kept for name, (_, kept, _) in SHAPES.items()}
CONFIG = AGCConfig(clipping_threshold=THRESHOLD, units=UNITS)  # type: ignore[arg-type]


class Spy:
    """What `execution.judge` is given, by thread: one thread is one rank."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._here = threading.local()
        real = execution.judge

        def judge(rule: Any, weight: Tensor, grad: Tensor, limit: Any) -> Any:
            self._here.calls.append(torch.stack([weight, grad], 1).double())
            return real(rule, weight, grad, limit)

        monkeypatch.setattr(execution, "judge", judge)
        monkeypatch.setattr(execution, "all_reduce", lambda buffer, axis: self._here.meeting.all_reduce(buffer, axis))

    def clip(self, parameters: Sequence[Parameter], meeting: Meeting) -> tuple[Clipper, ClipStats, list[Tensor]]:
        """The calls of the second clipping, which begins with the same gradients."""
        self._here.meeting, self._here.calls = meeting, []
        clipper = Clipper.of(parameters, CONFIG)
        tensors = {id(p.tensor): p.tensor for p in parameters}.values()
        before = [t.grad.clone() for t in tensors if t.grad is not None]
        clipper.clip()
        for tensor, grad in zip(tensors, before, strict=True):
            assert tensor.grad is not None
            tensor.grad.copy_(grad)
        self._here.calls = []
        stats = clipper.clip()
        assert stats is not None
        return clipper, stats, self._here.calls


def norms_of(model: nn.Module) -> Tensor:
    """Weight norm and gradient norm of every unit."""
    found = []
    for name, parameter in model.named_parameters():
        labels, units = oracle.unit_labels(tuple(parameter.shape), oracle.Units(UNITS[name]))
        assert parameter.grad is not None
        for unit in range(units):
            members = labels == unit
            pair = parameter.detach()[members].double().norm(), parameter.grad[members].double().norm()
            found.append(torch.stack(pair))
    return torch.stack(found)


def judged_units(calls: Sequence[Tensor], norms: Tensor) -> list[int]:
    """The units that were judged, each by its norms: what matches none was judged before it was complete."""
    given = torch.cat(list(calls))
    close = ((given[:, None] - norms).abs() <= 1e-5 * norms).all(2)
    assert bool((close.sum(1) == 1).all()), "a unit was judged on norms that are not complete"
    return close.int().argmax(1).tolist()


def check(world: Sequence[Sequence[Parameter]], spy: Spy) -> None:
    model = Model()
    norms, meeting = norms_of(model), Meeting()
    assert len(norms) == len(norms.round(decimals=5).unique(dim=0))
    weights, grads = dict(model.named_parameters()), {n: p.grad for n, p in model.named_parameters()}
    want = oracle.clip(weights, grads, {n: oracle.Units(k) for n, k in UNITS.items()}, THRESHOLD)
    assert 0 < want.clipped_units < want.units == len(norms)
    with ThreadPoolExecutor(len(world)) as pool:
        ends = [end.result(timeout=60) for end in [pool.submit(spy.clip, some, meeting) for some in world]]
    every: set[int] = set()
    for clipper, stats, calls in ends:
        units = judged_units(calls, norms)
        assert len(units) == len(set(units)), "a unit was judged twice"
        plan = clipper.execution().plan
        assert len(calls) == 1 + sum(axis.slots > 0 for axis in plan.axes), "the whole units, then those of each axis"
        assert len(units) == plan.whole + sum(count for axis in plan.axes for _, count in axis.owners)
        every |= set(units)
        counted = (stats.units, int(stats.clipped_units), int(stats.nonfinite_units))
        assert counted == (want.units, want.clipped_units, 0)
        assert float(stats.grad_norm) == pytest.approx(want.grad_norm, rel=1e-6)
        assert float(stats.max_ratio) == pytest.approx(want.max_ratio, rel=1e-6)
    assert every == set(range(want.units)), "a unit was judged on no rank"


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def test_in_one_process(spy: Spy) -> None:
    check([[Parameter.of(entry) for entry in entries(Model())]], spy)


def placed(layout: str, rank: int) -> list[Parameter]:
    sizes = {"hsdp": {"shard": 2}, "tp+fsdp2": {"tensor": 2}}.get(layout, {})
    found: list[Parameter] = []
    flat = nn.Parameter(torch.full((200,), -1.0))
    flat.grad = torch.full((200,), -1.0)
    for parameter in virtual.parameters(Model(), layout, virtual.World(WORLD, rank, **sizes)):
        whole = parameter.tensor
        assert whole.grad is not None
        if isinstance(parameter, FlatInterval):
            span = parameter.span
            inside = slice(span.offset, span.offset + span.numel)
            tensor = flat
            if layout == "fsdp1":
                tensor = nn.Parameter(torch.empty(span.numel))
                tensor.grad = torch.empty(span.numel)
            assert tensor.grad is not None
            tensor.data[inside] = whole.detach().flatten()[span.start : span.stop]
            tensor.grad[inside] = whole.grad.flatten()[span.start : span.stop]
            parameter = replace(parameter, tensor=tensor)
        found.append(parameter)
    return found


@pytest.mark.parametrize("layout", ["ddp", "fsdp1", "fsdp2", "hsdp", "tp+fsdp2", "zero1", "zero3"])
def test_on_ranks(layout: str, spy: Spy) -> None:
    check([placed(layout, rank) for rank in range(WORLD)], spy)


def tensor_parallel_and_zero(mesh: tuple[int, ...], rank: int, alone: bool) -> list[Parameter]:
    tensors = [(p.detach(), p.grad) for p in Model().parameters()]
    sliced = [Sliced(UnitRule(shape, kept), (dim,)) for shape, kept, dim in SHAPES.values()]
    weights, grads = [w for w, _ in tensors], [g for _, g in tensors if g is not None]
    found, (weight, grad) = flattened(mesh, sliced, rank, (weights, grads), alone=alone)
    tensor = nn.Parameter(weight)
    tensor.grad = grad
    return [replace(p, names=(name,), tensor=tensor) for p, name in zip(found, SHAPES, strict=True)]


@pytest.mark.parametrize("mesh", [(2, 2), (4, 2), (3, 2), (2, 4), (1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("alone", [True, False], ids=["zero3", "zero1"])
def test_on_ranks_whose_intervals_carry_a_cut_along_another_axis(alone: bool, mesh: tuple[int, int], spy: Spy) -> None:
    """Columnwise and rowwise slices, flattened beside what is copied, and gradients that are those of the oracle."""
    world = [tensor_parallel_and_zero(mesh, rank, alone) for rank in range(mesh[0] * mesh[1])]
    check(world, spy)
    model = Model()
    clipped = oracle.clip(
        dict(model.named_parameters()),
        {n: p.grad for n, p in model.named_parameters()},
        {n: oracle.Units(k) for n, k in UNITS.items()},
        THRESHOLD,
    )
    sliced = [Sliced(UnitRule(shape, kept), (dim,)) for shape, kept, dim in SHAPES.values()]
    for rank, parameters in enumerate(world):
        wanted = [clipped.grads[name] for name in SHAPES]
        _, (want,) = flattened(mesh, sliced, rank, (wanted,), alone=alone)
        grad = parameters[0].tensor.grad
        assert grad is not None
        torch.testing.assert_close(grad.double(), want, rtol=1e-6, atol=0)
