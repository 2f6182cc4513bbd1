"""One planned set of fragments, bound to tensors: what a single call of ``clip`` works on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from .config import AGCConfig
from .fragments import Axis, Fragment
from .plan import Plan
from .reduce import check_agreement
from .stats import ClipStats
from .vectors import Vectors


class Part:
    """The fragments that one call clips, their plan, and the vectors of all their units."""

    def __init__(self, fragments: Sequence[Fragment], config: AGCConfig) -> None:
        self.config = config
        self.plan = Plan(fragments, statistics=config.statistics)
        self._calls = 0
        self._bound: Vectors | None = None

    def clip(self, thresholds: Mapping[int, float | None], grad_scale: Tensor | float | None) -> ClipStats | None:
        plan, config = self.plan, self.config
        per_fragment = [_threshold(thresholds.get(id(f.holder), config.clipping_threshold)) for f in plan.governed]
        weights, grads, problem = _local_tensors(plan.fragments)
        if self._bound is None:
            # A rank that is about to raise tells the others: at the first call, where most mistakes show, none waits.
            try:
                self._agree(per_fragment, problem)
            except RuntimeError as difference:
                if problem is None:
                    raise
                raise problem from difference
        if problem is not None:
            raise problem
        if self._bound is None:
            self._bound = Vectors(plan, config, weights)
        vectors = self._bound
        vectors.set_thresholds(per_fragment)
        fresh = self._calls % config.weight_norm_interval == 0
        self._calls += 1
        vectors.measure(weights if fresh else None, grads, grad_scale)
        stats = vectors.judge(fresh)
        if config.on_nonfinite == "raise" and stats is not None and stats.nonfinite_units > 0:
            bad = [name for name, of in stats.per_parameter.items() if of.nonfinite_units > 0]
            raise FloatingPointError(
                f"{int(stats.nonfinite_units)} units have a gradient that is not finite, in {', '.join(bad[:5])}"
                f"{' and more' if len(bad) > 5 else ''}; no gradient was changed. on_nonfinite='keep' leaves such "
                "units as they are, 'zero' zeroes them."
            )
        if not config.dry_run:
            vectors.scale(grads)
        return stats

    def _agree(self, thresholds: list[float], problem: ValueError | None) -> None:
        """Compare settings and structure along every axis, in an order that all ranks share."""
        fragments = self.plan.fragments
        threshold = dict(zip([f.name for f in self.plan.governed], thresholds, strict=True))
        settings = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        shared: dict[Axis, list[Fragment]] = {}
        for fragment in fragments:
            for axis in fragment.axes:
                shared.setdefault(axis, []).append(fragment)
        checks = []
        for axis in sorted((a for a in shared if a.group is not None and a.size > 1), key=lambda axis: axis.ranks):
            # Only what is shared along this axis: ranks may hold other experts, or other stages of a pipeline.
            here = shared[axis]
            asked = {f.name: threshold[f.name] for f in here if f.rule is not None}
            what = {
                **settings,
                "clipping_threshold": asked if len(set(asked.values())) > 1 else list(asked.values())[:1],
                "parameters": [(f.name, f.numel, f.rule and (f.rule.shape, f.rule.kept)) for f in here],
                "slots": [stage.slots for stage in self.plan.stages if stage.axis == axis],
                "gradients": "as expected" if problem is None else str(problem),
            }
            checks.append((what, axis, here[0].holder.device))
        check_agreement(checks)


def _threshold(value: float | None) -> float:
    return math.inf if value is None else value


def _local_tensors(fragments: Sequence[Fragment]) -> tuple[list[Tensor], list[Tensor | None], ValueError | None]:
    """Every local weight and gradient, and what is wrong with the first that cannot be clipped."""
    weights, grads = [], []
    try:
        for fragment in fragments:
            holder = fragment.holder
            weight, grad = fragment.local(holder), holder.grad
            weights.append(weight)
            if grad is None or not holder.requires_grad:
                grads.append(None)
                continue
            grad = fragment.local(grad)
            if grad.shape != weight.shape or grad.layout != torch.strided:
                _check(fragment, weight, grad)
            grads.append(grad)
    except ValueError as error:
        return [], [], error
    return weights, grads, None


def _check(fragment: Fragment, weight: Tensor, grad: Tensor) -> None:
    if grad.shape != weight.shape:
        raise ValueError(
            f"parameter {fragment.name!r} has a local shape of {tuple(weight.shape)} and a gradient of "
            f"{tuple(grad.shape)}: clip after the gradients were reduced, right before the optimizer's step."
        )
    rule = fragment.rule
    if not grad.is_sparse:
        raise ValueError(f"parameter {fragment.name!r} has a gradient of layout {grad.layout}; expected strided.")
    if rule is not None and (rule.kept != (0,) or grad.sparse_dim() != 1 or fragment.pieces.splits):
        raise ValueError(
            f"parameter {fragment.name!r} has a sparse gradient, which AGC takes only where units are rows and "
            f"dim 0 alone is sparse; its units are numbered by dims {rule.kept} of {rule.shape}. Exclude it."
        )
