"""The one check that ranks are set up alike, at the first call of an execution."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist

from ..config import AGCConfig
from ..model.blocks import Axis
from .collectives import communication_device, missing
from .plan import Plan

# Digests in one exchange: a fixed number, because gloo ends the process where ranks send different lengths.
_DIGESTS = 32


def agree(plan: Plan, config: AGCConfig, limits: Sequence[float], problem: ValueError | None) -> list[Axis]:
    """Compare settings and structure along every axis; returns the axes, in an order that all ranks share.

    Args:
        limits: the threshold of every governed parameter.
        problem: why this rank cannot clip; it tells the others, so that none waits for it.

    Raises:
        RuntimeError: on every rank, naming what differs; ``problem`` itself, on the rank that has it.
    """
    asked = dict(zip([p.name for p in plan.parameters], limits, strict=False))
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    shared: dict[Axis, list[int]] = {}
    for i, axes in enumerate(plan.every_axis):
        for axis in axes:
            shared.setdefault(axis, []).append(i)
    axes = sorted((a for a in shared if a.group is not None and a.size > 1), key=lambda axis: axis.ranks)
    checks = []
    for axis in axes:
        # Only what is shared along this axis: ranks may hold other experts, or other stages of a pipeline.
        here = [plan.parameters[i] for i in shared[axis]]
        rules = [plan.rules[i] if i < plan.governed else None for i in shared[axis]]
        own = {p.name: asked[p.name] for p, rule in zip(here, rules, strict=True) if rule is not None}
        what = {
            **settings,
            "clipping_threshold": own if len(set(own.values())) > 1 else list(own.values())[:1],
            "parameters": [
                (p.name, p.numel, rule and (rule.shape, rule.kept)) for p, rule in zip(here, rules, strict=True)
            ],
            "dtypes": [str(p.tensor.dtype) for p in here],
            "slots": [found.slots for found in plan.axes if found.axis == axis],
            "gradients": "as expected" if problem is None else str(problem),
        }
        checks.append((what, axis, here[0].tensor.device))
    try:
        _compare(checks)
    except RuntimeError as difference:
        if problem is not None:
            raise problem from difference
        raise
    return axes


def _compare(checks: Sequence[tuple[Mapping[str, object], Axis, torch.device]]) -> None:
    """Compare settings and structure, (what, along which axis, on which device), in small collectives of fixed length.

    Two rounds over the axes, given in an order that all ranks share: the second tells ranks that share no axis with
    the one that differs.

    Raises:
        RuntimeError: on every rank, naming what differs, instead of a hang or of nonsense later.
    """
    problems: list[str] = []
    for what, axis, device in checks:
        # The names themselves are compared too, in case ranks run different versions of dist_agc.
        texts = _exchange({"settings": repr(sorted(what)), **{k: repr(v) for k, v in what.items()}}, axis, device)
        if texts:
            problems.append(_differences(texts, axis))
    for _, axis, device in checks:
        texts = _exchange({"problem": problems[0] if problems else ""}, axis, device)
        if texts and not problems:
            problems.append(next(text["problem"] for text in texts if text["problem"]))
    if problems:
        raise RuntimeError(
            f"dist_agc is set up differently on ranks that share parameters; {problems[0]}. No gradient was changed. "
            "Give every rank the same model and the same settings."
        )


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


def _differences(texts: list[dict[str, str]], axis: Axis) -> str:
    lines = []
    for name in dict.fromkeys(name for text in texts for name in text):
        spoken = [text.get(name, "nothing") for text in texts]
        other = next((i for i, text in enumerate(spoken) if text != spoken[0]), None)
        if other is not None:
            lines.append(f"{name}: {_difference(spoken[0], spoken[other], axis.ranks[0], axis.ranks[other])}")
    return "; ".join(lines)


def _difference(a: str, b: str, rank_a: int, rank_b: int, width: int = 160) -> str:
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = 0 if len(a) < width and len(b) < width else max(0, start - 20)
    return f"rank {rank_a} has {a[start : start + width]}, rank {rank_b} has {b[start : start + width]}"
