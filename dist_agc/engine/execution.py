"""Tensors bound to a plan, and the flow of one clipping: collect, measure, judge, complete, judge, scale.

Every unit's norms live in one vector for all parameters, so that what happens between the norms and the scaling is a
handful of operations a call and not a handful a parameter. Nothing here waits for an accelerator.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from ..config import AGCConfig
from ..model.names import first_of
from ..model.parameter import Parameter, Unknown
from ..model.units import UnitRule
from ..rules.agc import AGC
from ..stats import ClipStats
from . import alike
from .agreement import Once, agree
from .collectives import all_reduce
from .counts import ByParameter, Counts, Judged, Tally
from .kernels import Scaling
from .measure import Norms
from .plan import LARGEST, AxisPlan, Plan
from .reuse import Reuse
from .shares import Shares

# A unit that was just clipped lies within rounding of its limit: it is not clipped again. (In 16 bits its elements
# themselves are rounded, so there a second clipping may change their last bit.)
AT_LIMIT = 1.0 - 4 * torch.finfo(torch.float32).eps


def judge(rule: AGC, weight_norm: Tensor, grad_norm: Tensor, limit: float | Tensor) -> Judged:
    """The rule on complete norms, of which those of gradients may be inf or nan; such units get a coefficient of 1."""
    known = grad_norm.nan_to_num(nan=0.0, posinf=0.0)
    coefficient, ratio = rule.judge(weight_norm, known, limit)
    coefficient = torch.where(coefficient < AT_LIMIT, coefficient, 1.0)
    return Judged(coefficient, ratio, known == grad_norm, grad_norm, weight_norm)


class Execution:
    """One plan. At the first call ranks compare it, and the tensors that it needs are made; they are kept."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        rules: Sequence[UnitRule | None],
        config: AGCConfig,
        once: Once | None = None,
    ) -> None:
        self.config, self._once = config, once or Once()
        pairs = list(zip(parameters, rules, strict=True))
        unread = {p.name: p for p, rule in pairs if rule is None and isinstance(p, Unknown)}
        self._tell_unread({name: str(p.error) for name, p in unread.items() if not p.left_alone})
        pairs = [(p, rule) for p, rule in pairs if p.name not in unread]
        self.plan = Plan([p for p, _ in pairs], [rule for _, rule in pairs])
        self._reuse = Reuse(config.weight_norm_interval)
        self._bound: _Bound | None = None

    def clip(
        self,
        thresholds: Mapping[int, float | None],
        grad_scale: Tensor | float | None,
        clipping_threshold: float | None = None,
    ) -> ClipStats | None:
        """Clip once. ``thresholds``, by ``id`` of what the optimizer holds, take precedence over
        ``clipping_threshold``, and that over the config's."""
        config = self.config
        default = config.clipping_threshold if clipping_threshold is None else clipping_threshold
        asked = (thresholds.get(id(p.tensor), default) for p in self.plan.parameters[: self.plan.governed])
        weights, grads, bound = self._begin([math.inf if value is None else value for value in asked])
        complete = bound.shares.add_up(weights, grads)
        fresh = self._reuse.is_over(weights, [p.tensor for p in self.plan.parameters])
        tally = Counts(config.eps) if config.statistics else None
        bound.judge_all(weights if fresh else [], complete, grad_scale, tally)
        stats = None if tally is None else self._statistics(tally)
        if not config.dry_run:
            scaled = [None if own is None else total for own, total in zip(grads, complete, strict=True)]
            for scaling in bound.scalings:
                scaling.scale(scaled)
            bound.shares.settle(complete)
        return stats

    def ratios(self, tally: Tally) -> Tensor:
        """Count units by ratio, one row for each governed parameter. Changes no gradient."""
        weights, grads, bound = self._begin([self.config.clipping_threshold] * self.plan.governed)
        weight = bound.weight.clone()
        bound.judge_all(weights, bound.shares.add_up(weights, grads), None, tally)
        bound.weight.copy_(weight)  # clipping goes on with the weight norms that it had
        return tally.rows[: self.plan.governed]

    def _begin(self, limits: list[float]) -> tuple[list[Tensor], list[Tensor | None], _Bound]:
        """Weights and gradients, checked. At the first call ranks compare what they have: most mistakes show here."""
        try:
            weights, grads, unread = collect(self.plan)
        except ValueError as problem:
            if self._bound is None:
                with suppress(RuntimeError):  # the others are told, and wait for nothing
                    agree(self.plan, self.config, limits, self._once, str(problem))
            raise
        if self._bound is None:
            shares = Shares(self.plan, agree(self.plan, self.config, limits, self._once), grads)
            self._bound = _Bound(self.plan, self.config, shares, weights)
            alike.compare(self.plan.parameters, weights, grads)
        alike.look()
        self._tell_unread(unread)
        self._bound.set_limits(limits)
        return weights, grads, self._bound

    def _tell_unread(self, found: Mapping[str, str]) -> None:
        """Say once of which excluded parameters the gradients cannot be read. ``found``: by name, the error."""
        new = [name for name in found if name not in self._once.told]
        if new and self.config.statistics:
            self._once.told.update(new)
            warnings.warn(
                f"grad_norm is without the gradients of {first_of(map(repr, new), 5)}: they are excluded, and "
                f"dist_agc cannot read them. {found[new[0]]}",
                UserWarning,
                stacklevel=2,
            )

    def _statistics(self, tally: Counts) -> ClipStats:
        """FloatingPointError: with ``on_nonfinite="raise"``, a gradient that is not finite."""
        plan, sums = self.plan, tally.rows
        governed = plan.governed_now()
        if len(governed) < plan.governed:
            rows = [*(i for i, _, _ in governed), *range(plan.governed, len(plan.parameters))]
            sums = sums.index_select(0, torch.tensor(rows, device="cpu").to(sums.device, non_blocking=True))
        excluded = [p.name for p in plan.parameters[plan.governed :]]
        units, dry_run = {p.name: rule.count for _, p, rule in governed}, self.config.dry_run
        names = [p.name for p in plan.parameters[: plan.governed]]
        stats = ClipStats(units, sums, tally.largest, names, excluded, dry_run=dry_run)
        if self.config.on_nonfinite == "raise" and stats.nonfinite_units > 0:
            bad = [name for name, of in stats.per_parameter.items() if of.nonfinite_units > 0]
            raise FloatingPointError(
                f"{int(stats.nonfinite_units)} units have a gradient that is not finite, in {', '.join(bad[:5])}"
                f"{' and more' if len(bad) > 5 else ''}; no gradient was changed. on_nonfinite='keep' leaves such "
                "units as they are, 'zero' zeroes them."
            )
        return stats


