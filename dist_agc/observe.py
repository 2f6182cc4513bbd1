"""Looking without clipping: what the units of a model are, and how many have a ratio above each threshold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import frameworks
from .clipper import Clipper, Model, clipper_of
from .config import AGCConfig, check_threshold
from .engine.counts import Above
from .engine.execution import AT_LIMIT
from .model.parameter import all_zero
from .model.products import Products, agrees
from .model.units import unit_rules

# Half octaves through 0.01, 0.02, 0.04, 0.08 and 0.16, the thresholds that were published.
THRESHOLDS = tuple(0.01 * 2 ** (k / 2) for k in range(-12, 15))

ZERO = "; all 0 now, so clipped to clipping_threshold * eps"


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


@dataclass(frozen=True)
class UnitRow:
    """What numbers the units of one parameter.

    Attributes:
        name: of the parameter; the first of its names, where it is tied.
        shape: of the whole parameter, over all ranks.
        dims: which dims of ``view`` number the units; () for one unit, the whole tensor.
        count: how many units it has.
        why: one phrase. It says too where the weights are all zero, of a matrix that trains and that ranks hold whole.
        guessed: whether nothing but the shape says so.
        observed: with ``run=``, the dims that its products leave (those of the first that contradicts ``dims``, if one
            does); None where no product of the parameter itself was seen.
        view: the shape as which the parameter is looked at: ``shape``, unless the units run through a part of a dim, as
            in a grouped ``ConvTranspose``.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    count: int
    why: str
    guessed: bool
    observed: tuple[int, ...] | None
    view: tuple[int, ...]

    @property
    def disagrees(self) -> bool:
        """Whether the products of the forward pass leave other dims than those that number the units."""
        return self.observed is not None and self.observed != self.dims


def units(model: Model, run: Callable[[], Any] | None = None, **options: Any) -> list[UnitRow]:
    """Say for every parameter which dims number its units, and why. Nothing is clipped.

    The model may be on the meta device, so that one that is too large for this machine can be looked at, and sharded.

    Args:
        model: a module, or an iterable of parameters or of (name, parameter) pairs.
        run: a forward pass, such as ``lambda: model(x)``. It is run once, and the dims that its matrix products and
            convolutions leave are set beside the rule of each parameter. Run it before sharding: what a product takes
            is traced to a parameter by its memory.
        options: ``units``, as in `AGCConfig`.

    Returns:
        One row for each parameter, in the order of the model.

    Raises:
        TypeError: another option; something that is no model.
        ValueError: a pattern that matches nothing, dims that do not fit a parameter, a lazy one without a shape.

    Example:
        >>> rows = units(nn.Linear(3, 2))
        >>> [(row.name, row.dims, row.count, row.why) for row in rows]
        [('weight', (0,), 2, 'Linear: rows'), ('bias', (), 1, 'a vector: one unit')]
        >>> layer = nn.Linear(3, 2)
        >>> units(layer, run=lambda: layer(torch.ones(1, 3)))[0].observed
        (0,)
    """
    if unknown := [name for name in options if name != "units"]:
        raise TypeError(f"units() takes run and units, got {unknown[0]!r}.")
    parameters = frameworks.parameters(model)
    if lazy := [p.name for p in parameters if is_lazy(p.tensor)]:
        raise ValueError(f"parameter {lazy[0]!r} has no shape yet: run one forward pass first.")
    rules = [rule for rule in unit_rules(parameters, AGCConfig.of(None, options)) if rule is not None]
    seen: dict[int, list[tuple[int, ...]]] = {}
    if run is not None:
        with Products([(p.tensor, rule) for p, rule in zip(parameters, rules, strict=True)]) as products:
            run()
        seen = products.left
    zeros = {id(p) for p in all_zero(parameters)}
    rows = []
    for place, (parameter, rule) in enumerate(zip(parameters, rules, strict=True)):
        left = seen.get(place)
        other = (dims for dims in left or () if not agrees(rule, dims))
        observed = None if left is None else next(other, rule.kept)
        rows.append(
            UnitRow(
                name=parameter.name,
                shape=parameter.shape,
                dims=rule.kept,
                count=rule.count,
                why=rule.why + (ZERO if id(parameter) in zeros else ""),
                guessed=rule.guessed,
                observed=observed,
                view=rule.shape,
            )
        )
    return rows
