"""attach(): clipping inside every optimizer step."""

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

from . import frameworks, steps
from .clipper import Clipper
from .config import AGCConfig
from .engine.stages import Meet, Stages, meeting
from .frameworks import Model
from .frameworks.base import Attachment, Framework, group_axis, is_a, makes_state
from .frameworks.hooks import stepped_in_backward
from .held import Holdings, group_thresholds, held, thresholds_watched
from .in_backward import BackwardClipping, refuse_scaler
from .model.blocks import Axis
from .model.names import first_of
from .model.parameter import all_zero
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
            self._attachment.attached(self)
            undo.callback(self._attachment.removed)
            if meet is not None:  # last: whatever could go wrong on one stage alone has not
                self._stages = meet(clipper.parameters, clipper.rules, clipper.config)
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
            stacklevel=4,
        )


def attach(
    model: Model | Any,
    optimizer: Optimizer | Sequence[Optimizer] | Any = None,
    config: AGCConfig | None = None,
    *,
    during_backward: bool = False,
    pipeline: Any = None,
    **options: Any,
) -> AGCHook:
    """Clip inside every ``optimizer.step()`` from now on, after gradients were reduced and before the update.

    Skipped steps (GradScaler, overflow) clip nothing; accumulated gradients are clipped once, whole.
    ``param_group["clipping_threshold"]`` overrides the threshold of one group at any time; None does not clip it.
    What the model or the optimizer gets later (a new head, an adapter, a grown embedding) is clipped too; what an
    optimizer holds beside the model is not, and a warning says so.

    Args:
        model: a module (plain, DDP, FSDP1, FSDP2, tensor parallel), already sharded; a list of several; a list of
            parameters; or a DeepSpeed engine, whose config says the rest; or Megatron's model chunks.
        optimizer: the optimizer of its parameters, or a list of several. Not for a DeepSpeed engine. With Megatron's
            model chunks, what ``get_megatron_optimizer`` returned.
        config: an `AGCConfig`; or give its fields as keywords, see ``options``.
        during_backward: clip each gradient as soon as it is final, so that your own post-accumulate-grad hook,
            registered later, can step and free it; for LOMO and the like too, which do so by themselves. For plain
            modules, FSDP2 and tensor parallelism; the optimizers, which are not needed then, only bring the thresholds
            of their groups.
        pipeline: the process group of the ranks that hold the stages of one model, of which ``model`` lists this
            rank's. Patterns then have to match on some stage, and statistics cover all: one small collective more a
            step, none with ``statistics=False``. All of its ranks must call `attach`, and step all of their
            optimizers in each step. Names that two ranks have begin with ``pipeline0.``, the place in the group, in
            statistics. A DeepSpeed engine and Megatron know their stages.
        options: the fields of `AGCConfig`, which says what each does: ``clipping_threshold``, ``eps``, ``exclude``,
            ``units``, ``on_nonfinite``, ``dry_run``, ``statistics``, ``weight_norm_interval``, ``compile``,
            ``cpu_kernel``.

    Returns:
        A handle with ``.stats`` and ``.remove()``, also a context manager.

    Raises:
        TypeError, ValueError: as `Clipper`; something that is no optimizer, or one that holds none of the model's
            parameters, takes no hooks or has AGC attached already; ``during_backward`` with DDP or FSDP1, whose
            gradients are not final in backward; no ``during_backward`` where hooks are known to step there. Nothing is
            attached then.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> hook = attach(model, optimizer, clipping_threshold=0.01)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> int(hook.stats.clipped_units)
        3
        >>> hook.remove()
    """
    framework = frameworks.stepper(model, optimizer)
    with meeting(_stages_of(model, framework, pipeline)) as meet:
        if framework is None:
            settings = AGCConfig.of(config, options)
            optimizers = [] if during_backward and optimizer is None else _optimizers(optimizer)
            attachment = Attachment(frameworks.parameters(model), optimizers, settings)
        elif during_backward:
            name = type(framework).__name__
            raise ValueError(f"during_backward=True is not for {name}: AGC runs inside of its own step there.")
        else:
            attachment = framework.attachment(model, frameworks.unwrapped(optimizer), config, options)
        return _attached(model, attachment, during_backward, meet)


