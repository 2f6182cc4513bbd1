"""Which dims number the units of a parameter: what was registered, the table by module type, the guess.

The principle behind them: the dims that the forward pass does not contract number the units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from ..config import check_dims
from .names import Owners, unwrapped_module
from .table import Dims, known
from .units import UnitRule

_registered: dict[type, dict[str, Dims]] = {}
_registrations = 0


def registrations() -> int:
    """How often `register_units` was called: what was planned before the last call may be out of date."""
    return _registrations


def register_units(module_type: type[nn.Module], dims: Mapping[str, int | Dims]) -> None:
    """Say once for all which dims number the units of the parameters of a module of your own.

    It holds for every instance of ``module_type`` and of what derives from it, in all that is clipped from now on.
    ``units=`` in the settings goes before it. A second call for the same type replaces the first.

    Args:
        module_type: a subclass of ``torch.nn.Module``.
        dims: by the name of a parameter in the module (``"w1"``; ``"experts.w1"`` for one in a module inside of it),
            the dims that the forward pass does not contract: ``(0, 1)`` for a stack of experts (experts, out, in),
            ``(0, 2)`` for (experts, in, out), 1 for a matrix used as ``x @ w``, ``()`` for one unit.

    Raises:
        TypeError: no module type; no mapping; dims that are no whole numbers.
        ValueError: when the model is clipped or looked at: no such parameter, or no such dim.

    Example:
        >>> import torch
        >>> from dist_agc import units
        >>> class Experts(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w1 = nn.Parameter(torch.ones(4, 8, 16))   # (experts, out, in)
        >>> register_units(Experts, {"w1": (0, 1)})
        >>> units(Experts())[0].count
        32
    """
    global _registrations
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_units takes a subclass of torch.nn.Module, got {module_type!r}.")
    if not isinstance(dims, Mapping) or not dims:
        raise TypeError(f'register_units takes a mapping such as {{"w1": (0, 1)}} from names to dims, got {dims!r}.')
    for name in dims:
        if not isinstance(name, str) or not name:
            raise TypeError(f"the keys must be names of parameters of {module_type.__name__}, got {name!r}.")
    of = f"register_units({module_type.__name__})"
    _registered[module_type] = {name: check_dims(given, f"{of}[{name!r}]") for name, given in dims.items()}
    _registrations += 1


def default_rule(shape: Sequence[int], owners: Owners = ()) -> UnitRule:
    """The rule of a parameter of this shape in these modules: registered, by the table, or guessed."""
    shape = tuple(shape)
    if _registered:
        # As in the table, the outermost module goes first: it decides how those inside are used.
        for module, name in reversed(owners):
            if (rule := _of_registry(module, name, shape)) is not None:
                return rule
    if len(shape) <= 1:
        return UnitRule(shape, (), why="a vector: one unit" if shape else "a number: one unit")
    if (rule := known(shape, owners)) is not None:
        return rule
    if shape[0] == 1 and math.prod(shape) == max(shape):
        return UnitRule(shape, (), why="a vector: one unit")
    if len(shape) > 2 and math.prod(shape) == shape[0]:
        return UnitRule(shape, (0,), why="a gain: one for each number")
    return UnitRule(shape, (0,), why="guess: dim 0", guessed=True)


def _of_registry(module: nn.Module, name: str, shape: tuple[int, ...]) -> UnitRule | None:
    for kind in type(module).__mro__:
        if kind not in _registered:
            continue
        of, dims = f"register_units({kind.__name__})", _registered[kind]
        if missing := [asked for asked in dims if not _has(module, asked)]:
            raise ValueError(f"{of}: {type(module).__name__} has no parameter {missing[0]!r}.")
        if name in dims:
            return UnitRule(shape, (), why=f"{kind.__name__}: registered").overridden(dims[name], f"{of}[{name!r}]")
    return None


def _has(module: nn.Module, name: str) -> bool:
    *path, attribute = name.split(".")
    for step in path:
        inner = module._modules.get(step)
        if inner is None:
            return False
        module = unwrapped_module(inner)
    # Looked up without being read: a parametrized weight is a property that computes it.
    return attribute in module._parameters or attribute in vars(module) or hasattr(type(module), attribute)
