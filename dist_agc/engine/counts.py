"""What is counted of the units that were judged, by parameter: sums that ranks can add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .plan import STATISTICS


class Judged(NamedTuple):
    """Units that a rule has judged, each of shape (units,).

    ``coefficient``: 1 leaves the gradient alone. ``finite``: whether the gradient's norm is. ``ratio`` is that of a
    gradient that counts as zero where it is not.
    """

    coefficient: Tensor
    ratio: Tensor
    finite: Tensor
    grad_norm: Tensor


class ByParameter:
    """A vector of units cut into neighbouring spans, one a parameter, of these lengths."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.size = sum(lengths)
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device=device)
        self.offsets = torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])

    def __len__(self) -> int:
        return len(self.lengths)

    def spread(self, values: Tensor) -> Tensor:
        """One value a parameter, repeated for each of its units."""
        return values.repeat_interleave(self.lengths, output_size=self.size)

    def add_up(self, values: Tensor) -> Tensor:
        # unsafe: the lengths follow from the plan, and checking them would wait for the device.
        return torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True, initial=0)

    def count(self, mask: Tensor) -> Tensor:
        """How many are true of each parameter."""
        return trues_before(mask)[self.offsets].diff()


def trues_before(mask: Tensor) -> Tensor:
    """How many are true before each place, and in all."""
    before = torch.zeros(len(mask) + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(mask, 0, dtype=torch.int32, out=before[1:])
    return before


def sums_dtype(device: torch.device) -> torch.dtype:
    """What counts and squares are added up in. Apple's MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class Tally(Protocol):
    """What is counted. ``columns``: how many numbers a parameter has."""

    @property
    def columns(self) -> int: ...

    def count(self, judged: Judged, by: ByParameter) -> Tensor:
        """Shape (parameters, columns)."""
        ...

    def excluded(self, grad_norm: Tensor) -> Tensor:
        """The same of excluded parameters, by the norm of this rank's piece of each."""
        ...


class Counts:
    """Clipped units, units that are not finite, and the squared gradient norm: what `ClipStats` is made of."""

    columns = STATISTICS

    def count(self, judged: Judged, by: ByParameter) -> Tensor:
        dtype = sums_dtype(judged.grad_norm.device)
        # Not in place: of a float64 model these are the norms themselves. Columns one by one: six times as fast.
        squares = by.add_up(judged.grad_norm.to(dtype).square())
        clipped, bad = (by.count(mask).to(dtype) for mask in (judged.coefficient < 1, ~judged.finite))
        return torch.stack([clipped, bad, squares], dim=1)

    def excluded(self, grad_norm: Tensor) -> Tensor:
        square = grad_norm.to(sums_dtype(grad_norm.device)).square()
        none = torch.zeros_like(square)
        return torch.stack([none, none, square], 1)


class Above:
    """Units whose ratio is above each of several thresholds, which ascend."""

    def __init__(self, thresholds: Sequence[float], at_limit: float) -> None:
        # As a clipping decides it: a ratio within rounding of the threshold is not above it.
        self._bounds = [threshold / at_limit for threshold in thresholds]
        self.columns = len(thresholds)

    def count(self, judged: Judged, by: ByParameter) -> Tensor:
        ratio = judged.ratio
        bounds = torch.tensor(self._bounds, dtype=ratio.dtype, device="cpu").to(ratio.device, non_blocking=True)
        counts = torch.zeros(len(by) * (self.columns + 1), dtype=torch.int32, device=ratio.device)
        # One pass: each unit falls between two thresholds of its parameter.
        row = by.spread(torch.arange(len(by), device=ratio.device) * (self.columns + 1))
        counts.index_add_(0, row + torch.bucketize(ratio, bounds), torch.ones_like(row, dtype=torch.int32))
        between = counts.view(len(by), -1).flip(1).cumsum(1).flip(1)
        return between[:, 1:].to(sums_dtype(ratio.device))

    def excluded(self, grad_norm: Tensor) -> Tensor:
        return grad_norm.new_zeros(len(grad_norm), self.columns, dtype=sums_dtype(grad_norm.device))
