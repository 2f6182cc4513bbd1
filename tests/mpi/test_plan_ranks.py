"""The planner without ranks plans what the ranks themselves plan."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dist_agc
from dist_agc import frameworks
from dist_agc.engine.plan import Plan
from dist_agc.frameworks import deepspeed as on_deepspeed
from dist_agc.frameworks import virtual
from dist_agc.model.parameter import Parameter
from dist_agc.model.units import unit_rules

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("ignore:FSDP"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

CPU = torch.device("cpu")
CONFIG = dist_agc.AGCConfig(exclude=("head.bias",))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(13)
        self.q_proj = nn.Linear(13, 8)
        self.o_proj = nn.Linear(8, 13)
        self.conv = nn.ConvTranspose1d(6, 4, 3, groups=2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 13)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(13, 5)


def described(parameters: Sequence[Parameter]) -> list[Any]:
    """All of a plan that decides what is sent and what is scaled, in numbers."""

    def numbers(*tensors: Tensor | None) -> list[Any]:
        return [None if t is None else t.tolist() for t in tensors]

    # FSDP1 orders its flat parameters its own way; slots follow the order, so both get the same.
    ordered = sorted(parameters, key=lambda p: p.name)
    plan = Plan(ordered, unit_rules(ordered, CONFIG))
    axes = [
        (
            tuple(a.axis.ranks),
            a.axis.rank,
            a.slots,
            a.owners,
            a.reported,
            a.numel(),
            numbers(a.pieces.source, a.pieces.slot, a.complete, a.local.source, a.local.slot),
            [(before, numbers(found.source, found.slot)) for before, found in a.carried],
        )
        for a in plan.axes
    ]
    names = [p.name for p in plan.parameters]
    cuts = [names, plan.governed, plan.rules, plan.whole_units, plan.others]
    return [axes, cuts, plan.blocks, plan.owners, plan.offsets, plan.whole, plan.units]


def check(world: Any, parameters: Sequence[Parameter], layout: str, **sizes: int) -> None:
    with torch.device("meta"):
        shapes = Model()
    expected = virtual.parameters(shapes, layout, virtual.World(world.size, world.rank, **sizes))
    real, planned = described(parameters), described(expected)
    world.check(real == planned, f"{layout}: real {real}, planned {planned}")
    world.check(sum(axis[2] for axis in real[0]) > 0, "nothing is cut, so the case shows nothing")


def test_fsdp1(world: Any) -> None:
    model = Model()
    for i in range(2):
        model.layers[i] = FSDP(model.layers[i], use_orig_params=True, device_id=CPU)
    check(world, frameworks.parameters(FSDP(model, use_orig_params=True, device_id=CPU)), "fsdp1")


def fsdp2(mesh: DeviceMesh, model: nn.Module | None = None) -> nn.Module:
    model = model or Model()
    for layer in model.layers:  # pyright: ignore[reportGeneralTypeIssues]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def test_fsdp2(world: Any) -> None:
    check(world, frameworks.parameters(fsdp2(world.mesh())), "fsdp2")


@pytest.mark.mpi(min_size=4)
def test_hsdp(world: Any) -> None:
    check(world, frameworks.parameters(fsdp2(world.mesh((2, 2), ("replicate", "shard")))), "hsdp", shard=2)


def test_tensor_parallel_and_fsdp2(world: Any) -> None:
    tensor = 2 if world.size % 2 == 0 else world.size
    mesh = world.mesh((world.size // tensor, tensor), ("dp", "tp"))
    model = Model()
    for layer in model.layers:
        assert isinstance(layer, nn.Module)
        parallelize_module(layer, mesh["tp"], {"q_proj": ColwiseParallel(), "o_proj": RowwiseParallel()})
    check(world, frameworks.parameters(fsdp2(mesh["dp"], model)), "tp+fsdp2", tensor=tensor)


# DeepSpeed and what it imports warn about each other's ways.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(world: Any, stage: int) -> None:
    deepspeed = pytest.importorskip("deepspeed")
    import deepspeed_runs as runs

    runs.prepare()
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=runs.config(world, stage))
    check(world, on_deepspeed.parameters(engine), f"zero{stage}")
    engine.destroy()
