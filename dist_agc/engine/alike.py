"""One look, in the first step, at whether ranks that hold a model whole have the same gradients.

Where they have not, the optimizer adds gradients up itself, or nobody does: each rank would clip its own. No rank waits
for another here, since ranks may train apart: the first leaves the norms of some parameters in the store of the process
group, and those that come later compare theirs.

Private to torch and read here only: ``torch.distributed.distributed_c10d._get_default_store``.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.names import first_of
from ..model.parameter import Parameter
from .measure import norm_of

# So many norms, of the largest parameters, are in what a rank leaves: 2 kB, with any number of ranks that read it.
_MOST = 24
# Copies of weights have the same norm but for rounding; a gradient's sum may be added up in another order.
_SAME_WEIGHTS, _SAME_GRADIENTS = 1e-6, 1e-3
# For so many calls the rank that came first looks whether another has found a difference.
_LOOKS = 10

# By the process group of all ranks: for what was left there, in how many more calls to look.
_left: WeakKeyDictionary[dist.ProcessGroup, dict[str, int]] = WeakKeyDictionary()


def compare(parameters: Sequence[Parameter], weights: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Warn where the gradients of whole parameters differ from those of another rank whose weights are the same.

    Local weights and gradients of ``parameters``, before clipping. Models of one structure are compared once.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    whole = [
        (p, w, g) for p, w, g in zip(parameters, weights, grads, strict=True) if type(p) is Parameter and g is not None
    ]
    structure = repr([(p.name, p.shape) for p, _, _ in whole])
    key = f"dist_agc/alike/{hashlib.sha256(structure.encode()).hexdigest()[:16]}"
    left = _left.setdefault(_group(), {})
    if not whole or key in left:
        return
    left[key] = 0
    largest = sorted(whole, key=lambda one: -one[0].numel)[:_MOST]
    norms = torch.stack([norm_of(x).double().cpu() for _, *both in largest for x in both]).view(-1, 2).tolist()
    mine = {p.name: pair for (p, _, _), pair in zip(largest, norms, strict=True)}
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    first, theirs = json.loads(store.compare_set(key, "", json.dumps([rank, mine])))
    if first == rank:
        left[key] = _LOOKS
    elif found := _differing(mine, theirs):
        store.set(f"{key}/differ", json.dumps([rank, found]))
        _warn(found, rank, first)


def look() -> None:
    """Warn where another rank has found that its gradients differ from those that this one left. Never waits."""
    if not _left or not dist.is_initialized():
        return
    left = _left.get(_group(), {})
    for key in [key for key, looks in left.items() if looks]:
        left[key] -= 1
        try:
            store = dist.distributed_c10d._get_default_store()
            if store.check([f"{key}/differ"]):
                left[key] = 0
                other, found = json.loads(store.get(f"{key}/differ"))
                _warn(found, dist.get_rank(), other)
        except RuntimeError:  # the rank that keeps the store has ended
            left[key] = 0


def _group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _differing(mine: dict[str, list[float]], theirs: dict[str, list[float]]) -> list[str]:
    """The parameters whose gradients differ; none where weights do too, since such ranks do not hold one model."""
    pairs = [(name, mine[name], theirs[name]) for name in mine if name in theirs]
    if not all(math.isclose(a[0], b[0], rel_tol=_SAME_WEIGHTS) for _, a, b in pairs):
        return []
    finite = ((name, a[1], b[1]) for name, a, b in pairs if math.isfinite(a[1]) and math.isfinite(b[1]))
    return [name for name, a, b in finite if not math.isclose(a, b, rel_tol=_SAME_GRADIENTS)]


def _warn(names: Sequence[str], here: int, there: int) -> None:
    warnings.warn(
        f"the gradients of {first_of(map(repr, names), 3)} differ between rank {here} and rank {there}, whose "
        "weights are the same: AGC clips on each rank what that rank has. If the optimizer averages gradients over "
        "ranks in its step, or nobody does, average them before that step (DDP does, in the last backward). If these "
        "ranks are meant to train apart, all is well.",
        UserWarning,
        stacklevel=2,
    )
