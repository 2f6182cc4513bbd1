"""Which dims number the units of a parameter: what was registered, the table by module type, the guess.

The principle behind every line: the dims that the forward pass does not contract number the units. An expert is a
matrix of its own, so a stack of them, (experts, out, in), has one unit for each expert and output.

No library is imported: a module is known by the names of its class and of those that it derives from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from torch import nn

from ..config import check_dims
from .names import Owners, unwrapped_module
from .units import UnitRule

Dims = tuple[int, ...]
# Of a module, the name of a parameter in it and its shape. None: this line does not know such a parameter.
Look = Callable[[Any, str, tuple[int, ...]], "Dims | UnitRule | None"]


@dataclass(frozen=True)
class Kind:
    """One line of the table.

    ``types``: globs over ``module.Class``. ``dims``: by glob over a parameter's name in such a module, which dims
    number its units; or a function that looks at the module. ``why``: a phrase, to go on after the class's name.
    """

    types: tuple[str, ...]
    dims: Mapping[str, Dims] | Look
    why: str

    def look(self, module: nn.Module, name: str, shape: tuple[int, ...]) -> Dims | UnitRule | None:
        if callable(self.dims):
            return self.dims(module, name, shape)
        found = (dims for pattern, dims in self.dims.items() if fnmatchcase(name, pattern))
        return next((dims for dims in found if not dims or dims[-1] < len(shape)), None)


def _transposed(module: Any, name: str, shape: tuple[int, ...]) -> Dims | UnitRule | None:
    """A ConvTranspose: (in, out / groups, ...). The magnitudes of a weight norm are told from it by their shape."""
    groups, inputs, outputs = module.groups, module.in_channels, module.out_channels
    if fnmatchcase(name, "weight*") and shape == (inputs, outputs // groups, *module.kernel_size):
        return UnitRule((groups, inputs // groups, *shape[1:]), (0, 2), split=0) if groups > 1 else (1,)
    return (0,) if name in ("weight", "weight_g") else None


def _conv1d(module: Any, name: str, shape: tuple[int, ...]) -> Dims | None:
    return (1,) if shape[1:] == (getattr(module, "nf", None),) else None


def _experts(module: Any, name: str, shape: tuple[int, ...]) -> Dims | None:
    """What `use_experts_implementation` of transformers 5 has a module say of itself."""
    transposed = getattr(module, "is_transposed", None)
    if not isinstance(transposed, bool) or not hasattr(module, "has_gate") or not fnmatchcase(name, "*_proj*"):
        return None
    if len(shape) == 3:
        return (0, 2) if transposed else (0, 1)
    return (0,) if fnmatchcase(name, "*_bias") else None


ROWS, STACKED, STACKED_TRANSPOSED = (0,), (0, 1), (0, 2)
_EACH = "one for each expert and output"

# The first line that knows a parameter counts. Each says how such a module uses its parameters, which is the reason.
TABLE: tuple[Kind, ...] = (
    # y = x @ weight.T
    Kind(("torch.nn.modules.linear.Linear",), {"weight*": ROWS}, "rows"),
    # y_o = x1 @ weight[o] @ x2
    Kind(("torch.nn.modules.linear.Bilinear",), {"weight": ROWS}, "one for each output"),
    # An entry is looked up, not contracted; a row is what one entry is made of.
    Kind(("torch.nn.modules.sparse.Embedding*",), {"weight": ROWS}, "rows"),
    Kind(("torch.nn.modules.conv._ConvTransposeNd",), _transposed, "one for each output channel"),
    # (out, in / groups, ...); gain: that of weight standardisation, (out, 1, ...)
    Kind(("torch.nn.modules.conv._ConvNd",), {"weight*": ROWS, "gain": ROWS}, "one for each output channel"),
    # Linear layers, several below one another
    Kind(("torch.nn.modules.activation.MultiheadAttention",), {"*_proj_weight": ROWS}, "rows"),
    Kind(("torch.nn.modules.rnn.RNN*", "torch.nn.modules.rnn.*Cell*"), {"weight_*": ROWS}, "rows"),
    # y = x @ weight
    Kind(("transformers.pytorch_utils.Conv1D",), _conv1d, "columns"),
    # Whatever its class is called.
    Kind(("*",), _experts, _EACH),
)


@lru_cache(maxsize=4096)
def _lines(kind: type) -> tuple[Kind, ...]:
    """The lines of the table for modules of this type."""
    names = [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__ if base not in (nn.Module, object)]
    return tuple(line for line in TABLE if any(fnmatchcase(name, glob) for glob in line.types for name in names))


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
        for module, name in owners:
            if (rule := _of_registry(module, name, shape)) is not None:
                return rule
    if len(shape) <= 1:
        return UnitRule(shape, (), why="a vector: one unit" if shape else "a number: one unit")
    for module, name in owners:
        for line in _lines(type(module)):
            if (found := line.look(module, name, shape)) is not None:
                why = f"{type(module).__name__}: {line.why}"
                rule = found if isinstance(found, UnitRule) else UnitRule(shape, found)
                return rule.because(why)
    if shape[0] == 1 and math.prod(shape) == max(shape):
        return UnitRule(shape, (), why="a vector: one unit")
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
