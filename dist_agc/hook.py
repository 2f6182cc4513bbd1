"""The handle of what `attach` attaches: it clips before every step of its optimizers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from . import steps
from .clipper import Clipper
from .engine.stages import Brought, Meet, Stages
from .frameworks.base import Attachment, makes_state
from .held import Holdings, group_thresholds, thresholds_watched
from .in_backward import BackwardClipping, refuse_scaler
from .model.names import first_of
from .stats import ClipStats

logger = logging.getLogger("dist_agc")


class AGCHook:
    """The handle that `attach` returns. Also a context manager that removes itself. ``print(hook)`` says what it does.

    Attributes:
        clipper: the `Clipper` that runs.
        stats: the `ClipStats` of the last step, over all optimizers and parameter groups that stepped in it; an empty
            one, which is false, before the first. With ``during_backward=True``, of the last backward.
        steps: how many steps it has clipped.
    """

    def __init__(
        self,
        clipper: Clipper,
        attachment: Attachment | None = None,
        backward: BackwardClipping | None = None,
        meet: Meet | None = None,
    ) -> None:
        self.clipper = clipper
        self.steps = 0
        self._warned = False  # that there was nothing to clip
        self._apart = False  # warned that ranks clip gradients of their own
        self._attachment = attachment or Attachment(clipper.parameters, [], clipper.config)
        self._backward = backward
        self._holdings = Holdings(clipper)
        # One step may clip several times: two optimizers, ZeRO's groups and sub-groups. By optimizer and what it held.
        self._latest: dict[tuple[Optimizer, frozenset[object]], ClipStats | None] = {}
        self._stages: Stages | None = None
        self._of_all_stages = ClipStats.of_idle({})
        with ExitStack() as undo:
            if backward is not None:
                undo.callback(backward.remove)
            for optimizer in self._attachment.optimizers:
                if not self._attachment.by_engine:
                    self._holdings.begin(optimizer)
                undo.callback(optimizer.register_step_pre_hook(self._before_step).remove)
                undo.enter_context(thresholds_watched(optimizer, clipper.config.clipping_threshold))
                steps.mark(optimizer, in_step=backward is None)
                undo.callback(steps.unmark, optimizer)
            _tell_all_off(self._attachment.optimizers)
            if meet is not None:  # late: whatever could go wrong on one stage alone has not
                optimizers = self._attachment.optimizers
                groups = (group for optimizer in optimizers for group in self._attachment.groups(optimizer))
                held = {id(p) for group in groups for p in group["params"]}
                options = self._attachment.options
                self._stages = meet(Brought(clipper.parameters, clipper.rules, clipper.config, held, options))
            self._attachment.attached(self)
            undo.callback(self._attachment.removed)
            self._undo = undo.pop_all()  # an error until here leaves nothing behind
        if not dist.is_initialized() or dist.get_rank() == 0:
            logger.info("%s", self._described(". "))

    @property
    def stats(self) -> ClipStats:
        if self._backward is not None:
            return self._backward.stats
        if self._stages is not None:
            return self._of_all_stages
        return ClipStats.merged(stats for stats in self._latest.values() if stats is not None)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and steps.within_own(optimizer):
            return
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            raise ValueError(
                "optimizer.step(closure) computes gradients after AGC would have clipped them: call loss.backward() "
                "and then optimizer.step() without a closure, or call dist_agc.apply_agc(model) inside the closure. "
                "A trainer that hands over a closure, as Lightning's does, needs its callback of dist_agc.integrations."
            )
        if self._backward is not None:
            refuse_scaler(optimizer)
            self._holdings.look_in_backward(optimizer, self._backward.covers)
        else:
            # GradScaler leaves gradients scaled for optimizers that unscale them themselves (fused Adam).
            self.clip(optimizer, grad_scale=getattr(optimizer, "grad_scale", None))

    # As Optimizer does: a compiled step calls it between two graphs instead of tracing it.
    @torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
    def clip(self, optimizer: Optimizer, grad_scale: Tensor | float | None = None) -> None:
        """Clip what one optimizer holds, now: for loops in which a hook on its step would come too early."""
        if makes_state():
            return
        self._attachment.before_clip(optimizer)
        groups = self._attachment.groups(optimizer)
        if self._attachment.by_engine:
            tensors = [p for group in groups for p in group["params"]]
        else:
            tensors = self._holdings.look(optimizer)
        if not self._warned and all(p.grad is None for p in tensors if p.numel()) and any(p.numel() for p in tensors):
            self._warned = True
            if not steps.of_process().told(optimizer):
                warnings.warn(
                    f"the optimizer {type(optimizer).__name__} steps, and none of its {len(tensors)} parameters has a "
                    "gradient: AGC has nothing to clip. Call loss.backward() before step(), and make the optimizer "
                    "from the parameters that the model has now. Where gradients are used and freed inside of "
                    "backward, attach with during_backward=True.",
                    UserWarning,
                    stacklevel=2,
                )
        if not self._apart and (name := self.clipper.unreduced(tensors)):
            self._apart = True
            warnings.warn(
                f"the optimizer {type(optimizer).__name__} steps inside of no_sync(): the gradient of {name!r} is this "
                "rank's alone, and each rank clips its own. This is right where ranks are meant to train apart (local "
                "SGD); else copies of the model drift apart: leave no_sync() before the last backward of a step.",
                UserWarning,
                stacklevel=2,
            )
        thresholds = group_thresholds(groups)
        stats = self.clipper.clip(tensors, thresholds=thresholds, grad_scale=grad_scale, apart=True)
        # By tensor and by name, since another tensor may have come in the place of the one that was clipped before.
        what = frozenset((*map(id, tensors), *(() if stats is None else stats.names)))
        # What this optimizer has clipped already steps again: a new step has begun, and with it a new record.
        if any(other is optimizer and not what.isdisjoint(before) for other, before in self._latest):
            self._latest = {}
        self.steps += not self._latest
        self._latest[optimizer, what] = stats
        if self._stages is not None and stats is not None and self._attachment.step_is_over(self._latest):
            self._of_all_stages = self._stages.complete(ClipStats.merged(filter(None, self._latest.values())))

    def remove(self) -> None:
        """Stop clipping. Calling it again does nothing."""
        self._undo.close()

    def __enter__(self) -> AGCHook:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __reduce__(self) -> Any:
        raise TypeError("an AGCHook cannot be copied or pickled: attach to the copies, attach(model, optimizer).")

    def __repr__(self) -> str:
        return self._described("\n  ") + f"\n  steps clipped so far: {self.steps}"

    def _described(self, between: str) -> str:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        described = f"AGC on {ranks} process{'es' if ranks > 1 else ''}: {self.clipper.described(between)}"
        own = [
            f"{group['clipping_threshold']} in param_groups[{i}] of {type(optimizer).__name__}"
            for optimizer in self._attachment.optimizers
            for i, group in enumerate(optimizer.param_groups)
            if "clipping_threshold" in group
        ]
        return described + (f"{between}thresholds of groups: {first_of(own, 5)}" if own else "")


def _tell_all_off(optimizers: Sequence[Optimizer]) -> None:
    """Warn where no group is to be clipped: maybe a checkpoint says so that was loaded before."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if groups and all(group.get("clipping_threshold", 0.0) is None for group in groups):
        warnings.warn(
            "every group of the optimizer has a clipping_threshold of None, so AGC clips nothing. It may come from a "
            'checkpoint: del group["clipping_threshold"] gives a group the threshold that AGC is attached with.',
            UserWarning,
            stacklevel=5,
        )
