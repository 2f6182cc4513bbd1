"""Plain parameters whose gradients differ from rank to rank: said once, and nobody waits for anybody."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dist_agc
from conftest import World

pytestmark = pytest.mark.mpi(min_size=2)


class ReducesInside(torch.optim.SGD):
    """As nanochat's DistMuonAdamW: gradients are averaged over ranks in the step itself."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        return super().step(closure)


_sizes = itertools.count(7)  # models of one structure are compared once in a process


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    size = next(_sizes)
    return nn.Sequential(nn.Linear(4, size), nn.LayerNorm(size), nn.Linear(size, 3))


def backward(model: nn.Module, rank: int, step: int) -> None:
    model.zero_grad()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(100 * step + rank))
    model(x).square().sum().backward()


def said(world: World, train: Callable[[int], None], steps: int = 2) -> list[str]:
    """What each rank is told in these steps, of which the first is over everywhere before the second begins."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            train(step)
            world.gather(None)
    return [str(one.message) for one in caught if "AGC clips on each rank" in str(one.message)]


def attached(world: World, model: nn.Module, kind: type[torch.optim.Optimizer], data_of: int) -> Callable[[int], None]:
    optimizer: Any = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    dist_agc.attach(model, optimizer, clipping_threshold=0.01)

    def train(step: int) -> None:
        backward(model, data_of, step)
        optimizer.step()

    return train


@pytest.mark.parametrize("kind", [torch.optim.SGD, ReducesInside])
def test_every_rank_is_told_once_and_by_name(world: World, kind: type[torch.optim.Optimizer]) -> None:
    (found,) = said(world, attached(world, network(), kind, world.rank), steps=4)
    assert "'0.weight', '2.weight', '0.bias' and 3 more differ between rank" in found
    assert "average them before that step" in found


def test_a_list_of_parameters_is_compared_once(world: World) -> None:
    """`apply_agc` makes a Clipper anew for it in every step."""
    model = network()

    def train(step: int) -> None:
        backward(model, world.rank, step)
        dist_agc.apply_agc(model.parameters())

    assert len(said(world, train, steps=4)) == 1


def test_gradients_that_are_added_up_before_the_step(world: World) -> None:
    """The order that the message asks for."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dist_agc.attach(model, optimizer, clipping_threshold=0.01)

    def train(step: int) -> None:
        backward(model, world.rank, step)
        for p in model.parameters():
            assert p.grad is not None
            dist.all_reduce(p.grad)
        optimizer.step()

    assert not said(world, train)


def test_ddp_and_its_no_sync(world: World) -> None:
    model = DistributedDataParallel(network())

    def train(step: int) -> None:
        backward(model, world.rank, step)
        dist_agc.apply_agc(model)

    assert not said(world, train)
    if world.size > 2:
        return
    other = DistributedDataParallel(nn.Sequential(nn.Linear(4, 2)))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    clipper = dist_agc.Clipper(other.module)

    def apart(step: int) -> None:
        with other.no_sync():
            backward(other, world.rank, step)
            clipper.clip()
        optimizer.step()

    assert len(said(world, apart)) == 1


@pytest.mark.parametrize("apart", ["weights", "data alike", "some ranks have no gradient", "not finite"])
def test_no_false_alarm(world: World, apart: str) -> None:
    """Models of one structure that each rank trains by itself; copies that see the same data; gradients on one rank."""
    model = network(seed=world.rank if apart == "weights" else 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dist_agc.attach(model, optimizer, clipping_threshold=0.01)

    def train(step: int) -> None:
        backward(model, 0 if apart == "data alike" else world.rank, step)
        for p in model.parameters():
            if apart == "not finite":
                p.grad = torch.full_like(p, torch.inf)
            if apart == "some ranks have no gradient" and world.rank:
                p.grad = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="no gradient")
            optimizer.step()

    assert not said(world, train)


def test_a_rank_that_trains_alone_waits_for_nobody(world: World) -> None:
    model = nn.Linear(3, 5)
    if world.rank == world.size - 1:
        model(torch.ones(2, 3)).sum().backward()
        dist_agc.apply_agc(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_any_kind_of_number(world: World, dtype: torch.dtype) -> None:
    values = torch.ones(next(_sizes), 5).to(dtype)
    model: Any = nn.ParameterDict({name: nn.Parameter(values.clone()) for name in ("table", "other")})

    def train(step: int) -> None:
        grads: list[Tensor] = [torch.full_like(values, 1 + 0.01 * world.rank) for _ in range(2)]
        for p, grad in zip(model.values(), grads, strict=True):
            p.grad = grad
        dist_agc.apply_agc(model, units={"*": 0})

    assert len(said(world, train)) == 1


def test_looking_at_ratios_first_hides_nothing(world: World) -> None:
    model = network()
    clipper = dist_agc.Clipper(model)

    def train(step: int) -> None:
        backward(model, world.rank, step)
        if not step:
            dist_agc.ratios(clipper)
        clipper.clip()

    assert len(said(world, train)) == 1
