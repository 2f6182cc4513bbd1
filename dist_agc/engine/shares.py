"""Gradients of copies that come as each rank's share of a sum: they are added up before anything is measured.

Tensor parallelism alone leaves such gradients, for the optimizer to add up: those of norms that saw only a part of each
sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ..model.blocks import Axis
from .collectives import all_reduce, anywhere
from .plan import Plan


class Shares:
    """Which gradients are added up in every call, by axis. The ranks agree on it once, at the first call.

    Along each axis of its copies, a parameter whose gradient is a share on any rank is added up from then on, and so is
    one of which no rank has a gradient yet: nobody can know what it will be. One that is complete is left alone.
    ``axes`` are in an order that all ranks share.
    """

    def __init__(self, plan: Plan, axes: Sequence[Axis], grads: Sequence[Tensor | None]) -> None:
        self._parameters, self._governed = plan.parameters, plan.governed
        self._added: dict[Axis, list[int]] = {}
        for axis in axes:
            which = [i for i, p in enumerate(plan.parameters) if p.may_be_share and axis in p.copies]
            if which:
                known = [grads[i] is not None for i in which]
                shares = [a and axis in plan.parameters[i].pending() for a, i in zip(known, which, strict=True)]
                flags = anywhere(shares + known, axis, plan.parameters[which[0]].tensor.device)
                pairs = zip(which, flags, flags[len(which) :], strict=False)
                self._added[axis] = [i for i, share, seen in pairs if share or not seen]

    def add_up(self, weights: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients with sums, in memory of their own, in the places of shares. One collective an axis.

        A rank without a gradient sends zeros and gets the sum as well, so that it measures what the others do. One
        whose gradient turns out to be complete keeps it; ValueError where one was complete and has become a share.
        """
        pending = [(i, p.pending()) for i, p in enumerate(self._parameters) if p.may_be_share and grads[i] is not None]
        shares = {axis: {i for i, axes in pending if axis in axes} for axes in dict(pending).values() for axis in axes}
        for axis, which in shares.items():
            late = which - {*self._added.get(axis, ())}
            if late:
                raise ValueError(
                    f"parameter {self._parameters[min(late)].name!r} has a Partial gradient, each rank's share of a "
                    "sum, and had a complete one when it was clipped first: redistribute it to the parameter's "
                    "placements before clipping."
                )
        complete = list(grads)
        for axis, which in self._added.items():
            if which:
                given = [torch.zeros_like(weights[i]) if (g := complete[i]) is None else g for i in which]
                for i, total in zip(which, _sums(given, axis), strict=True):
                    if grads[i] is None or i in shares.get(axis, ()):
                        complete[i] = total
        return complete

    def settle(self, complete: Sequence[Tensor | None]) -> None:
        """Hand over what was clipped to the parameters that AGC governs and whose gradients lie elsewhere; of others
        the optimizer takes its part or its sum."""
        for p, final in zip(self._parameters[: self._governed], complete, strict=False):
            if final is not None and p.unsettled():
                p.settle(final)


def _sums(shares: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """The sums over ``axis`` of tensors that have the same shapes on all of its ranks; fp32 at least, in one buffer."""
    dtype = reduce(torch.promote_types, (share.dtype for share in shares), torch.float32)
    total = all_reduce(torch.cat([share.flatten().to(dtype) for share in shares]), axis)
    parts = total.split([share.numel() for share in shares])
    return [part.view(share.shape).to(share.dtype) for part, share in zip(parts, shares, strict=True)]
