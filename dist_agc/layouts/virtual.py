"""Layouts without ranks: what one rank of a world of any size would hold, from shapes alone.

The arithmetic by which FSDP1, FSDP2, tensor parallel and DeepSpeed cut parameters, on meta tensors and without a
process group. Everything after it (blocks, split units, slots, stages) is the code that runs on the cluster.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from ..fragments import Axis, Pieces, chunk, excluded, sharded
from ..names import Named, named_parameters
from ..units import UnitRule
from . import Placed
from .replicated import Replicated
from .zero import FlatPartition, _cut, _Interval

LAYOUTS = ("ddp", "fsdp1", "fsdp2", "hsdp", "tp+fsdp2", "zero0", "zero1", "zero2", "zero3")

# How torchtitan and transformers cut Llama-like models over tensor-parallel ranks, and Megatron GPT-2: by name of the
# module.
COLUMNWISE = (
    *("*q_proj", "*k_proj", "*v_proj", "*gate_proj", "*up_proj", "*embed_tokens", "*lm_head"),
    *("h.*.attn", "h.*.fc"),
)
ROWWISE = ("*o_proj", "*down_proj", "h.*.proj", "h.*.out")

_FSDP1_ALIGNMENT = 16  # bytes; with use_orig_params, where FSDP1 begins every parameter
_ZERO_ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor: a group is padded to this times the number of ranks


@dataclass(frozen=True)
class World:
    """One rank among many.

    Args:
        size: all ranks.
        rank: this one.
        tensor: tensor-parallel ranks, neighbours in the numbering.
        shard: ranks that share one copy of the parameters (HSDP), neighbours too.
    """

    size: int
    rank: int
    tensor: int = 1
    shard: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not in a world of {self.size}.")
        for name, ranks in (("tensor", self.tensor), ("shard", self.shard)):
            if ranks < 1 or self.size % ranks:
                raise ValueError(f"{name}={ranks} does not divide a world of {self.size}.")

    def axis(self, size: int, stride: int = 1) -> Axis:
        """``size`` ranks, ``stride`` apart, this one among them. A range, so that it costs nothing to compare."""
        index = self.rank // stride % size
        first = self.rank - index * stride
        return Axis(range(first, first + size * stride, stride), index)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class VirtualShard:
    """This rank's block of a DTensor. ``cuts``: (axis, tensor dim), innermost axis first."""

    holder: Tensor
    cuts: tuple[tuple[Axis, int], ...]
    copies: tuple[Axis, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.holder.shape)

    def local(self, tensor: Tensor) -> Tensor:
        for axis, dim in self.cuts:
            start, stop = chunk(tensor.shape[dim], axis.size, axis.rank)
            tensor = tensor.narrow(dim, start, stop - start)
        return tensor

    def pieces(self, rule: UnitRule | None) -> Pieces:
        if rule is None:
            return excluded(self.holder.ndim, (axis for axis, _ in self.cuts))
        local = self.local(self.holder).shape
        rows = next((chunk(self.shape[0], axis.size, axis.rank) for axis, dim in self.cuts if dim == 0), (0, local[0]))
        return sharded(rule, local, self.cuts, rows if rule.grouped else None)


def place(model: nn.Module, layout: str, world: World) -> list[Placed]:
    """What ``world.rank`` would hold of ``model``, whose parameters may be on the meta device.

    FSDP1 wraps every numbered module (``layers.0``) and the rest as one; DeepSpeed has one parameter group.

    Raises:
        ValueError: a layout that is not known.
    """
    named = named_parameters(model)
    if layout in ("ddp", "zero0"):
        return [Placed(n, Replicated(n.parameter)) for n in named]
    if layout in ("fsdp2", "hsdp", "tp+fsdp2"):
        return [_sharded(n, layout, world) for n in named]
    if layout == "fsdp1":
        return [placed for unit in wrapped(named) for placed in _flat(unit, world)]
    if layout in ("zero1", "zero2"):
        return list(_partitioned(named, world))
    if layout == "zero3":
        return list(_cut_one_by_one(named, world))
    raise ValueError(f"the layout {layout!r} is not known; choose from {', '.join(LAYOUTS)}.")


def wrapped(named: Sequence[Named]) -> list[list[Named]]:
    """The parameters by FSDP unit: those of no numbered module first."""
    units: dict[str, list[Named]] = {"": []}
    for n in named:
        numbered = re.match(r".*?\.\d+\.|\d+\.", n.name)
        units.setdefault(numbered.group() if numbered else "", []).append(n)
    return [unit for unit in units.values() if unit]


def _sharded(named: Named, layout: str, world: World) -> Placed:
    if layout == "fsdp2":
        cuts = [(world.axis(world.size), 0)]
    elif layout == "hsdp":
        cuts = [(world.axis(world.shard), 0)]
    else:
        dim = tensor_parallel_dim(named)
        cuts = [] if dim is None else [(world.axis(world.tensor), dim)]
        cuts.append((world.axis(world.size // world.tensor, world.tensor), 0))
    return Placed(named, VirtualShard(named.parameter, tuple((axis, dim) for axis, dim in cuts if axis.size > 1)))


def tensor_parallel_dim(named: Named) -> int | None:
    """The dim that tensor parallel cuts; None for what it replicates."""
    module, _, attribute = named.name.rpartition(".")
    if any(fnmatchcase(module, pattern) for pattern in COLUMNWISE):
        return 0
    return 1 if attribute == "weight" and any(fnmatchcase(module, pattern) for pattern in ROWWISE) else None


def _flat(unit: Sequence[Named], world: World) -> Iterator[Placed]:
    at, offsets = 0, []
    for n in unit:
        align = max(1, _FSDP1_ALIGNMENT // n.parameter.element_size())
        at = -(-at // align) * align
        offsets.append(at)
        at += n.parameter.numel()
    size, axis = -(-at // world.size), world.axis(world.size)
    for n, offset in zip(unit, offsets, strict=True):
        part = _cut(n.parameter.numel(), offset, size, world.rank)
        alone = _Interval(part.start, part.stop, 0, part.bounds)  # use_orig_params: a tensor of its own
        yield Placed(n, FlatPartition(n.name, tuple(n.parameter.shape), n.parameter, alone, axis))


def _partitioned(named: Sequence[Named], world: World) -> Iterator[Placed]:
    multiple = _ZERO_ALIGNMENT * world.size
    size = -(-sum(n.parameter.numel() for n in named) // multiple) * multiple // world.size
    axis, at = world.axis(world.size), 0
    for n in named:
        part = _cut(n.parameter.numel(), at, size, world.rank)
        at += n.parameter.numel()
        yield Placed(n, FlatPartition(n.name, tuple(n.parameter.shape), n.parameter, part, axis))


def _cut_one_by_one(named: Sequence[Named], world: World) -> Iterator[Placed]:
    axis, base = world.axis(world.size), 0
    for n in named:
        size = -(-n.parameter.numel() // world.size)
        part = _cut(n.parameter.numel(), 0, size, world.rank, base)
        base += size
        yield Placed(n, FlatPartition(n.name, tuple(n.parameter.shape), n.parameter, part, axis))
