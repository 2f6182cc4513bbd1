"""attach(): clipping inside every optimizer step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from . import frameworks, steps
from .clipper import Clipper
from .config import AGCConfig
from .engine.stages import Meet, meeting
from .frameworks import Model
from .frameworks.base import Attachment, Framework, group_axis, is_a
from .frameworks.hooks import stepped_in_backward
from .held import held
from .hook import AGCHook
from .in_backward import BackwardClipping
from .model.blocks import Axis
from .model.names import first_of
from .model.parameter import all_zero


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
            ``cpu_kernel``. For an engine of DeepSpeed and for Megatron's optimizer also ``norm_clipping``: False
            switches their own clipping to a global norm off, True keeps it, both silently. Without it a norm that was
            asked for is kept, with a warning; DeepSpeed's default of 1.0 is switched off, Megatron's is kept.

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
    clipper = Clipper.of(
        attachment.parameters, attachment.config, models, checked=meet is None, options=attachment.options
    )
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
            stacklevel=4,
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
