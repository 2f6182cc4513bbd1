"""What one clipping did: counts and norms that are equal on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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
        max_ratio: Tensor,
        excluded: Sequence[str] = (),
        *,
        dry_run: bool = False,
    ) -> None:
        """``units``: by governed parameter. ``sums``: one row (clipped, non-finite, squared gradient) per governed
        parameter in that order, then one for each of the ``excluded``."""
        self._units, self._sums, self._excluded, self._dry_run = units, sums, tuple(excluded), dry_run
        self.units, self.max_ratio = sum(units.values()), max_ratio

    @classmethod
    def merged(cls, parts: Iterable[ClipStats]) -> ClipStats:
        """One for all of a step that clips in several calls, such as two optimizers or ZeRO's groups.

        A parameter that several of them have counts once: as the first found it.
        """
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return cls({}, torch.zeros(0, 3, device="cpu"), torch.zeros((), device="cpu"))
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
        top = torch.stack([part.max_ratio.to(device) for part in parts]).amax()
        return cls(units, sums, top, list(excluded), dry_run=parts[0]._dry_run)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parameters that it is about, excluded ones too."""
        return (*self._units, *self._excluded)

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
    def per_parameter(self) -> Mapping[str, ParameterStats]:
        clipped, nonfinite, squares = self._sums[: len(self._units)].unbind(1)
        columns = zip(clipped.unbind(), nonfinite.unbind(), squares.sqrt().unbind(), strict=True)
        return {
            name: ParameterStats(units, *row) for (name, units), row in zip(self._units.items(), columns, strict=True)
        }

    def _as_tensors(self, *, per_parameter: bool = False) -> dict[str, Tensor]:
        """As `as_dict`, but without ``agc/units``, which is no tensor, and without waiting for the device."""
        names = ("clipped_units", "clip_fraction", "nonfinite_units", "grad_norm", "max_ratio")
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
            ``agc/units``, ``agc/clipped_units``, ``agc/clip_fraction``, ``agc/nonfinite_units``, ``agc/grad_norm`` and
            ``agc/max_ratio``. In a dry run also ``agc/dry_run``, which is 1: units would have been clipped.
        """
        # One copy, not one for each number.
        here = ClipStats(self._units, self._sums.cpu(), self.max_ratio.cpu(), self._excluded)
        values = here._as_tensors(per_parameter=per_parameter)
        dry = {"agc/dry_run": 1.0} if self._dry_run else {}
        return {"agc/units": float(self.units), **{name: float(value) for name, value in values.items()}, **dry}

    def __repr__(self) -> str:
        return f"ClipStats({', '.join(f'{k[4:]}={v:.4g}' for k, v in self.as_dict().items())})"
