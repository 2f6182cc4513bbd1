"""What is counted of the units that were judged, by parameter: sums that ranks can add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..stats import largest_of
from .plan import LARGEST, STATISTICS


class Judged(NamedTuple):
    """Units that a rule has judged, each of shape (units,)."""

    coefficient: Tensor  # 1 leaves the gradient alone
    ratio: Tensor  # a gradient that is not finite counts as zero
    finite: Tensor  # whether the gradient's norm is
    grad_norm: Tensor
    weight_norm: Tensor


class ByParameter:
    """A vector of units cut into neighbouring spans, one a parameter, of these lengths.

    ``places``: of the parameters in the plan; None where these are all of them.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, places: Sequence[int] | None = None) -> None:
        self.size = sum(lengths)
        places = range(len(lengths)) if places is None else places
        self.places = torch.tensor(places, dtype=torch.float32, device=device)  # beside ratios, in one buffer
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device=device)
        self.offsets = torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])

    def spread(self, values: Tensor) -> Tensor:
        """One value a parameter, repeated for each of its units."""
        return values.repeat_interleave(self.lengths, output_size=self.size)

    def add_up(self, values: Tensor) -> Tensor:
        # unsafe: the lengths follow from the plan, and checking them would wait for the device.
        return torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True, initial=0)

    def parameters_of(self, units: Tensor) -> Tensor:
        """The places of the parameters that have these units."""
        return self.places[torch.searchsorted(self.offsets[1:], units, right=True)]

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


class Tally:
    """What one call counts: ``rows``, one a parameter, of ``columns`` numbers."""

    columns: int
    rows: Tensor

    def count(self, judged: Judged, by: ByParameter) -> Tensor:
        """Shape (parameters, columns)."""
        raise NotImplementedError

    def begin(self, judged: Judged, by: ByParameter, excluded: Tensor) -> None:
        """With the whole units, and the norms of this rank's pieces of excluded parameters, which have no units."""
        self.rows = pad(self.count(judged, by), (0, 0, 0, len(excluded)))

    def add(self, judged: Judged, by: ByParameter, owner: Tensor) -> None:
        """Units of the parameters ``owner``, of which each is there once: nothing is added to one row twice."""
        self.rows[owner] += self.count(judged, by)

    def largest(self) -> Tensor | None:
        """What `largest_of` says of the units so far; None where nobody asks."""

    def hear(self, largest: Tensor) -> None:
        """What it is on every rank of an axis, shape (ranks, *LARGEST)."""


class Counts(Tally):
    """Clipped units, units that are not finite, and the squared gradient norm: what `ClipStats` is made of."""

    columns = STATISTICS

    def __init__(self, eps: float) -> None:
        self._eps = eps
        self._found: list[tuple[ByParameter, Any, Any]] = []
        self._heard: list[Tensor] = []

    def count(self, judged: Judged, by: ByParameter) -> Tensor:
        if len(ratio := judged.ratio):
            # With eps=0 no unit is below it, and that of zero weights has an infinite ratio.
            settled = judged.weight_norm >= (self._eps or torch.finfo(ratio.dtype).tiny)
            self._found.append((by, ratio.max(0), ratio.where(settled, 0.0).max(0)))
        dtype = sums_dtype(judged.grad_norm.device)
        # Not in place: of a float64 model these are the norms themselves. Columns one by one: six times as fast.
        squares = by.add_up(judged.grad_norm.to(dtype).square())
        clipped, bad = (by.count(mask).to(dtype) for mask in (judged.coefficient < 1, ~judged.finite))
        return torch.stack([clipped, bad, squares], dim=1)

    def begin(self, judged: Judged, by: ByParameter, excluded: Tensor) -> None:
        super().begin(judged, by, excluded)
        self.rows[len(by.lengths) :, -1] = excluded.to(self.rows.dtype).square()

    def largest(self) -> Tensor:
        """Only made when it is sent or read."""
        tops = list(self._heard)
        for by, *pair in self._found:
            value, unit = (torch.stack(both) for both in zip(*pair, strict=True))
            tops.append(torch.stack([value, by.parameters_of(unit)], 1)[None])
        return largest_of(tops) if tops else self.rows.new_zeros(LARGEST)

    def hear(self, largest: Tensor) -> None:
        self._found, self._heard = [], [largest.clone()]  # and not all of the buffer lives on in statistics


class Above(Tally):
    """Units whose ratio is above each of several thresholds, which ascend."""

    def __init__(self, thresholds: Sequence[float], at_limit: float) -> None:
        # As a clipping decides it: a ratio within rounding of the threshold is not above it.
        self._bounds = [threshold / at_limit for threshold in thresholds]
        self.columns = len(thresholds)

    def count(self, judged: Judged, by: ByParameter) -> Tensor:
        ratio = judged.ratio
        bounds = torch.tensor(self._bounds, dtype=ratio.dtype, device="cpu").to(ratio.device, non_blocking=True)
        counts = torch.zeros(len(by.lengths), self.columns + 1, dtype=torch.int32, device=ratio.device)
        # One pass: each unit falls between two thresholds of its parameter.
        row = by.spread(torch.arange(len(counts), device=ratio.device) * (self.columns + 1))
        counts.view(-1).index_add_(0, row + torch.bucketize(ratio, bounds), torch.ones_like(row, dtype=torch.int32))
        between = counts.flip(1).cumsum(1).flip(1)
        return between[:, 1:].to(sums_dtype(ratio.device))
