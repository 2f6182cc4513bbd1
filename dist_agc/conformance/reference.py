"""The rule in float64 on full tensors, written the slowest and plainest way: what every layout is held against.

It shares nothing with the code under test but the choice of which dims number the units. Tensors and rules go by the
names of parameters; a rule of None leaves the parameter alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..config import AGCConfig
from ..model.units import UnitRule

Tensors = Mapping[str, Tensor]
Rules = Mapping[str, UnitRule | None]


@dataclass(frozen=True)
class Reference:
    """What clipping must give: float64 gradients, and the statistics."""

    grads: Tensors
    units: int
    clipped_units: int
    max_ratio: float
    grad_norm: float


def _parts(tensor: Tensor, rule: UnitRule) -> Iterator[Tensor]:
    """The elements of every unit, one unit after the other, as views."""
    tensor = tensor.view(rule.shape)
    if tensor.numel():
        for index in itertools.product(*(range(rule.shape[d]) for d in rule.kept)):
            at = dict(zip(rule.kept, index, strict=True))
            yield tensor[tuple(at.get(d, slice(None)) for d in range(tensor.ndim))]


def _units(weights: Tensors, grads: Tensors, rules: Rules, eps: float) -> Iterator[tuple[Tensor, float]]:
    """Of every unit with a gradient other than zero: that gradient, as a view, and its norm over the weight's."""
    for name, grad in grads.items():
        if (rule := rules[name]) is not None:
            for w, g in zip(_parts(weights[name], rule), _parts(grad, rule), strict=True):
                norm, floor = float(g.square().sum().sqrt()), max(float(w.square().sum().sqrt()), eps)
                if norm > 0:
                    yield g, norm / floor if floor > 0 else math.inf


def clip(weights: Tensors, grads: Tensors, rules: Rules, config: AGCConfig) -> Reference:
    """Clip copies of full float64 gradients, unit by unit."""
    clipped = {name: grad.clone() for name, grad in grads.items()}
    count, top = 0, 0.0
    for unit, ratio in _units(weights, clipped, rules, config.eps):
        top = max(top, ratio)
        if ratio > config.clipping_threshold:
            unit *= config.clipping_threshold / ratio
            count += 1
    units = sum(rule.count for rule in rules.values() if rule is not None)
    return Reference(clipped, units, count, top, math.sqrt(sum(float(g.square().sum()) for g in grads.values())))


def threshold(weights: Tensors, grads: Tensors, rules: Rules, eps: float) -> float | None:
    """A threshold near the median ratio with room on both sides: rounding cannot move a unit across it.

    None where fewer than two ratios differ, so that no threshold can clip some units and leave some.
    """
    ratios = sorted({ratio for _, ratio in _units(weights, grads, rules, eps)})
    if len(ratios) < 2:
        return None
    middle = range(len(ratios) // 4, 3 * len(ratios) // 4)
    below, above = max(((ratios[i], ratios[i + 1]) for i in middle), key=lambda pair: pair[1] / pair[0])
    return math.sqrt(below * above)


def worst_error(actual: Tensors, expected: Tensors) -> float:
    """The largest relative error of any element: clipping only scales, so a small element may be off no more."""
    worst = 0.0
    for name, b in expected.items():
        a = actual.get(name)
        if a is None or a.shape != b.shape:
            return math.inf
        error = ((a - b).abs() / b.abs().clamp(min=1e-30)).nan_to_num(nan=math.inf)
        worst = max(worst, float(error.max()) if error.numel() else 0.0)
    return worst
