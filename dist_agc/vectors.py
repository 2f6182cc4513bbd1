"""The vectors of all units of one plan, and the arithmetic on them.

Every unit's norms live in one vector for all parameters, so that what happens between the norms and the scaling is a
handful of operations a call and not a handful a parameter. Nothing here waits for an accelerator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import AGCConfig
from .fragments import Axis, Block
from .measure import Norms
from .norms import coefficients, scale_, scale_rows_
from .plan import STATISTICS, Plan, Stage
from .reduce import all_reduce, shaped
from .stats import ClipStats

# Writing single rows costs about eight times as much an element as multiplying all of them (measured: 4 to 11), and
# beforehand as much as multiplying this many elements (45 microseconds).
_FEW = 8
_CALLS = 100_000


class Vectors:
    """Tensors of one plan, on one device, kept from call to call.

    ``weights``: the local tensors of ``plan.fragments``. Only their shapes and kinds are read here.
    """

    def __init__(self, plan: Plan, config: AGCConfig, weights: Sequence[Tensor]) -> None:
        self.plan, self.config = plan, config
        self.device = weights[0].device if weights else torch.device("cpu")
        double = any(w.dtype in (torch.float64, torch.complex128) for w in weights)
        self.dtype = torch.float64 if double else torch.float32
        units, governed = plan.local_units, len(plan.governed)
        # Behind the units come excluded parameters, whose gradients are measured for the global norm.
        others = [(i, b) for i, f in enumerate(plan.fragments) if i >= governed for b in f.pieces.blocks]
        blocks, owners = plan.blocks + [b for _, b in others], plan.owners + [i for i, _ in others]
        self.weight, grads = self._zeros(units), self._zeros(units + len(others))
        self.grad, self.excluded = grads[:units], grads[units:]
        self.of_weights = Norms(plan.blocks, plan.owners, weights, self.weight, own=config.cpu_kernel)
        self.of_grads = Norms(blocks, owners, weights, grads, own=config.cpu_kernel)
        self.coefficient = self._zeros(units)
        self.bad: Tensor | None = None  # units whose gradient is not finite
        spans = zip(plan.offsets, plan.offsets[1:], plan.blocks, strict=False)
        self.factors = [self.coefficient[a:b].view(_broadcast(block)) for a, b, block in spans]
        self.offsets = self._integers(plan.offsets)
        self.per_fragment = _Segments(self._integers(plan.units_per_fragment()), units)
        self.split = plan.split.to(self.device)
        self.stages = [_BoundStage(stage, self.device, len(plan.fragments)) for stage in plan.stages]
        self.units = {f.name: f.rule.count for f in plan.governed if f.rule is not None}
        self.coefficients = torch.compile(coefficients, dynamic=True) if config.compile else coefficients
        self.asked: list[float] | None = None
        self.thresholds: Tensor | float = math.inf

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def _integers(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def set_thresholds(self, asked: list[float]) -> None:
        """Thresholds by governed fragment, spread over units and slots only where they differ."""
        if asked == self.asked:
            return
        self.asked = asked
        if len(set(asked)) <= 1:
            self.thresholds = asked[0] if asked else math.inf
            if self.config.compile:  # a tensor, because torch.compile would compile anew for every other number
                self.thresholds = torch.full((), self.thresholds, dtype=self.dtype, device=self.device)
            for stage in self.stages:
                stage.thresholds = self.thresholds
            return
        host = torch.tensor(asked, dtype=self.dtype)
        # From pinned memory the copy does not wait for the device.
        values = (host.pin_memory() if self.device.type == "cuda" else host).to(self.device, non_blocking=True)
        self.thresholds = self.per_fragment.spread(values)
        for stage in self.stages:
            stage.thresholds = stage.owners.spread(values[stage.owner])

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

    def judge(self, fresh: bool, riders: Mapping[Axis, list[Tensor]]) -> ClipStats | None:
        """Complete the sums over ranks and fill the coefficients; statistics on the way.

        ``riders``: by axis, tensors that are added up in the same collective; their sums take their places.
        """
        coefficient, ratio, finite = self.coefficients(self.weight, self.grad, self.thresholds, self.config.eps)
        sums = top = None
        if self.config.statistics:
            none = self.excluded.new_zeros(len(self.excluded), dtype=torch.float64)
            others = torch.stack([none, none, self.excluded.double().square()], 1)
            sums = torch.cat([_sums(coefficient, finite, self.grad, self.split, self.per_fragment), others])
            top = _largest(ratio, self.split)
        waiting = dict(riders)
        for stage in self.stages:
            shares = waiting.pop(stage.stage.axis, [])
            sums, top = self._reduce(stage, fresh, shares, coefficient, finite, sums, top)
        self.coefficient.copy_(coefficient)
        self.bad = ~finite
        return None if sums is None or top is None else ClipStats(self.units, sums, top)

    def _reduce(
        self,
        bound: _BoundStage,
        fresh: bool,
        shares: list[Tensor],
        coefficient: Tensor,
        finite: Tensor,
        sums: Tensor | None,
        top: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """One all-reduce: sends pieces of units and the statistics of whole ones, completes both."""
        stage, slots = bound.stage, bound.stage.slots
        buffer = self._zeros(stage.numel(weights=fresh))
        weight, grad, rest = buffer.split([slots if fresh else 0, slots, len(buffer) - slots * (2 if fresh else 1)])
        grad.index_add_(0, bound.slot, self.grad[bound.local].square_())
        if fresh:
            weight.index_add_(0, bound.slot, self.weight[bound.local].square_())
        if sums is not None and top is not None:
            rest[: STATISTICS * len(stage.reported)] = sums[bound.reported].flatten()
            rest[STATISTICS * len(stage.reported) + stage.axis.rank] = top
        if shares:
            buffer = torch.cat([buffer, *(share.flatten() for share in shares)])
        lengths = [len(weight), slots, len(rest), *(share.numel() for share in shares)]
        weight, grad, rest, *totals = all_reduce(buffer, stage.axis).split(lengths)
        shares[:] = shaped(totals, shares)
        if sums is not None and top is not None:
            sums[bound.reported] = rest[: STATISTICS * len(stage.reported)].view(-1, STATISTICS).to(sums.dtype)
            top = rest[STATISTICS * len(stage.reported) :].amax()
        if not slots:
            return sums, top
        if fresh:
            bound.weight = weight.sqrt()
        grad = grad.sqrt()
        factor, ratio, whole = self.coefficients(bound.weight, grad, bound.thresholds, self.config.eps)
        coefficient[bound.local] = factor[bound.slot]
        finite[bound.local] = whole[bound.slot]
        if len(stage.passing):
            self.grad[bound.local] = grad[bound.slot]
            self.weight[bound.local] = bound.weight[bound.slot]
        if sums is not None and top is not None:
            sums.index_add_(0, bound.owner, _sums(factor, whole, grad, bound.passing, bound.owners))
            top = torch.maximum(top, _largest(ratio, bound.passing))
        return sums, top

    def scale(self, grads: Sequence[Tensor | None]) -> None:
        """Multiply gradients by their coefficients, in place; on CPU only where there is something to do."""
        assert self.bad is not None
        on_cpu, zero = self.device.type == "cpu", self.config.on_nonfinite == "zero"
        clipped = _counts(self.coefficient < 1, self.offsets).tolist() if on_cpu else None
        bad = _counts(self.bad, self.offsets).tolist() if on_cpu and zero else None
        views, factors = [], []
        for at, owner in enumerate(self.plan.owners):
            grad, block, factor = grads[owner], self.plan.blocks[at], self.factors[at]
            if grad is None or (clipped is not None and not clipped[at] and not (bad and bad[at])):
                continue
            if factor.device != grad.device:
                factor = factor.to(grad.device)
            if grad.is_sparse:
                self._scale_sparse(grad, factor, at)
                continue
            view = block.view(grad)
            if clipped is None:
                views.append(view)
                factors.append(factor)
            elif clipped[at] and _are_few(clipped[at], block, view) and (dim := _row_dim(block, view)) is not None:
                rows = torch.nonzero(factor.flatten() < 1).flatten()
                scale_rows_(view.movedim(dim, 0), factor.movedim(dim, 0), rows)
            elif clipped[at]:
                scale_(view, factor)
            if zero and (bad is None or bad[at]):
                view.masked_fill_(self._bad(at).to(view.device), 0)
        if views:
            torch._foreach_mul_(views, factors)  # pyright: ignore[reportPrivateImportUsage]

    def _scale_sparse(self, grad: Tensor, factor: Tensor, at: int) -> None:
        # Scaling is linear, so the entries of a gradient that is not coalesced can be scaled one by one. Not in place:
        # autograd lets two embeddings whose outputs are added share the memory of their values.
        values, rows = grad._values(), grad._indices()[0]
        shape = (-1, *[1] * (values.ndim - 1))
        values = (values * factor.flatten()[rows].view(shape)).to(values.dtype)
        if self.config.on_nonfinite == "zero":
            values.masked_fill_(self._bad(at).to(values.device).flatten()[rows].view(shape), 0)
        grad.data = torch.sparse_coo_tensor(
            grad._indices(), values, grad.shape, is_coalesced=grad.is_coalesced(), check_invariants=False
        )

    def _bad(self, at: int) -> Tensor:
        assert self.bad is not None
        return self.bad[self.plan.offsets[at] : self.plan.offsets[at + 1]].view(self.factors[at].shape)


class _Segments:
    """A vector cut into neighbouring segments."""

    def __init__(self, lengths: Tensor, size: int) -> None:
        self.lengths, self.size = lengths, size
        self.offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

    def spread(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.lengths, output_size=self.size)


class _BoundStage:
    """A stage's index tensors on the device, and the weight norms of its split units."""

    def __init__(self, stage: Stage, device: torch.device, fragments: int) -> None:
        self.stage = stage
        self.local, self.slot, self.passing = (t.to(device) for t in (stage.local, stage.slot, stage.passing))
        self.owner = torch.tensor([i for i, _ in stage.owners], dtype=torch.int64, device=device)
        lengths = torch.tensor([n for _, n in stage.owners], dtype=torch.int64, device=device)
        self.owners = _Segments(lengths, stage.slots)
        everything = stage.reported == tuple(range(fragments))
        self.reported: Any = (
            slice(None) if everything else torch.tensor(stage.reported, dtype=torch.int64, device=device)
        )
        self.thresholds: Tensor | float = math.inf
        self.weight = torch.empty(0, device=device)


