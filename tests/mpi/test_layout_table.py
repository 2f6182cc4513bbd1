"""The table of docs/layouts.md is what 4 ranks send."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn

import dist_agc
from dist_agc.conformance import sharding
from parallel import parallel, sequence_loss, sequences, tensor_parallel

pytestmark = [
    pytest.mark.mpi(min_size=4),
    pytest.mark.filterwarnings("ignore:FSDP:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Deallocating Tensor that still has live PyObject"),  # torch 2.7, without AGC too
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"


def fsdp2(mesh: Any, tp: Any = None, **options: Any) -> nn.Module:
    model = parallel() if tp is None else tensor_parallel(parallel(), tp)
    return sharding.fsdp2(model, [model.up, model.down], mesh, **options)


def columns(parameter: nn.Parameter) -> Any:
    from torch.distributed.tensor import Shard

    return Shard(1) if parameter.ndim == 2 and parameter.shape[1] % 4 == 0 else None


def models(world: Any) -> dict[str, Callable[[], nn.Module]]:
    hybrid, both = world.mesh((2, 2), ("replicate", "shard")), world.mesh((2, 2), ("dp", "tp"))
    cube = world.mesh((2, 1, 2), ("replicate", "shard", "tp"))
    return {
        "DDP": lambda: sharding.ddp(parallel()),
        "FSDP1 `FULL_SHARD`": lambda: sharding.fsdp1(parallel()),
        "FSDP1 `HYBRID_SHARD` 2 x 2": lambda: sharding.fsdp1(parallel(), (), "HYBRID_SHARD", device_mesh=hybrid),
        "FSDP1 `NO_SHARD`": lambda: sharding.fsdp1(parallel(), (), "NO_SHARD"),
        "FSDP2": lambda: fsdp2(world.mesh()),
        "FSDP2, weights `Shard(1)`": lambda: fsdp2(world.mesh(), shard_placement_fn=columns),
        "HSDP 2 x 2": lambda: fsdp2(hybrid),
        "TP": lambda: tensor_parallel(parallel(), world.mesh(names=("tp",))),
        "TP 2 x FSDP2 2": lambda: fsdp2(both["dp"], both["tp"]),
        "HSDP 2 x 1, TP 2": lambda: fsdp2(cube["replicate", "shard"], cube["tp"]),
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