def collect(plan: Plan) -> tuple[list[Tensor], list[Tensor | None], dict[str, str]]:
    """Weights and gradients in the order of ``plan.parameters``. ValueError: one cannot be clipped.

    An excluded gradient that cannot be read counts as none; third are these, by name, with the reasons.
    """
    weights, grads, unread = [p.weight() for p in plan.parameters], list[Tensor | None](), dict[str, str]()
    for i, (p, weight) in enumerate(zip(plan.parameters, weights, strict=True)):
        try:
            grad = p.gradient()
            if grad is not None and (problem := _problem(weight, grad, plan, i)):
                raise ValueError(f"parameter {p.name!r} {problem}")
        except ValueError as reason:
            if i < plan.governed:
                raise
            grad, unread[p.name] = None, str(reason)
        grads.append(grad)
    return weights, grads, unread


def _problem(weight: Tensor, grad: Tensor, plan: Plan, i: int) -> str | None:
    """Why a gradient of parameter ``i`` that lies like this cannot be clipped."""
    if grad.shape != weight.shape:
        return (
            f"has a local shape of {tuple(weight.shape)} and a gradient of {tuple(grad.shape)}: clip after the "
            "gradients were reduced, right before the optimizer's step."
        )
    if grad.layout == torch.strided:
        if i < plan.governed and 0 in grad.stride() and grad.numel() and 0 in grad.squeeze().stride():
            return (
                "has a gradient with several elements in one place of memory (an expanded tensor), which cannot be "
                "scaled in place: give it one of its own, grad.clone()."
            )
    elif not grad.is_sparse:
        return f"has a gradient of layout {grad.layout}; expected strided."
    elif i < plan.governed:
        rule = plan.rules[i]
        if rule.kept != (0,) or grad.sparse_dim() != 1 or any(i in dict(axis.owners) for axis in plan.axes):
            return (
                "has a sparse gradient, which AGC takes only where units are rows and dim 0 alone is sparse; its units "
                f"are numbered by dims {rule.kept} of {rule.shape}. Exclude it."
            )
    return None


