"""Models with weights and gradients but no forward, in any layout: what `bench` clips."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..clipper import Clipper
from ..config import AGCConfig
from ..conformance.subjects import backward_without_forward
from ..fragments import Block
from ..hooks import AGCHook
from ..layouts import make_fragments, place
from ..layouts.virtual import tensor_parallel_dim
from ..names import named_parameters
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
    mine = make_fragments(place(model), config)
    units = sum(f.rule.count for f in mine if f.rule is not None)
    clipped = torch.zeros(units)
    order = torch.randperm(units, generator=torch.Generator().manual_seed(2))
    clipped[order[: round(fraction * units)]] = 1
    at, threshold = 0, config.clipping_threshold
    with torch.no_grad():
        for fragment, other in zip(mine, make_fragments(place(weights), config), strict=True):
            for block in fragment.pieces.blocks if fragment.rule is not None else ():
                grad, weight = block.view(fragment.holder), block.view(other.holder)
                over = clipped[at : at + block.units].view(_broadcast(block))
                at += block.units
                norm = _norm(weight, block).clamp(min=config.eps) / _norm(grad, block)
                grad.mul_(norm * threshold * (0.5 + 1.5 * over))
    return int(clipped.sum())


def _norm(x: Tensor, block: Block) -> Tensor:
    return torch.linalg.vector_norm(x, dim=block.reduced or None, keepdim=True) if block.reduced else x.abs()


def _broadcast(block: Block) -> list[int]:
    kept = iter(block.kept)
    ndim = len(block.kept) + len(block.reduced)
    return [1 if d in block.reduced else next(kept) for d in range(ndim)]


def sharded(model: nn.Module, layout: str) -> nn.Module:
    """``model`` as plain, ddp, fsdp1, fsdp2, hsdp or tp+fsdp2: each child of a list of layers is a unit, the rest
    another.

    Raises:
        ValueError: the number of ranks does not fit.
    """
    if layout == "plain":
        return model
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    lists = [m for m in model.modules() if m._modules and all(name.isdigit() for name in m._modules)]
    lists.reverse()  # inner ones before those around them
    if layout == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        cpu = torch.device("cpu")
        for layers in lists:
            for name, layer in list(layers._modules.items()):
                assert layer is not None
                layers._modules[name] = FullyShardedDataParallel(layer, device_id=cpu)
        return FullyShardedDataParallel(model, device_id=cpu)
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(model, layout)
    for layers in lists:
        for layer in layers.children():
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _mesh(model: nn.Module, layout: str) -> Any:
    """Over which FSDP2 shards ``model``, cut by tensor parallelism already where the layout has it."""
    from torch.distributed.device_mesh import init_device_mesh

    ranks = dist.get_world_size()
    if layout == "fsdp2":
        return init_device_mesh("cpu", (ranks,))
    least = {"hsdp": 4, "tp+fsdp2": 2}[layout]
    if ranks < least or ranks % 2:
        raise ValueError(f"{layout} needs an even number of processes, at least {least}; got {ranks}.")
    if layout == "hsdp":
        return init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "tp"))
    _cut(model, mesh["tp"])
    return mesh["dp"]


def _cut(model: nn.Module, mesh: Any) -> None:
    """Tensor parallelism by the names of modules; what it does not cut is a DTensor too, as clip_grad_norm_ needs."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for named in named_parameters(model):
        dim = tensor_parallel_dim(named)
        placement = Replicate() if dim is None else Shard(dim)
        made = nn.Parameter(distribute_tensor(named.parameter.detach(), mesh, [placement]))
        module, attribute = named.module, named.name.rpartition(".")[2]
        assert module is not None
        setattr(module, attribute, made)


class Engine:
    """A DeepSpeed engine that is given its gradients, so that it needs no forward pass. Its weights stay as they are:
    Adam does all of its work at a learning rate of 0."""

    def __init__(self, weights: nn.Module, gradients: nn.Module, stage: int) -> None:
        for name, value in (("RANK", dist.get_rank()), ("WORLD_SIZE", dist.get_world_size())):
            os.environ.setdefault(name, str(value))  # mpirun says them in other variables
        from ..layouts import zero
        from .backend_zero import deepspeed_on_cpu

        deepspeed = deepspeed_on_cpu()
        deepspeed.init_distributed("gloo", verbose=False)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        }
        optimizer = torch.optim.Adam(weights.parameters(), lr=0.0)
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(model=weights, optimizer=optimizer, config=config)
        self.gradients = [g.detach() for g in gradients.parameters()]
        self.placed, self.optimizers = zero.place(self.engine), zero.optimizers(self.engine)
        self._hook: AGCHook | None = None

    def ready(self, clipper: Clipper | None, norm: float) -> None:
        """Gradients for one step, in which this clipper runs, or DeepSpeed's own to this norm (0 does not clip)."""
        from ..layouts import zero

        if self._hook is not None:
            self._hook.remove()
        self._hook = None if clipper is None else AGCHook(clipper, self.optimizers)
        zero.set_norm_clip(self.engine, norm)
        backward_without_forward(self.engine, list(self.engine.module.parameters()), self.gradients)

    def step(self) -> ClipStats | None:
        self.engine.step()
        return self._hook.stats if self._hook is not None else None
