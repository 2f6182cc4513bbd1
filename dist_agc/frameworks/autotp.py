"""DeepSpeed's AutoTP: what a tensor-parallel rank holds of a parameter, by the affine map that DeepSpeed keeps on it.

A map lists the pieces of every rank, such as its rows of q, of k and of v in a fused weight. All pieces are cut along
one dim, so only this counts: where that dim numbers units, ranks hold different units, whichever they are; where it
does not, ranks hold pieces of the same units, whatever their sizes, and sums of squares add up. ZeRO cuts what one rank
holds once more, over the ranks that hold the same.

Private to DeepSpeed and read here only: the attributes below, and the keys of the map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..model.units import UnitRule
from ._flat import FlatInterval

_META, _TAG = "ds_autotp_universal_checkpoint_meta", "tensor_model_parallel"


@dataclass(frozen=True)
class Slice:
    """What one rank holds of a parameter.

    ``shape``: of the whole parameter. ``view``: the same elements in the dims of which one is cut; in a fused weight of
    shape (3 * n, m) they may be (3, n, m). ``sliced``: this rank's part of the view, without gaps in its memory.
    ``dim``: which dim of the view is cut; None: every rank holds all. ``even``: whether all ranks hold as much.
    """

    shape: tuple[int, ...]
    view: tuple[int, ...]
    sliced: tuple[int, ...]
    dim: int | None = None
    even: bool = True


def slice_of(parameter: Tensor, shape: tuple[int, ...], rank: int) -> Slice | str:
    """What tensor-parallel rank ``rank`` holds of ``parameter``, of ``shape`` there; or why that cannot be told, to go
    on after the parameter's name."""
    meta = getattr(parameter, _META, None)
    if not meta:
        if getattr(parameter, _TAG, False):
            return "is cut by tensor parallelism, and DeepSpeed does not say how. Exclude it"
        return Slice(shape, shape, shape)
    said: dict[str, Any] = meta.get("conversion") or {}
    if reason := said.get("unsupported_reason"):
        return f"is cut by AutoTP in a way that DeepSpeed itself cannot describe ({reason}). Exclude it"
    if (described := said.get("affine_map")) is None:
        return (
            "has no affine map, which says how AutoTP has cut it: DeepSpeed 0.19.8 makes one, older versions do not. "
            "Exclude it, or take a newer DeepSpeed"
        )
    view = tuple(described["logical_shape"])
    original = tuple(said.get("original_shape") or view)
    held = {int(one): tuple(entry["shard_shape"]) for one, entry in described["ranks"].items()}
    pieces = [(one, piece) for one, entry in described["ranks"].items() for piece in entry["pieces"]]
    if any(piece.get("scale", 1.0) != 1.0 for _, piece in pieces):
        return "is held in parts of its value (its affine map has a scale), which dist_agc does not know. Exclude it"
    dims = {d for part in held.values() for d, (a, b) in enumerate(zip(part, view, strict=True)) if a != b}
    copied = [math.prod(piece["shape"]) > 0 and len(piece["locations"]) > 1 for _, piece in pieces]
    if any(copied) and (dims or not all(len(piece["locations"]) == len(held) for _, piece in pieces)):
        return (
            "is held by AutoTP partly by one rank and partly by several, which add up what each has seen in no known "
            "order. Exclude it"
        )
    lies = all(
        tuple(piece["source"][1]) == _strides(view) and tuple(piece["dest"][1]) == _strides(held[int(one)])
        for one, piece in pieces
    )
    fits = math.prod(shape) == math.prod(held[rank]) and (original != view or shape == held[rank])
    if len(dims) > 1 or not lies or not fits or _refined(original, view) is None:
        return (
            f"has an affine map that dist_agc cannot read: a part of shape {shape}, of {original}, seen as {view} and "
            f"cut into {[held[one] for one in sorted(held)]}. Exclude it"
        )
    even = len(set(held.values())) == 1
    return Slice(original, view, held[rank], min(dims, default=None), even)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Those of a tensor without gaps."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _refined(shape: tuple[int, ...], view: tuple[int, ...]) -> list[tuple[int, ...]] | None:
    """For each dim of ``shape`` the dims of ``view`` that it is seen as; None where they are no such dims."""
    found: list[tuple[int, ...]] = []
    at = 0
    for i, size in enumerate(shape):
        first, numel = at, 1
        while at < len(view) and (numel < size or at == first or (i == len(shape) - 1 and view[at] == 1)):
            numel, at = numel * view[at], at + 1
        if numel != size:
            return None
        found.append(tuple(range(first, at)))
    return found if at == len(view) else None


@dataclass(frozen=True, eq=False, kw_only=True)
class Sliced(FlatInterval):
    """This rank's interval of its slice of a parameter, in a flat tensor, or all of the slice in one of its own."""

    slice: Slice

    framework: ClassVar[str] = "DeepSpeed AutoTP"

    def flattened(self, rule: UnitRule) -> UnitRule:
        if rule.split is None:
            dims = _refined(self.slice.shape, self.slice.view)
            assert dims is not None  # see `slice_of`
            return UnitRule(self.slice.sliced, tuple(d for kept in rule.kept for d in dims[kept]))
        return super().flattened(rule)
