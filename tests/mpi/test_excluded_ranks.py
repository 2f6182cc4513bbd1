"""``exclude`` as a way out on several ranks: layouts that dist_agc does not know; one process: test_excluded.py."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dist_agc
import oracle
from conftest import World
from helpers import (
    assert_equal_everywhere,
    assert_some_clipped,
    assert_stats,
    full,
    median_threshold,
    noisy_grads,
    told,
)
from parity import distribute

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.filterwarnings("ignore:.*(FSDP|NO_SHARD)")]

SAID = "grad_norm is without the gradients of"


class Beside:
    """Three layers: one cut inside of its units, one by units, one to exclude; and what the oracle makes of them."""

    def __init__(self, world: World) -> None:
        torch.manual_seed(5)
        source = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 8), nn.Linear(8, 4, bias=False))
        noisy_grads(source)
        self.rules = oracle.unit_rules(source)
        self.threshold = median_threshold(source, self.rules)
        self.mesh = world.mesh()
        grads: dict[str, Any] = {name: p.grad for name, p in source.named_parameters()}
        self.weights, self.grads = {n: full(p) for n, p in source.named_parameters()}, grads
        self.model: Any = distribute(source, self.mesh, {"0.weight": [Shard(1)], "0.bias": [Shard(0)]})
        self.model = distribute(self.model, self.mesh, {"1.weight": [Shard(0)], "2.weight": [Shard(0)]})
        for name, parameter in self.model.named_parameters():
            if isinstance(parameter, DTensor):
                whole = DTensor.from_local(grads[name], self.mesh, [Replicate()], run_check=False)
                parameter.grad = whole.redistribute(placements=parameter.placements)
            else:
                parameter.grad = grads[name].clone()

    def check(self, world: World, stats: Any, *, counted: bool) -> None:
        odd = ("2.weight",)
        names = [name for name in self.weights if counted or name not in odd]
        expected = oracle.clip(
            {name: self.weights[name] for name in names}, self.grads, self.rules, self.threshold, exclude=odd
        )
        assert_some_clipped(expected)
        assert_stats(stats, expected)
        assert_equal_everywhere(world, stats)
        for name, parameter in self.model.named_parameters():
            if name not in odd:
                assert float((full(parameter.grad) - expected.grads[name]).norm()) <= 1e-6 * float(
                    expected.grads[name].norm()
                )


def test_excluded_and_cut(world: World) -> None:
    """What can be read counts, over all ranks, without a word."""
    beside = Beside(world)
    with told():
        stats = dist_agc.apply_agc(beside.model, beside.threshold, exclude="2.*")
    beside.check(world, stats, counted=True)


def test_a_placement_that_is_not_known(world: World) -> None:
    beside = Beside(world)
    partial = DTensor.from_local(torch.ones(4, 8), beside.mesh, [Partial()], run_check=False)
    beside.model[2].weight = nn.Parameter(partial)
    beside.model[2].weight.grad = DTensor.from_local(torch.ones(4, 8), beside.mesh, [Partial()], run_check=False)
    assert [row.count for row in dist_agc.units(beside.model)][-1] == 4
    with pytest.raises(ValueError, match=r"'2\.weight' has the placement Partial.*or exclude it\."):
        dist_agc.apply_agc(beside.model, beside.threshold)
    with told(f"{SAID} '2.weight'"):
        stats = dist_agc.apply_agc(beside.model, beside.threshold, exclude="2.*")
    beside.check(world, stats, counted=False)
    beside.model[2].requires_grad_(False)
    beside.model[2].weight.grad = None
    clipper = dist_agc.Clipper(beside.model, clipping_threshold=beside.threshold)  # what does not train is no trouble
    assert clipper.clip() is not None


@pytest.mark.parametrize("ranks", ["all", "one"])
def test_a_gradient_that_lies_elsewhere(world: World, ranks: str) -> None:
    """No rank does anything else because of it: the others wait for nothing."""
    beside = Beside(world)
    if world.rank == 1 or ranks == "all":
        beside.model[2].weight.grad = DTensor.from_local(torch.ones(4, 8), beside.mesh, [Partial()], run_check=False)
        said = [f"{SAID} '2.weight': they are excluded, and dist_agc cannot read them. parameter '2.weight' has pl"]
    else:
        said = []
    clipper = dist_agc.Clipper(beside.model, clipping_threshold=beside.threshold, exclude="2.*")
    with told(*said):
        stats = clipper.clip()
        if ranks == "all":
            beside.check(world, stats, counted=False)
        clipper.clip()
    assert_equal_everywhere(world, stats)


@pytest.mark.parametrize("orig", [True, False])
def test_fsdp1_over_tensor_parallel(world: World, orig: bool) -> None:
    """The tensor-parallel layers are excluded; the others in the same flat parameter are clipped as ever."""
    mesh = world.mesh((world.size, 1), ("dp", "tp"))
    torch.manual_seed(5)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 5))
    rules = oracle.unit_rules(plain)
    x = torch.randn(4, 6)

    def backward(model: nn.Module) -> None:
        (model(x) * torch.tensor([0.01, 0.1, 1.0, 3.0, 9.0])).square().mean().backward()

    backward(plain)
    own = [f"{layer}.{name}" for layer in (3, 4) for name in ("weight", "bias")]
    weights = {name: full(p) for name, p in plain.named_parameters() if name in own}
    grads: Any = {name: full(p.grad) for name, p in plain.named_parameters() if name in own and p.grad is not None}
    expected = oracle.clip(weights, grads, rules, 1.0)
    plain.zero_grad()
    parallelize_module(plain, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    model = FullyShardedDataParallel(plain, device_mesh=mesh["dp"], use_orig_params=orig, device_id=torch.device("cpu"))
    backward(model)
    assert {row.name: row.shape for row in dist_agc.units(model)}["0.weight"] == (8, 6)
    with pytest.raises(ValueError, match=r"'0\.weight' is tensor-parallel under FSDP1, .*or exclude it\."):
        dist_agc.apply_agc(model, 1.0)
    with told(f"{SAID} '0.weight', '0.bias', '2.weight', '2.bias': they are"):
        stats = dist_agc.apply_agc(model, 1.0, exclude=("0.*", "2.*"))
    assert_some_clipped(expected)
    assert_stats(stats, expected, tolerance=1e-5)
    assert_equal_everywhere(world, stats)


def test_pieces_of_a_flat_parameter(world: World) -> None:
    """Given without their module, which alone knows their places."""
    model = FullyShardedDataParallel(nn.Linear(4, 3), use_orig_params=True, device_id=torch.device("cpu"))
    beside = nn.Linear(3, 2)
    noisy_grads(beside)
    threshold = median_threshold(beside, oracle.unit_rules(beside))
    expected = oracle.clip(
        {name: full(p) for name, p in beside.named_parameters()},
        {name: p.grad for name, p in beside.named_parameters()},
        oracle.unit_rules(beside),
        threshold,
    )
    named = [*beside.named_parameters(), *((f"flat.{name}", p) for name, p in model.named_parameters())]
    with pytest.raises(ValueError, match="is a piece of an FSDP1 flat parameter"):
        dist_agc.apply_agc(named, threshold)
    with told(SAID):
        stats = dist_agc.apply_agc(named, threshold, exclude="flat.*")
    assert_some_clipped(expected)
    assert_stats(stats, expected)
