"""Layouts without ranks: what one rank of a world of any size would hold, from shapes alone.

The arithmetic by which FSDP1, FSDP2, tensor parallel and DeepSpeed cut parameters, on meta tensors and without a
process group. Everything after it (blocks, cuts, slots, axes) is the code that runs on the cluster.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar

from torch import Tensor, nn

from ..model.blocks import Axis, Pieces, chunk, sharded
from ..model.names import Entry, entries
from ..model.parameter import Parameter
from ..model.units import UnitRule
from ._flat import FlatInterval, Span

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


@dataclass(frozen=True, eq=False, kw_only=True)
class VirtualShard(Parameter):
    """This rank's block of a DTensor. ``cuts``: see `sharded`."""

    cuts: tuple[tuple[Axis, int], ...]

    framework: ClassVar[str] = "virtual"

    def local(self, tensor: Tensor) -> Tensor:
        for axis, dim in self.cuts:
            start, stop = chunk(tensor.shape[dim], axis.size, axis.rank)
            tensor = tensor.narrow(dim, start, stop - start)
        return tensor

    def pieces(self, rule: UnitRule | None) -> Pieces:
        return sharded(rule, self.weight().shape, self.cuts)


def parameters(model: nn.Module, layout: str, world: World) -> list[Parameter]:
    """What ``world.rank`` would hold of ``model``, whose parameters may be on the meta device.

    FSDP1 wraps every numbered module (``layers.0``) and the rest as one; DeepSpeed has one parameter group.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"the layout {layout!r} is not known; choose from {', '.join(LAYOUTS)}.")
    found = entries(model)
    if layout in ("ddp", "zero0"):
        return [Parameter.of(entry) for entry in found]
    if layout in ("fsdp2", "hsdp", "tp+fsdp2"):
        return [VirtualShard.of(entry, cuts=_cuts(entry, layout, world)) for entry in found]
    spans = {"fsdp1": _fsdp1, "zero3": _zero3}.get(layout, _zero1)(found, world)
    return [FlatInterval.of(entry, span=span, axis=world.axis(world.size)) for entry, span in spans]


def _cuts(entry: Entry, layout: str, world: World) -> tuple[tuple[Axis, int], ...]:
    if layout == "tp+fsdp2":
        dim = tensor_parallel_dim(entry.name)
        cuts = [] if dim is None else [(world.axis(world.tensor), dim)]
        cuts.append((world.axis(world.size // world.tensor, world.tensor), 0))
    else:
        cuts = [(world.axis(world.size if layout == "fsdp2" else world.shard), 0)]
    return tuple((axis, dim) for axis, dim in cuts if axis.size > 1)


def tensor_parallel_dim(name: str) -> int | None:
    """The dim of the parameter of this name that tensor parallel cuts; None for what it replicates."""
    module, _, attribute = name.rpartition(".")
    if any(fnmatchcase(module, pattern) for pattern in COLUMNWISE):
        return 0
    return 1 if attribute == "weight" and any(fnmatchcase(module, pattern) for pattern in ROWWISE) else None


def _fsdp1(found: Sequence[Entry], world: World) -> Iterator[tuple[Entry, Span]]:
    units: dict[str, list[Entry]] = {"": []}  # parameters of no numbered module first
    for entry in found:
        numbered = re.match(r".*?\.\d+\.|\d+\.", entry.name)
        units.setdefault(numbered.group() if numbered else "", []).append(entry)
    for unit in units.values():
        at, offsets = 0, []
        for entry in unit:
            align = max(1, _FSDP1_ALIGNMENT // entry.tensor.element_size())
            offsets.append(-(-at // align) * align)
            at = offsets[-1] + entry.tensor.numel()
        for entry, offset in zip(unit, offsets, strict=True):
            span = Span.cut(entry.tensor.numel(), offset, -(-at // world.size), world.rank)
            yield entry, replace(span, offset=0)  # use_orig_params: a tensor of its own


def _zero1(found: Sequence[Entry], world: World) -> Iterator[tuple[Entry, Span]]:
    multiple = _ZERO_ALIGNMENT * world.size
    at, size = 0, -(-sum(entry.tensor.numel() for entry in found) // multiple) * _ZERO_ALIGNMENT
    for entry in found:
        yield entry, Span.cut(entry.tensor.numel(), at, size, world.rank)
        at += entry.tensor.numel()


def _zero3(found: Sequence[Entry], world: World) -> Iterator[tuple[Entry, Span]]:
    base = 0
    for entry in found:
        size = -(-entry.tensor.numel() // world.size)
        yield entry, Span.cut(entry.tensor.numel(), 0, size, world.rank, base)
        base += size
