"""What a unit is: which dims of a parameter number its units, and what a user's settings say of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..config import AGCConfig
from .names import matching

if TYPE_CHECKING:
    from .parameter import Parameter


@dataclass(frozen=True)
class UnitRule:
    """The units of one parameter.

    ``shape`` is the parameter's global shape; where ``split`` is given, that dim of the parameter is seen as two, such
    as dim 0 of a grouped ConvTranspose as (groups, in / groups). ``kept`` are the dims of ``shape`` that number the
    units; a norm sums over all others. ``why`` is a phrase that says where this comes from, and ``guessed`` whether
    from nothing but the shape.

    The canonical form is (batch, outer, units, inner): a unit is one (batch, unit) pair.

    Example:
        >>> UnitRule((8, 3, 5, 5), (0,)).canonical     # Conv2d: one unit per output channel
        (1, 1, 8, 75)
        >>> UnitRule((2, 3, 4, 5), (0, 2)).canonical   # ConvTranspose1d(6, 8, 5, groups=2)
        (2, 3, 4, 5)
        >>> UnitRule((7,), ()).canonical               # a bias: one unit
        (1, 1, 1, 7)
    """

    shape: tuple[int, ...]
    kept: tuple[int, ...]
    split: int | None = None
    why: str = field(default="", compare=False)
    guessed: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        kept, ndim = self.kept, len(self.shape)
        run = kept[self._leading :]
        valid = tuple(sorted(set(kept))) == kept and all(0 <= d < ndim for d in kept)
        if not valid or (run and run[-1] - run[0] >= len(run)):
            raise ValueError(
                f"the dims {kept} cannot number the units of a tensor of shape {self.shape}: they must be leading "
                f"dims, then at most one run of neighbours, each below {ndim}."
            )

    def because(self, why: str) -> UnitRule:
        """The same units, for this reason."""
        return replace(self, why=why)

    def overridden(self, dims: tuple[int, ...], said: str) -> UnitRule:
        """The rule of the same parameter with other ``dims``; ``said`` is where they are from. ValueError: no such."""
        shape = self.of_parameter
        if any(not -len(shape) <= d < len(shape) for d in dims):
            raise ValueError(f"{said} = {dims}: a parameter of shape {shape} has no such dim.")
        try:
            return UnitRule(shape, tuple(sorted({d % len(shape) for d in dims})), why=self.why)
        except ValueError as error:
            raise ValueError(f"{said}: {error}") from None

    @property
    def doubtful(self) -> bool:
        """Whether it is a guess that is often wrong: one on three dims or more, of a tensor that has units."""
        return self.guessed and len(self.shape) > 2 and self.count > 0

    @property
    def of_parameter(self) -> tuple[int, ...]:
        """The shape of the parameter itself, in which no dim is two."""
        shape, at = self.shape, self.split
        return shape if at is None else (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])

    @property
    def joined(self) -> UnitRule:
        """The same units without ``split``, where both of its dims number units or neither does."""
        at = self.split
        if at is None or (at in self.kept) != (at + 1 in self.kept):
            return self
        kept = tuple(sorted({d - (d > at) for d in self.kept}))
        return replace(self, shape=self.of_parameter, kept=kept, split=None)

    @property
    def _leading(self) -> int:
        """How many of ``kept`` are the first dims of the shape."""
        return next((i for i, d in enumerate(self.kept) if d != i), len(self.kept))

    @property
    def count(self) -> int:
        """How many units the whole parameter has. A tensor without elements has none, whatever its shape."""
        return math.prod(self.shape[d] for d in self.kept) if math.prod(self.shape) else 0

    @property
    def reduced(self) -> tuple[int, ...]:
        """The dims that a norm sums over."""
        return tuple(d for d in range(len(self.shape)) if d not in self.kept)

    @property
    def canonical(self) -> tuple[int, int, int, int]:
        """Sizes (batch, outer, units, inner), whose product is the number of elements."""
        leading, run = self._leading, self.kept[self._leading :]
        # Leading dims alone are rows, without batch and outer.
        a, b, c = (leading, run[0], run[-1] + 1) if run else (0, 0, leading)
        shape = self.shape
        return math.prod(shape[:a]), math.prod(shape[a:b]), math.prod(shape[b:c]), math.prod(shape[c:])


def unit_rules(parameters: Sequence[Parameter], config: AGCConfig, *, checked: bool = True) -> list[UnitRule | None]:
    """One rule per parameter, in order; None where ``config.exclude`` or its framework leaves the parameter alone.

    Raises ValueError where a pattern matches nothing (if ``checked``), or an override does not fit a parameter's shape.
    """
    names = [p.names for p in parameters]
    rules = [p.default for p in parameters]
    if config.units == "leading":
        rules = [UnitRule(p.shape, (0,) if len(p.shape) > 1 else (), why='units="leading"') for p in parameters]
    elif isinstance(config.units, dict):
        for pattern, dims in config.units.items():
            assert isinstance(dims, tuple)  # AGCConfig made it one
            for i in matching(pattern, names, "units", checked=checked):
                said = f"parameter {parameters[i].name!r}: units[{pattern!r}]"
                rules[i] = rules[i].overridden(dims, said).because(f"units[{pattern!r}]")
    excluded = {i for pattern in config.exclude for i in matching(pattern, names, "exclude", checked=checked)}
    excluded.update(i for i, p in enumerate(parameters) if p.left_alone)
    return [None if i in excluded else rule for i, rule in enumerate(rules)]
