"""Parameters by the names that the user gave them, and globs over those names."""

from __future__ import annotations

import difflib
import glob
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain

from torch import Tensor, nn

# The class of a wrapper, and the attribute under which it keeps the wrapped module, which is no part of a name that a
# user wrote. These are torch's own; `dist_agc.frameworks` adds those of each framework.
WRAPPED = {
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
}


def first_of(texts: Iterable[str], most: int) -> str:
    """For a message: so many of them, and the number of the rest."""
    texts = list(texts)
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


# Modules, the innermost first, each with the name that something has in it.
Owners = tuple[tuple[nn.Module, str], ...]


@dataclass(frozen=True, eq=False)
class Entry:
    """A parameter in the model's own list. It lives only while a framework looks at it, since it holds the module.

    ``names`` has every fully qualified name (a tied parameter has several), the leading one first. ``owners`` are the
    modules that it is in, the innermost first, each with the parameter's name in it; none where parameters were given
    without a model.
    """

    names: tuple[str, ...]
    tensor: Tensor
    owners: Owners = ()

    @property
    def name(self) -> str:
        return self.names[0]


def module_paths(model: nn.Module, path: str = "", above: Owners = ()) -> Iterator[tuple[str, Owners]]:
    """Every path with its module and those around it, the module first; a shared module once under each path.

    Wrappers leave no trace in a path, and are among the modules around.
    """
    owners = ((model, ""), *above)
    yield path, owners
    wrapped = {WRAPPED.get(kind.__name__) for kind in type(model).__mro__}
    # Not named_children(), which leaves out the second name that a module has in the same parent.
    for attribute, child in model._modules.items():
        if child is not None and attribute in wrapped:
            yield from module_paths(child, path, owners)
        elif child is not None:
            around = tuple((module, joined(within, attribute)) for module, within in owners)
            yield from module_paths(child, joined(path, attribute), around)


def unwrapped_module(module: nn.Module) -> nn.Module:
    """What is inside of any wrappers around a module."""
    inside = (WRAPPED[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in WRAPPED)
    inner = module._modules.get(next(inside, ""))
    return module if inner is None else unwrapped_module(inner)


def joined(path: str, attribute: str) -> str:
    return f"{path}.{attribute}" if path else attribute


def entries(model: nn.Module) -> list[Entry]:
    """The parameters of ``model``, each once, in the order of ``model.parameters()``."""
    found: dict[int, tuple[Tensor, Owners, dict[str, None]]] = {}
    for path, owners in module_paths(model):
        for attribute, parameter in owners[0][0]._parameters.items():
            if parameter is not None:
                _, _, names = found.setdefault(id(parameter), (parameter, held_by(owners, attribute), {}))
                names[joined(path, attribute)] = None
    return [Entry(tuple(names), parameter, owners) for parameter, owners, names in found.values()]


def held_by(owners: Owners, attribute: str) -> Owners:
    """The owners of a module's parameter. The tensors that make a parametrized weight are called like that weight."""
    return tuple((module, _MADE.sub(r"\1", joined(within, attribute))) for module, within in owners)


_MADE = re.compile(r"\bparametrizations\.([^.]+)\.original\d*$")


def last_linear(model: nn.Module) -> str:
    """A pattern for ``exclude`` that names the last linear layer, in the order in which the model defines its modules.

    AGC usually leaves that layer alone (Brock et al. 2021, section 4.1). The name is logged: look at it once, since
    the layer defined last need not be the one that runs last. A layer that is tied to another, as a language model's
    head to its embedding, is warned of: both would be left out.

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
    modules = ((path, owners[0][0]) for path, owners in module_paths(model))
    paths = [path for path, m in modules if isinstance(m, nn.Linear) or type(m).__name__.endswith("Linear")]
    if not paths:
        raise ValueError(f"{type(model).__name__} has no linear layer: name what AGC shall leave alone in exclude.")
    last = paths[-1]
    logging.getLogger("dist_agc").info("the last linear layer is %r", last or "the model itself")
    for entry in entries(model):
        inside = [name for name in entry.names if name.startswith(f"{last}.")]
        outside = [name for name in entry.names if name not in inside]
        if inside and outside:
            warnings.warn(
                f"the last linear layer {last!r} is tied: {inside[0]!r} and {outside[0]!r} are one parameter, and to "
                f"exclude {last}.* leaves both out. Where an embedding is to be clipped, exclude nothing.",
                UserWarning,
                stacklevel=2,
            )
    return f"{glob.escape(last)}.*" if last else "*"


def matching(pattern: str, names: Sequence[tuple[str, ...]], setting: str, *, checked: bool = True) -> list[int]:
    """The indices of the parameters of which any name matches the glob; ValueError where none does, if ``checked``."""
    hits = [i for i, of_one in enumerate(names) if any(fnmatchcase(name, pattern) for name in of_one)]
    if checked and not hits:
        raise ValueError(f"{setting}: {pattern!r} matches no parameter; {near(pattern, chain(*names))}")
    return hits


def numberless(name: str) -> str:
    """A glob for this parameter and those called alike but for numbers: ``layers.*.w1`` for ``layers.3.w1``."""
    return name if name.isdigit() else ".".join("*" if part.isdigit() else part for part in name.split("."))


def near(pattern: str, names: Iterable[str]) -> str:
    """A phrase with up to five names that ``pattern`` may have meant."""
    every = list(names)
    bare = pattern.replace("*", "").strip(".")
    close = [name for name in every if bare and bare in name][:5]
    close += [name for name in difflib.get_close_matches(pattern, every, n=5, cutoff=0.4) if name not in close]
    return f"near names: {', '.join((close or every)[:5])}" + ("" if close or len(every) <= 5 else ", ...")
