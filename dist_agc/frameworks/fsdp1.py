"""FSDP1: parameters flattened one after another and cut into equal shards, anywhere within a row.

Private to torch and read here only: ``FullyShardedDataParallel._handle`` and the flat parameter's metadata, as they are
in torch 2.6 to 2.15.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from ..model.names import Entry, Owners, held_by, joined, module_paths
from ..model.parameter import Parameter, Unknown
from ..model.units import UnitRule
from ._flat import ALONE, FlatInterval, Span
from .base import Framework, group_axis, is_a, read_torch

_CLASS = "FullyShardedDataParallel"
_OVER_DTENSOR = (
    "is tensor-parallel under FSDP1, and dist_agc does not support FSDP1 over DTensors: the flat parameter does not "
    "say how the other mesh axis cuts a row. Use FSDP2 (fully_shard) with tensor parallel, or exclude it"
)
_METADATA = (  # of a flat parameter
    *("_param_infos", "_shapes", "_strides", "_numels", "_numels_with_padding", "_is_padding_mask"),
    *("_shared_param_infos", "_param_extensions", "_sharded_size", "_params"),
)


class FSDP1(Framework):
    wrapped = {_CLASS: "_fsdp_wrapped_module"}

    def claim(self, model: nn.Module | None, entries: Sequence[Entry]) -> tuple[list[Parameter], list[Entry]]:
        modules = [] if model is None else [m for m in model.modules() if is_a(m, _CLASS)]
        if model is None or not modules:
            return [], list(entries)
        paths: dict[int, list[tuple[str, Owners]]] = {}
        for path, owners in module_paths(model):
            paths.setdefault(id(owners[0][0]), []).append((path, owners))
        known = {id(entry.tensor): entry for entry in entries}
        found = [p for module in modules for p in _parameters(module, known, paths)]
        mine = {id(p.tensor) for p in found}
        return found, [entry for entry in entries if id(entry.tensor) not in mine]

    def refuses(self, tensor: Tensor) -> str | None:
        if getattr(tensor, "_fsdp_flattened", False):
            return (
                "is a piece of an FSDP1 flat parameter, whose place only the module knows: pass the "
                "FullyShardedDataParallel module itself, not its parameters"
            )
        return None

    def not_in_backward(self, module: nn.Module) -> str | None:
        if is_a(module, _CLASS):
            return (
                "FSDP1 hands over the gradients of its flat parameters when backward has ended; use FSDP2 (fully_shard)"
            )
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class FlatShard(FlatInterval):
    """One original parameter inside a flat one.

    ``tensor`` is the flat parameter, or with ``use_orig_params=True`` this rank's 1-D piece of the original one.
    ``strides`` are those of the original parameter, which was flattened in the order of its memory. ``held``: elements
    that the sharded tensor has.
    """

    strides: tuple[int, ...]
    held: int

    framework: ClassVar[str] = "FSDP1"

    def local(self, tensor: Tensor) -> Tensor:
        if tensor.numel() != self.held or tensor.ndim != 1:
            raise ValueError(
                f"FSDP1 parameter {self.name!r} is not sharded right now: expected a flat local tensor of {self.held} "
                f"elements, got shape {tuple(tensor.shape)}. Clip outside of summon_full_params, and after a backward "
                "that reduced the gradients (outside of no_sync)."
            )
        return tensor

    def flattened(self, rule: UnitRule) -> UnitRule:
        strides, at = self.strides, rule.split
        if at is not None:
            strides = (*strides[:at], strides[at] * rule.shape[at + 1], *strides[at:])
        # Dims of size 1 lie nowhere, and number nothing.
        order = sorted((d for d, size in enumerate(rule.shape) if size != 1), key=lambda d: strides[d], reverse=True)
        return UnitRule(tuple(rule.shape[d] for d in order), tuple(i for i, d in enumerate(order) if d in rule.kept))


class _Whole(Parameter):
    """With NO_SHARD and ``use_orig_params=True`` the original parameters stay whole."""

    framework: ClassVar[str] = "FSDP1"


def _parameters(
    module: nn.Module, known: dict[int, Entry], paths: dict[int, list[tuple[str, Owners]]]
) -> Iterator[Parameter]:
    """Those of one FSDP1 module. By ``id``, ``known``: entries, by their tensor; ``paths``: of every module."""
    handle = read_torch(module, "_handle")
    if handle is None:
        return
    flat: Any = read_torch(handle, "flat_param")
    meta = {attribute: read_torch(flat, attribute) for attribute in _METADATA}
    originals = meta["_params"]  # None without use_orig_params
    over = meta["_param_extensions"]  # by parameter, what is known of the DTensor that it was; None: it was plain
    sharded = bool(read_torch(handle, "uses_sharded_strategy"))
    axis, copies = group_axis(read_torch(handle, "process_group")), ()
    if not sharded:
        axis, copies = ALONE, (axis,)
    elif "HYBRID" in read_torch(module, "sharding_strategy").name:
        copies = (group_axis(read_torch(module, "_inter_node_pg")),)
    if originals is not None and not sharded:
        for p, whole in zip(originals, over, strict=True):
            if id(p) in known and whole is None:
                yield _Whole.of(known[id(p)], copies=copies)
            elif id(p) in known:
                yield Unknown.of(known[id(p)], whole.shape, problem=_OVER_DTENSOR)
        return
    held = meta["_sharded_size"].numel() if sharded else flat.numel()
    starts = itertools.accumulate(meta["_numels_with_padding"], initial=0)
    starts = [at for at, padding in zip(starts, meta["_is_padding_mask"], strict=False) if not padding]
    for i, (info, at, numel) in enumerate(zip(meta["_param_infos"], starts, meta["_numels"], strict=True)):
        span, tensor, entry = Span.cut(numel, at, held, axis.rank), flat, None
        if originals is not None:  # a tensor of its own, of which it fills all
            span, tensor = replace(span, offset=0), originals[i]
            entry = known.get(id(tensor))
        entry = entry or _entry(info, tensor, meta, paths)
        if over[i] is not None:
            yield Unknown.of(entry, over[i].shape, problem=_OVER_DTENSOR)
            continue
        yield FlatShard.of(
            entry,
            meta["_shapes"][i],
            copies=copies,
            span=span,
            axis=axis,
            strides=tuple(meta["_strides"][i]),
            held=held if originals is None else span.numel,
        )


def _entry(info: Any, tensor: Tensor, meta: dict[str, Any], paths: dict[int, list[tuple[str, Owners]]]) -> Entry:
    """A parameter that only the flat parameter's metadata knows, under all of its names."""
    owners = [(info.module, info.param_name)]
    for shared in meta["_shared_param_infos"]:
        if shared.prim_module is info.module and shared.prim_param_name == info.param_name:
            owners.append((shared.module, shared.param_name))
    names = tuple(joined(path, attribute) for module, attribute in owners for path, _ in paths[id(module)])
    return Entry(names, tensor, held_by(paths[id(info.module)][0][1], info.param_name))
