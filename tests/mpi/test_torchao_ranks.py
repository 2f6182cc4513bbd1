"""torchao's training weights under FSDP2, which puts a DTensor around each."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import dist_agc
from helpers import assert_equal_everywhere
from test_torchao import KINDS, check, each, network, step

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
]


def given(model: nn.Module, number: int) -> None:
    """Gradients from nowhere: gloo does not gather 8-bit floats, so float8 has no forward pass on a CPU."""
    torch.manual_seed(number)
    for name, parameter in model.named_parameters():
        weight: Any = parameter
        size = 9.0 if name.endswith("0.weight") else 1.0
        parameter.grad = distribute_tensor(
            torch.randn(parameter.shape) * size / 40, weight.device_mesh, weight.placements, src_data_rank=None
        )


@each
@pytest.mark.parametrize("dim", [0, 1])
def test_fsdp2(world: Any, kind: str, dim: int) -> None:
    """Cut between rows, which are units, and through them where the class can be cut there."""
    if world.size == 3:
        pytest.skip("torchao's classes want even shards under FSDP2: gloo aborts in its gathering, AGC or not")
    if dim and kind in ("int8", "bitnet"):
        pytest.skip("torchao cuts it between rows alone")
    model: Any = KINDS[kind][0](network())
    place: Any = (lambda p: Shard(dim) if p.ndim == 2 else None) if dim else None
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=world.mesh(), shard_placement_fn=place)
    fully_shard(model, mesh=world.mesh())

    def gathered(weight: torch.Tensor) -> torch.Tensor:
        return torch.cat(world.gather(weight), dim if weight.ndim == 2 else 0)

    def backward(model: nn.Module, number: int) -> None:
        step(model, number, (world.rank, world.size))

    for stats in check(model, kind, gathered, given if kind == "float8" else backward):
        assert_equal_everywhere(world, stats)


def test_a_wrapper_that_nobody_knows(world: Any) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    local = TwoTensor(torch.ones(2, 3), torch.ones(2, 3))
    model = nn.Linear(3, 2 * world.size, bias=False)
    model.weight = nn.Parameter(DTensor.from_local(local, world.mesh(), [Shard(0)], run_check=False))
    with pytest.raises(ValueError, match="'weight' is a TwoTensor, a layout that dist_agc does not know"):
        dist_agc.Clipper(model)
