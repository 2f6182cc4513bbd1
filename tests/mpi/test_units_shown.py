"""`units` shows of a sharded model what it shows of the whole one: names, shapes, dims and reasons."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import dist_agc
from dist_agc.conformance import sharding

# DeepSpeed, what it imports and FSDP1 warn about each other's ways.
pytest.importorskip("deepspeed", reason="needs pip install 'dist-agc[deepspeed]'")
import deepspeed_runs

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.filterwarnings("ignore")]


class Stack(nn.Module):
    """Known by a registration, through a name in a module inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterDict({"up": nn.Parameter(torch.ones(2, 6, 5)), "down": torch.ones(2, 5, 3)})


dist_agc.register_units(Stack, {"experts.up": (0, 1), "experts.down": (0, 2)})


def make() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 7), nn.ConvTranspose2d(4, 6, 2, groups=2), weight_norm(nn.Conv2d(3, 6, 2)), Stack()
    )


def zero(stage: int) -> Callable[[nn.Module, Any], nn.Module]:
    def shard(model: nn.Module, world: Any) -> nn.Module:
        deepspeed_runs.prepare()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        import deepspeed

        return deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_runs.config(world, stage))[0]

    return shard


LAYOUTS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "fsdp1": lambda model, _: sharding.fsdp1(model, [model[3]], use_orig_params=True),  # type: ignore[index]
    "fsdp1-flat": lambda model, _: sharding.fsdp1(model, [model[3]], use_orig_params=False),  # type: ignore[index]
    "fsdp2": lambda model, _: sharding.fsdp2(model, [model[3]]),  # type: ignore[index]
    "ddp": lambda model, _: sharding.ddp(model),
    "zero1": zero(1),
    "zero3": zero(3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sharded_model_shows_the_units_of_the_whole_one(world: Any, layout: str) -> None:
    expected = {row.name: row for row in dist_agc.units(make())}
    assert (expected["3.experts.up"].dims, expected["3.experts.down"].dims) == ((0, 1), (0, 2))
    assert not any(row.guessed for row in expected.values())
    rows = dist_agc.units(LAYOUTS[layout](make(), world))
    assert {row.name: row for row in rows} == expected
