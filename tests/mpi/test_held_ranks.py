"""What an optimizer holds is changed after `attach`, by those who shard: clipped as it lies now, or an error."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import dist_agc
import models
import oracle
from helpers import assert_clipped, assert_some_clipped, full_weights, reference

pytestmark = [pytest.mark.mpi(min_size=2)]

THRESHOLD = models.THRESHOLD


@pytest.fixture
def model() -> models.Awkward:
    return models.awkward()


def backward(world: Any, model: nn.Module, step: int = 0) -> None:
    """Every rank has the whole batch, so that gradients need no average to be those of one process."""
    models.loss(model, *models.batch(step)).backward()


@pytest.fixture(autouse=True)
def _every_warning_counts() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="AGC|dist_agc|the optimizer")
        yield


@pytest.mark.filterwarnings("ignore")
def test_fsdp1_wraps_after_attach(world: Any, model: models.Awkward) -> None:
    """Its vectors were clipped by the norms of pieces, its matrices were an IndexError."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    backward(world, wrapped)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(ValueError, match="FSDP1 flat parameter.*shard the model first, then make the optimizer"):
        optimizer.step()
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(before) == len(after) > 0 and all(map(torch.equal, before, after))
    assert not hook.stats
    hook.remove()
    again = dist_agc.attach(wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1), clipping_threshold=THRESHOLD)
    next(iter(again._attachment.optimizers)).step()
    assert 0 < int(again.stats.clipped_units) < again.stats.units


def test_a_head_that_is_added_to_a_sharded_model(world: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh())
    fully_shard(model, mesh=world.mesh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=0.3)
    torch.manual_seed(1)
    head = nn.Linear(7, 5)
    fully_shard(head, mesh=world.mesh())
    for adds in (False, True):
        if adds:
            model.append(head)
            optimizer.add_param_group({"params": list(head.parameters())})
        optimizer.zero_grad()
        rows(model)
        expected = reference(model, oracle.unit_rules(model), 0.3)
        assert_some_clipped(expected)
        optimizer.step()
        assert_clipped(model, hook.stats, expected)
    assert hook.stats.units == 7 + 1 + 5 + 1


def rows(model: nn.Module) -> None:
    """Gradients of many sizes, unit by unit, the same for every rank."""
    from torch.distributed.tensor import distribute_tensor

    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        size = torch.randn(len(p), *[1] * (p.ndim - 1), generator=generator).mul(2).exp()
        grad: Tensor = torch.randn(p.shape, generator=generator) * size * 0.2
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements)  # type: ignore[attr-defined]


def test_a_wrapper_puts_sharded_parameters_into_the_optimizer(world: Any) -> None:
    """Accelerate shards the model and then changes what the optimizer holds."""
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=0.3)
    fully_shard(model, mesh=world.mesh())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    for _ in range(2):
        rows(model)
        expected = reference(model, oracle.unit_rules(model), 0.3)
        assert_some_clipped(expected)
        optimizer.step()
        assert_clipped(model, hook.stats, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_is_made_of_an_optimizer_with_the_hook(world: Any, model: models.Awkward, stage: int) -> None:
    """The hook ran in every step, and found nothing: 0 units, and no word."""
    deepspeed = pytest.importorskip("deepspeed")
    import deepspeed_runs as runs

    runs.prepare()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD)
    weights = full_weights(model)
    engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=runs.config(world, stage))[0]
    with pytest.raises(ValueError, match=r"is sharded by DeepSpeed: pass the engine, dist_agc\.attach\(engine\)"):
        runs.one_step(world, engine, 0)
    assert not hook.stats
    if stage < 3:
        assert all(torch.equal(p.double(), weights[name]) for name, p in model.named_parameters() if p.requires_grad)
    engine.destroy()
