"""Stages of a pipeline in the suite: their clipping is checked, and no schedule of theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..attach import attach
from ..config import AGCConfig
from ..engine.plan import AxisPlan
from ..frameworks import deepspeed
from ..held import held
from ..stats import ClipStats
from . import sharding
from .counting import Operations
from .ranks import NotSetUp
from .subjects import Subject, Tensors


class Stages(Subject):
    """Every rank trains some children of a model, as the stages of a pipeline, and clips these.

    Forward and backward run through the whole model on every rank.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        children = [(name, child) for name, child in model.named_children() if any(True for _ in child.parameters())]
        owned = sum(len(list(child.parameters())) for _, child in children)
        ranks = dist.get_world_size()
        if len(children) < ranks or owned != len(list(model.parameters())):
            raise NotSetUp("needs a child for each rank, and no parameter beside them or in two of them")
        ends = [rank * len(children) // ranks for rank in range(ranks + 1)]
        self._children = [[name for name, _ in children[a:b]] for a, b in zip(ends, ends[1:], strict=False)]
        mine = self._children[dist.get_rank()]
        self._stage = nn.ModuleDict({name: child for name, child in children if name in mine})
        self._optimizer = torch.optim.SGD(self._stage.parameters(), lr=0.0)
        self._hook: Any = None

    def clip(self, config: AGCConfig) -> ClipStats:
        if self._hook is None or self._hook.clipper.config != config:
            self._hook = attach(self._stage, self._optimizer, config, pipeline=dist.group.WORLD)
            self.clipper = self._hook.clipper
        self._hook.clip(self._optimizer)
        return self._hook.stats

    def clipped(self) -> Tensors:
        """Each stage as its rank has left it."""
        found = super().clipped()
        for rank, children in enumerate(self._children):
            for name in (name for name in found if name.partition(".")[0] in children):
                there = found[name].to(sharding.device())
                dist.broadcast(there, rank)
                found[name] = there.cpu()
        return found

    def sends_more(self) -> bool:
        return True


class StagesOfDeepSpeed(Subject):
    """A PipelineEngine without ZeRO, which runs forward, backward and step in one call.

    ``names``: of the parameters in the model that its layers are of, by ``id``.
    """

    def __init__(self, engine: Any, batch: tuple[Tensor, Tensor], names: Mapping[int, str]) -> None:
        super().__init__(engine)
        self._batch, self._names = batch, names
        (self._optimizer,) = deepspeed.optimizers(engine)
        self._hook: Any = None
        self._grads: Tensors = {}
        self._seen = Operations()

    def rehearse(self) -> None:
        self._train()

    def backward(self) -> None:
        """As the optimizer sees the gradients, there is nothing else to look at."""

    def tensors(self) -> tuple[Tensors, Tensors]:
        return self._everywhere({name: p for p, name in self._held()}), self._everywhere(self._grads)

    def held(self) -> list[tuple[Tensor, Tensor | None]]:
        return [(p, None) for p in held(self._optimizer)]

    def clip(self, config: AGCConfig) -> ClipStats:
        if self._hook is None:
            self._hook = attach(self.model, config=config)
            self.clipper = self._hook.clipper
        self._train()
        return self._hook.stats

    def clipped(self) -> Tensors:
        return self._everywhere(self._grads)

    def hand_over(self, clip: Callable[[list[Tensor]], None]) -> None:
        handle = self._optimizer.register_step_pre_hook(lambda optimizer, *_: clip(held(optimizer)))
        self._train()
        handle.remove()

    def sends_more(self) -> bool:
        return True

    def sent(self, config: AGCConfig) -> tuple[Operations, list[AxisPlan]]:
        assert self._hook is not None
        seen, clip = Operations(), self._hook.clip

        def watched(*args: Any, **options: Any) -> None:
            with seen:
                clip(*args, **options)

        self._hook.clip = watched
        self._train()
        del self._hook.clip
        return seen, self._hook.clipper.execution().plan.axes

    def _held(self) -> list[tuple[Tensor, str]]:
        return [(p, self._names[id(p)]) for p in held(self._optimizer)]

    def _train(self) -> None:
        """One step, with a learning rate of 0. What the optimizer has got is kept."""

        def keep(*_: Any) -> None:
            self._grads = {name: p.grad.clone() for p, name in self._held() if p.grad is not None}

        handle = self._optimizer.register_step_pre_hook(keep)  # after AGC's
        self.model.train_batch(iter([self._batch]))
        handle.remove()

    def _everywhere(self, mine: Tensors) -> Tensors:
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, {name: tensor.detach().to("cpu", torch.float64) for name, tensor in mine.items()})
        return {name: tensor for of_one in every for name, tensor in of_one.items()}
