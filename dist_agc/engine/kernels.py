"""Norms of plain local tensors, and gradients times coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model.blocks import Block
from .counts import trues_before
from .plan import Plan
from .row_norms import row_norms, serves

# Writes L2 norms of a tensor over dims to a tensor, and returns that.
Kernel = Callable[[Tensor, tuple[int, ...], Tensor], Tensor]

# Elements of one leaf of the blockwise CPU path: small enough for the cache and for "no full-size temporary",
# large enough to hide the cost of a call.
_LEAF = 1 << 17
# Leaves whose squares are added up one after another: few enough to keep the error near 1e-7.
_LEAVES = 64
# CPU kernels add up one row in order; longer rows are halved first, which keeps the error near 1e-7 (measured: 1e-5 at
# a million elements in a row, 1e-3 at twenty million).
_LONG = 1 << 13
# The same for units whose elements lie apart in memory: they are added up one by one (measured: 2e-6 at 7,500 of them).
_APART = 1 << 11
# Writing single rows costs about eight times as much an element as multiplying all of them (measured: 4 to 11), and
# beforehand as much as multiplying this many elements (45 microseconds).
_FEW = 8
_CALLS = 100_000


def unit_norms_(x: Tensor, reduced: tuple[int, ...], out: Tensor) -> Tensor:
    """Write the L2 norms of ``x`` over the dims ``reduced`` to ``out``, in the dtype of ``out``, and return that.

    Accelerators take one kernel. CPU kernels convert whole tensors, walk columns slowly and lose digits in long rows,
    so there such tensors are halved until they are easy, and halves meet in ``hypot``.
    """
    if x.is_complex():
        x, reduced = torch.view_as_real(x.resolve_conj()), (*reduced, x.ndim)
    if kernel := one_kernel(x, reduced, out):
        return kernel(x, reduced, out)
    if x.numel() > _APART and _columns(x, reduced):
        dim = max(reduced, key=lambda d: x.shape[d])
        if x.numel() <= _LEAF * min(x.shape[dim], _LEAVES):
            return _column_norms(x, reduced, dim, out)
    dim, halves = _halves(x)
    if dim in reduced:
        first, second = (x.narrow(dim, *half) for half in halves)
        rest = unit_norms_(second, reduced, torch.empty_like(out))
        return torch.hypot(unit_norms_(first, reduced, out), rest, out=out)
    place = sum(d not in reduced for d in range(dim))
    for half in halves:
        unit_norms_(x.narrow(dim, *half), reduced, out.narrow(place, *half))
    return out


def _halves(x: Tensor) -> tuple[int, tuple[tuple[int, int], tuple[int, int]]]:
    """The longest dim, and where its halves begin and how long they are."""
    dim = max(range(x.ndim), key=lambda d: x.shape[d])
    half = x.shape[dim] // 2
    return dim, ((0, half), (half, x.shape[dim] - half))


def _column_norms(x: Tensor, reduced: tuple[int, ...], dim: int, out: Tensor) -> Tensor:
    """Squares of a few slices at a time add up in one leaf along ``dim``, so that memory is read in its order."""
    leaf, *rest = x.split(max(1, _LEAF * x.shape[dim] // x.numel()), dim)
    squares = leaf.to(out.dtype).square()
    for leaf in rest:
        leaf = leaf.to(out.dtype)
        squares.narrow(dim, 0, leaf.shape[dim]).addcmul_(leaf, leaf)
    return torch.sum(squares, dim=reduced, out=out).sqrt_()


def one_kernel(x: Tensor, reduced: tuple[int, ...], out: Tensor, *, own: bool = False) -> Kernel | None:
    """The kernel that alone gives the norms, fast and exactly enough; None where ``x`` wants to be halved.

    ``own``: whether that may be `row_norms`.
    """
    if x.is_complex():
        return None
    if not x.is_cpu or x.numel() == 0:
        return vector_norm
    if own and serves(x, reduced, out):
        return row_norms
    exact = x.numel() <= _LONG * out.numel() and (x.numel() <= _APART or not _columns(x, reduced))
    return vector_norm if exact and (x.dtype == out.dtype or x.numel() <= _LEAF) else None


def vector_norm(x: Tensor, reduced: tuple[int, ...], out: Tensor) -> Tensor:
    """L2 norms over ``reduced`` in the dtype of ``out``, by torch's kernel."""
    if not reduced and x.ndim:  # an empty tuple would mean every dim
        return out.copy_(x.abs())
    return torch.linalg.vector_norm(x, 2, reduced or None, False, dtype=out.dtype, out=out)


def _columns(x: Tensor, reduced: tuple[int, ...]) -> bool:
    """Whether elements of other units lie between those of one unit."""
    strides = [(x.stride(d), d in reduced) for d in range(x.ndim) if x.shape[d] > 1]
    within = [stride for stride, summed in strides if summed]
    return any(stride < max(within, default=0) for stride, summed in strides if not summed)


def scale_(x: Tensor, coefficient: Tensor) -> None:
    """Multiply ``x`` in place by coefficients that broadcast to it, rounding once to the dtype of ``x``."""
    if not x.is_cpu or x.dtype == coefficient.dtype or x.numel() <= _LEAF:
        x.mul_(coefficient)
        return
    dim, halves = _halves(x)
    for half in halves:
        scale_(x.narrow(dim, *half), coefficient if coefficient.shape[dim] == 1 else coefficient.narrow(dim, *half))


