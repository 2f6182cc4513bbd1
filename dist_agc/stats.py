"""What one clipping did: counts and norms that are equal on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_CLIPPED, _NONFINITE, _SQUARE = range(3)


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


class _PerParameter(Mapping[str, ParameterStats]):
    def __init__(self, units: dict[str, int], sums: Tensor) -> None:
        self._units, self._sums = units, sums
        self._row = {name: i for i, name in enumerate(units)}

    def __getitem__(self, name: str) -> ParameterStats:
        sums = self._sums[self._row[name]]
        return ParameterStats(self._units[name], sums[_CLIPPED], sums[_NONFINITE], sums[_SQUARE].sqrt())

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)


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

    def __init__(self, units: dict[str, int], sums: Tensor, max_ratio: Tensor) -> None:
        """``units``: by governed parameter. ``sums``: one row (clipped, non-finite, squared gradient) per governed
        parameter in that order, then one per excluded parameter."""
        self._units = units
        self._sums = sums
        self.max_ratio = max_ratio
        self.units = sum(units.values())

    @classmethod
    def merged(cls, parts: Iterable[ClipStats]) -> ClipStats:
        """One for all of a step that clips in several calls, such as two optimizers or ZeRO's groups."""
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        units = {name: count for part in parts for name, count in part._units.items()}
        device = parts[0]._sums.device
        governed = [part._sums[: len(part._units)].to(device) for part in parts]
        excluded = [part._sums[len(part._units) :].to(device) for part in parts]
        top = torch.stack([part.max_ratio.to(device) for part in parts]).amax()
        return cls(units, torch.cat(governed + excluded), top)

    @property
    def clipped_units(self) -> Tensor:
        return self._sums[:, _CLIPPED].sum()

    @property
    def nonfinite_units(self) -> Tensor:
        return self._sums[:, _NONFINITE].sum()

    @property
    def clip_fraction(self) -> Tensor:
        return self.clipped_units / max(self.units, 1)

    @property
    def grad_norm(self) -> Tensor:
        return self._sums[:, _SQUARE].sum().sqrt()

    @cached_property
    def per_parameter(self) -> Mapping[str, ParameterStats]:
        return _PerParameter(self._units, self._sums)

    def as_dict(self, *, per_parameter: bool = False) -> dict[str, float]:
        """Plain floats under stable names, for any logger. Waits for the device.

        Args:
            per_parameter: add ``agc/clip_fraction/NAME`` and ``agc/grad_norm/NAME`` of every governed parameter.
        """
        sums = self._sums.tolist()
        clipped = sum(row[_CLIPPED] for row in sums)
        values = {
            "agc/units": float(self.units),
            "agc/clipped_units": clipped,
            "agc/clip_fraction": clipped / max(self.units, 1),
            "agc/nonfinite_units": sum(row[_NONFINITE] for row in sums),
            "agc/grad_norm": sum(row[_SQUARE] for row in sums) ** 0.5,
            "agc/max_ratio": float(self.max_ratio),
        }
        if per_parameter:
            for (name, units), row in zip(self._units.items(), sums, strict=False):
                values[f"agc/clip_fraction/{name}"] = row[_CLIPPED] / max(units, 1)
                values[f"agc/grad_norm/{name}"] = row[_SQUARE] ** 0.5
        return values

    def __repr__(self) -> str:
        return f"ClipStats({', '.join(f'{k[4:]}={v:.4g}' for k, v in self.as_dict().items())})"