def _broadcast(block: Block) -> tuple[int, ...]:
    kept = iter(block.kept)
    ndim = len(block.kept) + len(block.reduced)
    return tuple(1 if d in block.reduced else next(kept) for d in range(ndim))


def _are_few(clipped: int, block: Block, view: Tensor) -> bool:
    """Whether writing the clipped units alone takes less time than multiplying all of them."""
    return _CALLS + _FEW * view.numel() * clipped // block.units < view.numel()


def _row_dim(block: Block, view: Tensor) -> int | None:
    """The dim whose slices are units that lie apart in memory, so that single ones can be written; None without."""
    strides = {d: view.stride(d) for d in range(view.ndim) if view.shape[d] > 1}  # others say nothing
    dims = [d for d in strides if d not in block.reduced]
    if len(dims) != 1 or strides[dims[0]] < max(strides.values()):
        return None
    return dims[0]


def _sums(coefficient: Tensor, finite: Tensor, grad: Tensor, without: Tensor, segments: _Segments) -> Tensor:
    """(segments, 3): clipped units, units that are not finite, squared gradient; leaving out the units ``without``.

    float64, since counts and squares are added up in it. The columns are made one by one: that is six times as fast.
    """
    # Not square_(): double() of a float64 model's norms is those norms themselves, which are still to be reduced.
    clipped, bad, square = coefficient < 1, ~finite, grad.double().square()
    if len(without):
        for column in (clipped, bad, square):
            column.index_fill_(0, without, 0)
    # unsafe: the lengths follow from the plan, and checking them would wait for the device.
    squares = torch.segment_reduce(square, "sum", lengths=segments.lengths, unsafe=True, initial=0)
    counts = [_counts(mask, segments.offsets).double() for mask in (clipped, bad)]
    return torch.stack([*counts, squares], dim=1)


def _counts(mask: Tensor, offsets: Tensor) -> Tensor:
    """How many are true between one offset and the next."""
    before = torch.zeros(len(mask) + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(mask, 0, dtype=torch.int32, out=before[1:])
    return before[offsets].diff()


def _largest(ratio: Tensor, without: Tensor) -> Tensor:
    if not len(ratio):
        return ratio.new_zeros(())
    return (ratio.index_fill(0, without, 0) if len(without) else ratio).amax()
