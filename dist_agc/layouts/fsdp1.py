"""FSDP1: parameters flattened one after another and cut into equal shards, anywhere within a row.

Private to torch and read here only: ``FullyShardedDataParallel._handle`` and the flat parameter's metadata, as they are
in torch 2.6 to 2.13.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..fragments import Axis, Pieces, excluded, interval
from ..names import Named, module_paths, named_parameters, parametrized
from ..units import UnitRule
from . import Placed, group_axis
from .replicated import Replicated

_METADATA = (
    "_param_infos",
    "_shapes",
    "_strides",
    "_numels",
    "_numels_with_padding",
    "_is_padding_mask",
    "_shared_param_infos",
    "_param_extensions",
    "_sharded_size",
    "_params",
)


@dataclass(frozen=True, eq=False)
class FlatShard:
    """One original parameter inside a flat one.

    Args:
        name: the parameter's name, for errors.
        shape, strides: of the original parameter; it was flattened in the order of its memory.
        holder: the flat parameter, or with ``use_orig_params=True`` this rank's 1-D piece of the original one.
        start, stop: the elements of the parameter that this rank holds; maybe none.
        offset: where they begin in the holder.
        numel: elements that the sharded holder has.
        bounds: the borders between shards, in elements of the parameter.
        axis: the ranks that share the flat parameter.
        copies: with hybrid sharding, the ranks that hold the same shard.
    """

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    holder: Tensor
    start: int
    stop: int
    offset: int
    numel: int
    bounds: range
    axis: Axis
    copies: tuple[Axis, ...]

    def local(self, tensor: Tensor) -> Tensor:
        if tensor.numel() != self.numel or tensor.ndim != 1:
            raise ValueError(
                f"FSDP1 parameter {self.name!r} is not sharded right now: expected a flat local tensor of {self.numel} "
                f"elements, got shape {tuple(tensor.shape)}. Clip outside of summon_full_params, and after a backward "
                "that reduced the gradients (outside of no_sync)."
            )
        return tensor

    def pieces(self, rule: UnitRule | None) -> Pieces:
        if rule is None:
            return excluded(1, (self.axis,), (self.offset, self.stop - self.start))
        return interval(self._in_memory_order(rule), self.start, self.stop, self.offset, self.bounds, self.axis)

    def _in_memory_order(self, rule: UnitRule) -> UnitRule:
        """The rule with its dims in the order in which FSDP1 flattened them (channels-last weights)."""
        strides = (self.strides[0] * rule.shape[1], *self.strides) if rule.grouped else self.strides
        order = sorted(range(len(rule.shape)), key=lambda d: (rule.shape[d] > 1, strides[d]), reverse=True)
        return UnitRule(tuple(rule.shape[d] for d in order), tuple(i for i, d in enumerate(order) if d in rule.kept))


def place(model: nn.Module) -> list[Placed]:
    """The parameters that FSDP1 manages below ``model``; none where there is no FSDP1 module."""
    if not any("FullyShardedDataParallel" in [k.__name__ for k in type(m).__mro__] for m in model.modules()):
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel

    paths: dict[int, list[str]] = {}
    for path, module in module_paths(model):
        paths.setdefault(id(module), []).append(path)
    named = {id(n.parameter): n for n in named_parameters(model)}
    made_for = parametrized(model)
    placed = []
    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle = _read(module, "_handle")
        if handle is not None:
            if "HYBRID" in _read(module, "sharding_strategy").name:
                _read(module, "_inter_node_pg")  # an attribute that only hybrid sharding has
            between = getattr(module, "_inter_node_pg", None)
            copies = () if between is None else (group_axis(between),)
            placed += _flat(handle, paths, named, made_for, copies)
    return placed


def _read(owner: Any, attribute: str) -> Any:
    """A private attribute of torch's FSDP1."""
    try:
        return getattr(owner, attribute)
    except AttributeError:
        raise RuntimeError(
            f"dist_agc reads the private {attribute!r} of FSDP1, which torch {torch.__version__} does not "
            "have; supported are torch 2.6 to 2.13."
        ) from None


def _flat(
    handle: Any,
    paths: dict[int, list[str]],
    named: dict[int, Named],
    made_for: dict[int, nn.Module],
    copies: tuple[Axis, ...],
) -> Iterator[Placed]:
    flat: Any = _read(handle, "flat_param")
    meta = {attribute: _read(flat, attribute) for attribute in _METADATA}
    if any(extension is not None for extension in meta["_param_extensions"]):
        raise ValueError(
            "FSDP1 over tensor-parallel DTensors is not supported by dist_agc: its flat parameters do not say how the "
            "other mesh axis cuts a row. Use FSDP2 (fully_shard) with tensor parallel."
        )
    sharded, originals = bool(_read(handle, "uses_sharded_strategy")), meta["_params"]
    if originals is not None and not sharded:  # NO_SHARD keeps the original parameters whole
        everyone = (group_axis(_read(handle, "process_group")),)
        yield from (Placed(n, Replicated(p, everyone)) for p in originals if (n := named.get(id(p))) is not None)
        return
    axis = group_axis(_read(handle, "process_group"))
    if not sharded:
        axis, copies = Axis((dist.get_rank(),), 0), (axis,)
    shard = meta["_sharded_size"].numel() if sharded else flat.numel()
    first = shard * axis.rank
    ends = itertools.accumulate(meta["_numels_with_padding"])
    spans = zip(ends, meta["_numels_with_padding"], meta["_is_padding_mask"], strict=True)
    offsets = [end - numel for end, numel, padding in spans if not padding]
    for i, (info, offset, numel) in enumerate(zip(meta["_param_infos"], offsets, meta["_numels"], strict=True)):
        # Elements of this parameter that fall into [first, first + shard) of the flat one.
        start = min(max(first - offset, 0), numel)
        stop = max(min(first + shard - offset, numel), start)
        holder = flat if originals is None else originals[i]
        entry = named.get(id(holder)) if originals is not None else None
        owner = made_for[id(info.module)] if id(info.module) in made_for else info.module
        entry = entry or Named(_names(info, meta, paths), holder, weakref.ref(owner))
        yield Placed(
            entry,
            FlatShard(
                entry.name,
                tuple(meta["_shapes"][i]),
                tuple(meta["_strides"][i]),
                holder,
                start,
                stop,
                0 if originals is not None or stop == start else offset + start - first,
                shard if originals is None else stop - start,
                range(shard - offset, numel, shard),
                axis,
                copies,
            ),
        )


def _names(info: Any, meta: dict[str, Any], paths: dict[int, list[str]]) -> tuple[str, ...]:
    """The names of a parameter that only the flat parameter's metadata knows, ties included."""
    owners = [(info.module, info.param_name)]
    for shared in meta["_shared_param_infos"]:
        if shared.prim_module is info.module and shared.prim_param_name == info.param_name:
            owners.append((shared.module, shared.param_name))
    return tuple(
        f"{path}.{attribute}" if path else attribute for module, attribute in owners for path in paths[id(module)]
    )
