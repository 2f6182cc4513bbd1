"""attach(): clipping inside every optimizer step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .backward import BackwardClipping, refuse_scaler
from .clipper import Clipper, group_thresholds
from .config import AGCConfig, check_threshold
from .stats import ClipStats

_attached: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class AGCHook:
    """The handle that `attach` returns. Also a context manager that removes itself.

    Attributes:
        clipper: the `Clipper` that runs.
        stats: the `ClipStats` of the last step, over all optimizers and parameter groups; None before the first. With
            ``during_backward=True``, of the last backward.
    """

    def __init__(
        self, clipper: Clipper, optimizers: Sequence[Optimizer], backward: BackwardClipping | None = None
    ) -> None:
        self.clipper = clipper
        self._backward = backward
        self._optimizers = list(optimizers)
        self._handles: list[RemovableHandle] = []
        # One step may call the hook several times: two optimizers, ZeRO's groups and sub-groups.
        self._latest: dict[frozenset[int], ClipStats] = {}
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            _attached.add(optimizer)

    @property
    def stats(self) -> ClipStats | None:
        if self._backward is not None:
            return self._backward.stats
        return ClipStats.merged(self._latest.values()) if self._latest else None

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_closure(args[1:], kwargs)
        if self._backward is not None:
            refuse_scaler(optimizer)
            return
        # GradScaler leaves gradients scaled for optimizers that unscale them themselves (fused Adam).
        self.clip(optimizer, grad_scale=getattr(optimizer, "grad_scale", None))

    # As Optimizer does: a compiled step calls it between two graphs instead of tracing it.
    @torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
    def clip(self, optimizer: Optimizer, grad_scale: Tensor | float | None = None) -> None:
        """Clip what one optimizer holds, now: for loops in which a hook on its step would come too early."""
        holders = [p for group in optimizer.param_groups for p in group["params"]]
        stats = self.clipper.clip(
            holders, thresholds=group_thresholds(optimizer.param_groups, check_threshold), grad_scale=grad_scale
        )
        if stats is not None:
            key = frozenset(map(id, holders))
            # A group that has grown takes the place of the one it was.
            self._latest = {k: v for k, v in self._latest.items() if k.isdisjoint(key)} | {key: stats}

    def remove(self) -> None:
        """Stop clipping. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._backward is not None:
            self._backward.remove()
        for optimizer in self._optimizers:
            _attached.discard(optimizer)
        self._optimizers.clear()

    def __enter__(self) -> AGCHook:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def refuse_closure(args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise ValueError where ``optimizer.step`` was given a closure."""
    closure = args[0] if args else kwargs.get("closure")
    if closure is not None:
        raise ValueError(
            "optimizer.step(closure) computes gradients after AGC would have clipped them: call loss.backward() and "
            "then optimizer.step() without a closure, or call dist_agc.apply_agc(model) inside the closure."
        )


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
        TypeError: an unknown option, or something that is no optimizer.
        ValueError: a setting out of range, a pattern that matches nothing, a layout that is not known, an optimizer
            that holds none of the model's parameters or has AGC attached already; ``during_backward`` with DDP or
            FSDP1, whose gradients are not final in backward.

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
    if any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__):
        # The one import upward: attach(engine) is one name for every framework, and only an engine ever comes here.
        from .integrations.deepspeed import attach_engine

        if during_backward:
            raise ValueError("during_backward=True is not for DeepSpeed: AGC runs inside of engine.step() there.")
        return attach_engine(model, unwrapped(optimizer), config, **options)
    settings = AGCConfig.of(config, options)
    given = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    optimizers = [] if during_backward and optimizer is None else [_inner(o) for o in given]
    if not optimizers and not (during_backward and optimizer is None):
        raise ValueError("attach needs at least one optimizer, got an empty list.")
    clipper = Clipper(model, settings)
    for one in optimizers:
        check_free(one)
        held = [p for group in one.param_groups for p in group["params"]]
        if not any(clipper.holds(p) for p in held):
            raise ValueError(
                f"the optimizer {type(one).__name__} holds none of the model's parameters: attach after sharding, and "
                "make the optimizer from the parameters of the sharded model."
            )
    if len(set(map(id, optimizers))) != len(optimizers):
        raise ValueError("the same optimizer was given twice.")
    return AGCHook(clipper, optimizers, BackwardClipping(model, clipper, optimizers) if during_backward else None)


def check_free(optimizer: Optimizer) -> None:
    """Raise ValueError where AGC is attached already."""
    if optimizer in _attached:
        raise ValueError(
            f"AGC is attached to this {type(optimizer).__name__} already: call .remove() on the first handle to attach "
            "with other settings."
        )


def unwrapped(optimizer: Any) -> Any:
    """What Accelerate and Lightning Fabric wrap: their own optimizers cannot take hooks, or take them half."""
    wrappers = ("AcceleratedOptimizer", "_FabricOptimizer")
    return optimizer.optimizer if any(k.__name__ in wrappers for k in type(optimizer).__mro__) else optimizer


def _inner(optimizer: object) -> Optimizer:
    optimizer = unwrapped(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer or a list of them, got {type(optimizer).__name__}.")
    return optimizer
