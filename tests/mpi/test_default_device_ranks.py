"""Models on several ranks while torch.set_default_device names another device; one process: test_default_device.py."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import dist_agc
import oracle
from conftest import World
from helpers import agc, assert_clipped, assert_equal_everywhere, assert_some_clipped, assert_stats, full, reference
from parity import distribute

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.filterwarnings("ignore:.*(FSDP|NO_SHARD)")]

THRESHOLD = 0.3


@pytest.fixture
def elsewhere() -> Iterator[Callable[[], None]]:
    """Makes a device the default on which nothing can be read."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


def network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4))


def backward(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 6, generator=generator)
    (model(x) * torch.tensor([0.02, 0.3, 1.0, 3.0])).square().mean().backward()


def ddp(world: World) -> nn.Module:
    return DistributedDataParallel(network())


def fsdp2(world: World) -> nn.Module:
    model = network()
    fully_shard(model, mesh=world.mesh())
    return model


def fsdp1(world: World) -> nn.Module:
    return FullyShardedDataParallel(network(), use_orig_params=False, device_id=torch.device("cpu"))


@pytest.mark.parametrize("spread", [ddp, fsdp2, fsdp1])
def test_a_step(world: World, elsewhere: Callable[[], None], spread: Callable[[World], nn.Module]) -> None:
    """Ranks agree, measure, send and count; ratios are counted too, before. Every rank has the same batch."""
    twin = network()
    backward(twin)
    expected = reference(twin, oracle.unit_rules(twin), THRESHOLD)
    assert_some_clipped(expected)
    model = spread(world)
    backward(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, foreach=False)
    elsewhere()
    hook = dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD)
    counted = dist_agc.ratios(hook.clipper, [THRESHOLD])
    optimizer.step()
    torch.set_default_device(None)
    assert_stats(hook.stats, expected, tolerance=1e-5)
    assert_equal_everywhere(world, hook.stats)
    assert {name: above[0] for name, above in counted.above.items()} == {
        name: of.clipped_units for name, of in expected.per_parameter.items()
    }


def test_what_ranks_have_otherwise_is_told(world: World, elsewhere: Callable[[], None]) -> None:
    model = ddp(world)
    backward(model)
    elsewhere()
    with pytest.raises(RuntimeError, match=r"clipping_threshold: rank 0 has \[0\.01\], rank 1 has \[0\.02\]"):
        dist_agc.apply_agc(model, 0.02 if world.rank else 0.01)


def test_shares_of_a_sum_and_units_that_are_cut(world: World, elsewhere: Callable[[], None]) -> None:
    """One rank alone has a share of the norm's gradient: the other makes zeros for it."""
    mesh = world.mesh()
    source = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5))
    rules = oracle.unit_rules(source)
    model: Any = distribute(
        source, mesh, {"0.weight": [Replicate()], "1.weight": [Shard(1)], "1.bias": [Shard(0)], "0.bias": [Shard(0)]}
    )
    torch.manual_seed(9)
    grads: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        grads[name] = torch.randn(parameter.shape) * torch.tensor([0.01, 4, 0.01, 4, 1, 1])[: parameter.shape[0]].view(
            -1, *[1] * (parameter.ndim - 1)
        )
        if name != "0.weight":
            whole = DTensor.from_local(grads[name], mesh, [Replicate()], run_check=False)
            parameter.grad = whole.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    gain: Any = model[0].weight
    if world.rank == 1:
        gain.grad = DTensor.from_local(grads["0.weight"].clone(), mesh, [Partial()], run_check=False)
    weights = {name: full(p) for name, p in model.named_parameters()}
    expected = oracle.clip(weights, grads, rules, THRESHOLD)
    elsewhere()
    stats = agc(model, THRESHOLD)
    torch.set_default_device(None)
    if world.rank == 1:
        gain.grad = DTensor.from_local(gain.grad.to_local(), mesh, [Replicate()], run_check=False)
    else:
        gain.grad = DTensor.from_local(expected.grads["0.weight"].float(), mesh, [Replicate()], run_check=False)
    assert_clipped(model, stats, expected)
    assert_equal_everywhere(world, stats)
