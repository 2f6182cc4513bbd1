"""attach(): clipping inside every optimizer step."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import frameworks
from .clipper import Clipper, group_thresholds, held
from .config import AGCConfig
from .frameworks.base import Attachment
from .in_backward import BackwardClipping, refuse_scaler
from .stats import ClipStats


class AGCHook:
    """The handle that `attach` returns. Also a context manager that removes itself.

    Attributes:
        clipper: the `Clipper` that runs.
        stats: the `ClipStats` of the last step, over all optimizers and parameter groups that stepped in it; None
            before the first. With ``during_backward=True``, of the last backward.
    """

    def __init__(
        self, clipper: Clipper, attachment: Attachment | None = None, backward: BackwardClipping | None = None
    ) -> None:
        self.clipper = clipper
        self._attachment = attachment or Attachment(clipper.parameters, [], clipper.config)
        self._backward = backward
        # One step may clip several times: two optimizers, ZeRO's groups and sub-groups. By what each of them holds.
        self._latest: dict[frozenset[int], ClipStats] = {}
        self._undo = ExitStack()
        if backward is not None:
            self._undo.callback(backward.remove)
        for optimizer in self._attachment.optimizers:
            self._undo.callback(optimizer.register_step_pre_hook(self._before_step).remove)
            _mark(optimizer, in_step=backward is None)
            self._undo.callback(_unmark, optimizer)
        self._attachment.attached(self)
        self._undo.callback(self._attachment.removed)

    @property
    def stats(self) -> ClipStats | None:
        if self._backward is not None:
            return self._backward.stats
        return ClipStats.merged(self._latest.values()) if self._latest else None

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            raise ValueError(
                "optimizer.step(closure) computes gradients after AGC would have clipped them: call loss.backward() "
                "and then optimizer.step() without a closure, or call dist_agc.apply_agc(model) inside the closure."
            )
        if self._backward is not None:
            refuse_scaler(optimizer)
        else:
            # GradScaler leaves gradients scaled for optimizers that unscale them themselves (fused Adam).
            self.clip(optimizer, grad_scale=getattr(optimizer, "grad_scale", None))

    # As Optimizer does: a compiled step calls it between two graphs instead of tracing it.
    @torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
    def clip(self, optimizer: Optimizer, grad_scale: Tensor | float | None = None) -> None:
        """Clip what one optimizer holds, now: for loops in which a hook on its step would come too early."""
        self._attachment.before_clip(optimizer)
        tensors = held(optimizer)
        stats = self.clipper.clip(tensors, thresholds=group_thresholds(optimizer), grad_scale=grad_scale)
        if stats is not None:
            key = frozenset(map(id, tensors))
            # What is in the record already steps again: a new step has begun, and with it a new record.
            same_step = all(key.isdisjoint(other) for other in self._latest)
            self._latest = {**(self._latest if same_step else {}), key: stats}

    def remove(self) -> None:
        """Stop clipping. Calling it again does nothing."""
        self._undo.close()

    def __enter__(self) -> AGCHook:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


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
            what = "steps parameters that another optimizer holds, and AGC is attached to that one"
        else:
            return
        warnings.warn(
            f"this {type(optimizer).__name__} {what}, so its gradients are not clipped: call "
            "dist_agc.attach(model, optimizer) for it, after .remove() on the handle of an optimizer that it replaces.",
            UserWarning,
            stacklevel=3,
        )


@cache
def _steps() -> _Steps:
    """Made at the first `attach`: a process that never calls it has no hooks of ours."""
    return _Steps()


def _mark(optimizer: Optimizer, *, in_step: bool) -> None:
    _steps().attached[optimizer] = in_step
    _steps().looked_at.clear()
    marked: Any = OrderedDict(optimizer.defaults)
    marked.clipped_by = "dist_agc"
    optimizer.defaults = marked


def _unmark(optimizer: Optimizer) -> None:
    _steps().attached.pop(optimizer, None)
    optimizer.defaults = dict(optimizer.defaults)


def attach(
    model: nn.Module | Iterable[Tensor] | Any,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    config: AGCConfig | None = None,
    *,
    during_backward: bool = False,
    **options: Any,
) -> AGCHook:
    """Clip inside every ``optimizer.step()`` from now on, after gradients were reduced and before the update.

    Skipped steps (GradScaler, overflow) clip nothing; accumulated gradients are clipped once, whole.
    ``param_group["clipping_threshold"]`` overrides the threshold of one group at any time; None does not clip it.

    Args:
        model: a module (plain, DDP, FSDP1, FSDP2, tensor parallel), already sharded; or a DeepSpeed engine, whose
            config says the rest.
        optimizer: the optimizer of its parameters, or a list of several. Not for a DeepSpeed engine.
        config: an `AGCConfig`; or give its fields as keywords: ``clipping_threshold``, ``eps``, ``exclude``, ``units``,
            ``on_nonfinite``.
        during_backward: clip each gradient as soon as it is final, so that your own post-accumulate-grad hook,
            registered later, can step and free it. For plain modules, FSDP2 and tensor parallelism; the optimizers,
            which are not needed then, only bring the thresholds of their groups.

    Returns:
        A handle with ``.stats`` and ``.remove()``, also a context manager.

    Raises:
        TypeError, ValueError: as `Clipper`; something that is no optimizer, or one that holds none of the model's
            parameters or has AGC attached already; ``during_backward`` with DDP or FSDP1, whose gradients are not
            final in backward.

    Example:
        >>> import torch
        >>> model = nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> hook = attach(model, optimizer, clipping_threshold=0.01)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> int(hook.stats.clipped_units)
        3
        >>> hook.remove()
    """
    framework = frameworks.stepper(model)
    if framework is None:
        settings = AGCConfig.of(config, options)
        optimizers = [] if during_backward and optimizer is None else _optimizers(optimizer)
        attachment = Attachment(frameworks.parameters(model), optimizers, settings)
    elif during_backward:
        name = type(framework).__name__
        raise ValueError(f"during_backward=True is not for {name}: AGC runs inside of engine.step() there.")
    else:
        attachment = framework.attachment(model, frameworks.unwrapped(optimizer), config, options)
    clipper = Clipper.of(attachment.parameters, attachment.config)
    for one in attachment.optimizers:
        if one in _steps().attached:
            raise ValueError(
                f"AGC is attached to this {type(one).__name__} already: call .remove() on the first handle to attach "
                "with other settings."
            )
        # An engine may bring in what its optimizers hold only when it steps.
        if framework is None and not any(map(clipper.holds, held(one))):
            raise ValueError(
                f"the optimizer {type(one).__name__} holds none of the model's parameters: attach after sharding, and "
                "make the optimizer from the parameters of the sharded model."
            )
    if len(set(attachment.optimizers)) != len(attachment.optimizers):
        raise ValueError("the same optimizer was given twice.")
    backward = BackwardClipping(model, clipper, attachment.optimizers) if during_backward else None
    return AGCHook(clipper, attachment, backward)


def _optimizers(given: Any) -> list[Optimizer]:
    found = [frameworks.unwrapped(one) for one in (given if isinstance(given, list | tuple) else [given])]
    if not found:
        raise ValueError("attach needs at least one optimizer, got an empty list.")
    for one in found:
        if not isinstance(one, Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer or a list of them, got {type(one).__name__}.")
    return found
