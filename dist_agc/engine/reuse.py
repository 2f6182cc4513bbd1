"""How long weight norms are reused: over an interval of calls, or until someone beside the optimizer writes weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..model.values import stored


class Reuse:
    """Looks at the weights of every call. ``interval``: in calls; 1 measures them always."""

    def __init__(self, interval: int) -> None:
        self._interval, self._calls = interval, 0
        self._written: list[tuple[int, int]] = []  # where weights lay at the last call, and how often written by then
        self._writes: list[int] | None = None  # how often between the two calls before this one

    def is_over(self, weights: Sequence[Tensor], holders: Sequence[Tensor]) -> bool:
        """Whether to measure in this call. Each rank decides for itself. ``holders``: what optimizers have of them.

        An optimizer writes a weight equally often in every step; `load_state_dict` comes on top of that.
        """
        if self._interval == 1:
            return True
        before, self._written = self._written, [_written(*pair) for pair in zip(weights, holders, strict=True)]
        moved = [now[0] != then[0] for now, then in zip(self._written, before, strict=False)]
        writes = [now[1] - then[1] for now, then in zip(self._written, before, strict=False)]
        over = self._calls % self._interval == 0 or any(moved) or writes != self._writes
        self._calls, self._writes = self._calls + 1, writes if before else None
        return over


def _written(weight: Tensor, holder: Tensor) -> tuple[int, int]:
    """Where it lies, and how often it was written. What goes through a tensor around another is counted on
    that one alone."""
    inner = stored(weight)
    around = holder._version if is_traceable_wrapper_subclass(holder) else 0
    return inner.data_ptr(), inner._version + around
