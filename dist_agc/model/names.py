"""Parameters by the names that the user gave them, and globs over those names."""

from __future__ import annotations

import difflib
import glob
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain

from torch import Tensor, nn
from torch.nn.utils import parametrize

# The class of a wrapper, and the attribute under which it keeps the wrapped module, which is no part of a name that a
# user wrote. These are torch's own; `dist_agc.frameworks` adds those of each framework.
WRAPPED = {
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
}


@dataclass(frozen=True, eq=False)
class Entry:
    """A parameter in the model's own list. It lives only while a framework looks at it, since it holds the module.

    ``names`` has every fully qualified name (a tied parameter has several), the leading one first. ``module`` is None
    where parameters were given without a model.
    """

    names: tuple[str, ...]
    tensor: Tensor
    module: nn.Module | None = None

    @property
    def name(self) -> str:
        return self.names[0]


def module_paths(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every (path, module), a shared module once under each path, wrappers leaving no trace in the path."""
    yield path, model
    wrapped = {WRAPPED.get(kind.__name__) for kind in type(model).__mro__}
    # Not named_children(), which leaves out the second name that a module has in the same parent.
    for attribute, child in model._modules.items():
        if child is not None:
            yield from module_paths(child, path if attribute in wrapped else joined(path, attribute))


def joined(path: str, attribute: str) -> str:
    return f"{path}.{attribute}" if path else attribute


def entries(model: nn.Module) -> list[Entry]:
    """The parameters of ``model``, each once, in the order of ``model.parameters()``."""
    found: dict[int, tuple[Tensor, nn.Module, dict[str, None]]] = {}
    made = made_for(model)
    for path, module in module_paths(model):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                _, _, names = found.setdefault(id(parameter), (parameter, made.get(id(module), module), {}))
                names[joined(path, attribute)] = None
    return [Entry(tuple(names), parameter, module) for parameter, module, names in found.values()]


def made_for(model: nn.Module) -> dict[int, nn.Module]:
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


def matching(pattern: str, names: Sequence[tuple[str, ...]], setting: str) -> list[int]:
    """The indices of the parameters of which any name matches the glob ``pattern``; ValueError where none does."""
    hits = [i for i, of_one in enumerate(names) if any(fnmatchcase(name, pattern) for name in of_one)]
    if not hits:
        raise ValueError(f"{setting}: {pattern!r} matches no parameter; {near(pattern, chain(*names))}")
    return hits


def near(pattern: str, names: Iterable[str]) -> str:
    """A phrase with up to five names that ``pattern`` may have meant."""
    every = list(names)
    bare = pattern.replace("*", "").strip(".")
    close = [name for name in every if bare and bare in name][:5]
    close += [name for name in difflib.get_close_matches(pattern, every, n=5, cutoff=0.4) if name not in close]
    return f"near names: {', '.join((close or every)[:5])}" + ("" if close or len(every) <= 5 else ", ...")
