"""What one clipping did: counts and norms that are equal on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate

import torch
from torch import Tensor


def largest_of(tops: Sequence[Tensor]) -> Tensor:
    """Of all units, and of those whose weights are not below eps: the largest ratio, and the place of its parameter.

    Takes such pairs, shape (several, 2, 2), and gives the largest, shape (2, 2). Where ratios are equal it is the first
    parameter, whichever rank asks.
    """
    value, place = (tops[0] if len(tops) == 1 else torch.cat(list(tops))).unbind(-1)
    most = value.amax(0)
    return torch.stack([most, place.where(value == most, math.inf).amin(0)], 1)


def _largest_in(parts: Sequence[ClipStats]) -> Tensor:
    """The same of several, with places in the names of all."""
    device, before = parts[0]._sums.device, [0, *accumulate(len(part._names) for part in parts)]
    shifts = torch.tensor([[0.0, n] for n in before[:-1]], device="cpu").to(device, non_blocking=True)
    return largest_of([torch.stack([part._top.to(device) for part in parts]) + shifts[:, None]])


@dataclass(frozen=True, eq=False)
class ParameterStats:
    """One parameter's share of a `ClipStats`.

    ``units`` is a number; the others are tensors without dims, on the device of the gradients.
    """

    units: int
    clipped_units: Tensor
    nonfinite_units: Tensor
    grad_norm: Tensor

    @property
    def clip_fraction(self) -> Tensor:
        """Clipped units over units; 0 where there are none."""
        return self.clipped_units / max(self.units, 1)


class ClipStats:
    """What one clipping did. Global: the same on every rank, without another collective.

    ``units`` is a number. Every other attribute is a tensor without dims on the device of the gradients, so reading
    one does not wait for the device; `as_dict` does.

    Attributes:
        units: units that AGC governs (not excluded, not frozen), with a gradient or without.
        clipped_units: units whose gradient was scaled down.
        nonfinite_units: units whose gradient norm was inf or nan.
        clip_fraction: clipped units over units.
        max_ratio: the largest ``norm(G) / max(norm(W), eps)`` of a unit with a finite gradient, before clipping.
        max_ratio_above_eps: the same, of units whose weight norm is at least ``eps``. Units that begin at zero (LoRA's
            B, a new head) have by far the largest ratios at first, and hide all others.
        max_ratio_parameter: the name of the parameter that has the largest ratio; None where every ratio is 0.
            A string, so reading it waits for the device. `as_dict`, which holds numbers, does not have it.
        max_ratio_above_eps_parameter: likewise.
        grad_norm: the L2 norm of all gradients before clipping, excluded parameters too.
        per_parameter: a `ParameterStats` by fully qualified name.

    Example:
        >>> import dist_agc
        >>> layer = torch.nn.Linear(2, 2)
        >>> _ = torch.nn.init.ones_(layer.weight), torch.nn.init.ones_(layer.bias)
        >>> layer.weight.grad = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> stats = dist_agc.apply_agc(layer, clipping_threshold=0.01)
        >>> stats.units, int(stats.clipped_units), float(stats.grad_norm)
        (3, 1, 5.0)
        >>> float(stats.per_parameter["weight"].clip_fraction)
        0.5
        >>> sorted(stats.as_dict())[:2]
        ['agc/clip_fraction', 'agc/clipped_units']
    """

    def __init__(
        self,
        units: dict[str, int],
        sums: Tensor,
        largest: Callable[[], Tensor],
        names: Sequence[str],
        excluded: Sequence[str] = (),
        *,
        dry_run: bool = False,
    ) -> None:
        """``units``: by governed parameter. ``sums``: one row (clipped, non-finite, squared gradient) per governed
        parameter in that order, then one for each of the ``excluded``. ``largest``: gives
        what `largest_of` does, with places in ``names``; it is not asked before somebody reads that."""
        self._units, self._sums, self._excluded, self._dry_run = units, sums, tuple(excluded), dry_run
        self._largest, self._names, self.units = largest, names, sum(units.values())

    @classmethod
    def of_idle(cls, units: dict[str, int], device: torch.device | str = "cpu") -> ClipStats:
        """Of parameters without a gradient."""
        largest = partial(torch.zeros, 2, 2, device=device)
        return cls(units, torch.zeros(len(units), 3, device=device), largest, ())

    @classmethod
    def merged(cls, parts: Iterable[ClipStats]) -> ClipStats:
        """One for all of a step that clips in several calls, such as two optimizers or ZeRO's groups.

        A parameter that several of them have counts once: as the first found it.
        """
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return cls.of_idle({})
        device = parts[0]._sums.device
        units: dict[str, int] = {}
        governed: dict[str, Tensor] = {}
        excluded: dict[str, Tensor] = {}
        for part in parts:
            units = {**part._units, **units}
            rows = part._sums.to(device).unbind()
            governed = {**dict(zip(part._units, rows, strict=False)), **governed}
            excluded = {**dict(zip(part._excluded, rows[len(part._units) :], strict=True)), **excluded}
        excluded = {name: row for name, row in excluded.items() if name not in governed}
        rows = [*governed.values(), *excluded.values()]
        sums = torch.stack(rows) if rows else parts[0]._sums
        names = [name for part in parts for name in part._names]
        return cls(units, sums, partial(_largest_in, parts), names, list(excluded), dry_run=parts[0]._dry_run)

    def placed(self, places: Mapping[str, int], size: int) -> tuple[Tensor, Tensor]:
        """What is added up over ranks, among ``size`` parameters of which some are at these places by name.

        Returns the rows, shape (size, 3), and the largest ratios, shape (2, 2). Does not wait for the device.
        """
        rows = self._sums.new_zeros(size, self._sums.shape[1])
        pairs = [(i, places[name]) for i, name in enumerate(self.names) if name in places]
        if pairs:
            source, at = torch.tensor(pairs, device="cpu").to(rows.device, non_blocking=True).unbind(1)
            rows[at] = self._sums[source]
        named = [*(places.get(name, size) for name in self._names), size]
        where = torch.tensor(named, dtype=rows.dtype, device="cpu").to(rows.device, non_blocking=True)
        value, place = self._top.to(rows.dtype).unbind(1)
        return rows, torch.stack([value, where[place.clamp(max=len(named) - 1).long()]], 1)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parameters that it is about, excluded ones too."""
        return (*self._units, *self._excluded)

    @property
    def unit_counts(self) -> Mapping[str, int]:
        """Units by governed parameter."""
        return self._units

    def __bool__(self) -> bool:
        """Whether anything was measured: not before the first step."""
        return bool(self.names)

    @property
    def clipped_units(self) -> Tensor:
        return self._sums[:, 0].sum()

    @property
    def nonfinite_units(self) -> Tensor:
        return self._sums[:, 1].sum()

    @property
    def grad_norm(self) -> Tensor:
        return self._sums[:, 2].sum().sqrt()

    @property
    def clip_fraction(self) -> Tensor:
        return self.clipped_units / max(self.units, 1)

    @cached_property
    def _top(self) -> Tensor:
        return self._largest()

    @property
    def max_ratio(self) -> Tensor:
        return self._top[0, 0]

    @property
    def max_ratio_above_eps(self) -> Tensor:
        return self._top[1, 0]

    @property
    def max_ratio_parameter(self) -> str | None:
        return self._has(0)

    @property
    def max_ratio_above_eps_parameter(self) -> str | None:
        return self._has(1)

    def _has(self, which: int) -> str | None:
        ratio, place = self._top[which].tolist()
        return self._names[int(place)] if ratio > 0 and place < len(self._names) else None

    @cached_property
    def per_parameter(self) -> Mapping[str, ParameterStats]:
        clipped, nonfinite, squares = self._sums[: len(self._units)].unbind(1)
        columns = zip(clipped.unbind(), nonfinite.unbind(), squares.sqrt().unbind(), strict=True)
        return {
            name: ParameterStats(units, *row) for (name, units), row in zip(self._units.items(), columns, strict=True)
        }

    def _as_tensors(self, *, per_parameter: bool = False) -> dict[str, Tensor]:
        """As `as_dict`, but without ``agc/units``, which is no tensor, and without waiting for the device."""
        names = ("clipped_units", "clip_fraction", "nonfinite_units", "grad_norm", "max_ratio", "max_ratio_above_eps")
        values = {f"agc/{name}": getattr(self, name) for name in names}
        for name, of in self.per_parameter.items() if per_parameter else ():
            values[f"agc/clip_fraction/{name}"] = of.clip_fraction
            values[f"agc/grad_norm/{name}"] = of.grad_norm
        return values

    def as_dict(self, *, per_parameter: bool = False) -> dict[str, float]:
        """Plain floats under stable names, for any logger. Waits for the device.

        Args:
            per_parameter: add ``agc/clip_fraction/NAME`` and ``agc/grad_norm/NAME`` of every governed parameter.

        Returns:
            ``agc/units``, ``agc/clipped_units``, ``agc/clip_fraction``, ``agc/nonfinite_units``, ``agc/grad_norm``,
            ``agc/max_ratio`` and ``agc/max_ratio_above_eps``. In a dry run also ``agc/dry_run``, which is 1: units
            would have been clipped.
        """
        # One copy, not one for each number.
        here = ClipStats(self._units, self._sums.cpu(), self._top.cpu, self._names, self._excluded)
        values = here._as_tensors(per_parameter=per_parameter)
        dry = {"agc/dry_run": 1.0} if self._dry_run else {}
        return {"agc/units": float(self.units), **{name: float(value) for name, value in values.items()}, **dry}

    def __repr__(self) -> str:
        said = [f"{key[4:]}={value:.4g}" for key, value in self.as_dict().items()]
        wheres = {name: getattr(self, name) for name in ("max_ratio_parameter", "max_ratio_above_eps_parameter")}
        return f"ClipStats({', '.join(said + [f'{name}={where!r}' for name, where in wheres.items() if where])})"
