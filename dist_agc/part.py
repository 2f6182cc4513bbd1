"""One planned set of fragments, bound to tensors: what a single call of ``clip`` works on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from .config import AGCConfig
from .fragments import Axis, Fragment
from .plan import Plan
from .reduce import anywhere, check_agreement
from .shares import Shares, pending
from .stats import ClipStats
from .vectors import Vectors

T = TypeVar("T")


class Part:
    """The fragments that one call clips, their plan, and the vectors of all their units."""

    def __init__(self, fragments: Sequence[Fragment], config: AGCConfig) -> None:
        self.config = config
        self.plan = Plan(fragments, statistics=config.statistics)
        self._calls = 0
        self._shares = Shares({}, self.plan)
        self._bound: list[_Bound] = []

    def clip(
        self,
        thresholds: Mapping[int, float | None],
        grad_scale: Tensor | float | None,
        clipping_threshold: float | None = None,
    ) -> ClipStats | None:
        """Clip once. ``thresholds``, by ``id`` of a holder, take precedence over ``clipping_threshold``, and that over
        the config's."""
        plan, config = self.plan, self.config
        default = config.clipping_threshold if clipping_threshold is None else clipping_threshold
        asked = [_threshold(thresholds.get(id(f.holder), default)) for f in plan.governed]
        weights, grads, problem = _local_tensors(plan.fragments)
        found = pending(plan.fragments, grads)
        if not self._bound or not self._shares.cover(found):
            # A rank that is about to raise tells the others: at the first call, where most mistakes show, none waits.
            try:
                self._shares = self._agree(asked, found, problem)
            except RuntimeError as difference:
                if problem is None:
                    raise
                raise problem from difference
            self._bound = []
        if problem is not None:
            raise problem
        self._bound = self._bound or self._bind(weights)
        fresh = self._calls % config.weight_norm_interval == 0
        self._calls += 1
        self._shares.add_up(weights, grads)
        riders = self._shares.riders(weights, grads)
        parts = []
        for i, bound in enumerate(self._bound):
            if i:
                self._shares.arrived(riders, grads)
            bound.vectors.set_thresholds(bound.of(asked))
            bound.vectors.measure(bound.of(weights) if fresh else None, bound.of(grads), grad_scale)
            parts.append(bound.vectors.judge(fresh, {} if i else riders))
        stats = ClipStats.merged(parts) if config.statistics else None
        if config.on_nonfinite == "raise" and stats is not None and stats.nonfinite_units > 0:
            bad = [name for name, of in stats.per_parameter.items() if of.nonfinite_units > 0]
            raise FloatingPointError(
                f"{int(stats.nonfinite_units)} units have a gradient that is not finite, in {', '.join(bad[:5])}"
                f"{' and more' if len(bad) > 5 else ''}; no gradient was changed. on_nonfinite='keep' leaves such "
                "units as they are, 'zero' zeroes them."
            )
        if not config.dry_run:
            for bound in self._bound:
                bound.vectors.scale(bound.of(grads))
            self._shares.settle(grads)
        return stats

    def _bind(self, weights: Sequence[Tensor]) -> list[_Bound]:
        """The vectors; those of gradients that are sums only after the collectives of the others stand apart."""
        plan, config = self.plan, self.config
        late = {i for which in self._shares.late.values() for i in which}
        if not late:
            return [_Bound(Vectors(plan, config, weights), None)]
        bound = []
        for which in ([i for i in range(len(plan.fragments)) if i not in late], sorted(late)):
            part = Plan([plan.fragments[i] for i in which], statistics=config.statistics)
            bound.append(_Bound(Vectors(part, config, [weights[i] for i in which]), which))
        return bound

    def _agree(self, thresholds: list[float], found: Mapping[Axis, list[int]], problem: ValueError | None) -> Shares:
        """Compare settings and structure along every axis, in an order that all ranks share."""
        fragments = self.plan.fragments
        threshold = dict(zip([f.name for f in self.plan.governed], thresholds, strict=True))
        settings = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        shared: dict[Axis, list[int]] = {}
        for i, fragment in enumerate(fragments):
            for axis in fragment.axes:
                shared.setdefault(axis, []).append(i)
        axes = sorted((a for a in shared if a.group is not None and a.size > 1), key=lambda axis: axis.ranks)
        checks = []
        for axis in axes:
            # Only what is shared along this axis: ranks may hold other experts, or other stages of a pipeline.
            here = [fragments[i] for i in shared[axis]]
            asked = {f.name: threshold[f.name] for f in here if f.rule is not None}
            what = {
                **settings,
                "clipping_threshold": asked if len(set(asked.values())) > 1 else list(asked.values())[:1],
                "parameters": [(f.name, f.numel, f.rule and (f.rule.shape, f.rule.kept)) for f in here],
                "dtypes": [str(f.holder.dtype) for f in here],
                "slots": [stage.slots for stage in self.plan.stages if stage.axis == axis],
                "gradients": "as expected" if problem is None else str(problem),
            }
            checks.append((what, axis, here[0].holder.device))
        check_agreement(checks)
        agreed = {}
        for _, axis, device in checks:
            copies = [i for i in shared[axis] if fragments[i].sums is not None and axis in fragments[i].copies]
            if copies and any(flags := anywhere([i in found.get(axis, ()) for i in copies], axis, device)):
                agreed[axis] = [i for i, flag in zip(copies, flags, strict=True) if flag]
        return Shares(agreed, self.plan)


@dataclass(frozen=True)
class _Bound:
    """Vectors of some of the fragments, by their places; None is all."""

    vectors: Vectors
    which: list[int] | None

    def of(self, values: list[T]) -> list[T]:
        """What belongs to these fragments; of values for governed ones alone, which come first, those."""
        return values if self.which is None else [values[i] for i in self.which if i < len(values)]


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
            if grad.shape != weight.shape or grad.layout != torch.strided or 0 in grad.stride():
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
    if grad.layout == torch.strided:
        if grad.numel() and any(
            stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True)
        ):
            raise ValueError(
                f"parameter {fragment.name!r} has a gradient with several elements in one place of memory (an expanded "
                "tensor), which cannot be scaled in place: give it one of its own, grad.clone()."
            )
        return
    if not grad.is_sparse:
        raise ValueError(f"parameter {fragment.name!r} has a gradient of layout {grad.layout}; expected strided.")
    if rule is not None and (rule.kept != (0,) or grad.sparse_dim() != 1 or fragment.pieces.splits):
        raise ValueError(
            f"parameter {fragment.name!r} has a sparse gradient, which AGC takes only where units are rows and "
            f"dim 0 alone is sparse; its units are numbered by dims {rule.kept} of {rule.shape}. Exclude it."
        )