class _Bound:
    """One plan on the devices of ``weights``: a vector for each thing that is known of every local unit."""

    def __init__(self, plan: Plan, config: AGCConfig, shares: Shares, weights: Sequence[Tensor]) -> None:
        self.plan, self.shares = plan, shares
        self._rule = AGC(config.clipping_threshold, config.eps)
        self._judge = torch.compile(judge, dynamic=True) if config.compile else judge
        # Where most of the work is: on an accelerator, if anything lies on one.
        devices = [w.device for w in weights]
        self.device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        double = any(w.dtype in (torch.float64, torch.complex128) for w in weights)
        self.dtype = torch.float64 if double else torch.float32
        blocks, owners = [b for b, _ in plan.others], [i for _, i in plan.others]
        self.weight, norms = self.zeros(plan.local_units), self.zeros(plan.local_units + len(blocks))
        self.grad, self._excluded = norms[: plan.local_units], norms[plan.local_units :]
        self._of_weights = Norms(plan.blocks, plan.owners, weights, self.weight, own=config.cpu_kernel)
        self._of_grads = Norms(plan.blocks + blocks, plan.owners + owners, weights, norms, own=config.cpu_kernel)
        self._coefficient = self.zeros(plan.local_units)
        zero = config.on_nonfinite == "zero"
        self._bad = torch.zeros_like(self._coefficient, dtype=torch.bool) if zero else None
        self.scalings = [
            Scaling(plan, devices, device, self._coefficient, self._bad)
            for device in dict.fromkeys(devices[owner] for owner in plan.owners)
        ]
        self._whole = ByParameter(plan.whole_units, self.device)
        self.axes = [_BoundAxis(axis, self) for axis in plan.axes]
        self._limits: list[float] | None = None

    def zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def set_limits(self, asked: list[float]) -> None:
        """Thresholds by governed parameter, spread over units only where they differ."""
        if asked == self._limits:
            return
        self._limits = asked
        alike = len(set(asked)) == 1
        host = torch.tensor(asked[0] if alike else asked, dtype=self.dtype, device="cpu")
        # From pinned memory the copy does not wait for the device.
        values = (host.pin_memory() if self.device.type == "cuda" else host).to(self.device, non_blocking=True)
        self._limit = values if alike else self._whole.spread(values)
        for axis in self.axes:
            axis.limit = values if alike else axis.units.spread(values[axis.owner])

    def judge_all(
        self, weights: list[Tensor], grads: list[Tensor | None], scale: Tensor | float | None, tally: Tally | None
    ) -> None:
        """Measure; judge the whole units; then, axis by axis, complete the cut ones and judge what that completed.

        Fills the coefficients and the tally, which is global then. Each gradient is read once, and so is each weight;
        without ``weights`` their norms are reused.
        """
        self._of_grads.fill(grads)  # backward has just written them: some may still be in a cache
        if scale is not None:
            self._of_grads.out.div_(scale)
        if weights:
            self._of_weights.fill(weights)
        whole = slice(0, self.plan.whole)
        judged = self.judge(self.weight[whole], self.grad[whole], self._limit, whole, slice(None))
        if tally is not None:
            tally.begin(judged, self._whole, self._excluded)
        for axis in self.axes:
            if axis.plan.slots or tally is not None:  # else the axis is there for the counts alone
                axis.complete(tally)
            if axis.plan.slots:
                axis.judge(tally)

    def judge(
        self, weight: Tensor, grad: Tensor, limit: Tensor, units: slice | Tensor, place: slice | Tensor
    ) -> Judged:
        """Judge by complete norms. The local ``units`` get the coefficients of those at ``place``."""
        judged = Judged(*self._judge(self._rule, weight, grad, limit))
        self._coefficient[units] = judged.coefficient[place]
        if self._bad is not None:
            self._bad[units] = ~judged.finite[place]
        return judged


