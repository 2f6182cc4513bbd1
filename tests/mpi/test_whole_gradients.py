"""Whole gradients of cut parameters: what tensor parallelism leaves of an embedding, without FSDP2."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

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
    worst_distance,
    worst_relative_error,
)
from parallel import varied
from parity import STEPS, check_training, distribute

pytestmark = pytest.mark.mpi(min_size=2)

THRESHOLD = 0.03


class Words(nn.Module):
    """An embedding of a size that no number of ranks divides, two layers, and a head as wide as the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(self.norm(self.embedding(tokens))))))


def words(dtype: torch.dtype = torch.float32) -> Words:
    return varied(Words, 5, dtype)


def sentences(step: int, *, rank: int = 0, size: int = 1) -> tuple[Tensor, Tensor]:
    """The same for all ranks; 12 words, for sequence parallelism of 2, 3 and 4 ranks. Not all words occur."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(9, (4, 12), generator=generator), torch.randint(11, (4,), generator=generator)


def loss(model: nn.Module, tokens: Tensor, classes: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens).mean(1), classes)


def tensor_parallel(model: Words, mesh: DeviceMesh, *, sequences: bool = False) -> Words:
    """As torchtitan does it, with sequence parallelism and without."""
    between = Shard(1) if sequences else Replicate()
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "up": ColwiseParallel(input_layouts=between),
        "down": RowwiseParallel(output_layouts=between),
        "head": ColwiseParallel(input_layouts=between, output_layouts=Replicate()),
    }
    if sequences:
        plan["norm"] = SequenceParallel()  # type: ignore[assignment]
    return parallelize_module(model, mesh, plan)  # type: ignore[return-value]


@pytest.mark.parametrize("sequences", [False, True], ids=["alone", "sequences"])
def test_embeddings_of_tensor_parallelism(world: Any, sequences: bool) -> None:
    model = tensor_parallel(words(), world.mesh(names=("tp",)), sequences=sequences)
    loss(model, *sentences(0)).backward()
    grad: Any = model.embedding.weight.grad
    assert grad.placements == (Replicate(),), "what torch leaves"
    check_training(
        world,
        model,
        words(torch.float64),
        share=(0, 1),
        all_reduces=2 if sequences else 1,
        clipping_threshold=THRESHOLD,
        batches=sentences,
        loss=loss,
    )


def test_adamw_takes_the_steps_of_one_process(world: Any) -> None:
    model, twin = tensor_parallel(words(), world.mesh(names=("tp",))), words(torch.float64)
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-5}
    optimizer = torch.optim.AdamW(model.parameters(), **settings, foreach=False)
    reference, rules = torch.optim.AdamW(twin.parameters(), **settings), oracle.unit_rules(twin)
    named = dict(twin.named_parameters())
    with dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD) as hook:
        for step in range(STEPS):
            for one in (model, twin):
                one.zero_grad()
                loss(one, *sentences(step)).backward()
            expected = oracle.clip(named, {name: p.grad for name, p in named.items()}, rules, THRESHOLD)
            assert_some_clipped(expected)
            for name, p in named.items():
                p.grad = expected.grads[name]
            optimizer.step()
            reference.step()
            assert int(hook.stats.clipped_units) == expected.clipped_units
            assert_equal_everywhere(world, hook.stats)
    error = worst_distance(full_weights(model), {name: p.detach() for name, p in named.items()})
    assert error <= 1e-5, f"worst relative error of a parameter: {error:.3g}"


# ------------------------------------------------------------------------------------------------- written by hand


def table(world: Any) -> tuple[nn.Module, Tensor]:
    """A cut table, of which the last of 4 ranks has nothing, with a whole gradient in memory of its own on each."""
    model = distribute(nn.Embedding(5, 6), world.mesh(), {"weight": [Shard(0)]})
    torch.manual_seed(8)
    grad = torch.randn(5, 6) * torch.tensor([0.01, 9.0, 0.01, 9.0, 9.0])[:, None]
    give(world, model, grad)
    return model, grad


def give(world: Any, model: nn.Module, grad: Tensor) -> None:
    model.weight.grad = DTensor.from_local(grad.clone(), world.mesh(), [Replicate()], run_check=False)  # type: ignore[union-attr]


def is_untouched(model: nn.Module, grad: Tensor) -> bool:
    now: Any = model.weight.grad
    return now.placements == (Replicate(),) and torch.equal(now.to_local(), grad)


def test_twice_is_once(world: Any) -> None:
    model, grad = table(world)
    expected = oracle.clip(full_weights(model), {"weight": grad}, oracle.unit_rules(model), 0.5)
    measured = agc(model, clipping_threshold=0.5, dry_run=True)
    assert is_untouched(model, grad), "in a dry run"
    assert_stats(measured, expected)
    clipper = dist_agc.Clipper(model, clipping_threshold=0.5)
    clipper.clip()
    give(world, model, grad)
    with collectives() as seen:
        stats = clipper.clip()
    assert seen.counts == {"allreduce_": 1}, seen.counts
    assert_clipped(model, stats, expected)
    now: Any = model.weight.grad
    assert now.placements == (Shard(0),)
    once = now.to_local().clone()
    again = clipper.clip()
    assert again is not None and int(again.clipped_units) == 0
    after: Any = model.weight.grad
    assert torch.equal(after.to_local(), once)


def test_errors_leave_them(world: Any) -> None:
    model, grad = table(world)
    grad[3, 1] = float("inf")
    give(world, model, grad)
    with pytest.raises(FloatingPointError, match="in weight; no gradient was changed"):
        agc(model, clipping_threshold=0.5, on_nonfinite="raise")
    assert is_untouched(model, grad)

    model.register_parameter("later", nn.Parameter(torch.ones(2, 3)))
    model.later.grad = torch.ones(1, 3).expand(2, 3)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="'later' has a gradient with several elements in one place"):
        agc(model, clipping_threshold=0.5)
    assert is_untouched(model, grad)


@pytest.mark.filterwarnings("ignore:exclude=.* leaves out every parameter")
def test_excluded_ones_stay_for_the_optimizer(world: Any) -> None:
    model, grad = table(world)
    stats = agc(model, clipping_threshold=0.5, exclude="weight")
    assert is_untouched(model, grad)
    assert float(stats.grad_norm) == pytest.approx(float(grad.norm()), rel=1e-6)


def test_on_two_axes(world: Any) -> None:
    """Each axis by itself: whole along one and in place, or a share, along the other."""
    mesh = world.mesh((2, world.size // 2) if world.size % 2 == 0 else (world.size, 1), ("outer", "inner"))
    R, S, P = Replicate(), Shard, Partial()
    cases = [
        ([S(0), S(1)], [R, S(1)]),
        ([S(0), S(1)], [S(0), R]),
        ([S(0), S(0)], [R, R]),
        ([S(0), S(0)], [S(0), R]),
        ([S(1), R], [R, P]),
        ([R, S(0)], [P, R]),
    ]
    for wanted, given in cases:
        model = distribute(nn.Linear(6, 7, bias=False), mesh, {"weight": wanted})
        torch.manual_seed(8)
        grad = torch.randn(7, 6) * torch.tensor([0.01, 9.0, 0.01, 9.0, 9.0, 0.01, 9.0])[:, None]
        weight: Any = model.weight
        lying = [R if one == P else one for one in given]
        mine = distribute_tensor(grad, mesh, lying, src_data_rank=None).to_local().clone()
        for axis, one in enumerate(given):
            mine /= mesh.size(axis) if one == P else 1
        weight.grad = DTensor.from_local(mine, mesh, given, run_check=False, shape=weight.shape, stride=weight.stride())
        expected = oracle.clip({"weight": full(weight)}, {"weight": grad}, oracle.unit_rules(model), 0.5)
        stats = agc(model, clipping_threshold=0.5)
        assert weight.grad.placements == weight.placements, f"{given}"
        assert_clipped(model, stats, expected)
        assert_equal_everywhere(world, stats)
        assert worst_relative_error(full_grads(model), expected.grads) <= 1e-6
