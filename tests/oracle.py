"""The reference: adaptive gradient clipping in float64, in one process, written the slowest and plainest way.

It never imports ``dist_agc``: a mistake there cannot be repeated here by import. It takes full tensors, walks over the
units one by one, and knows nothing of shards, buffers, dtypes or devices.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Units:
    """Which elements of a parameter form one unit.

    ``dims`` are the dimensions whose indices name a unit: (0,) is a unit per row, (0, 1) a unit per pair, () the whole
    tensor. ``groups`` cuts dimension 0 into that many equal blocks, each with units of its own (ConvTranspose).
    ``view``: the shape that the parameter is seen in, of which ``dims`` are, such as (experts, rows, columns) for a
    matrix that has all experts below one another.
    """

    dims: tuple[int, ...]
    groups: int = 1
    view: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ParameterReference:
    units: int
    clipped_units: int
    nonfinite_units: int
    max_ratio: float
    grad_norm: float
    max_ratio_above_eps: float = 0.0

    @property
    def clip_fraction(self) -> float:
        return self.clipped_units / self.units if self.units else 0.0


@dataclass(frozen=True)
class Reference:
    """What clipping must give: float64 gradients by name (only of parameters that have one) and the statistics."""

    grads: dict[str, Tensor]
    grad_norm: float
    per_parameter: dict[str, ParameterReference]

    @property
    def units(self) -> int:
        return sum(p.units for p in self.per_parameter.values())

    @property
    def clipped_units(self) -> int:
        return sum(p.clipped_units for p in self.per_parameter.values())

    @property
    def nonfinite_units(self) -> int:
        return sum(p.nonfinite_units for p in self.per_parameter.values())

    @property
    def clip_fraction(self) -> float:
        return self.clipped_units / self.units if self.units else 0.0

    @property
    def max_ratio(self) -> float:
        return max((p.max_ratio for p in self.per_parameter.values()), default=0.0)

    @property
    def max_ratio_above_eps(self) -> float:
        return max((p.max_ratio_above_eps for p in self.per_parameter.values()), default=0.0)


def unit_rules(model: nn.Module, overrides: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Units]:
    """The unit rule of every parameter of an unwrapped model, by name; ``overrides`` are full names, not patterns."""
    rules: dict[str, Units] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.ndim <= 1:
                rules[name] = Units(())
            elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                rules[name] = Units((1,), groups=module.groups)
            elif type(module).__name__ == "Conv1D":  # transformers: (in, out)
                rules[name] = Units((1,))
            else:
                rules[name] = Units((0,))
    for name, dims in (overrides or {}).items():
        rules[name] = Units(dims)
    return rules


def unit_labels(shape: tuple[int, ...], rule: Units) -> tuple[Tensor, int]:
    """For every element the number of its unit, and how many units there are (none in a tensor without elements)."""
    if rule.view is not None:
        labels, count = unit_labels(rule.view, Units(rule.dims))
        return labels.reshape(shape), count
    labels, count = torch.zeros(shape, dtype=torch.int64), 1
    for dim in rule.dims:
        along = [1] * len(shape)
        along[dim] = shape[dim]
        labels = labels * shape[dim] + torch.arange(shape[dim]).reshape(along)
        count *= shape[dim]
    if rule.groups > 1:
        block = torch.arange(shape[0]) // (shape[0] // rule.groups)
        labels = labels * rule.groups + block.reshape([shape[0]] + [1] * (len(shape) - 1))
        count *= rule.groups
    return labels, count if labels.numel() else 0


def clip(
    weights: Mapping[str, Tensor],
    grads: Mapping[str, Tensor | None],
    rules: Mapping[str, Units],
    clipping_threshold: float | Mapping[str, float | None],
    *,
    eps: float = 1e-3,
    exclude: Collection[str] = (),
    on_nonfinite: str = "keep",
    loss_scale: float = 1.0,
) -> Reference:
    """Clip full gradients.

    Every parameter in ``weights`` that is not in ``exclude`` is governed; leave frozen ones out. A threshold of None
    leaves the parameter alone but its units still count. Gradients carry ``loss_scale`` and keep it.
    """
    clipped: dict[str, Tensor] = {}
    per_parameter: dict[str, ParameterReference] = {}
    sum_of_squares = 0.0
    for name, weight in weights.items():
        grad = grads.get(name)
        if grad is not None:
            grad = grad.detach().to_dense().to(torch.float64, copy=True) / loss_scale
            sum_of_squares += float(grad.square().sum())
            clipped[name] = grad
        if name in exclude:
            continue
        threshold = clipping_threshold[name] if isinstance(clipping_threshold, Mapping) else clipping_threshold
        per_parameter[name] = _clip_parameter(
            weight.detach().double(), grad, rules[name], threshold, eps=eps, on_nonfinite=on_nonfinite
        )
    return Reference(
        {name: grad * loss_scale for name, grad in clipped.items()}, math.sqrt(sum_of_squares), per_parameter
    )


def _clip_parameter(
    weight: Tensor, grad: Tensor | None, rule: Units, threshold: float | None, *, eps: float, on_nonfinite: str
) -> ParameterReference:
    labels, units = unit_labels(tuple(weight.shape), rule)
    if grad is None:
        return ParameterReference(units, 0, 0, 0.0, 0.0)
    norm = math.sqrt(float(grad.square().sum()))
    clipped_units, nonfinite_units, max_ratio, above_eps = 0, 0, 0.0, 0.0
    for unit in range(units):
        members = labels == unit
        weight_norm = math.sqrt(float(weight[members].square().sum()))
        grad_norm = math.sqrt(float(grad[members].square().sum()))
        if not math.isfinite(grad_norm):
            nonfinite_units += 1
            if on_nonfinite == "zero":
                grad[members] = 0.0
            continue
        if grad_norm == 0.0:  # also 0/0 with eps=0: nothing to clip
            continue
        floor = max(weight_norm, eps)
        ratio = grad_norm / floor if floor > 0.0 else math.inf
        max_ratio = max(max_ratio, ratio)
        if weight_norm >= eps and weight_norm > 0.0:
            above_eps = max(above_eps, ratio)
        if threshold is not None and ratio > threshold:
            clipped_units += 1
            grad[members] *= threshold / ratio
    return ParameterReference(units, clipped_units, nonfinite_units, max_ratio, norm, above_eps)


def composer(weight: Tensor, grad: Tensor, clipping_threshold: float) -> Tensor:
    """Composer's rule (mosaicml 0.32, ``gradient_clipping.py``) in float64, with its behaviour at zeros.

    max_norm = threshold * ||W||; coefficient = nan_to_num(max_norm / ||G||, nan=1) clamped to 1; dim 0 always.
    """
    grad = grad.detach().to(torch.float64, copy=True)
    weight = weight.detach().double()
    flat_weight = weight.reshape(1, -1) if weight.ndim <= 1 else weight.flatten(1)
    flat_grad = grad.view(1, -1) if grad.ndim <= 1 else grad.view(flat_weight.shape)
    for weight_row, grad_row in zip(flat_weight, flat_grad, strict=True):
        coefficient = clipping_threshold * weight_row.norm() / grad_row.norm()
        grad_row *= coefficient.nan_to_num(nan=1.0).clamp(max=1.0)
    return grad


def train(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    rules: Mapping[str, Units],
    clipping_threshold: float | Mapping[str, float | None],
    *,
    lr: float,
    momentum: float = 0.9,
    eps: float = 1e-3,
    exclude: Collection[str] = (),
) -> list[Reference]:
    """Train a float64 model with clipped SGD on full batches, in place; returns one reference per step."""
    trainable: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    velocity: dict[str, Tensor] = {}
    references = []
    for inputs, targets in batches:
        model.zero_grad(set_to_none=True)
        loss(model, inputs, targets).backward()
        grads = {name: p.grad for name, p in trainable.items()}
        references.append(clip(trainable, grads, rules, clipping_threshold, eps=eps, exclude=exclude))
        with torch.no_grad():
            for name, grad in references[-1].grads.items():
                velocity[name] = velocity[name] * momentum + grad if name in velocity else grad
                trainable[name] -= lr * velocity[name]
    return references