def _stages_of(model: Any, framework: Framework | None, pipeline: Any) -> Axis | None:
    """The ranks that hold the stages of one model; None where this one has all of it."""
    if framework is not None:
        if pipeline is not None:
            raise ValueError(f"pipeline= is not for {type(framework).__name__}, which knows the stages of its engine.")
        group = framework.pipeline(model)
    else:
        if pipeline is not None and not (dist.is_initialized() and isinstance(pipeline, dist.ProcessGroup)):
            raise TypeError(
                "pipeline must be the torch.distributed process group of the ranks that hold the stages of one model, "
                f"such as mesh['pp'].get_group(); got {type(pipeline).__name__}."
            )
        group = pipeline
    axis = None if group is None else group_axis(group)
    return axis if axis is not None and axis.size > 1 else None


def _attached(model: Any, attachment: Attachment, during_backward: bool, meet: Meet | None) -> AGCHook:
    if meet is not None and during_backward:
        raise ValueError(
            "during_backward=True is not for a pipeline: its backward has no end at which stages could add up what was "
            "clipped. Attach on each stage without pipeline=."
        )
    if meet is not None and attachment.config.on_nonfinite == "raise":
        raise ValueError(
            "on_nonfinite='raise' is not for a pipeline: it would stop the ranks of one stage, for which all others "
            "wait. Take 'zero' or 'keep', and look at stats.nonfinite_units, which all stages know."
        )
    if nowhere := [p.name for p in attachment.parameters if p.trains and p.tensor.is_meta]:
        raise ValueError(
            f"parameter {nowhere[0]!r} is on the meta device, and has no weights yet: attach when the model has been "
            "moved to where it trains, and make the optimizer from its parameters there."
        )
    if not during_backward:
        _refuse_late_steps(attachment)
    models = [] if attachment.by_engine else frameworks.modules(model)
    clipper = Clipper.of(attachment.parameters, attachment.config, models, checked=meet is None)
    for one in attachment.optimizers:
        if one in steps.of_process().attached:
            raise ValueError(
                f"AGC is attached to this {type(one).__name__} already: call .remove() on the first handle to attach "
                "with other settings."
            )
    if len(set(attachment.optimizers)) != len(attachment.optimizers):
        raise ValueError("the same optimizer was given twice.")
    _tell_zeros(clipper)
    backward = BackwardClipping(model, clipper, attachment.optimizers) if during_backward else None
    return AGCHook(clipper, attachment, backward, meet)


def _tell_zeros(clipper: Clipper) -> None:
    """One warning for all weights that begin at zero: an ordinary threshold makes SGD leave them there."""
    config = clipper.config
    pairs = zip(clipper.parameters, clipper.rules, strict=True)
    names = [p.name for p in all_zero([p for p, rule in pairs if rule is not None])]
    if names and not config.dry_run:
        warnings.warn(
            f"the weights of {first_of(map(repr, names), 3)} are all zero now. Until the weight norm of a unit "
            f"is above eps, AGC clips its gradient to clipping_threshold * eps = {config.clipping_threshold:g} * "
            f"{config.eps:g}, by which SGD trains next to nothing. Leave them out, exclude=({names[0]!r},), or raise "
            "eps. Adam and its like divide by the size of gradients and make up for most of it.",
            UserWarning,
            stacklevel=3,
        )


def _refuse_late_steps(attachment: Attachment) -> None:
    """Where hooks that are known step in backward what the optimizers hold, or all there is where that is nothing."""
    mine = set(map(id, held(*attachment.optimizers)))
    stepped = [p for p in attachment.parameters if id(p.tensor) in mine] or attachment.parameters
    for p in stepped:
        if whose := stepped_in_backward(p.tensor):
            raise ValueError(
                f"parameter {p.name!r} is stepped inside of backward, by {whose}, before optimizer.step() comes in "
                "which AGC would clip: attach with during_backward=True, in the Trainer "
                "AGCCallback(during_backward=True)."
            )


def _optimizers(given: Any) -> list[Optimizer]:
    found = [frameworks.unwrapped(one) for one in (given if isinstance(given, list | tuple) else [given])]
    if not found:
        raise ValueError("attach needs at least one optimizer, got an empty list.")
    for one in found:
        if is_a(one, "CPUOffloadOptimizer"):  # torchao's
            raise ValueError(
                "a CPUOffloadOptimizer copies gradients to the host in backward, before its step: clip there, with "
                "dist_agc.attach(model, during_backward=True) before the optimizer is made."
            )
        inside = steps.inside(one)
        advice = f" Attach to the optimizer inside of it: optimizer.{inside}." if inside else ""
        if not isinstance(one, Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer or a list of them, got {type(one).__name__}.{advice}")
        if not hasattr(one, "_optimizer_step_pre_hooks"):
            raise ValueError(
                f"the {type(one).__name__} takes no step hooks, because its class does not call "
                f"torch.optim.Optimizer.__init__.{advice or ' Call it there.'}"
            )
    return found
