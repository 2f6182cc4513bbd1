"""``cpu_kernel=True`` where parameters are sharded: the same promises, in rows that are cut anywhere."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

from dist_agc import row_norms
from parity import check_one_clip

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("ignore:FSDP"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Of the rows that the kernel measured on this rank."""
    found: set[int] = set()
    kernel = row_norms.load()

    def counted(x: int, rows: int, length: int, out: int, threads: int) -> None:
        found.add(length)
        kernel(x, rows, length, out, threads)

    monkeypatch.setattr(row_norms, "load", lambda: counted)
    yield found


def model() -> nn.Module:
    """No number of ranks divides its rows; on 2 to 4 ranks each has whole rows of the first."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(120, 37), nn.Conv2d(5, 11, 3), nn.ConvTranspose1d(6, 4, 3), nn.LayerNorm(37))


def fsdp1(module: nn.Module, mesh: Any, *, originals: bool) -> nn.Module:
    return FSDP(module, device_id=torch.device("cpu"), use_orig_params=originals)


def fsdp2(module: nn.Module, mesh: Any) -> nn.Module:
    for layer in module.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def columns(module: nn.Module, mesh: Any) -> nn.Module:
    """Every row is cut, as by a row-wise parallel linear layer."""

    def cut(name: str, layer: nn.Module, mesh: Any) -> None:
        for key, parameter in list(layer.named_parameters(recurse=False)):
            placement = Shard(1) if parameter.ndim > 1 else Shard(0)
            layer.register_parameter(key, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement])))

    return distribute_module(module, mesh, cut)


SHARDS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "fsdp1": (fsdp1, {"originals": True}),
    "fsdp1-flat": (fsdp1, {"originals": False}),
    "fsdp2": (fsdp2, {}),
    "tp": (columns, {}),
}


@pytest.mark.parametrize("layout", SHARDS)
def test_sharded(world: Any, layout: str, lengths: set[int]) -> None:
    shard, options = SHARDS[layout]
    mesh = world.mesh()
    check_one_clip(world, model, lambda m: shard(m, mesh, **options), all_reduces=1, cpu_kernel=True)
    cut = -(-120 // world.size)
    length = min(cut, 120 - world.rank * cut) if layout == "tp" else 120
    assert length in lengths, "whole rows of the first layer, or what this rank has of them"


@pytest.mark.filterwarnings("ignore")  # DeepSpeed and what it imports warn about each other's ways
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(world: Any, stage: int, lengths: set[int]) -> None:
    pytest.importorskip("deepspeed")
    import deepspeed_runs as runs

    runs.parity(world, runs.config(world, stage), cpu_kernel=True).engine.destroy()
    assert any(world.gather(len(lengths))), "on some rank; others may hold small parameters alone"
