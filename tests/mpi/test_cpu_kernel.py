"""``cpu_kernel=True`` where parameters are sharded: the same promises, in rows that are cut anywhere."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from parity import check_one_clip, distribute

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("ignore:FSDP"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


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
    placements = {name: [Shard(1 if p.ndim > 1 else 0)] for name, p in module.named_parameters()}
    return distribute(module, mesh, placements)


SHARDS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "fsdp1": partial(fsdp1, originals=True),
    "fsdp1-flat": partial(fsdp1, originals=False),
    "fsdp2": fsdp2,
    "tp": columns,
}


@pytest.mark.parametrize("layout", SHARDS)
def test_sharded(world: Any, layout: str, measured: list[tuple[int, int]]) -> None:
    """The kernel measures whole rows of the first layer, or what this rank has of them."""
    shard, mesh = SHARDS[layout], world.mesh()
    check_one_clip(world, model, lambda m: shard(m, mesh), all_reduces=1, cpu_kernel=True)
    cut = -(-120 // world.size)
    expected = min(cut, 120 - world.rank * cut) if layout == "tp" else 120
    assert expected in {length for _, length in measured}


@pytest.mark.filterwarnings("ignore")  # DeepSpeed and what it imports warn about each other's ways
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(world: Any, stage: int, measured: list[tuple[int, int]]) -> None:
    pytest.importorskip("deepspeed")
    import deepspeed_runs as runs

    runs.parity(world, runs.config(world, stage), cpu_kernel=True).engine.destroy()
    assert any(world.gather(len(measured))), "on some rank; others may hold small parameters alone"
