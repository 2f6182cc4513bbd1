"""A small model for tensor parallelism, and sequences for it."""

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

M = TypeVar("M", bound=nn.Module)


class Parallel(nn.Module):
    """Two blocks of a transformer's shape: one whose weights are cut by rows, one by columns, a norm between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)  # left alone by tensor parallelism: a plain tensor, or on another mesh

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(self.norm(x)))))


def varied(kind: type[M], seed: int, dtype: torch.dtype) -> M:
    """A model of this class in which no parameter begins at zeros or ones; the same for the same seed."""
    torch.manual_seed(seed)
    model = kind()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def parallel(dtype: torch.dtype = torch.float32) -> Parallel:
    return varied(Parallel, 3, dtype)


def sequences(step: int, *, rank: int = 0, size: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(12, 12, 8, generator=generator), torch.randint(5, (12,), generator=generator)
    return x.chunk(size)[rank], y.chunk(size)[rank]


def sequence_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).mean(1), y)


def tensor_parallel(model: Parallel, mesh: DeviceMesh) -> Parallel:
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)  # type: ignore[return-value]
