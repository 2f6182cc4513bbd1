"""Stages of a pipeline in the suite: their clipping is checked, and no schedule of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..attach import attach
from ..config import AGCConfig
from ..frameworks import deepspeed
from ..held import held
from ..hook import AGCHook
from ..stats import ClipStats
from . import sharding
from .ranks import NotSetUp
from .subjects import Subject, Tensors
from .whole_steps import Piece, WholeSteps


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


class StagesOfDeepSpeed(WholeSteps):
    """A PipelineEngine without ZeRO. ``names``: of the parameters in the model that its layers are of, by ``id``."""

    def __init__(self, engine: Any, batch: tuple[Tensor, Tensor], names: Mapping[int, str]) -> None:
        (optimizer,) = deepspeed.optimizers(engine)
        super().__init__(engine, optimizer)
        self._batch, self._names = batch, names

    def attached(self, config: AGCConfig) -> AGCHook:
        return attach(self.model, config=config)

    def sends_more(self) -> bool:
        return True

    def train(self) -> None:
        self.model.train_batch(iter([self._batch]))

    def pieces(self) -> list[Piece]:
        return [Piece(p, self._names[id(p)], tuple(p.shape)) for p in held(self.optimizer)]
