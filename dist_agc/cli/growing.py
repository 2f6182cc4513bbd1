"""How the time of clip() and of planning grows with elements, tensors and ranks."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..clipper import Clipper
from ..config import AGCConfig
from ..layouts import make_fragments
from ..layouts.virtual import World, place
from ..plan import Plan
from . import shapes


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
    """CPU seconds, so that other programs on the machine count little."""
    call()
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def _clip(tensors: int, shape: tuple[int, int]) -> float:
    parameters = [torch.nn.Parameter(torch.randn(shape)) for _ in range(tensors)]
    for p in parameters:
        p.grad = torch.randn(shape) * 1e-4
    return _time(Clipper(parameters, AGCConfig()).clip)


def _plan(layers: int, world: int, layout: str = "fsdp1") -> float:
    model = shapes.build({f"layers.{i}.weight": (4096, 1024) for i in range(layers)})
    here = World(world, world // 2)
    return _time(lambda: Plan(make_fragments(place(model, layout, here), AGCConfig())), 3)


def curves() -> list[Curve]:
    elements = [(n * 1024, _clip(1, (n, 1024))) for n in (256, 1024, 4096, 16384, 32768)]
    tensors = [(n, _clip(n, (16, 64))) for n in (64, 256, 1024, 4096)]
    planned = [(n, _plan(n, 64)) for n in (64, 256, 1024, 4096)]
    ranks = [(n, _plan(64, n)) for n in (64, 256, 1024, 4096, 16384)]
    return [
        Curve("clip()", "elements", elements),
        Curve("clip()", "tensors", tensors),
        Curve("planning", "tensors", planned),
        Curve("planning", "ranks", ranks),
    ]
