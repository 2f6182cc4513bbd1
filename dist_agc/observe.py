"""Looking without clipping: how many units have a ratio above each of several thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .clipper import Clipper, clipper_of
from .config import AGCConfig, check_threshold
from .engine.counts import Above
from .engine.execution import AT_LIMIT

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
    model: nn.Module | Iterable[Tensor] | Clipper, thresholds: Sequence[float] = THRESHOLDS, **options: Any
) -> Ratios:
    """Count, between ``loss.backward()`` and clipping, the units above each threshold. Changes no gradient.

    It costs as much as one clipping and waits for the device once. Call it before `apply_agc`, or before
    ``optimizer.step()`` where AGC is attached. On sharded models every rank must call it.

    Args:
        model: as for `apply_agc`; or a `Clipper`, such as ``hook.clipper``, whose settings then count.
        thresholds: ascending, positive.
        options: fields of `AGCConfig`: ``eps``, ``exclude``, ``units``.

    Raises:
        TypeError, ValueError: as `apply_agc`; thresholds that do not ascend.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> layer.weight.grad = torch.tensor([[0.03, 0.03], [0.2, 0.2]])   # ratios 0.03 and 0.2
        >>> ratios(layer, [0.01, 0.1, 1.0]).above
        {'weight': (2, 1, 0)}
    """
    asked = tuple(check_threshold(value, "thresholds") for value in thresholds)
    if not asked or list(asked) != sorted(set(asked)):
        raise ValueError(f"thresholds must ascend, got {list(thresholds)!r}.")
    if not isinstance(model, Clipper):
        model = clipper_of(model, AGCConfig.of(None, options))
    elif options:
        raise TypeError(f"a Clipper has its settings already (got {', '.join(options)}).")
    execution = model.execution()
    with torch.no_grad(), torch.profiler.record_function("dist_agc::ratios"):
        counts = execution.ratios(Above(asked, AT_LIMIT)).tolist()
    governed = execution.plan.governed_now()
    units = {p.name: rule.count for _, p, rule in governed}
    return Ratios(asked, units, {p.name: tuple(map(int, counts[i])) for i, p, _ in governed})
