"""The steps of all optimizers in this process: which of them clip, which do not and should, which run inside of others.

Private to torch and read here only: the code of ``Optimizer.profile_hook_step``, which runs the hooks of a step, and
``torch._C._current_graph_task_id``.
"""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .held import held

# torch hangs its hooks on the step of a class. Where that calls the step of a class above it, which has been used by
# itself before, they run once more, on gradients that may have been changed in between.
_STEP = Optimizer.profile_hook_step(lambda: None).__code__


def within_own(optimizer: Optimizer) -> bool:
    """Whether the hook that asks runs inside of another step of the same optimizer."""
    frame, steps = sys._getframe(1), 0
    while frame is not None and steps < 2:
        steps += frame.f_code is _STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps > 1


def backward_now() -> int:
    """The number of the backward that runs now, in this thread; -1 where none does."""
    return torch._C._current_graph_task_id()


# AGC warns of steps that it does not clip, though it is attached to the original of a copied optimizer, or to another
# optimizer over the same parameters. A copy has lost its hooks (torch drops them) and still has its ``defaults``. These
# carry a mark: an attribute of the dict and no entry in it, so that nothing else sees it. Containers and wrappers step
# one optimizer inside of another, so whether something was clipped is known when the step has ended.


class _Steps:
    """The steps of every optimizer in this process."""

    def __init__(self) -> None:
        self.attached: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()  # whether steps clip, and not backward
        self.looked_at: WeakSet[Optimizer] = WeakSet()
        self._began: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()  # the latest step's number
        self._running: WeakSet[Optimizer] = WeakSet()
        self._in_backward: WeakSet[Optimizer] = WeakSet()  # attached, and others step their parameters in backward
        self._number = 0
        register_optimizer_step_pre_hook(self._before)
        register_optimizer_step_post_hook(self._after)

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        if torch.compiler.is_compiling():  # torch.compile leaves this out of a compiled step, attached or not
            return
        self._number += 1
        self._began[optimizer] = self._number
        self._running.add(optimizer)

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._running.discard(optimizer)
        if optimizer in self.attached or optimizer in self.looked_at:
            return
        self.looked_at.add(optimizer)
        came, mine = self._began.get(optimizer, 0), set(map(id, held(optimizer)))
        in_step = (one for one, clips in self.attached.items() if clips)
        clipping = [one for one in in_step if not mine.isdisjoint(map(id, held(one)))]
        if hasattr(optimizer.defaults, "clipped_by"):
            what = "is a copy of one that AGC is attached to (copied or unpickled: torch leaves hooks behind)"
        elif clipping and not any(one in self._running or self._began.get(one, 0) > came for one in clipping):
            around = next((name for one in clipping if (name := inside(one, optimizer))), None)
            what = "steps parameters that another optimizer holds, and AGC is attached to that one"
            what += f", which keeps this one as .{around}" if around else ""
            if backward_now() >= 0:
                self._tell_of_backward(optimizer, clipping)
                return
        else:
            return
        warnings.warn(
            f"this {type(optimizer).__name__} {what}, so its gradients are not clipped: call "
            "dist_agc.attach(model, optimizer) for it, after .remove() on the handle of an optimizer that it replaces.",
            UserWarning,
            stacklevel=3,
        )

    def _tell_of_backward(self, optimizer: Optimizer, clipping: list[Optimizer]) -> None:
        """Once, though each parameter may have an optimizer of its own."""
        if not all(one in self._in_backward for one in clipping):
            self._in_backward.update(clipping)
            warnings.warn(
                f"this {type(optimizer).__name__} steps inside of backward what {type(clipping[0]).__name__} holds, "
                "and AGC is attached to the step of that one, which comes too late: nothing is clipped. Attach with "
                "during_backward=True, before the hooks are registered that step.",
                UserWarning,
                stacklevel=4,
            )

    def told(self, optimizer: Optimizer) -> bool:
        """Whether it was said that others step what ``optimizer`` holds, in backward."""
        return optimizer in self._in_backward


@cache
def of_process() -> _Steps:
    """Made at the first `attach`: a process that never calls it has no hooks of ours."""
    return _Steps()


def mark(optimizer: Optimizer, *, in_step: bool) -> None:
    of_process().attached[optimizer] = in_step
    of_process().looked_at.clear()
    marked: Any = OrderedDict(optimizer.defaults)
    marked.clipped_by = "dist_agc"
    optimizer.defaults = marked


def unmark(optimizer: Optimizer) -> None:
    of_process().attached.pop(optimizer, None)
    optimizer.defaults = dict(optimizer.defaults)


def inside(optimizer: object, wanted: Optimizer | None = None) -> str | None:
    """The attribute under which an optimizer keeps another one, any or the one that is ``wanted``."""
    inner = {name: value for name, value in getattr(optimizer, "__dict__", {}).items() if isinstance(value, Optimizer)}
    return next((name for name, value in inner.items() if wanted in (None, value)), None)
