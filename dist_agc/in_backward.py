"""Clipping during backward: each gradient as soon as it is final, so that it can be used and freed at once.

Where the optimizer runs inside of backward no moment exists at which all gradients do, and clipping by a global norm is
impossible. AGC judges every unit by itself, so it needs none.

Private to torch and read here only: the backward and the node that run now (``torch._C._current_graph_task_id``,
``_current_autograd_node``), ``Variable._execution_engine`` and the name of ``GradScaler._maybe_opt_step``.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Sequence
from functools import partial
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.optim import Optimizer

from .clipper import Clipper
from .frameworks import not_in_backward, plain
from .held import group_thresholds, held
from .stats import ClipStats

_MARK = "_dist_agc_clipped"
_OTHERWISE = "clip in optimizer.step() instead: attach without during_backward."


class BackwardClipping:
    """Clips in post-accumulate-grad hooks: of FSDP2's sharded parameters (after reduce-scatter) and of plain ones.

    Each parameter has an execution, and, where its units are cut or statistics are asked for, a collective of its own.
    Collectives come in the order in which backward makes the gradients. That is the same on all ranks of an SPMD model,
    which FSDP2 and tensor parallelism require anyway.

    Parameters that are frozen later are left out; one that is unfrozen has no hook, so the next backward raises.
    ``stats`` are those of the last whole backward.
    """

    def __init__(self, model: object, clipper: Clipper, optimizers: Sequence[Optimizer]) -> None:
        reason = not_in_backward(model) or _reduced_by_a_wrapper([p.tensor for p in clipper.parameters])
        if reason:
            raise ValueError(f"during_backward=True cannot be right here: {reason}, or {_OTHERWISE}")
        self.stats = ClipStats.merged([])
        self._optimizers = optimizers
        stepped = set(map(id, held(*optimizers)))
        covered = [p for p in clipper.parameters if not optimizers or id(p.tensor) in stepped]
        self._frozen = [p for p in covered if not p.tensor.requires_grad]
        chosen = [p for p in covered if p.tensor.requires_grad]
        for p in chosen:
            if getattr(p.tensor, "_post_accumulate_grad_hooks", None):
                raise ValueError(
                    f"parameter {p.name!r} has a post-accumulate-grad hook already, which would see the gradient "
                    "before it is clipped: attach first, then register your own hooks."
                )
        self._names = {id(p.tensor): p.name for p in chosen}
        self._executions = {id(p.tensor): clipper.execution([p.tensor]) for p in chosen}
        # With several devices in one process, autograd has a thread for each, and hooks run at the same time.
        self._lock = Lock()
        self._record: dict[int, ClipStats | None] = {}  # what was clipped since backward began, by parameter
        self._thresholds: dict[int, float | None] = {}  # as they were when backward began
        self._running = False
        self._watched: set[int] = set()  # backwards whose end calls `_ended`
        self._handles = [p.tensor.register_post_accumulate_grad_hook(self._clip) for p in chosen]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _clip(self, tensor: Tensor) -> None:
        key, execution = id(tensor), self._executions[id(tensor)]
        if tensor.grad is None:
            return
        if getattr(tensor.grad, _MARK, False):
            raise RuntimeError(
                f"parameter {self._names[key]!r}: backward added to a gradient that was clipped already, so the sum is "
                "neither. With during_backward=True free gradients before the next backward (p.grad = None, or "
                "zero_grad(set_to_none=True)). To accumulate, turn off FSDP2's gradient sync until the last "
                f"backward (set_requires_gradient_sync(False)), or {_OTHERWISE}"
            )
        with self._lock:
            if not self._running or key in self._record:  # seen again: the last backward ended in an error
                self._begin()
            self._record[key] = None
            self._watch()
        with torch.no_grad(), torch.profiler.record_function("dist_agc::clip"):
            self._record[key] = execution.clip(self._thresholds, None)
        # Version counters would not do: FSDP2's gradients share one.
        setattr(tensor.grad, _MARK, True)

    # The record of one backward. Reentrant checkpointing runs further backwards inside of it, and perhaps all hooks in
    # those, so it ends with the outermost one.

    def _begin(self) -> None:
        if thawed := [p.name for p in self._frozen if p.tensor.requires_grad]:
            raise RuntimeError(
                f"parameter {thawed[0]!r} was frozen when AGC was attached and trains now, unclipped: call "
                ".remove() on the handle and attach again after unfreezing."
            )
        self._thresholds = group_thresholds(*self._optimizers)
        self._record, self._running = {}, True
        self._watched.clear()

    def _watch(self) -> None:
        """Have `_ended` called at the end of the backward that runs now."""
        backward = torch._C._current_graph_task_id()
        if self._running and backward not in self._watched:
            self._watched.add(backward)
            Variable._execution_engine.queue_callback(partial(self._ended, backward))

    def _ended(self, backward: int) -> None:
        with self._lock:
            if backward not in self._watched:  # of a record that is over
                return
            self._watched.remove(backward)
            outer = torch._C._current_autograd_node()  # runs now, and has run the backward that ends
            following = None if outer is None else next((n for n, _ in outer.next_functions if n is not None), None)
            if following is None:
                self._finish()
                return

        # Only from within the outer backward can its end be watched: as soon as it is at its next node.
        def at_next_node(*_: Any) -> None:
            handle.remove()
            with self._lock:
                self._watch()

        handle = following.register_prehook(at_next_node)

    def _finish(self) -> None:
        self._running = False
        self._watched.clear()
        counted = [stats for stats in self._record.values() if stats is not None]
        if not counted:
            return
        # Parameters without a gradient have units too.
        silent = [execution.plan for key, execution in self._executions.items() if key not in self._record]
        idle = {p.name: rule.count for plan in silent for _, p, rule in plan.governed_now()}
        self.stats = ClipStats.merged([*counted, ClipStats.of_idle(idle, counted[0].max_ratio.device)])


def refuse_scaler(optimizer: Optimizer) -> None:
    """Raise RuntimeError where a GradScaler steps ``optimizer``: its loss scale was on the gradients in backward.

    Only the callers show it. Their local variables are not looked at, because that alone would keep them alive. A
    scaler that is switched off steps from elsewhere.
    """
    # Optimizers that unscale by themselves are told so: by an attribute, or, formerly, by an argument.
    by_argument = "grad_scaler" in inspect.signature(optimizer.step).parameters
    scalers = [torch.amp.GradScaler.step.__code__] if by_argument else []
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_maybe_opt_step" and frame.f_code not in scalers:
        frame = frame.f_back
    if frame is not None or getattr(optimizer, "found_inf", None) is not None:
        raise RuntimeError(
            "during_backward=True cannot be right with a GradScaler: gradients carry its scale in backward; "
            f"{_OTHERWISE}"
        )


def _reduced_by_a_wrapper(tensors: Sequence[Tensor]) -> str | None:
    """Why gradients are not final in backward where parameters came without their wrapper, which alone knows of them.

    The wrapper is looked for among all objects, and what ``gc.freeze()`` has put away is brought back for that long.
    """
    if not dist.is_initialized():
        return None
    frozen = gc.get_freeze_count() > 0
    if frozen:
        gc.collect()  # what is garbage now would stay for good
        gc.unfreeze()
    try:
        return plain.not_in_backward_of(tensors, gc.get_objects())
    finally:
        if frozen:
            gc.freeze()