class _BoundAxis:
    """One axis of the plan on the device. ``weight``, ``grad``: the squared norms in its slots, as last measured."""

    def __init__(self, plan: AxisPlan, bound: _Bound) -> None:
        self.plan, self._bound, device = plan, bound, bound.device
        self._pieces, self._local = plan.pieces.to(device), plan.local.to(device)
        self._carried = [(before, slots.to(device)) for before, slots in plan.carried]
        self._ready = None if plan.complete is None else plan.complete.to(device)
        self.owner = torch.tensor([i for i, _ in plan.owners], dtype=torch.int64, device=device)
        self.units = ByParameter([n for _, n in plan.owners], device, [i for i, _ in plan.owners])
        everything = plan.reported == tuple(range(len(bound.plan.parameters)))
        self._reported = slice(None) if everything else torch.tensor(plan.reported, dtype=torch.int64, device=device)
        self.limit = self.weight = self.grad = bound.zeros(0)

    def complete(self, tally: Tally | None) -> None:
        """One all-reduce: sends squares of pieces and the counts so far, completes both.

        Weights that were not measured anew are sent all the same, because another rank may have measured its own.
        """
        plan, bound, slots = self.plan, self._bound, self.plan.slots
        columns = 0 if tally is None else tally.columns
        width = columns * len(plan.reported)
        buffer = bound.zeros(plan.numel(columns))
        sizes = [slots, slots, len(buffer) - 2 * slots]
        weight, grad, counts = buffer.split(sizes)
        if slots:
            self._pack(bound.grad, [bound.axes[before].grad for before, _ in self._carried], grad)
            self._pack(bound.weight, [bound.axes[before].weight for before, _ in self._carried], weight)
        if tally is not None:
            counts[:width] = tally.rows[self._reported].flatten()
            largest = counts[width:].view(-1, *LARGEST)
            if (top := tally.largest()) is not None:
                largest[plan.axis.rank] = top
        self.weight, self.grad, counts = all_reduce(buffer, plan.axis).split(sizes)
        if tally is not None:
            tally.rows[self._reported] = counts[:width].view(-1, columns).to(tally.rows.dtype)
            tally.hear(counts[width:].view(-1, *LARGEST))

    def _pack(self, norms: Tensor, carried: Sequence[Tensor], into: Tensor) -> None:
        self._pieces.add(norms.square(), into)
        for squares, (_, slots) in zip(carried, self._carried, strict=True):
            slots.add(squares, into)

    def judge(self, tally: Tally | None) -> None:
        """Judge the units that are complete now, each once; every rank of the axis judges them alike."""
        weight, grad = (x if self._ready is None else x.index_select(0, self._ready) for x in (self.weight, self.grad))
        judged = self._bound.judge(weight.sqrt(), grad.sqrt(), self.limit, self._local.source, self._local.slot)
        if tally is not None:
            tally.add(judged, self.units, self.owner)
