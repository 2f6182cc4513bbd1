"""How many units have a ratio above each of several thresholds: what a threshold is chosen from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .clipper import Clipper
from .config import AGCConfig, check_threshold

# Half octaves through 0.01, 0.02, 0.04, 0.08 and 0.16, the thresholds that were published.
THRESHOLDS = tuple(0.01 * 2 ** (k / 2) for k in range(-12, 15))


@dataclass(frozen=True)
class Ratios:
    """Counts of units by ratio ``norm(G) / max(norm(W), eps)``. Global: the same on every rank.

    Attributes:
        thresholds: ascending.
        units: by parameter, how many units it has.
        above: by parameter, how many of them have a ratio above each threshold.
    """

    thresholds: tuple[float, ...]
    units: dict[str, int]
    above: dict[str, tuple[int, ...]]

    def as_dict(self) -> dict[str, Any]:
        """For one line of JSON, as ``dist-agc report`` and ``dist-agc advise`` read it."""
        counts = {name: [self.units[name], *above] for name, above in self.above.items()}
        return {"agc/ratios": {"thresholds": list(self.thresholds), "parameters": counts}}


def ratios(
    model: nn.Module | Iterable[Tensor] | Clipper,
    thresholds: Sequence[float] = THRESHOLDS,
    **options: Any,
) -> Ratios:
    """Count, between ``loss.backward()`` and clipping, the units above each threshold. Changes no gradient.

    It measures once per threshold, so it costs as much as that many clippings: call it every 100 steps or so, before
    `apply_agc`, or before ``optimizer.step()`` where AGC is attached. On sharded models every rank must call it.

    Args:
        model: as for `apply_agc`; or a `Clipper`, such as ``hook.clipper``, whose settings then count.
        thresholds: ascending, positive.
        options: fields of `AGCConfig`: ``eps``, ``exclude``, ``units``.

    Raises:
        TypeError, ValueError: as `apply_agc`; thresholds that do not ascend.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.ones_(layer.weight)
        >>> layer.weight.grad = torch.tensor([[0.03, 0.03], [0.2, 0.2]])   # ratios 0.03 and 0.2
        >>> ratios(layer, [0.01, 0.1, 1.0]).above
        {'weight': (2, 1, 0)}
    """
    asked = tuple(check_threshold(value, "thresholds") for value in thresholds)
    if not asked or list(asked) != sorted(set(asked)):
        raise ValueError(f"thresholds must ascend, got {list(thresholds)!r}.")
    if isinstance(model, Clipper):
        if options:
            raise TypeError(f"a Clipper has its settings already (got {', '.join(options)}).")
        made, settings = model, model.config
    else:
        settings = AGCConfig.of(None, options)
        made = Clipper(model, settings)
    quiet = replace(settings, dry_run=True, statistics=True, on_nonfinite="keep", weight_norm_interval=1)
    dry = Clipper.of_placed(made._placed, quiet)
    units: dict[str, int] = {}
    above: dict[str, list[int]] = {}
    for value in asked:
        stats = dry.clip(thresholds={id(f.holder): value for f in dry.fragments})
        assert stats is not None
        for name, of in stats.per_parameter.items():
            units[name] = of.units
            above.setdefault(name, []).append(int(of.clipped_units))
    return Ratios(asked, units, {name: tuple(counts) for name, counts in above.items()})
