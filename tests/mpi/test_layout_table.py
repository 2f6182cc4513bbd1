"""The table of docs/layouts.md is what 4 ranks send."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import dist_agc
from parallel import parallel, sequence_loss, sequences, tensor_parallel

pytestmark = [
    pytest.mark.mpi(min_size=4),
    pytest.mark.filterwarnings("ignore:FSDP:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Deallocating Tensor that still has live PyObject"),  # torch 2.7, without AGC too
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"


def flat(strategy: ShardingStrategy, mesh: Any) -> nn.Module:
    return FSDP(parallel(), device_id=torch.device("cpu"), sharding_strategy=strategy, device_mesh=mesh)


def sharded(mesh: Any, tp: Any = None, **options: Any) -> nn.Module:
    model = parallel() if tp is None else tensor_parallel(parallel(), tp)
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def columns(parameter: nn.Parameter) -> Any:
    from torch.distributed.tensor import Shard

    return Shard(1) if parameter.ndim == 2 and parameter.shape[1] % 4 == 0 else None


def models(world: Any) -> dict[str, Callable[[], nn.Module]]:
    hybrid, both = world.mesh((2, 2), ("replicate", "shard")), world.mesh((2, 2), ("dp", "tp"))
    cube = {n: world.mesh(n, ("replicate", "shard", "tp")) for n in [(2, 1, 2)]}
    return {
        "DDP": lambda: DDP(parallel()),
        "FSDP1 `FULL_SHARD`": partial(flat, ShardingStrategy.FULL_SHARD, world.mesh()),
        "FSDP1 `HYBRID_SHARD` 2 x 2": partial(flat, ShardingStrategy.HYBRID_SHARD, hybrid),
        "FSDP1 `NO_SHARD`": partial(flat, ShardingStrategy.NO_SHARD, world.mesh()),
        "FSDP2": partial(sharded, world.mesh()),
        "FSDP2, weights `Shard(1)`": partial(sharded, world.mesh(), shard_placement_fn=columns),
        "HSDP 2 x 2": partial(sharded, hybrid),
        "TP": lambda: tensor_parallel(parallel(), world.mesh(names=("tp",))),
        "TP 2 x FSDP2 2": lambda: sharded(both["dp"], both["tp"]),
        "HSDP 2 x 1, TP 2": lambda: sharded(cube[2, 1, 2]["replicate", "shard"], cube[2, 1, 2]["tp"]),
    }


def test_the_table(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    real = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return real(tensor, *args, **options)

    monkeypatch.setattr(dist, "all_reduce", counted)
    rows = {}
    for name, make in models(world).items():
        model, found = make(), []
        for statistics in (True, False):
            clipper = dist_agc.Clipper(model, clipping_threshold=0.03, statistics=statistics)
            for step in range(2):
                model.zero_grad()
                sequence_loss(model, *sequences(step)).backward()
                sent.clear()
                clipper.clip()
            found += [len(sent), sum(sent)]
        rows[name] = found
    table = [re.split(r"\s*\|\s*", line)[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    written = {row[0]: row[2:] for row in table if row[0] in rows}
    measured = {name: [str(number) for number in found] for name, found in rows.items()}
    assert written == measured, "\n".join(f"{name} | | {' | '.join(found)}" for name, found in measured.items())
