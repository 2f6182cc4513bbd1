"""The rule in float64 on full tensors, written the slowest and plainest way: what every layout is held against.

It shares nothing with the code under test but the choice of which dims number the units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..config import AGCConfig
from ..model.units import UnitRule


@dataclass(frozen=True)
class Reference:
    """What clipping must give: float64 gradients by name, and the statistics."""

    grads: dict[str, Tensor]
    units: int
    clipped_units: int
    max_ratio: float
    grad_norm: float


def unit_parts(tensor: Tensor, rule: UnitRule) -> Iterator[Tensor]:
    """The elements of every unit, one unit after the other, as views."""
    tensor = tensor.view(rule.shape)
    if tensor.numel():
        for index in itertools.product(*(range(rule.shape[d]) for d in rule.kept)):
            at = dict(zip(rule.kept, index, strict=True))
            yield tensor[tuple(at.get(d, slice(None)) for d in range(tensor.ndim))]


def ratios(
    weights: Mapping[str, Tensor], grads: Mapping[str, Tensor], rules: Mapping[str, UnitRule | None], eps: float
) -> list[float]:
    """The ratio of gradient norm to weight norm of every unit that has a gradient other than zero."""
    return [ratio for name, grad in grads.items() for _, ratio in _units(weights[name], grad, rules[name], eps)]


def _units(weight: Tensor, grad: Tensor, rule: UnitRule | None, eps: float) -> Iterator[tuple[Tensor, float]]:
    if rule is None:
        return
    for w, g in zip(unit_parts(weight, rule), unit_parts(grad, rule), strict=True):
        norm, floor = float(g.square().sum().sqrt()), max(float(w.square().sum().sqrt()), eps)
        if norm > 0:
            yield g, norm / floor if floor > 0 else math.inf


def clip(
    weights: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    rules: Mapping[str, UnitRule | None],
    config: AGCConfig,
) -> Reference:
    """Clip copies of full float64 gradients, unit by unit. A rule of None leaves the parameter alone."""
    clipped = {name: grad.clone() for name, grad in grads.items()}
    count, top = 0, 0.0
    for name, grad in clipped.items():
        for unit, ratio in _units(weights[name], grad, rules[name], config.eps):
            top = max(top, ratio)
            if ratio > config.clipping_threshold:
                unit *= config.clipping_threshold / ratio
                count += 1
    return Reference(
        clipped,
        sum(rule.count for rule in rules.values() if rule is not None),
        count,
        top,
        math.sqrt(sum(float(grad.square().sum()) for grad in grads.values())),
    )


def threshold_between(values: list[float]) -> float | None:
    """A threshold near the median with room on both sides: rounding cannot move a unit across it.

    None where fewer than two ratios differ, so that no threshold can clip some and leave some.
    """
    ordered = sorted(set(values))
    if len(ordered) < 2:
        return None
    middle = range(len(ordered) // 4, max(3 * len(ordered) // 4, len(ordered) // 4 + 1))
    at = max((i for i in middle if i + 1 < len(ordered)), key=lambda i: ordered[i + 1] / ordered[i])
    return math.sqrt(ordered[at] * ordered[at + 1])


def worst_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative error of any element: clipping only scales, so a small element may be off no more."""
    worst = 0.0
    for name, b in expected.items():
        a = actual.get(name)
        if a is None or a.shape != b.shape:
            return math.inf
        error = ((a - b).abs() / b.abs().clamp(min=1e-30)).nan_to_num(nan=math.inf)
        worst = max(worst, float(error.max()) if error.numel() else 0.0)
    return worst
