"""Gradients of replicated parameters that come as each rank's share of a sum.

Tensor parallelism without FSDP2 leaves such gradients (``SequenceParallel``'s norms), for the optimizer to add up.
Which ones is agreed on once; from then on every call adds them up, and a rank that has no gradient adds zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .fragments import Axis, Fragment
from .plan import Plan
from .reduce import add_up

ByAxis = Mapping[Axis, Sequence[int]]


def pending(fragments: Sequence[Fragment], grads: Sequence[Tensor | None]) -> dict[Axis, list[int]]:
    """By axis, the fragments of which this rank holds a share of the gradient."""
    found: dict[Axis, list[int]] = {}
    for i, (fragment, grad) in enumerate(zip(fragments, grads, strict=False)):
        if grad is not None and fragment.sums is not None and fragment.copies:
            assert fragment.holder.grad is not None
            for axis in fragment.sums.pending(fragment.holder.grad):
                found.setdefault(axis, []).append(i)
    return found


class Shares:
    """What the ranks have agreed on.

    Args:
        agreed: by axis, the fragments whose gradients are shares of a sum over it.
        plan: of all fragments.

    Attributes:
        late: those that ride in a collective that the plan has anyway. Their units are whole and lie alike on every
            rank once the sums are there, so nothing waits for them. The others take one collective an axis before.
    """

    def __init__(self, agreed: ByAxis, plan: Plan) -> None:
        self._fragments = plan.fragments
        collectives = {stage.axis for stage in plan.stages}
        times = [i for which in agreed.values() for i in which]
        self.late = {
            axis: [i for i in which if times.count(i) == 1 and self._waits_for_nothing(i)]
            for axis, which in agreed.items()
            if axis in collectives
        }
        self._early = {axis: [i for i in which if i not in self.late.get(axis, ())] for axis, which in agreed.items()}
        self._all = {(axis, i) for axis, which in agreed.items() for i in which}

    def _waits_for_nothing(self, i: int) -> bool:
        fragment = self._fragments[i]
        return not (fragment.pieces.splits or fragment.pieces.distinct or fragment.holder.is_complex())

    def cover(self, found: ByAxis) -> bool:
        """Whether all that was found is agreed on."""
        return all((axis, i) in self._all for axis, which in found.items() for i in which)

    def add_up(self, weights: Sequence[Tensor], grads: list[Tensor | None]) -> None:
        """Put sums in the places of shares that cannot ride, in memory of their own."""
        for axis, which in self._early.items():
            if which:
                _put(add_up(_tensors(which, weights, grads), axis), which, grads)

    def riders(self, weights: Sequence[Tensor], grads: Sequence[Tensor | None]) -> dict[Axis, list[Tensor]]:
        return {axis: _tensors(which, weights, grads) for axis, which in self.late.items()}

    def arrived(self, riders: Mapping[Axis, list[Tensor]], grads: list[Tensor | None]) -> None:
        """Put sums in the places of shares that rode."""
        for axis, sums in riders.items():
            _put(sums, self.late[axis], grads)

    def settle(self, grads: Sequence[Tensor | None]) -> None:
        """Hand the sums over to the parameters that AGC governs; others keep their shares for the optimizer."""
        for i in {i for _, i in self._all}:
            fragment, total = self._fragments[i], grads[i]
            if total is not None and fragment.sums is not None and fragment.rule is not None:
                fragment.sums.settle(total)


def _tensors(which: Sequence[int], weights: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [torch.zeros_like(weights[i]) if (grad := grads[i]) is None else grad for i in which]


def _put(sums: Sequence[Tensor], which: Sequence[int], grads: list[Tensor | None]) -> None:
    for i, total in zip(which, sums, strict=True):
        grads[i] = None if grads[i] is None else total  # where a rank has no gradient the sum is nobody's
