"""How frameworks spread parameters over ranks: one file each, and the switch that selects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import AGCConfig
from ..fragments import Axis, Fragment, Pieces, Sums
from ..names import Named, named_parameters
from ..units import UnitRule, unit_rules


class Layout(Protocol):
    """How one parameter lies on this rank."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The global shape."""
        ...

    @property
    def holder(self) -> Tensor:
        """What the optimizer holds: the parameter, or a flat tensor with many parameters in it."""
        ...

    def local(self, tensor: Tensor) -> Tensor:
        """The plain local tensor of the holder or of its gradient; raises ValueError where it cannot be had."""
        ...

    def pieces(self, rule: UnitRule | None) -> Pieces:
        """The blocks and cuts; for an excluded parameter (no rule) whatever adds up to its gradient norm."""
        ...


@dataclass(frozen=True, eq=False)
class Placed:
    """A parameter with its name and its layout."""

    named: Named
    layout: Layout


def group_axis(group: Any) -> Axis:
    """The ranks of a process group that this rank is in; None is all of them."""
    ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
    return Axis(ranks, ranks.index(dist.get_rank()), group or dist.group.WORLD)


def place(model: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> list[Placed]:
    """Every parameter of a model (or of a list) with the layout that holds it.

    Raises:
        TypeError: it holds something other than parameters.
        ValueError: it holds no parameter, or two under one name.
    """
    if isinstance(model, nn.Module):
        from . import dtensor, fsdp1, replicated

        dtensor.reshard(model)
        placed = fsdp1.place(model)
        taken = {id(p.named.parameter) for p in placed} | {id(p.layout.holder) for p in placed}
        copies = replicated.copied(model)
        for named in named_parameters(model):
            if id(named.parameter) not in taken:
                placed.append(Placed(named, select(named, copies.get(id(named.parameter), ()))))
    else:
        placed = [Placed(n, select(n)) for n in _listed(model)]
    if not placed:
        raise ValueError(
            "there are no parameters to clip: expected a module or parameters, got an empty one (a generator that was "
            "used up already? pass the module, or a list)."
        )
    return placed


def _listed(parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> list[Named]:
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    if not isinstance(parameters, Iterable):
        raise TypeError(f"expected an nn.Module or an iterable of parameters, got {type(parameters).__name__}.")
    found: dict[int, Named] = {}
    for i, entry in enumerate(parameters):
        name, parameter = entry if isinstance(entry, tuple) and len(entry) == 2 else (str(i), entry)
        if not isinstance(name, str) or not isinstance(parameter, Tensor):
            raise TypeError(f"expected parameters or (name, parameter) pairs, got {type(entry).__name__} at place {i}.")
        found.setdefault(id(parameter), Named((name,), parameter))
    twice = [name for name, count in Counter(n.name for n in found.values()).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} names more than one parameter: give each a name of its own.")
    return list(found.values())


def select(named: Named, copies: tuple[Axis, ...] = ()) -> Layout:
    """The layout of one parameter that carries all there is to know of it, but for the ``copies`` that DDP makes."""
    from torch.distributed.tensor import DTensor

    from . import dtensor, replicated

    parameter = named.parameter
    if isinstance(parameter, DTensor):
        return dtensor.Sharded(named.name, parameter)
    problem = _unknown(parameter)
    return replicated.Replicated(parameter, copies) if problem is None else Unknown(named.name, parameter, problem)


def _unknown(parameter: Tensor) -> str | None:
    """Why it cannot be told where the pieces of a parameter lie; None for a plain tensor."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "has no shape yet: run one forward pass before clipping"
    if getattr(parameter, "_fsdp_flattened", False):
        return (
            "is a piece of an FSDP1 flat parameter, whose place only the module knows: pass the "
            "FullyShardedDataParallel module itself, not its parameters"
        )
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        return (
            "is sharded by DeepSpeed: pass the engine, dist_agc.attach(engine), so that clipping runs on the fp32 "
            "partitions inside engine.step()"
        )
    if hasattr(type(parameter), "__tensor_flatten__"):  # a tensor made of other tensors
        return (
            f"is a {type(parameter).__name__}, a layout that dist_agc does not know; known are plain tensors (DDP), "
            "DTensor (FSDP2, tensor parallel), FSDP1 and DeepSpeed ZeRO"
        )
    return None


@dataclass(frozen=True, eq=False)
class Unknown:
    """A parameter that cannot be clipped; an error only where it is trained (quantised base weights are not)."""

    name: str
    holder: Tensor
    problem: str

    @property
    def shape(self) -> tuple[int, ...]:
        uninitialized = isinstance(self.holder, nn.parameter.UninitializedParameter)
        return () if uninitialized else tuple(self.holder.shape)

    def local(self, tensor: Tensor) -> Tensor:
        raise ValueError(f"parameter {self.name!r} {self.problem}.")

    def pieces(self, rule: UnitRule | None) -> Pieces:
        raise ValueError(f"parameter {self.name!r} {self.problem}.")


def make_fragments(placed: Sequence[Placed], config: AGCConfig) -> list[Fragment]:
    """The fragments of every trainable parameter, in order.

    Raises:
        ValueError: a pattern matches nothing, a unit rule does not fit, or a layout is not known or cannot be cut into
            its units.
    """
    rules = unit_rules([p.named for p in placed], [p.layout.shape for p in placed], config)
    fragments = []
    for entry, rule in zip(placed, rules, strict=True):
        if not entry.layout.holder.requires_grad:
            continue
        layout = entry.layout
        fragments.append(
            Fragment(
                entry.named.name,
                rule,
                layout.pieces(rule),
                layout.holder,
                layout.local,
                torch.Size(layout.shape).numel(),
                getattr(layout, "copies", ()),
                layout if isinstance(layout, Sums) else None,
            )
        )
    return fragments
