"""Parameters by the names that the user gave them, and globs over those names."""

from __future__ import annotations

import difflib
import glob
import logging
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.utils import parametrize

# Attributes under which wrappers keep the wrapped module; no part of a name that a user wrote.
_WRAPPED = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "PipelineEngine": "module",
    "OptimizedModule": "_orig_mod",
    "_FabricModule": "_forward_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
}


def wrapped_attribute(module: nn.Module) -> str | None:
    """The attribute under which a wrapper module keeps what it wraps; None for any other module."""
    for kind in type(module).__mro__:
        attribute = _WRAPPED.get(kind.__name__)
        if attribute is not None and attribute in module._modules:
            return attribute
    return None


@dataclass(frozen=True, eq=False)
class Named:
    """One parameter and what is known of its place in the model.

    ``names`` has every fully qualified name (a tied parameter has several), the leading one first.
    """

    names: tuple[str, ...]
    parameter: Tensor
    # Weak, because a Clipper that is kept for as long as its model lives must not keep the model alive.
    owner: weakref.ref[nn.Module] | None = None

    @property
    def module(self) -> nn.Module | None:
        return None if self.owner is None else self.owner()

    @property
    def name(self) -> str:
        return self.names[0]


def module_paths(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every (path, module), a shared module once under each path, wrappers leaving no trace in the path."""
    found: list[tuple[str, nn.Module]] = []

    def walk(module: nn.Module, path: str) -> None:
        found.append((path, module))
        transparent = wrapped_attribute(module)
        # Not named_children(), which leaves out the second name that a module has in the same parent.
        for attribute, child in module._modules.items():
            if child is not None:
                walk(child, path if attribute == transparent else f"{path}.{attribute}" if path else attribute)

    walk(model, "")
    return found


def named_parameters(model: nn.Module) -> list[Named]:
    """The parameters of ``model``, each once, in the order of ``model.parameters()``."""
    owners: dict[int, tuple[Tensor, nn.Module, list[str]]] = {}
    made_for = parametrized(model)
    for path, module in module_paths(model):
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{attribute}" if path else attribute
            owners.setdefault(id(parameter), (parameter, made_for.get(id(module), module), []))[2].append(name)
    return [
        Named(tuple(dict.fromkeys(names)), parameter, weakref.ref(module))
        for parameter, module, names in owners.values()
    ]


def parametrized(model: nn.Module) -> dict[int, nn.Module]:
    """By ``id`` of a list of parametrizations, the module whose tensor it makes, which says what the units are."""
    return {
        id(made_by): module
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for made_by in module.parametrizations.children()  # type: ignore[union-attr]
    }


def last_linear(model: nn.Module) -> str:
    """A pattern for ``exclude`` that names the last linear layer, in the order in which the model defines its modules.

    AGC usually leaves that layer alone (Brock et al. 2021, section 4.1). The name is logged: look at it once, since
    the layer defined last need not be the one that runs last.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no linear layer.

    Example:
        >>> last_linear(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(-1)))
        '2.*'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"last_linear needs the model's structure: expected a module, got {type(model).__name__}.")
    # By name too: tensor-parallel and quantised layers of other libraries are not nn.Linear.
    paths = [path for path, m in module_paths(model) if isinstance(m, nn.Linear) or type(m).__name__.endswith("Linear")]
    if not paths:
        raise ValueError(f"{type(model).__name__} has no linear layer: name what AGC shall leave alone in exclude.")
    logging.getLogger("dist_agc").info("the last linear layer is %r", paths[-1] or "the model itself")
    return f"{glob.escape(paths[-1])}.*" if paths[-1] else "*"


def matching(pattern: str, named: Sequence[tuple[str, ...]], setting: str) -> list[int]:
    """The indices of the parameters of which any name matches the glob ``pattern``.

    Raises:
        ValueError: none does; the message lists near names.
    """
    hits = [i for i, names in enumerate(named) if any(fnmatchcase(name, pattern) for name in names)]
    if not hits:
        every = [name for names in named for name in names]
        raise ValueError(f"{setting}: {pattern!r} matches no parameter; {near(pattern, every)}")
    return hits


def near(pattern: str, names: Iterable[str], count: int = 5) -> str:
    """A phrase that names what ``pattern`` may have meant."""
    every = list(names)
    bare = pattern.replace("*", "").strip(".")
    close = [name for name in every if bare and bare in name][:count]
    close += [name for name in difflib.get_close_matches(pattern, every, n=count, cutoff=0.4) if name not in close]
    return f"near names: {', '.join((close or every)[:count])}" + ("" if close or len(every) <= count else ", ...")
