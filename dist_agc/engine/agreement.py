"""The one check that ranks are set up alike, at the first call of an execution.

Ranks that send each other something in every call all come to the first one too. Those that hold mere copies need not:
where batches have run out, a rank stays away from steps, and nothing of ours else would wait for it. Along such an axis
ranks compare once, and not while some may stay away. Which axes these are follows from structure, and from what all of
their ranks have done alike; never from one rank's gradients.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ..config import AGCConfig
from ..model.blocks import Axis
from .collectives import communication_device, missing
from .plan import Plan

# Digests in one exchange: a fixed number, because gloo ends the process where ranks send different lengths.
_DIGESTS = 32


@dataclass
class Once:
    """What the executions of one Clipper do once between them, by the name of the parameter."""

    agreed: set[str] = field(default_factory=set)  # compared with the other ranks that hold it
    told: set[str] = field(default_factory=set)  # said that its gradient cannot be read
    options: Mapping[str, Any] = field(default_factory=dict)  # settings beside the config


def agree(
    plan: Plan, config: AGCConfig, limits: Sequence[float], once: Once, gradients: str = "as expected"
) -> list[Axis]:
    """Compare settings and structure along every axis; returns the axes, in an order that all ranks share.

    Small collectives of fixed length, in two rounds over the axes: the second tells ranks that share no axis with the
    one that differs. All raise RuntimeError then, which names what differs, instead of a hang or of nonsense later.

    ``limits``: the threshold of every governed parameter. ``gradients``: or why this rank cannot clip its own.
    ``once``: which parameters were compared before; those of this call are added.
    """
    several = (axis for axis in plan.shared if axis.group is not None and axis.size > 1)
    axes = sorted((axis for axis in several if _all_come(plan, axis, once.agreed)), key=lambda axis: axis.ranks)
    devices = {axis: plan.parameters[plan.shared[axis][0]].tensor.device for axis in axes}
    problem = ""
    for axis in axes:
        # Only what is shared along this axis: ranks may hold other experts, or other stages of a pipeline.
        which = plan.shared[axis]
        here = [(plan.parameters[i], plan.rules[i] if i < plan.governed else None) for i in which]
        own = {plan.parameters[i].name: limits[i] for i in which if i < plan.governed}
        what = {
            **asdict(config),
            **once.options,
            "clipping_threshold": own if len(set(own.values())) > 1 else list(own.values())[:1],
            "parameters": [(p.name, p.numel, rule and (rule.shape, rule.kept)) for p, rule in here],
            "dtypes": [str(p.tensor.dtype) for p, _ in here],
            "slots": [found.slots for found in plan.axes if found.axis == axis],
            "gradients": gradients,
        }
        # The names themselves are compared too, in case ranks run different versions of dist_agc.
        said = _exchange({"settings": repr(sorted(what)), **{k: repr(v) for k, v in what.items()}}, axis, devices[axis])
        problem = problem or _differences(said, axis)
    for axis in axes:
        said = _exchange({"problem": problem}, axis, devices[axis])
        problem = problem or next((one["problem"] for one in said if one["problem"]), "")
    if problem:
        raise RuntimeError(
            f"dist_agc is set up differently on ranks that share parameters; {problem}. No gradient was changed. "
            "Give every rank the same model and the same settings."
        )
    once.agreed.update(plan.parameters[i].name for axis in axes for i in plan.shared[axis])
    return axes


def _all_come(plan: Plan, axis: Axis, agreed: set[str]) -> bool:
    """Whether all ranks of an axis come to compare; each of them gives the same answer.

    A plan of mere copies that was made because more trains than before is not compared anew: a rank without batches
    may not know of it.
    """
    which = [plan.parameters[i] for i in plan.shared[axis]]
    mere_copies = plan.copied.issuperset(plan.shared[axis])
    return not mere_copies or not any(p.name in agreed or (p.uneven is not None and p.uneven()) for p in which)


def _exchange(said: dict[str, str], axis: Axis, device: torch.device) -> list[dict[str, str]]:
    """What every rank of the axis says; empty where all say the same."""
    assert len(said) <= _DIGESTS
    digests = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") for text in said.values()]
    digests += [0] * (_DIGESTS - len(said))
    mine = torch.tensor(digests, dtype=torch.int64, device=communication_device(device, axis.group))
    every = [torch.empty_like(mine) for _ in axis.ranks]
    try:
        dist.all_gather(every, mine, group=axis.group)
        if bool((torch.stack(every) == mine).all()):
            return []
        # Every rank of the axis knows by now that they differ, so all of them come to this collective.
        texts: list[Any] = [None] * axis.size
        dist.all_gather_object(texts, said, group=axis.group)
    except RuntimeError as error:
        raise missing(axis) from error
    return texts


def _differences(texts: list[dict[str, str]], axis: Axis, width: int = 160) -> str:
    """By name: what the first rank says, and the first that says something else. Long texts from where they differ."""
    found = []
    for name in dict.fromkeys(name for text in texts for name in text):
        said = dict(zip(axis.ranks, (text.get(name, "nothing") for text in texts), strict=True))
        a, b = axis.ranks[0], next((rank for rank in said if said[rank] != said[axis.ranks[0]]), None)
        if b is not None:
            longest = max(len(said[a]), len(said[b]))
            start = 0 if longest < width else max(0, len(os.path.commonprefix([said[a], said[b]])) - 20)
            part = slice(start, start + width)
            found.append(f"{name}: rank {a} has {said[a][part]}, rank {b} has {said[b][part]}")
    return "; ".join(found)
