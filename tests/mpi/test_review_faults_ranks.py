"""Faults that a review of the whole code found and that take several ranks, by the public names alone."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import dist_agc
import oracle
from helpers import (
    agc,
    assert_clipped,
    assert_equal_everywhere,
    assert_some_clipped,
    assert_stats,
    collectives,
    full,
    full_grads,
    full_weights,
    median_threshold,
    noisy_grads,
    reference,
    trainable,
    worst_relative_error,
)
from parallel import parallel, sequence_loss, sequences, tensor_parallel
from parity import distribute

pytestmark = pytest.mark.mpi(min_size=2)


# ------------------------------------------------------------------ gradients that are shares of sums, and come late


class Late:
    """A layer whose weight every rank holds whole and whose gradients are given by hand; others beside it are cut."""

    def __init__(self, world: Any, others: bool, **options: Any) -> None:
        self.world, self.mesh = world, world.mesh()
        torch.manual_seed(8)
        self.model = nn.ModuleDict({"late": nn.Linear(4, 6, bias=False), "cut": nn.Linear(5, 3)})
        placements: dict[str, Sequence[Any]] = {"late.weight": [Replicate()]}
        if others:
            placements |= {"cut.weight": [Shard(1)], "cut.bias": [Shard(0)]}
        distribute(self.model, self.mesh, placements)
        self.rules = oracle.unit_rules(self.model)
        self.threshold = 0.5
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, foreach=False)
        self.optimizer = optimizer
        self.hook: Any = dist_agc.attach(self.model, optimizer, clipping_threshold=self.threshold, **options)
        self.step = 0

    def check(self, ranks: Sequence[int], *, complete: bool = False) -> dict[str, int]:
        """Clip once, with gradients of the late weight on ``ranks`` alone; the collectives that it took."""
        self.step += 1
        world, model = self.world, self.model
        torch.manual_seed(100 + self.step)
        size = torch.tensor([0.01, 9.0, 0.01, 9.0, 9.0, 0.01])[:, None]
        # Of few binary places, so that their sum is exact and no element suffers where shares cancel.
        shares = (torch.randn(world.size, 6, 4) * size * 2**15).round() / 2**15
        grads: dict[str, Tensor | None] = {"late.weight": None}
        model.zero_grad()
        for name, parameter in trainable(model).items():
            if name == "late.weight":
                continue
            grads[name] = torch.randn(*parameter.shape) * 3
            parameter.grad = self.as_placed(parameter, grads[name])  # type: ignore[arg-type]
        late: Any = model["late"].weight
        if ranks:
            grads["late.weight"] = shares[0] if complete else shares[list(ranks)].sum(0)
        if world.rank in ranks:
            mine = (shares[0] if complete else shares[world.rank]).clone()
            how = Replicate() if complete else Partial()
            late.grad = DTensor.from_local(mine, self.mesh, [how], run_check=False)
        expected = oracle.clip(full_weights(model), grads, self.rules, self.threshold)
        with collectives() as seen:
            self.optimizer.step()
        world.check((late.grad is not None) == (world.rank in ranks), "a gradient came or went")
        if world.rank in ranks:
            found = late.grad.to_local().double()
            error = worst_relative_error({"late": found}, {"late": expected.grads["late.weight"]})
            world.gather(error)
            assert error <= 1e-6, f"step {self.step}: worst relative error {error:.3g}"
        else:
            world.gather(None)
        found = {
            name: full(p.grad) for name, p in trainable(model).items() if name != "late.weight" and p.grad is not None
        }
        wanted = {name: grad for name, grad in expected.grads.items() if name != "late.weight"}
        assert worst_relative_error(found, wanted) <= 1e-6
        stats = self.hook.stats
        assert_equal_everywhere(world, stats)
        right = stats.units == expected.units and int(stats.clipped_units) == expected.clipped_units
        right &= float(stats.grad_norm) == pytest.approx(expected.grad_norm, rel=1e-6)
        world.check(right, repr(stats))
        return seen.counts

    def as_placed(self, parameter: Tensor, grad: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor):
            return grad.clone()
        return distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)


@pytest.mark.parametrize("others", [True, False], ids=["beside cut ones", "alone"])
@pytest.mark.parametrize("interval", [2, 3, 5])
def test_a_share_that_first_comes_while_weight_norms_are_reused(world: Any, interval: int, others: bool) -> None:
    late = Late(world, others, weight_norm_interval=interval)
    everyone = range(world.size)
    for ranks in ((), everyone, everyone, (), everyone, everyone):
        late.check(ranks)


@pytest.mark.parametrize("others", [True, False], ids=["beside cut ones", "alone"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_share_that_first_comes_on_one_rank_alone(world: Any, first: int, others: bool) -> None:
    """No rank may decide by itself that there is more to agree on, for the others would not come."""
    late = Late(world, others)
    seen = [late.check(ranks) for ranks in ((), (first,), (1 - first,), range(world.size), (), (first,))]
    assert all(set(counts) <= {"allreduce_"} for counts in seen[1:]), f"agreed on again: {seen}"


def test_a_complete_gradient_of_which_nothing_was_known_counts_once(world: Any) -> None:
    """It is added up over the ranks for as long as it may be a share, and must not come out of that larger."""
    late = Late(world, True)
    everyone = range(world.size)
    for ranks in ((), (), everyone, everyone, (), everyone):
        late.check(ranks, complete=True)


@pytest.mark.parametrize("interval", [1, 3])
def test_sequence_parallel_norms_without_a_gradient_at_first(world: Any, interval: int) -> None:
    """Tensor parallelism without FSDP2; the norm's two gradients come in the second step."""
    model = tensor_parallel(parallel(), world.mesh(names=("tp",)))
    twin = parallel(torch.float64)
    rules, threshold = oracle.unit_rules(twin), 0.03
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, foreach=False)
    hook: Any = dist_agc.attach(model, optimizer, clipping_threshold=threshold, weight_norm_interval=interval)
    for step in range(5):
        x, y = sequences(step)
        for one, inputs in ((model, x), (twin, x.double())):
            one.zero_grad()
            sequence_loss(one, inputs, y).backward()
            if step in (0, 3):
                one.norm.zero_grad()
        expected = reference(twin, rules, threshold)
        assert_some_clipped(expected)
        optimizer.step()
        assert_stats(hook.stats, expected, tolerance=1e-5)
        assert_equal_everywhere(world, hook.stats)
        found = full_grads(model)
        assert set(found) == set(expected.grads)
        for name, grad in expected.grads.items():
            error = float((found[name] - grad).norm() / grad.norm())
            assert error <= 1e-5, f"step {step}, {name}: {error:.3g}"


