"""Copies of a model on several ranks of which one stays away from a step: nobody waits for it, and nobody need.

DDP's `join`, where batches have run out, and torch.distributed.checkpoint, which steps to make an optimizer's state.
Where all ranks come, they are still compared.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dist_agc
import oracle
from conftest import World
from helpers import assert_some_clipped, assert_stats, collectives, full_grads, full_weights, worst_distance

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.filterwarnings("ignore:.*find_unused_parameters")]

LR, THRESHOLD = 0.1, 0.3


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def loss(model: nn.Module, step: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)
    return (model(x) * torch.tensor([0.05, 1.0, 4.0])).square().mean()


class Twin:
    """The model in float64 and one process, which knows the batches of all ranks."""

    def __init__(self, size: int) -> None:
        self.model, self.size = network(torch.float64), size
        self.rules = oracle.unit_rules(self.model)
        self.last: Any = None

    def step(self, step: int, ranks: range) -> None:
        """DDP divides by the number of all ranks, those that have joined included."""
        self.model.zero_grad()
        for rank in ranks:
            (loss(self.model, step, rank, torch.float64) / self.size).backward()
        trains = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.last = oracle.clip(trains, full_grads(self.model), self.rules, THRESHOLD)
        assert_some_clipped(self.last)
        with torch.no_grad():
            for name, grad in self.last.grads.items():
                trains[name] -= LR * grad


Clip = Callable[[], Any]


def clipping(way: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Clip:
    """Clips and steps; returns the statistics."""
    if way == "attach":
        hook = dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD)
        return lambda: (optimizer.step(), hook.stats)[1]
    clipper = dist_agc.Clipper(model, clipping_threshold=THRESHOLD) if way == "Clipper" else None

    def clip() -> Any:
        stats = clipper.clip() if clipper else dist_agc.apply_agc(model, THRESHOLD)
        optimizer.step()
        return stats

    return clip


def check_steps_of_all(
    world: World,
    model: nn.Module,
    twin: Twin,
    optimizer: torch.optim.Optimizer,
    clip: Clip,
    *,
    steps: tuple[int, ...],
) -> None:
    """Steps for which every rank has a batch again."""
    for step in steps:
        optimizer.zero_grad()
        loss(model, step, world.rank).backward()
        stats = clip()
        twin.step(step, range(world.size))
        assert_stats(stats, twin.last, tolerance=1e-4)
    assert worst_distance(full_weights(model), full_weights(twin.model)) <= 1e-5


@pytest.mark.parametrize("way", ["attach", "Clipper", "apply_agc"])
def test_a_rank_that_has_no_batch_at_all(world: World, way: str) -> None:
    """Two epochs within `join`, the last rank without a batch in the first, then steps of all ranks."""
    twin, model = Twin(world.size), DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    clip = clipping(way, model, optimizer)
    last = world.size - 1
    for first, uneven in ((0, 0), (3, 2)):  # of an epoch: its first step, and from which on the last rank has no batch
        with model.join():
            for step in range(first, first + (uneven if world.rank == last else 3)):
                optimizer.zero_grad()
                loss(model, step, world.rank).backward()
                clip()
        for step in range(first, first + 3):
            twin.step(step, range(world.size if step < first + uneven else last))
        assert worst_distance(full_weights(model), full_weights(twin.model)) <= 1e-5
    check_steps_of_all(world, model, twin, optimizer, clip, steps=(6, 7))


@pytest.mark.parametrize("way", ["attach", "Clipper", "apply_agc"])
@pytest.mark.parametrize("agreed", [True, False], ids=["after a common step", "from the start"])
def test_a_layer_that_is_thawed_while_a_rank_has_joined(world: World, way: str, agreed: bool) -> None:
    """The plan that this takes is made by the ranks that still have batches, and by the last one only later."""
    twin, model = Twin(world.size), DistributedDataParallel(network(), find_unused_parameters=True)
    for one in (twin.model, model.module):
        one.get_submodule("0").requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    clip = clipping(way, model, optimizer)
    last, common = world.size - 1, 1 if agreed else 0
    for step in range(common):
        optimizer.zero_grad()
        loss(model, step, world.rank).backward()
        clip()
        twin.step(step, range(world.size))
    with model.join():
        for step in range(common, common + (1 if world.rank == last else 3)):
            if step == common + 1:
                model.module.get_submodule("0").requires_grad_(True)
            optimizer.zero_grad()
            loss(model, step, world.rank).backward()
            clip()
    for step in range(common, common + 3):
        twin.model[0].requires_grad_(step > common)
        twin.step(step, range(world.size if step == common else last))
    model.module.get_submodule("0").requires_grad_(True)
    check_steps_of_all(world, model, twin, optimizer, clip, steps=(7, 8))


def test_copies_are_agreed_on_once(world: World) -> None:
    """Thawed on all ranks: what one rank alone may see is no reason to wait for the others."""
    model = DistributedDataParallel(network(), find_unused_parameters=True)
    model.module.get_submodule("0").requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD)
    seen = []
    for step in range(3):
        model.module.get_submodule("0").requires_grad_(step == 2)
        optimizer.zero_grad()
        loss(model, step, world.rank).backward()
        with collectives() as found:
            optimizer.step()
        seen.append(found.total)
    assert seen[0] > 0 and seen[1:] == [0, 0]
    assert hook.stats is not None and hook.stats.units == 6 + 1 + 3 + 1
    if world.rank == 0:  # nobody else comes
        dist_agc.ratios(hook.clipper)


# ------------------------------------------------------------------------------------------- the state of optimizers


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_state_of_an_optimizer_asked_for_on_one_rank(world: World, kind: Any) -> None:
    """Before the first step. That it makes the state does not count as a step of ours."""
    twin, model = Twin(world.size), DistributedDataParallel(network())
    optimizer = kind(model.parameters(), lr=LR)
    hook: Any = dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD)
    if world.rank == 0:
        state = get_optimizer_state_dict(model, optimizer)
        assert len(state["state"]) == (4 if kind is torch.optim.AdamW else 0)
    assert not hook.stats
    world.gather(None)
    loss(model, 0, world.rank).backward()
    optimizer.step()
    twin.step(0, range(world.size))
    assert_stats(hook.stats, twin.last, tolerance=1e-5)
    assert worst_distance(full_grads(model), twin.last.grads) <= 1e-5


def test_the_same_where_units_are_cut(world: World) -> None:
    """What a step sends to the other ranks is not sent where there is none."""
    model = network()
    fully_shard(model, mesh=world.mesh())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    hook: Any = dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD)
    if world.rank == 0:
        assert get_optimizer_state_dict(model, optimizer)["state"]
    world.gather(None)
    loss(model, 0, world.rank).backward()
    optimizer.step()
    assert 0 < int(hook.stats.clipped_units) < hook.stats.units


# --------------------------------------------------------------------------------------- what is still found out


@pytest.mark.parametrize("asked", [False, True], ids=["at once", "after one rank asked for its state"])
@pytest.mark.parametrize("how", ["threshold", "group", "exclude"])
def test_copies_that_are_set_up_differently(world: World, how: str, asked: bool) -> None:
    """On every rank, at the first step that all of them make, and before any gradient changes."""
    model = DistributedDataParallel(network())
    odd = world.rank == 1
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if how == "group" and odd:
        groups[0]["clipping_threshold"] = 0.2
    optimizer = torch.optim.AdamW(groups, lr=LR)
    exclude = ("2.*",) if how == "exclude" and odd else ()
    dist_agc.attach(model, optimizer, clipping_threshold=0.2 if how == "threshold" and odd else 0.1, exclude=exclude)
    if asked and world.rank == 0:
        get_optimizer_state_dict(model, optimizer)
    world.gather(None)
    loss(model, 0, world.rank).backward()
    before = full_grads(model)
    with pytest.raises(RuntimeError, match="set up differently.*: rank 0 has .*, rank 1 has "):
        optimizer.step()
    assert all(torch.equal(grad, before[name]) for name, grad in full_grads(model).items())


def test_copies_of_which_one_has_no_gradients_or_zeros(world: World) -> None:
    """Gradients that were not reduced: whether ranks come to compare never follows from what one of them has."""
    for given in (None, 0.0):
        model = DistributedDataParallel(network())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if world.rank else None
            if given is not None and not world.rank:
                parameter.grad = torch.zeros_like(parameter)
        with collectives() as seen:
            dist_agc.apply_agc(model, THRESHOLD)
        counts = world.gather(seen.counts)
        assert counts == [counts[0]] * world.size and seen.total > 0


def test_a_join_that_is_switched_off(world: World) -> None:
    """All ranks have as many batches, the user says: they are compared."""
    model = DistributedDataParallel(network())
    with model.join(enable=False), pytest.raises(RuntimeError, match="clipping_threshold: rank 0 has"):
        loss(model, 0, world.rank).backward()
        dist_agc.apply_agc(model, 0.2 if world.rank else 0.1)
