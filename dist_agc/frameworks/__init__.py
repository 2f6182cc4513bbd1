"""How frameworks spread parameters over ranks: one file each, and the order in which they are asked."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..model import names
from ..model.names import Entry
from ..model.parameter import Parameter, Unknown
from . import wrappers
from .base import Framework
from .deepspeed import DeepSpeed
from .fsdp1 import FSDP1
from .hooks import summed_later
from .megatron import Megatron
from .plain import Plain

# What has parameters: a module, a list of several, or the parameters themselves, with or without names.
Model = nn.Module | Sequence[nn.Module] | Iterable[Tensor] | Iterable[tuple[str, Tensor]]

_SHARDING: tuple[Framework, ...] = (DeepSpeed(), Megatron(), FSDP1())
_PLAIN = Plain()  # takes what nobody else knows and nobody refuses

for _framework in (*_SHARDING, _PLAIN):
    names.WRAPPED.update(_framework.wrapped)
names.WRAPPED["_FabricModule"] = "_forward_module"  # Lightning Fabric, around any of them


def _asked() -> tuple[Framework, ...]:
    """The frameworks in the order in which they are asked. Whoever has a DTensor has imported what makes them."""
    if "torch.distributed.tensor" not in sys.modules:
        return _SHARDING
    from .dtensor import DTensors

    return (*_SHARDING, DTensors())


def parameters(model: Model) -> list[Parameter]:
    """Every parameter of a model (of several, of a list), as the framework that holds it knows it.

    Raises TypeError for a list of something else, ValueError for no parameter, or two under one name.
    """
    models = modules(model)
    whole = None if not models else models[0] if len(models) == 1 else nn.ModuleList(models)
    if whole is not None:
        for framework in _asked():
            framework.prepare(whole)
    given = _listed(model) if whole is None else names.entries(whole)  # type: ignore[arg-type]
    left, found = given, []
    for framework in _asked():
        some, left = framework.claim(whole, left)
        found += some
    plain = []
    for entry in left:
        if problem := refused(entry.tensor):
            found.append(Unknown.of(entry, () if is_lazy(entry.tensor) else None, problem=problem))
        else:
            plain.append(entry)
    found += _PLAIN.claim(whole, plain)[0]
    if not found:
        raise ValueError(
            "there are no parameters to clip: expected a module or parameters, got an empty one (a generator that was "
            "used up already? pass the module, or a list)."
        )
    # In the order of the model, however they were claimed.
    place = {id(entry.tensor): i for i, entry in enumerate(given)}
    found.sort(key=lambda p: place.get(id(p.tensor), -1))
    return found if len(models) < 2 else _named_alone(found)


def modules(model: object) -> list[nn.Module]:
    """The modules that were given: one, or a list of several. None where parameters were given."""
    given = [model] if isinstance(model, nn.Module) else model
    if isinstance(given, list | tuple) and all(isinstance(one, nn.Module) for one in given):
        return list(given)
    return []


def _named_alone(found: list[Parameter]) -> list[Parameter]:
    """The parameters of several models under the names that each has in its own, ``weight`` for ``1.weight``.

    Patterns may use either. The longer one comes first where two models have the same name.
    """
    short = [tuple(name.partition(".")[2] for name in p.names) for p in found]
    often = Counter(names[0] for names in short)
    named = []
    for p, own in zip(found, short, strict=True):
        names = (*own, *p.names) if often[own[0]] == 1 else (*p.names, *own)
        named.append(replace(p, names=tuple(dict.fromkeys(names))))
    return named


def refused(tensor: Tensor) -> str | None:
    """Why a tensor that nobody claims cannot be clipped; None for a plain one."""
    if is_lazy(tensor):
        return "has no shape yet: run one forward pass before clipping"
    for framework in _asked():
        if reason := framework.refuses(tensor):
            return reason
    if reason := wrappers.unknown(tensor):
        return reason
    if tensor.dtype.itemsize < 2:
        return f"is of {tensor.dtype}, in which torch finds no norms. Exclude it"
    return None


def stepper(model: object, optimizer: object = None) -> Framework | None:
    """The framework that steps this object by itself, because it is an engine, or whose optimizer this is; or None."""
    return next((framework for framework in _asked() if framework.steps(model, optimizer)), None)


def not_in_backward(model: object) -> str | None:
    """Why the gradients of some module in ``model`` are not final in backward; None where all are."""
    inside = (module for one in modules(model) for module in one.modules())
    asked = [*(framework.not_in_backward for framework in (*_asked(), _PLAIN)), summed_later]
    return next(filter(None, (ask(module) for module in inside for ask in asked)), None)


# Optimizers around another, which takes the hooks: their own classes cannot, or take them half. By class name, the
# attribute with the inner one, which steps on the same gradients and weights.
_AROUND = {
    "AcceleratedOptimizer": "optimizer",
    "_FabricOptimizer": "optimizer",
    "PostLocalSGDOptimizer": "optim",  # averages weights after the step
    "DPOptimizer": "original_optimizer",  # Opacus: what is clipped has its noise already
}


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that takes hooks, where one around it does not."""
    inner = (getattr(optimizer, _AROUND[kind.__name__]) for kind in type(optimizer).__mro__ if kind.__name__ in _AROUND)
    found = next(inner, None)
    return optimizer if found is None else unwrapped(found)


def _listed(parameters: Any) -> list[Entry]:
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    if not isinstance(parameters, Iterable):
        raise TypeError(f"expected an nn.Module or an iterable of parameters, got {type(parameters).__name__}.")
    found: dict[int, Entry] = {}
    for i, entry in enumerate(parameters):
        name, parameter = entry if isinstance(entry, tuple) and len(entry) == 2 else (str(i), entry)
        if not isinstance(name, str) or not isinstance(parameter, Tensor):
            raise TypeError(f"expected parameters or (name, parameter) pairs, got {type(entry).__name__} at place {i}.")
        found.setdefault(id(parameter), Entry((name,), parameter))
    twice = [name for name, count in Counter(entry.name for entry in found.values()).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} names more than one parameter: give each a name of its own.")
    return list(found.values())