# ------------------------------------------------------------------ halves that are frozen in turn


class Halves(nn.Module):
    def __init__(self, world: Any, how: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.generator, self.critic = nn.Linear(5, 7), nn.Linear(6, 5)
        if how == "fsdp2":
            for half in (self.generator, self.critic):
                fully_shard(half, mesh=world.mesh())
        elif how == "cut inside of units":
            cut = {f"{half}.{name}": [Shard(d)] for half in ("generator", "critic") for name, d in WITHIN}
            distribute(self, world.mesh(), cut)
        else:
            names = [name for name, _ in self.named_parameters()]
            distribute(self, world.mesh(), dict.fromkeys(names, [Replicate()]))

    def train_only(self, half: str) -> None:
        self.generator.requires_grad_(half == "generator")
        self.critic.requires_grad_(half == "critic")

    def give(self, half: str, seed: int) -> None:
        self.zero_grad()
        torch.manual_seed(seed)
        for parameter in getattr(self, half).parameters():
            size = torch.rand(parameter.shape[0]).view(-1, *[1] * (parameter.ndim - 1))
            grad = torch.randn(parameter.shape) * size
            parameter.grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)


WITHIN = (("weight", 1), ("bias", 0))
HOW = ("fsdp2", "cut inside of units", "copies")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("interval", "optimizers"), [(1, 1), (1, 2), (3, 2)])
def test_halves_that_are_frozen_in_turn_need_no_new_plan(world: Any, interval: int, optimizers: int, how: str) -> None:
    """Ranks compare their plans where these are made, in all_gathers: none after the first step of either half."""
    model, threshold = Halves(world, how), 0.3
    rules = oracle.unit_rules(nn.ModuleDict({"generator": nn.Linear(5, 7), "critic": nn.Linear(6, 5)}))
    held = [model.parameters()] if optimizers == 1 else [half.parameters() for half in (model.critic, model.generator)]
    made = [torch.optim.SGD(parameters, lr=0.05, foreach=False) for parameters in held]
    hook: Any = dist_agc.attach(model, made, clipping_threshold=threshold, weight_norm_interval=interval)
    measured: dict[str, dict[str, Tensor]] = {}
    clipped = 0
    for step in range(7):
        for half, optimizer in zip(("critic", "generator"), made * 2, strict=False):
            model.train_only(half)
            model.give(half, seed=10 * step + len(half))
            if step % interval == 0 or step == 1:
                measured[half] = full_weights(model)
            expected = oracle.clip(measured[half], full_grads(model), rules, threshold)
            clipped += expected.clipped_units
            with collectives() as seen:
                optimizer.step()
            assert step == 0 or set(seen.counts) <= {"allreduce_"}, f"{half}, step {step}: {seen.counts}"
            error = worst_relative_error(full_grads(model), expected.grads)
            assert error <= 1e-6, f"{half}, step {step}: worst relative error {error:.3g}"
            assert_equal_everywhere(world, hook.stats)
            for name, of in expected.per_parameter.items():
                found = hook.stats.per_parameter[name]
                assert (found.units, int(found.clipped_units)) == (of.units, of.clipped_units)
                assert float(found.grad_norm) == pytest.approx(of.grad_norm, rel=1e-6)
    assert clipped


