"""Clipping inside of DDP's ``no_sync``: each rank has its own gradients there, so copies would drift apart."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_agc
import helpers
import oracle
from conftest import World

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.filterwarnings("ignore:the gradients of:UserWarning")]
INSIDE = r"inside of no_sync\(\)"


def wrapped() -> DistributedDataParallel:
    return DistributedDataParallel(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def backward(model: nn.Module, world: World) -> None:
    torch.manual_seed(world.rank)
    model(torch.randn(8, 4)).square().sum().backward()


@pytest.mark.parametrize("call", [dist_agc.apply_agc, lambda model: dist_agc.Clipper([model]).clip()])
def test_an_error_that_changes_nothing(world: World, call: Any) -> None:
    model = wrapped()
    with model.no_sync():
        backward(model, world)
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with pytest.raises(ValueError, match=f"'0.weight' has a gradient of this rank alone.*{INSIDE}"):
            call(model)
        after = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(before) == len(after) == 4 and all(map(torch.equal, before, after))
    backward(model, world)  # the last of the micro-batches, which is reduced
    assert call(model).clipped_units > 0
    helpers.assert_equal_everywhere(world, helpers.agc(model))


def test_a_step_inside_is_said_once_and_clips_what_the_rank_has(world: World) -> None:
    """Local SGD: each rank clips as it would alone."""
    model = wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=3.0)
    with model.no_sync():
        for step in range(2):
            optimizer.zero_grad()
            backward(model, world)
            expected = helpers.reference(model, oracle.unit_rules(model.module), 3.0)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                optimizer.step()
            assert len([w for w in said if "steps inside of no_sync()" in str(w.message)]) == (step == 0)
            helpers.assert_clipped(model, hook.stats, expected, tolerance=1e-5)
    assert dist_agc.Clipper(model).clip(apart=True)


def test_what_is_not_touched_may_be_inside(world: World) -> None:
    """A generator steps while the discriminator's gradients, which nobody will use, are not reduced."""
    ours, theirs = wrapped(), DistributedDataParallel(nn.Sequential(nn.Linear(3, 2)))
    both = nn.ModuleList([ours, theirs])
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    hook = dist_agc.attach(both, optimizer)
    with theirs.no_sync():
        torch.manual_seed(world.rank)
        theirs(ours(torch.randn(8, 4))).square().sum().backward()
        optimizer.step()
        assert hook.stats.clipped_units > 0
        assert dist_agc.apply_agc(ours)
        assert dist_agc.apply_agc(both, exclude="1.*")
        with pytest.raises(ValueError, match=INSIDE):
            dist_agc.apply_agc(both)


def test_a_copy_alone_and_a_forward_pass_without_gradients(world: World) -> None:
    """Neither says that gradients are not reduced."""
    model = wrapped()
    backward(model, world)
    with torch.no_grad():
        model(torch.ones(1, 4))
    assert dist_agc.apply_agc(model)
    groups = [dist.new_group([rank]) for rank in range(world.size)]
    alone = DistributedDataParallel(nn.Linear(4, 3), process_group=groups[world.rank])
    with alone.no_sync():
        backward(alone, world)
        assert dist_agc.apply_agc(alone)