def scale_rows_(x: Tensor, coefficient: Tensor, rows: Tensor) -> None:
    """Multiply only the slices ``rows`` of ``x`` along dim 0; ``coefficient`` broadcasts to ``x``."""
    step = max(1, _LEAF * len(x) // max(x.numel(), 1))
    # The kernel writes number by number: in numbers of 16 bytes it writes four times as fast.
    row = x.numel() // max(len(x), 1) * x.element_size()
    wide = x.is_contiguous() and row % 16 == 0 and x.storage_offset() * x.element_size() % 16 == 0
    for some in rows.split(step):
        target, scaled = x, x.index_select(0, some).mul_(coefficient.index_select(0, some))
        if wide:
            target, scaled = (t.view(len(t), -1).view(torch.complex128) for t in (target, scaled))
        target.index_copy_(0, some, scaled)


class Scaling:
    """Scales the gradients of a plan's blocks on one device by ``coefficient``, and zeroes the units that are ``bad``.

    Both have one number for each local unit, and are copied to the device in every call where they lie elsewhere.
    ``devices``: of the gradients, in the order of ``plan.parameters``. ``bad`` is None where nothing is zeroed.
    """

    def __init__(
        self, plan: Plan, devices: Sequence[torch.device], device: torch.device, coefficient: Tensor, bad: Tensor | None
    ) -> None:
        given = [coefficient] if bad is None else [coefficient, bad]
        here = [v if v.device == device else torch.empty_like(v, device=device) for v in given]
        self._copies = [(own, source) for own, source in zip(here, given, strict=True) if own is not source]
        self.coefficient, self.bad = here[0], None if bad is None else here[1]
        self.on_cpu = device.type == "cpu"
        self.blocks, ends = [], []
        for block, owner, start in zip(plan.blocks, plan.owners, plan.offsets, strict=False):
            if devices[owner] == device:
                ends.append((start, start + block.units))
                factor, *mask = (vector[slice(*ends[-1])].view(_broadcast(block)) for vector in here)
                self.blocks.append((block, owner, factor, mask[0] if mask else None))
        self._ends = torch.tensor(ends, dtype=torch.int64, device="cpu")

    def scale(self, grads: Sequence[Tensor | None]) -> None:
        for own, source in self._copies:
            own.copy_(source)
        clipped = self._counts(self.coefficient < 1) if self.on_cpu else None
        bad = self._counts(self.bad) if self.on_cpu and self.bad is not None else None
        views, factors = [], []
        for at, (block, owner, factor, mask) in enumerate(self.blocks):
            grad = grads[owner]
            if grad is None or (clipped is not None and not clipped[at] and not (bad and bad[at])):
                continue
            if grad.is_sparse:
                _scale_sparse(grad, factor, mask)
                continue
            view = block.view(grad)
            if clipped is None:
                views.append(view)
                factors.append(factor)
            elif clipped[at] and (dim := _dim_of_few(clipped[at], block, view)) is not None:
                rows = torch.nonzero(factor.flatten() < 1).flatten()
                scale_rows_(view.movedim(dim, 0), factor.movedim(dim, 0), rows)
            elif clipped[at]:
                scale_(view, factor)
            if mask is not None and (bad is None or bad[at]):
                view.masked_fill_(mask, 0)
        if views:
            torch._foreach_mul_(views, factors)  # pyright: ignore[reportPrivateImportUsage]

    def _counts(self, mask: Tensor) -> list[int]:
        return trues_before(mask)[self._ends].diff().flatten().tolist()


def _scale_sparse(grad: Tensor, factor: Tensor, bad: Tensor | None) -> None:
    # Scaling is linear, so the entries of a gradient that is not coalesced can be scaled one by one. Not in place:
    # autograd lets two embeddings whose outputs are added share the memory of their values.
    values, rows = grad._values(), grad._indices()[0]
    shape = (-1, *[1] * (values.ndim - 1))
    values = (values * factor.flatten()[rows].view(shape)).to(values.dtype)
    if bad is not None:
        values.masked_fill_(bad.flatten()[rows].view(shape), 0)
    grad.data = torch.sparse_coo_tensor(
        grad._indices(),
        values,
        grad.shape,
        device=values.device,
        is_coalesced=grad.is_coalesced(),
        check_invariants=False,
    )


def _broadcast(block: Block) -> tuple[int, ...]:
    """A shape for one number a unit that broadcasts to the block's view."""
    kept = iter(block.kept)
    return tuple(1 if d in block.reduced else next(kept) for d in range(len(block.kept) + len(block.reduced)))


def _dim_of_few(clipped: int, block: Block, view: Tensor) -> int | None:
    """The dim whose slices are units that lie apart in memory, where it takes less time to write the clipped ones
    alone than to multiply all of them; else None."""
    if _CALLS + _FEW * view.numel() * clipped // block.units >= view.numel():
        return None
    strides = {d: view.stride(d) for d in range(view.ndim) if view.shape[d] > 1}  # others say nothing
    dims = [d for d in strides if d not in block.reduced]
    return dims[0] if len(dims) == 1 and strides[dims[0]] == max(strides.values()) else None
