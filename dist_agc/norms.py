"""The formula, on plain local tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
# A unit that was just clipped lies within rounding of its limit: it is not clipped again. (In 16 bits its elements
# themselves are rounded, so there a second clipping may change their last bit.)
_AT_LIMIT = 1.0 - 4 * torch.finfo(torch.float32).eps


def is_small(x: Tensor) -> bool:
    """Whether one kernel gives the norm of all of ``x`` exactly enough, without halving it."""
    return 0 < x.numel() and not (x.is_cpu and x.numel() > _LONG)


def unit_norms_(x: Tensor, reduced: tuple[int, ...], out: Tensor) -> Tensor:
    """Write the L2 norms of ``x`` over the dims ``reduced`` to ``out``, in the dtype of ``out``, and return that.

    Accelerators take one kernel. CPU kernels convert whole tensors, walk columns slowly and lose digits in long rows,
    so there such tensors are halved until they are easy, and halves meet in ``hypot``.
    """
    if out.device != x.device:
        return out.copy_(_norms(x, reduced, torch.empty_like(out, device=x.device)))
    return _norms(x, reduced, out)


def _norms(x: Tensor, reduced: tuple[int, ...], out: Tensor) -> Tensor:
    if x.is_complex():
        x, reduced = torch.view_as_real(x.resolve_conj()), (*reduced, x.ndim)
    if kernel := one_kernel(x, reduced, out):
        return kernel(x, reduced, out)
    columns = x.numel() > _APART and _columns(x, reduced)
    dim = max(reduced if columns else range(x.ndim), key=lambda d: x.shape[d])
    if columns and x.numel() <= _LEAF * min(x.shape[dim], _LEAVES):
        return _column_norms(x, reduced, dim, out)
    dim = max(range(x.ndim), key=lambda d: x.shape[d])
    half = x.shape[dim] // 2
    first, second = x.narrow(dim, 0, half), x.narrow(dim, half, x.shape[dim] - half)
    if dim in reduced:
        rest = _norms(second, reduced, torch.empty_like(out))
        return torch.hypot(_norms(first, reduced, out), rest, out=out)
    place = sum(d not in reduced for d in range(dim))
    _norms(first, reduced, out.narrow(place, 0, half))
    _norms(second, reduced, out.narrow(place, half, x.shape[dim] - half))
    return out


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
    if x.is_complex() or x.device != out.device:
        return None
    if not x.is_cpu or x.numel() == 0:
        return vector_norm
    if own and serves(x, reduced, out):
        return row_norms
    long = x.numel() > _LONG * out.numel()
    in_order = x.numel() <= _APART or not _columns(x, reduced)
    enough = not long and in_order and (x.dtype == out.dtype or x.numel() <= _LEAF)
    return vector_norm if enough else None


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


def coefficients(
    weight_norm: Tensor,
    grad_norm: Tensor,
    clipping_threshold: float | Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The factor of every unit's gradient: ``min(1, clipping_threshold / ratio)``.

    Brock et al. 2021, arXiv 2102.06171, equation 3, with ``ratio = grad_norm / max(weight_norm, eps)``.

    Args:
        weight_norm, grad_norm: L2 norms, one per unit, shape (units,).
        clipping_threshold: the largest allowed ratio, one for all or one per unit; inf never clips.
        eps: the least weight norm that counts.

    Returns:
        (coefficient, ratio, finite), each of shape (units,). A unit whose gradient norm is not finite has the
        coefficient 1, and so has a unit of which weight and gradient are zero.

    Example:
        >>> w, g = torch.tensor([5.0, 5.0, 0.0]), torch.tensor([25.0, 1.0, 1.0])
        >>> [round(c, 5) for c in coefficients(w, g, 0.5, 1e-3)[0].tolist()]
        [0.1, 1.0, 0.0005]
    """
    known = grad_norm.nan_to_num(nan=0.0, posinf=0.0)  # what is not finite is not clipped
    ratio = known / weight_norm.clamp(min=eps)
    if eps == 0:
        ratio.masked_fill_(known == 0, 0.0)  # 0/0: nothing to clip, and no nan among the ratios
    coefficient = clipping_threshold / ratio
    return torch.where(coefficient < _AT_LIMIT, coefficient, 1.0), ratio, known == grad_norm


def scale_(x: Tensor, coefficient: Tensor) -> None:
    """Multiply ``x`` in place by coefficients that broadcast to it, rounding once to the dtype of ``x``."""
    if x.device.type != "cpu" or x.dtype == coefficient.dtype or x.numel() <= _LEAF:
        x.mul_(coefficient)
        return
    dim = max(range(x.ndim), key=lambda d: x.shape[d])
    half = x.shape[dim] // 2
    for start, length in ((0, half), (half, x.shape[dim] - half)):
        same = coefficient.shape[dim] == 1
        scale_(x.narrow(dim, start, length), coefficient if same else coefficient.narrow(dim, start, length))


def scale_rows_(x: Tensor, coefficient: Tensor, rows: Tensor) -> None:
    """Multiply only the slices ``rows`` of ``x`` along dim 0; ``coefficient`` broadcasts to ``x``."""
    step = max(1, _LEAF * len(x) // max(x.numel(), 1))
    # The kernel writes number by number: in numbers of 16 bytes it writes four times as fast.
    row = x.numel() // max(len(x), 1) * x.element_size()
    wide = x.is_contiguous() and row % 16 == 0 and x.storage_offset() * x.element_size() % 16 == 0
    target = _wide(x) if wide else x
    for some in rows.split(step):
        scaled = x.index_select(0, some).mul_(coefficient.index_select(0, some))
        target.index_copy_(0, some, _wide(scaled) if wide else scaled)


def _wide(x: Tensor) -> Tensor:
    return x.view(len(x), -1).view(torch.complex128)
