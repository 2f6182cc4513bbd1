"""Frameworks that step on something else than the model's parameters, in the suite: looked at in their optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..config import AGCConfig
from ..engine.plan import AxisPlan
from ..held import held
from ..hook import AGCHook
from ..stats import ClipStats
from .counting import Operations
from .subjects import Subject, Tensors


class Piece(NamedTuple):
    """What a torch optimizer steps on: elements of the parameter ``name`` of this shape, flat, from ``start`` on."""

    tensor: Tensor
    name: str
    shape: tuple[int, ...]
    start: int = 0


class WholeSteps(Subject):
    """Forward, backward and step are one call, `train`, with a learning rate of 0, in which ``optimizer`` steps.

    The same batch every time: the gradients of a step without AGC are those of the next one before AGC.
    """

    def __init__(self, model: Any, optimizer: Optimizer) -> None:
        super().__init__(model)
        self.optimizer = optimizer
        self._hook: AGCHook | None = None
        self._grads: list[tuple[Piece, Tensor]] = []

    def train(self) -> None:
        raise NotImplementedError

    def pieces(self) -> list[Piece]:
        raise NotImplementedError

    def attached(self, config: AGCConfig) -> AGCHook:
        raise NotImplementedError

    def rehearse(self) -> None:
        self._train()

    def backward(self) -> None:
        """As the optimizer sees the gradients, there is nothing else to look at."""

    def tensors(self) -> tuple[Tensors, Tensors]:
        return _everywhere([(piece, piece.tensor) for piece in self.pieces()]), self.clipped()

    def held(self) -> list[tuple[Tensor, Tensor | None]]:
        return [(p, None) for p in held(self.optimizer)]

    def clip(self, config: AGCConfig) -> ClipStats:
        if self._hook is None:
            self._hook = self.attached(config)
            self.clipper = self._hook.clipper
        self._train()
        return self._hook.stats

    def clipped(self) -> Tensors:
        return _everywhere(self._grads)

    def hand_over(self, clip: Callable[[list[Tensor]], None]) -> None:
        handle = self.optimizer.register_step_pre_hook(lambda optimizer, *_: clip(held(optimizer)))
        self._train()
        handle.remove()

    def sent(self, config: AGCConfig) -> tuple[Operations, list[AxisPlan]]:
        hook: Any = self._hook
        seen, clip = Operations(), hook.clip

        def watched(*args: Any, **options: Any) -> None:
            with seen:
                clip(*args, **options)

        hook.clip = watched
        self._train()
        del hook.clip
        return seen, hook.clipper.execution().plan.axes

    def _train(self) -> None:
        def keep(*_: Any) -> None:
            grads = [(piece, piece.tensor.grad) for piece in self.pieces()]
            self._grads = [(piece, grad.clone()) for piece, grad in grads if grad is not None]

        handle = self.optimizer.register_step_pre_hook(keep)  # after AGC's
        self.train()
        handle.remove()


def _everywhere(mine: list[tuple[Piece, Tensor]]) -> Tensors:
    """Whole tensors out of what all ranks have of them."""
    said = [(*piece[1:], tensor.detach().flatten().to("cpu", torch.float64)) for piece, tensor in mine]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, said)
    found: Tensors = {}
    for name, shape, start, values in (piece for of_one in every for piece in of_one):
        whole = found.setdefault(name, torch.full((math.prod(shape),), torch.nan, dtype=torch.float64))
        whole[start : start + len(values)] = values
    shapes = {name: shape for of_one in every for name, shape, *_ in of_one}
    return {name: whole.view(shapes[name]) for name, whole in found.items()}
