"""Models with weights and gradients but no forward, in any layout: what `bench` clips."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..clipper import Clipper
from ..config import AGCConfig
from ..conformance import sharding
from ..conformance.subjects import backward_without_forward
from ..frameworks import deepspeed, parameters
from ..frameworks.base import Attachment
from ..frameworks.virtual import tensor_parallel_dim
from ..hook import AGCHook
from ..model.blocks import Block
from ..model.names import entries
from ..model.units import unit_rules
from ..stats import ClipStats


def fill(model: nn.Module, seed: int = 0) -> None:
    """Random weights, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02, generator=generator)


def turn_into_gradients(weights: nn.Module, model: nn.Module, fraction: float, config: AGCConfig) -> int:
    """Make the parameters of ``model`` gradients of those of ``weights``, of which exactly ``fraction`` are clipped.

    That is as whole tensors, before sharding: sharded like the weights, they are then the sharded gradients, split
    units included. Returns how many units are clipped.
    """
    fill(model, 1)
    mine = parameters(model)
    rules = unit_rules(mine, config)
    units = sum(rule.count for rule in rules if rule is not None)
    clipped = torch.zeros(units)
    order = torch.randperm(units, generator=torch.Generator().manual_seed(2))
    clipped[order[: round(fraction * units)]] = 1
    at, threshold = 0, config.clipping_threshold
    with torch.no_grad():
        for parameter, other, rule in zip(mine, parameters(weights), rules, strict=True):
            for block in parameter.pieces(rule).blocks if rule is not None else ():
                grad, weight = block.view(parameter.tensor), block.view(other.tensor)
                norm = _norm(weight, block).clamp(min=config.eps) / _norm(grad, block)
                over = clipped[at : at + block.units].view_as(norm)
                grad.mul_(norm * threshold * (0.5 + 1.5 * over))
                at += block.units
    return int(clipped.sum())


def _norm(x: Tensor, block: Block) -> Tensor:
    return torch.linalg.vector_norm(x, dim=block.reduced or None, keepdim=True) if block.reduced else x.abs()


def sharded(model: nn.Module, layout: str) -> nn.Module:
    """``model`` as plain, ddp, fsdp1, fsdp2, hsdp or tp+fsdp2: each child of a list of layers is a unit, the rest
    another.

    Raises:
        ValueError: the number of ranks does not fit.
    """
    least = {"hsdp": 4, "tp+fsdp2": 2}.get(layout, 1)
    if least > 1 and (dist.get_world_size() < least or dist.get_world_size() % 2):
        raise ValueError(f"{layout} needs an even number of processes, at least {least}; got {dist.get_world_size()}.")
    units = sharding.numbered(model)
    ways: dict[str, Callable[[], nn.Module]] = {
        "plain": lambda: model,
        "ddp": lambda: sharding.ddp(model),
        "fsdp1": lambda: sharding.fsdp1(model, units),
        "fsdp2": lambda: sharding.fsdp2(model, units),
        "hsdp": lambda: sharding.hsdp(model, units),
        "tp+fsdp2": lambda: sharding.tp_fsdp2(model, units, _cut),
    }
    return ways[layout]()


def _cut(model: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism by the names of modules; what it does not cut is a DTensor too, as clip_grad_norm_ needs."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for entry in entries(model):
        dim = tensor_parallel_dim(entry.name)
        placement = Replicate() if dim is None else Shard(dim)
        made = nn.Parameter(distribute_tensor(entry.tensor.detach(), mesh, [placement]))
        setattr(*entry.owners[0], made)


class _InEngine(Attachment):
    """What optimizers hold is the engine's affair; its norm clip is set from outside."""

    by_engine = True


class Engine:
    """A DeepSpeed engine that is given its gradients, so that it needs no forward pass. Its weights stay as they are:
    Adam does all of its work at a learning rate of 0."""

    def __init__(self, weights: nn.Module, gradients: nn.Module, stage: int) -> None:
        self.engine = sharding.zero(weights, stage, torch.optim.Adam(weights.parameters(), lr=0.0))
        self.gradients = [g.detach() for g in gradients.parameters()]
        self.parameters, self.optimizers = deepspeed.parameters(self.engine), deepspeed.optimizers(self.engine)
        self._hook: AGCHook | None = None

    def ready(self, clipper: Clipper | None, norm: float) -> None:
        """Gradients for one step, in which this clipper runs, or DeepSpeed's own to this norm (0 does not clip)."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        if clipper is not None:
            self._hook = AGCHook(clipper, _InEngine(clipper.parameters, self.optimizers, clipper.config))
        deepspeed.set_norm_clip(self.engine, norm)
        backward_without_forward(self.engine, list(self.engine.module.parameters()), self.gradients)

    def step(self) -> ClipStats | None:
        self.engine.step()
        return self._hook.stats if self._hook is not None else None
