"""Clipping during backward: each gradient as soon as it is final, so that it can be used and freed at once.

Where the optimizer runs inside of backward no moment exists at which all gradients do, and clipping by a global norm is
impossible. AGC judges every unit by itself, so it needs none.

Private to torch and read here only: the node that runs now (``torch._C._current_autograd_node``),
``Variable._execution_engine`` and the name of ``GradScaler._maybe_opt_step``.
"""

from __future__ import annotations

import gc
import inspect
import sys
import warnings
import weakref
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
from .engine.measure import norm_of
from .frameworks import hooks, modules, not_in_backward, plain
from .held import group_thresholds, held
from .model.parameter import Parameter
from .stats import ClipStats
from .steps import backward_now

_MARK = "_dist_agc_clipped"
_OTHERWISE = "clip in optimizer.step() instead: attach without during_backward."


class BackwardClipping:
    """Clips in post-accumulate-grad hooks: of FSDP2's sharded parameters (after reduce-scatter) and of plain ones.

    Each parameter has an execution, and, where its units are cut or statistics are asked for, a collective of its own.
    Collectives come in the order in which backward makes the gradients. That is the same on all ranks of an SPMD model,
    which FSDP2 and tensor parallelism require anyway.

    Parameters that are frozen later are left out; one that is unfrozen has no hook, so the next backward raises.
    Hooks that are known to step come after ours, whenever they were registered. What comes after ours and changes a
    gradient is looked for in the first backward. ``stats`` are those of the last whole backward.
    """

    def __init__(self, model: object, clipper: Clipper, optimizers: Sequence[Optimizer]) -> None:
        reason = not_in_backward(model) or _reduced_by_a_wrapper([p.tensor for p in clipper.parameters])
        if reason:
            raise ValueError(f"during_backward=True cannot be right here: {reason}; {_OTHERWISE}")
        self.stats = ClipStats.merged([])
        self._optimizers = optimizers
        stepped = set(map(id, held(*optimizers)))
        covered = [p for p in clipper.parameters if not optimizers or id(p.tensor) in stepped]
        self._frozen = [p for p in covered if not p.tensor.requires_grad]
        chosen = [p for p in covered if p.tensor.requires_grad]
        for p in chosen:
            if hooks.comes_too_late(p.tensor):
                raise ValueError(
                    f"parameter {p.name!r} has a post-accumulate-grad hook already, which would see the gradient "
                    "before it is clipped: attach first, then register your own hooks."
                )
        # Where optimizers are known, what they hold is looked at instead; frameworks show other parameters in backward.
        looked_at = not optimizers and all(type(p) is Parameter for p in clipper.parameters)
        self._models = [weakref.ref(one) for one in modules(model) if looked_at]
        self._chosen = {id(p.tensor): p for p in chosen}
        pairs = zip(clipper.parameters, clipper.rules, strict=True)
        self._governed = {id(p.tensor) for p, rule in pairs if rule is not None}
        self._executions = {id(p.tensor): clipper.execution([p.tensor]) for p in chosen}
        # With several devices in one process, autograd has a thread for each, and hooks run at the same time.
        self._lock = Lock()
        self._record: dict[int, ClipStats | None] = {}  # what was clipped since backward began, by parameter
        self._thresholds: dict[int, float | None] = {}  # as they were when backward began
        self._running = False
        self._watched: set[int] = set()  # backwards whose end calls `_ended`
        self._left: dict[int, Tensor] | None = {}  # sizes of the gradients that the first backward has clipped
        self._handles = [p.tensor.register_post_accumulate_grad_hook(self._clip) for p in chosen]
        for p, handle in zip(chosen, self._handles, strict=True):
            hooks.put_first(p.tensor, handle)

    def covers(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has a hook of ours, or had been frozen, which `_begin` looks at."""
        return id(tensor) in self._chosen or any(p.tensor is tensor for p in self._frozen)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _clip(self, tensor: Tensor) -> None:
        key, execution = id(tensor), self._executions[id(tensor)]
        if tensor.grad is None:
            return
        if getattr(tensor.grad, _MARK, False):
            raise RuntimeError(
                f"parameter {self._chosen[key].name!r}: backward added to a gradient that was clipped already, so the "
                "sum is neither. With during_backward=True free gradients before the next backward (p.grad = None, or "
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
        if self._left is not None and key in self._governed:
            self._left[key] = _size(self._chosen[key])

    # The record of one backward. Reentrant checkpointing runs further backwards inside of it, and perhaps all hooks in
    # those, so it ends with the outermost one.

    def _begin(self) -> None:
        if thawed := [p.name for p in self._frozen if p.tensor.requires_grad]:
            raise RuntimeError(
                f"parameter {thawed[0]!r} was frozen when AGC was attached and trains now, unclipped: call "
                ".remove() on the handle and attach again after unfreezing."
            )
        if new := self._new():
            raise RuntimeError(
                f"parameter {new!r} has come since AGC was attached and trains now, unclipped: call .remove() on the "
                "handle and attach again."
            )
        # LOMO makes one in the first backward of a loss in fp16.
        if any(getattr(one, "loss_scaler", None) is not None for one in self._optimizers):
            raise _scaled("LOMO's loss scale")
        self._thresholds = group_thresholds(*(optimizer.param_groups for optimizer in self._optimizers))
        self._record, self._running = {}, True
        self._left = None if self._left is None else {}
        self._watched.clear()

    def _new(self) -> str | None:
        """The name of a parameter that a model has got since."""
        models = (model for ref in self._models if (model := ref()) is not None)
        named = (pair for model in models for pair in model.named_parameters())
        return next((name for name, p in named if p.requires_grad and not self.covers(p)), None)

    def _watch(self) -> None:
        """Have `_ended` called at the end of the backward that runs now."""
        backward = backward_now()
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
        self._look_once()
        counted = [stats for stats in self._record.values() if stats is not None]
        if not counted:
            return
        # Parameters without a gradient have units too.
        silent = [execution.plan for key, execution in self._executions.items() if key not in self._record]
        idle = {p.name: rule.count for plan in silent for _, p, rule in plan.governed_now()}
        self.stats = ClipStats.merged([*counted, ClipStats.of_idle(idle, counted[0].max_ratio.device)])

    def _look_once(self) -> None:
        """Warn where a gradient of the first backward is no longer what was clipped."""
        left, self._left = self._left, None
        if any(size.device.type != "cpu" for size in (left or {}).values()):
            torch.accelerator.synchronize()  # FSDP2 reduces, and we clip, beside the stream that runs now
        kept = ((self._chosen[key], size) for key, size in (left or {}).items())
        if changed := [p.name for p, size in kept if p.tensor.grad is not None and not _is_as_left(p, size)]:
            more = f" and {len(changed) - 1} more parameter{'s' if len(changed) > 2 else ''}" if changed[1:] else ""
            warnings.warn(
                f"the gradient of {changed[0]!r}{more} changed after AGC had clipped it, in the same backward: by a "
                "hook that comes after AGC's, such as one that adds gradients up over ranks. What is stepped with is "
                f"not what was clipped; {_OTHERWISE}",
                UserWarning,
                stacklevel=2,
            )


def _is_as_left(parameter: Parameter, size: Tensor) -> bool:
    same = getattr(parameter.tensor.grad, _MARK, False)
    return same and bool(torch.isclose(_size(parameter), size, rtol=1e-4, atol=0, equal_nan=True))


@torch.no_grad()
def _size(parameter: Parameter) -> Tensor:
    """The sum of the absolute values of this rank's part of a gradient."""
    grad = parameter.tensor.grad
    assert grad is not None
    return norm_of(parameter.local(grad), 1)


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
        raise _scaled("a GradScaler")


def _scaled(by: str) -> RuntimeError:
    return RuntimeError(
        f"during_backward=True cannot be right with {by}: gradients carry its scale in backward; {_OTHERWISE}"
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