# ------------------------------------------------------------------ ratios()


@pytest.mark.parametrize("given", ["attached", "model"])
def test_ratios_take_one_collective_and_no_plan(world: Any, given: str) -> None:
    source = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4), nn.LayerNorm(4))
    noisy_grads(source)
    rules = oracle.unit_rules(source)
    threshold = median_threshold(source, rules)
    grads = {name: p.grad for name, p in source.named_parameters()}
    placements = {"0.weight": [Shard(1)], "0.bias": [Shard(0)], "1.weight": [Shard(0)], "2.weight": [Shard(0)]}
    model = distribute(source, world.mesh(), placements)
    for name, parameter in model.named_parameters():
        grad = grads[name]
        assert grad is not None
        how = parameter.placements if isinstance(parameter, DTensor) else None
        parameter.grad = grad if how is None else distribute_tensor(grad, world.mesh(), how, src_data_rank=None)
    about: Any = model
    if given == "attached":
        hook: Any = dist_agc.attach(
            model, torch.optim.SGD(model.parameters(), lr=0.0, foreach=False), clipping_threshold=threshold
        )
        about = hook.clipper
    dist_agc.ratios(about)
    expected = reference(model, rules, threshold)
    assert_some_clipped(expected)
    with collectives() as seen:
        found = dist_agc.ratios(about, [threshold / 8, threshold, threshold * 8])
    assert seen.counts == {"allreduce_": 1}
    assert {n: (found.units[n], above[1]) for n, above in found.above.items()} == {
        name: (of.units, of.clipped_units) for name, of in expected.per_parameter.items()
    }
    every = world.gather(repr(found))
    assert every == [every[0]] * world.size
    assert_clipped(model, agc(model, threshold), expected)
