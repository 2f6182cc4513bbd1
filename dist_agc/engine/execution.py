"""Tensors bound to a plan, and the flow of one clipping: collect, measure, judge, complete, judge, scale.

Every unit's norms live in one vector for all parameters, so that what happens between the norms and the scaling is a
handful of operations a call and not a handful a parameter. Nothing here waits for an accelerator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import AGCConfig
from ..model.parameter import Parameter
from ..model.units import UnitRule
from ..rules.agc import AGC
from ..stats import ClipStats
from .agreement import agree
from .collectives import Packing, all_reduce
from .counts import ByParameter, Counts, Judged, Tally
from .kernels import Scaling
from .measure import Norms
from .plan import AxisPlan, Plan
from .shares import Shares

# A unit that was just clipped lies within rounding of its limit: it is not clipped again. (In 16 bits its elements
# themselves are rounded, so there a second clipping may change their last bit.)
AT_LIMIT = 1.0 - 4 * torch.finfo(torch.float32).eps


def judge(rule: AGC, weight_norm: Tensor, grad_norm: Tensor, limit: float | Tensor) -> Judged:
    """The rule on complete norms, of which those of gradients may be inf or nan; such units get a coefficient of 1."""
    known = grad_norm.nan_to_num(nan=0.0, posinf=0.0)
    coefficient, ratio = rule.judge(weight_norm, known, limit)
    return Judged(torch.where(coefficient < AT_LIMIT, coefficient, 1.0), ratio, known == grad_norm, grad_norm)


class Execution:
    """One plan, and the tensors that it needs, kept from call to call.

    The plan is made at once. Ranks compare it, and tensors are made, at the first call, which knows the devices.
    """

    def __init__(self, parameters: Sequence[Parameter], rules: Sequence[UnitRule | None], config: AGCConfig) -> None:
        self.config = config
        self.plan = Plan(parameters, rules)
        self._calls = 0
        self._shares: Shares | None = None
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
        limits = [math.inf if value is None else value for value in asked]
        weights, grads, bound, shares = self._begin(limits)
        complete, summed = shares.add_up(weights, grads)
        fresh = self._calls % config.weight_norm_interval == 0
        self._calls += 1
        bound.set_limits(limits)
        bound.measure(weights if fresh else None, complete, grad_scale)
        sums, top = bound.judge_all(Counts() if config.statistics else None, fresh)
        stats = None if sums is None or top is None else self._statistics(sums, top)
        if stats is not None and config.on_nonfinite == "raise" and stats.nonfinite_units > 0:
            bad = [name for name, of in stats.per_parameter.items() if of.nonfinite_units > 0]
            raise FloatingPointError(
                f"{int(stats.nonfinite_units)} units have a gradient that is not finite, in {', '.join(bad[:5])}"
                f"{' and more' if len(bad) > 5 else ''}; no gradient was changed. on_nonfinite='keep' leaves such "
                "units as they are, 'zero' zeroes them."
            )
        if not config.dry_run:
            grads = [None if held is None else total for held, total in zip(grads, complete, strict=True)]
            bound.scaling.scale(grads)
            shares.settle(summed, grads)
        return stats

    def ratios(self, tally: Tally) -> Tensor:
        """Count units by ratio, one row for each governed parameter. Changes no gradient."""
        weights, grads, bound, shares = self._begin([self.config.clipping_threshold] * self.plan.governed)
        grads, _ = shares.add_up(weights, grads)
        kept = bound.weight.clone(), [axis.weight for axis in bound.axes]
        bound.measure(weights, grads, None)
        sums, _ = bound.judge_all(tally, True)
        bound.weight.copy_(kept[0])  # clipping goes on with the weight norms that it had
        for axis, weight in zip(bound.axes, kept[1], strict=True):
            axis.weight = weight
        assert sums is not None
        return sums[: self.plan.governed]

    def _begin(self, limits: list[float]) -> tuple[list[Tensor], list[Tensor | None], _Bound, Shares]:
        """Weights and gradients, checked. At the first call ranks compare what they have, most mistakes show here."""
        weights, grads, problem = collect(self.plan)
        if self._bound is None or self._shares is None:
            axes = agree(self.plan, self.config, limits, problem)
            if problem is None:
                self._shares = Shares(self.plan, axes, grads)
                self._bound = _Bound(self.plan, self.config, weights)
        if problem is not None or self._bound is None or self._shares is None:
            assert problem is not None
            raise problem
        return weights, grads, self._bound, self._shares

    def _statistics(self, sums: Tensor, top: Tensor) -> ClipStats:
        plan = self.plan
        governed = plan.governed_now()
        if len(governed) < plan.governed:
            rows = [*(i for i, _, _ in governed), *range(plan.governed, len(plan.parameters))]
            sums = sums.index_select(0, torch.tensor(rows, device="cpu").to(sums.device, non_blocking=True))
        return ClipStats({p.name: rule.count for _, p, rule in governed}, sums, top)


def collect(plan: Plan) -> tuple[list[Tensor], list[Tensor | None], ValueError | None]:
    """Weights and gradients in the order of ``plan.parameters``, and why the first that cannot be clipped cannot.

    The problem is returned and not raised, so that other ranks can be told of it.
    """
    weights: list[Tensor] = []
    grads: list[Tensor | None] = []
    try:
        for i, parameter in enumerate(plan.parameters):
            weight, grad = parameter.weight(), parameter.gradient()
            if grad is not None and (grad.shape != weight.shape or grad.layout != torch.strided or 0 in grad.stride()):
                _check(parameter, weight, grad, plan, i)
            weights.append(weight)
            grads.append(grad)
    except ValueError as error:
        return [], [], error
    return weights, grads, None


def _check(parameter: Parameter, weight: Tensor, grad: Tensor, plan: Plan, i: int) -> None:
    if grad.shape != weight.shape:
        raise ValueError(
            f"parameter {parameter.name!r} has a local shape of {tuple(weight.shape)} and a gradient of "
            f"{tuple(grad.shape)}: clip after the gradients were reduced, right before the optimizer's step."
        )
    if grad.layout == torch.strided:
        if grad.numel() and any(
            stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True)
        ):
            raise ValueError(
                f"parameter {parameter.name!r} has a gradient with several elements in one place of memory (an "
                "expanded tensor), which cannot be scaled in place: give it one of its own, grad.clone()."
            )
        return
    if not grad.is_sparse:
        raise ValueError(f"parameter {parameter.name!r} has a gradient of layout {grad.layout}; expected strided.")
    if i >= plan.governed:
        return
    rule = plan.rules[i]
    if rule.kept != (0,) or grad.sparse_dim() != 1 or any(i in dict(axis.owners) for axis in plan.axes):
        raise ValueError(
            f"parameter {parameter.name!r} has a sparse gradient, which AGC takes only where units are rows and "
            f"dim 0 alone is sparse; its units are numbered by dims {rule.kept} of {rule.shape}. Exclude it."
        )


class _Bound:
    """The vectors and index tensors of one plan, on one device.

    ``weights``: the local tensors of ``plan.parameters``. Only their shapes and kinds are read here.
    """

    def __init__(self, plan: Plan, config: AGCConfig, weights: Sequence[Tensor]) -> None:
        self.plan = plan
        self.rule = AGC(config.clipping_threshold, config.eps)
        # Where most of the work is: on an accelerator, if anything lies on one.
        devices = [w.device for w in weights]
        self.device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        double = any(w.dtype in (torch.float64, torch.complex128) for w in weights)
        self.dtype = torch.float64 if double else torch.float32
        blocks, owners = [b for b, _ in plan.others], [i for _, i in plan.others]
        self.weight = self._zeros(plan.local_units)
        grads = self._zeros(plan.local_units + len(blocks))
        self.grad, self.excluded = grads[: plan.local_units], grads[plan.local_units :]
        own = config.cpu_kernel
        self.of_weights = Norms(plan.blocks, plan.owners, weights, self.weight, own=own)
        self.of_grads = Norms(plan.blocks + blocks, plan.owners + owners, weights, grads, own=own)
        self.coefficient = self._zeros(plan.local_units)
        self.scaling = Scaling(plan, self.coefficient, devices, zero=config.on_nonfinite == "zero")
        self.whole = ByParameter(plan.whole_units, self.device)
        self.axes = [_BoundAxis(axis, self) for axis in plan.axes]
        self._judge = torch.compile(judge, dynamic=True) if config.compile else judge
        self._limits: list[float] | None = None
        self._limit_as_tensor = config.compile  # torch.compile would compile anew for every other number
        self.limit: Tensor | float = math.inf

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def set_limits(self, asked: list[float]) -> None:
        """Thresholds by governed parameter, spread over units only where they differ."""
        if asked == self._limits:
            return
        self._limits = asked
        if len(set(asked)) <= 1:
            self.limit = asked[0] if asked else math.inf
            if self._limit_as_tensor:
                self.limit = torch.full((), self.limit, dtype=self.dtype, device=self.device)
            for axis in self.axes:
                axis.limit = self.limit
            return
        host = torch.tensor(asked, dtype=self.dtype, device="cpu")
        # From pinned memory the copy does not wait for the device.
        values = (host.pin_memory() if self.device.type == "cuda" else host).to(self.device, non_blocking=True)
        self.limit = self.whole.spread(values)
        for axis in self.axes:
            axis.limit = axis.complete.spread(values[axis.owner])

    def measure(
        self, weights: Sequence[Tensor] | None, grads: Sequence[Tensor | None], grad_scale: Tensor | float | None
    ) -> None:
        """Fill the vectors of local norms: each weight (unless it is None: reused) and each gradient is read once.

        Gradients first, since backward has just written them: some may still be in a cache.
        """
        self.of_grads.fill(grads)
        if grad_scale is not None:
            self.of_grads.out.div_(grad_scale)
        if weights is not None:
            self.of_weights.fill(weights)

    def judge(self, weight: Tensor, grad: Tensor, limit: float | Tensor) -> Judged:
        return Judged(*self._judge(self.rule, weight, grad, limit))

    def judge_all(self, tally: Tally | None, fresh: bool) -> tuple[Tensor | None, Tensor | None]:
        """Judge the whole units, then, axis by axis, those that it completes. Fills the coefficients.

        Returns what was tallied, one row for each parameter, and the largest ratio. Both are global.
        """
        whole = self.plan.whole
        judged = self.judge(self.weight[:whole], self.grad[:whole], self.limit)
        totals = None
        if tally is not None:
            rows = torch.cat([tally.count(judged, self.whole), tally.excluded(self.excluded)])
            totals = _Totals(tally, rows, _largest(judged.ratio))
        self.coefficient[:whole] = judged.coefficient
        self.scaling.note(slice(0, whole), judged.finite)
        squares: list[_Squares] = []
        for axis in self.axes:
            if totals is None and not axis.plan.slots:
                squares.append(_Squares(axis.weight, axis.weight))  # an axis that is there for the counts alone
                continue
            squares.append(axis.complete_squares(squares, fresh, totals))
            if axis.plan.slots:
                axis.judge(squares[-1], totals)
        return (None, None) if totals is None else (totals.rows, totals.top)


class _Totals:
    """What is tallied so far: rows by parameter, and the largest ratio."""

    def __init__(self, tally: Tally, rows: Tensor, top: Tensor) -> None:
        self.tally, self.rows, self.top = tally, rows, top


class _Squares(NamedTuple):
    """Squared norms in the slots of an axis."""

    weight: Tensor
    grad: Tensor


class _BoundAxis:
    """One axis of the plan: its index tensors on the device, and the weight norms of the units cut along it."""

    def __init__(self, plan: AxisPlan, bound: _Bound) -> None:
        self.plan, self.bound, device = plan, bound, bound.device
        self.pieces = Packing(plan.pieces, device)
        self.carried = [(before, Packing(slots, device)) for before, slots in plan.carried]
        self.ready = None if plan.complete is None else plan.complete.to(device)
        self.local, self.place = plan.local.source.to(device), plan.local.slot.to(device)
        self.owner = torch.tensor([i for i, _ in plan.owners], dtype=torch.int64, device=device)
        self.complete = ByParameter([n for _, n in plan.owners], device)
        everything = plan.reported == tuple(range(len(bound.plan.parameters)))
        self.reported = slice(None) if everything else torch.tensor(plan.reported, dtype=torch.int64, device=device)
        self.limit: Tensor | float = math.inf
        self.weight = torch.empty(0, dtype=bound.dtype, device=device)  # squares, from the last call that measured

    def complete_squares(self, earlier: Sequence[_Squares], fresh: bool, totals: _Totals | None) -> _Squares:
        """One all-reduce: sends squares of pieces and the counts so far, completes both."""
        plan, bound, slots = self.plan, self.bound, self.plan.slots
        columns = 0 if totals is None else totals.tally.columns
        buffer = bound._zeros(plan.numel(weights=fresh, columns=columns))
        weight, grad, counts = buffer.split([slots if fresh else 0, slots, len(buffer) - slots * (2 if fresh else 1)])
        if slots:
            self.pieces.add(bound.grad.square(), grad)
            for before, slot in self.carried:
                slot.add(earlier[before].grad, grad)
            if fresh:
                self.pieces.add(bound.weight.square(), weight)
                for before, slot in self.carried:
                    slot.add(earlier[before].weight, weight)
        width = columns * len(plan.reported)
        if totals is not None:
            counts[:width] = totals.rows[self.reported].flatten()
            counts[width + plan.axis.rank] = totals.top
        weight, grad, counts = all_reduce(buffer, plan.axis).split([len(weight), slots, len(counts)])
        if totals is not None:
            totals.rows[self.reported] = counts[:width].view(-1, columns).to(totals.rows.dtype)
            totals.top = counts[width:].amax()
        if fresh:
            self.weight = weight
        return _Squares(self.weight, grad)

    def judge(self, squares: _Squares, totals: _Totals | None) -> None:
        """Judge the units that are complete now, each once; every rank of the axis judges them alike."""
        weight, grad = squares if self.ready is None else (x.index_select(0, self.ready) for x in squares)
        judged = self.bound.judge(weight.sqrt(), grad.sqrt(), self.limit)
        self.bound.coefficient[self.local] = judged.coefficient[self.place]
        self.bound.scaling.note(self.local, judged.finite, self.place)
        if totals is not None:
            # An owner stands here once, so that nothing is added to one row twice.
            totals.rows[self.owner] += totals.tally.count(judged, self.complete)
            totals.top = torch.maximum(totals.top, _largest(judged.ratio))


def _largest(ratio: Tensor) -> Tensor:
    return ratio.amax() if len(ratio) else ratio.new_zeros(())
