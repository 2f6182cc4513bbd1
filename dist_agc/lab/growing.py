"""How the time of clip() and of planning grows with elements, tensors and ranks."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..clipper import Clipper
from ..config import AGCConfig
from ..engine.plan import Plan
from ..frameworks.virtual import World, parameters
from ..model.units import unit_rules


@dataclass(frozen=True)
class Curve:
    what: str
    against: str
    points: list[tuple[int, float]]  # (size, seconds)

    @property
    def power(self) -> float:
        """The slope between the last two thirds of the points in a log-log chart: 1 is linear, 2 is quadratic."""
        points = self.points[len(self.points) // 3 :]
        (x0, y0), (x1, y1) = points[0], points[-1]
        return math.log(y1 / y0) / math.log(x1 / x0)


def _time(call: Callable[[], object], repeats: int = 5) -> float:
    """CPU seconds, the fewest of several: whatever else the machine does can only add to them."""
    call()
    seconds = []
    gc.collect()  # neither what came before nor an earlier call must be cleared away in a later one
    gc.disable()
    try:
        for _ in range(repeats):
            began = time.process_time()
            call()
            seconds.append(time.process_time() - began)
    finally:
        gc.enable()
    return min(seconds)


def _clip(tensors: int, shape: tuple[int, int]) -> float:
    made = [nn.Parameter(torch.randn(shape)) for _ in range(tensors)]
    for p in made:
        p.grad = torch.randn(shape) * 1e-4
    return _time(Clipper(made).clip)


def _plan(layers: int, world: int, rows: int = 4096) -> float:
    linear = [nn.Linear(1024, rows, bias=False, device="meta") for _ in range(layers)]
    model = nn.ModuleDict({"layers": nn.ModuleList(linear)})
    here = World(world, world // 2)

    def plan() -> Plan:
        found = parameters(model, "fsdp1", here)
        return Plan(found, unit_rules(found, AGCConfig()))

    return _time(plan)


def curves(scale: float = 1.0) -> list[Curve]:
    """``scale``: times the usual sizes."""

    def against(call: Callable[[int], float], *sizes: int) -> list[tuple[int, float]]:
        scaled = sorted({max(2, round(scale * size)) for size in sizes})
        return [(size, call(size)) for size in scaled]

    return [
        Curve("clip()", "rows of 1024", against(lambda n: _clip(1, (n, 1024)), 256, 1024, 4096, 16384, 32768)),
        Curve("clip()", "tensors", against(lambda n: _clip(n, (16, 64)), 64, 256, 1024, 4096)),
        Curve("planning", "rows of 1024", against(lambda n: _plan(64, 64, n), 256, 1024, 4096, 16384, 65536)),
        Curve("planning", "tensors", against(lambda n: _plan(n, 64), 64, 256, 1024, 4096)),
        Curve("planning", "ranks", against(lambda n: _plan(64, n), 64, 256, 1024, 4096, 16384)),
    ]
