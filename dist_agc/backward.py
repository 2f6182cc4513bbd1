"""Clipping during backward: each gradient as soon as it is final, so that it can be used and freed at once.

Where the optimizer runs inside of backward no moment exists at which all gradients do, and clipping by a global norm is
impossible. AGC judges every unit by itself, so it needs none.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer

from .clipper import Clipper, group_thresholds
from .config import check_threshold
from .part import Part
from .stats import ClipStats

_DDP = "DistributedDataParallel reduces gradients after the hooks of their parameters"
_REFUSED = {
    "DistributedDataParallel": _DDP,
    "DDP": _DDP,  # what torch.distributed._composable.replicate makes of a module's class
    "FullyShardedDataParallel": "FSDP1 hands over the gradients of its flat parameters when backward has ended; use "
    "FSDP2 (fully_shard)",
}
_MARK = "_dist_agc_clipped"
_OTHERWISE = "clip in optimizer.step() instead: attach without during_backward."


class BackwardClipping:
    """Clips in post-accumulate-grad hooks: of FSDP2's sharded parameters (after reduce-scatter) and of plain ones.

    One part for each parameter: where its units are cut or statistics are asked for, one collective each, in the order
    in which backward makes the gradients. That is the same on all ranks of an SPMD model, which FSDP2 and tensor
    parallelism require anyway.

    Parameters that are frozen later are left out; one that is unfrozen has no hook, so the next backward raises.

    Attributes:
        stats: the `ClipStats` of the last whole backward; None before the first.

    Raises:
        ValueError: DDP or FSDP1, or a parameter with a hook that would run before the clipping.
    """

    def __init__(self, model: object, clipper: Clipper, optimizers: Sequence[Optimizer]) -> None:
        _check_model(model)
        _check_replicas(f.holder for f in clipper.fragments)
        self.stats: ClipStats | None = None
        self._fragments = {id(f.holder): f for f in clipper.fragments}
        self._parts: dict[int, Part] = {}
        # Groups by place: an optimizer that loads a state has new ones.
        self._groups = {
            id(p): (optimizer, i)
            for optimizer in optimizers
            for i, group in enumerate(optimizer.param_groups)
            for p in group["params"]
        }
        # The parameters clipped since backward began, and whether it has ended.
        self._record: dict[int, ClipStats | None] = {}
        self._running = False
        chosen = [f for f in clipper.fragments if not optimizers or id(f.holder) in self._groups]
        self._frozen = [(name, p) for name, p in clipper.frozen() if not optimizers or id(p) in self._groups]
        for fragment in chosen:
            if getattr(fragment.holder, "_post_accumulate_grad_hooks", None):
                raise ValueError(
                    f"parameter {fragment.name!r} has a post-accumulate-grad hook already, which would see the "
                    "gradient before it is clipped: attach first, then register your own hooks."
                )
        self._parts = {id(f.holder): clipper.part([f.holder]) for f in chosen}
        self._handles = [f.holder.register_post_accumulate_grad_hook(self._clip) for f in chosen]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _clip(self, parameter: Tensor) -> None:
        grad, key = parameter.grad, id(parameter)
        if grad is None:
            return
        if getattr(grad, _MARK, False):
            raise RuntimeError(
                f"parameter {self._fragments[key].name!r}: backward added to a gradient that was clipped already, so "
                "the sum is neither. With during_backward=True free gradients before the next backward (p.grad = "
                "None, or zero_grad(set_to_none=True)). To accumulate, turn off FSDP2's gradient sync until the last "
                f"backward (set_requires_gradient_sync(False)), or {_OTHERWISE}"
            )
        if not self._running or key in self._record:  # the same parameter again: the last backward ended in an error
            self._begin()
        with torch.no_grad(), torch.profiler.record_function("dist_agc::clip"):
            self._record[key] = self._parts[key].clip(self._threshold(parameter), None)
        # Version counters would not do: FSDP2's gradients share one.
        setattr(parameter.grad, _MARK, True)

    def _begin(self) -> None:
        thawed = [name for name, parameter in self._frozen if parameter.requires_grad]
        if thawed:
            raise RuntimeError(
                f"parameter {thawed[0]!r} was frozen when AGC was attached and trains now, unclipped: call "
                ".remove() on the handle and attach again after unfreezing."
            )
        self._record, self._running = {}, True
        Variable._execution_engine.queue_callback(self._finish)

    def _threshold(self, parameter: Tensor) -> Mapping[int, float | None]:
        if id(parameter) not in self._groups:
            return {}
        optimizer, i = self._groups[id(parameter)]
        return group_thresholds([{**optimizer.param_groups[i], "params": [parameter]}], check_threshold)

    def _finish(self) -> None:
        if not self._running:
            return
        self._running = False
        counted = [stats for stats in self._record.values() if stats is not None]
        if not counted:
            return
        # Parameters without a gradient have units too.
        silent = [self._fragments[key] for key in self._parts if key not in self._record]
        idle = {f.name: f.rule.count for f in silent if f.rule is not None and f.holder.requires_grad}
        top = counted[0].max_ratio
        nothing = ClipStats(idle, torch.zeros(len(idle), 3, dtype=torch.float64, device=top.device), top.new_zeros(()))
        self.stats = ClipStats.merged([*counted, nothing])


def refuse_scaler(optimizer: Optimizer) -> None:
    """Raise RuntimeError where a GradScaler steps ``optimizer``: its loss scale was on the gradients in backward.

    A scale leaves no trace on gradients, and unscaling not even in their version counters: only the caller shows it.
    """
    frame = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), torch.amp.GradScaler):
        frame = frame.f_back
    if frame is not None or getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            "during_backward=True cannot be right with a GradScaler: gradients carry its scale in backward; "
            f"{_OTHERWISE}"
        )


def _check_model(model: object) -> None:
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for kind in type(module).__mro__:
            if kind.__name__ in _REFUSED:
                raise ValueError(
                    f"during_backward=True cannot be right here: {_REFUSED[kind.__name__]}, or {_OTHERWISE}"
                )


def _check_replicas(parameters: Iterable[Tensor]) -> None:
    """Refuse the inner module of a DistributedDataParallel, or its parameters: only the wrapper knows of them."""
    if not dist.is_initialized():
        return
    ours = set(map(id, parameters))
    for found in gc.get_objects():
        if issubclass(type(found), nn.parallel.DistributedDataParallel) and not ours.isdisjoint(
            map(id, found.parameters())
        ):
            raise ValueError(f"during_backward=True cannot be right here: {_DDP}, or {_OTHERWISE}")
