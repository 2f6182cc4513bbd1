"""What `bench` times: a model with weights and gradients but no forward, in any layout, and ways to clip it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..clipper import Clipper
from ..config import AGCConfig
from ..fragments import Block
from ..layouts import make_fragments, place

FLOOR, NORM, AGC, REUSED = "W and G read once", "clip_grad_norm_", "dist_agc", "dist_agc, every 10"


@dataclass
class Method:
    """One way to clip. ``call`` is None where it cannot run here; ``reason`` says why."""

    name: str
    call: Callable[[], Any] | None = None
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, other: Method) -> float:
        """The median over rounds of this method's time over the other's in the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def sharded(model: nn.Module, layout: str) -> nn.Module:
    """``model`` as plain, ddp, fsdp1 or fsdp2: each child of a list of layers is a unit, the rest another."""
    if layout == "plain":
        return model
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    lists = [m for m in model.modules() if m._modules and all(name.isdigit() for name in m._modules)]
    if layout == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        cpu = torch.device("cpu")
        for layers in lists:
            for name, layer in list(layers._modules.items()):
                assert layer is not None
                layers._modules[name] = FullyShardedDataParallel(layer, device_id=cpu)
        return FullyShardedDataParallel(model, device_id=cpu)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layers in lists:
        for layer in layers.children():
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


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


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def methods(model: nn.Module, layout: str, config: AGCConfig) -> list[Method]:
    parameters = list(model.parameters())
    pairs = [(local(p.detach()), local(p.grad)) for p in parameters if p.grad is not None]

    def floor() -> None:
        for weight, grad in pairs:
            torch.linalg.vector_norm(weight)
            torch.linalg.vector_norm(grad)

    def norm() -> None:
        # An infinite norm clips nothing and does all of the work: the gradients are multiplied by 1.
        if layout == "fsdp1":
            model.clip_grad_norm_(math.inf)  # pyright: ignore[reportCallIssue]
        else:
            torch.nn.utils.clip_grad_norm_(parameters, math.inf)

    reused = AGCConfig(
        clipping_threshold=config.clipping_threshold, eps=config.eps, units=config.units, weight_norm_interval=10
    )
    named = "FSDP1 clip_grad_norm_" if layout == "fsdp1" else NORM
    return [
        Method(FLOOR, floor),
        Method(named, norm),
        Method(AGC, Clipper(model, config).clip),
        Method(REUSED, Clipper(model, reused).clip),
        _timm(parameters, layout, config),
        _composer(model, layout, config),
    ]


def _timm(parameters: Sequence[Tensor], layout: str, config: AGCConfig) -> Method:
    method = Method("timm")
    try:
        clip = import_module("timm.utils.agc").adaptive_clip_grad
    except ImportError as error:
        method.reason = f"not installed ({error})"
        return method
    if layout.startswith("fsdp"):
        method.reason = "knows no shards"
        return method
    method.call = lambda: clip(parameters, config.clipping_threshold, config.eps)
    return method


def _composer(model: nn.Module, layout: str, config: AGCConfig) -> Method:
    method = Method("Composer")
    try:
        clip = import_module("composer.algorithms.gradient_clipping").apply_gradient_clipping
    except ImportError as error:
        method.reason = f"not installed ({error})"
        return method
    if layout.startswith("fsdp"):
        method.reason = "knows no shards"
        return method
    method.call = lambda: clip(model, "adaptive", config.clipping_threshold, False)
    return method


def time_together(chosen: Sequence[Method], grads: Sequence[Tensor], rounds: int, show: Callable[[], None]) -> None:
    """Every method once a round, each from the same gradients and together with the other ranks. The slowest rank
    counts. Two rounds before the first are not timed: plans are made in them."""
    kept = [g.clone() for g in grads]
    several = dist.is_initialized()

    def fresh() -> None:
        for g, k in zip(grads, kept, strict=True):
            g.copy_(k)
        if several:
            dist.barrier()

    running = [m for m in chosen if m.call is not None]
    for i in range(rounds + 2):
        for method in running:
            assert method.call is not None
            fresh()
            began = time.perf_counter()
            method.call()
            if i >= 2:
                method.seconds.append(time.perf_counter() - began)
        show()
    for method in running:
        fresh()
        method.counts = count(method)
        if several:
            slowest = torch.tensor(method.seconds, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            method.seconds = slowest.tolist()
    fresh()


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher: views apart, a list operation as one, collectives and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.collectives = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first: what it does inside comes by here again
        if func.namespace in ("c10d", "_c10d_functional"):
            if "wait" not in func.__name__ and "barrier" not in func.__name__:
                self.collectives += 1
                sent = args[0] if isinstance(args[0], list | tuple) else [args[0]]
                self.bytes += sum(t.numel() * t.element_size() for t in sent if isinstance(t, Tensor))
        elif func.namespace == "aten" and not func.is_view:
            self.operations += 1
        return func(*args, **(kwargs or {}))


def count(method: Method) -> dict[str, int]:
    """Operations, collectives and their bytes of one call, and the most memory it allocated beyond what there was.

    The memory is what torch's profiler sees of the allocator. It changes gradients like any call.
    """
    assert method.call is not None
    with Operations() as seen:
        method.call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        method.call()
    now = most = 0
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events: list[Any] = profile.profiler.kineto_results.events()
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return {
        "operations": seen.operations,
        "collectives": seen.collectives,
        "bytes": seen.bytes,
        "peak_extra_bytes": most,
    }
