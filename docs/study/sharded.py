"""The same trainings alone and sharded over real processes: how far apart are they?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_agc.lab.console import launch
from dist_agc.lab.tasks import Split

from .networks import NETWORKS
from .runner import prepared, trained
from .trials import Case, Study

SEED = 0


@dataclass(frozen=True)
class Outcome:
    """Per step, the loss of the batch and how many units AGC clipped; the weights in the end, whole."""

    losses: list[float]
    clipped: list[int]
    units: int
    weights: dict[str, Tensor]


def compare(
    here: launch.Place, study: Study, cases: list[Case], say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The line of each case for the results. All processes must call it: each trains every case alone, then all of them
    train together. In this order, as a group that was destroyed and made again hangs (torch 2.13, gloo)."""
    torch.set_num_threads(1)
    with launch.process_group(launch.ALONE):
        alone = [_outcome(case, study, say, "alone") for case in cases]
    with launch.process_group(here):
        for case, other in zip(cases, alone, strict=True):
            together = _outcome(case, study, say, f"over {here.size} processes")
            yield case.as_dict() | {"processes": here.size} | differences(other, together)


def _outcome(case: Case, study: Study, say: Callable[[str], None], where: str) -> Outcome:
    say(f"sharded  {NETWORKS[case.network].label}, {case.clipping}, {case.dtype}, {where}")
    dtype = getattr(torch, case.dtype)
    task = prepared(case, study)
    torch.manual_seed(SEED)
    model = task.model().to(dtype)  # the same weights in either dtype
    task = replace(task, model=lambda: model, train=_cast(task.train, dtype), test=_cast(task.test, dtype))
    run = trained(task, case.clipping, SEED)
    return Outcome(
        [step.loss for step in run.steps],
        [int(step.stats["agc/clipped_units"]) for step in run.steps],
        int(run.steps[0].stats["agc/units"]),
        {name: _whole(parameter.detach()) for name, parameter in model.named_parameters()},
    )


def _cast(split: Split, dtype: torch.dtype) -> Split:
    return replace(split, inputs=split.inputs.to(dtype)) if split.inputs.is_floating_point() else split


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def differences(alone: Outcome, together: Outcome) -> dict[str, Any]:
    """Losses: absolute. Weights: relative to the largest weight of the parameter."""
    assert alone.weights.keys() == together.weights.keys() and alone.units == together.units
    weights = (
        float((together.weights[name] - weight).abs().max() / weight.abs().max())
        for name, weight in alone.weights.items()
    )
    losses = [abs(a - b) for a, b in zip(alone.losses, together.losses, strict=True)]
    clipped = [abs(a - b) for a, b in zip(alone.clipped, together.clipped, strict=True)]
    return {
        "steps": len(losses),
        "loss": [round(alone.losses[0], 4), round(alone.losses[-1], 4)],
        "units": alone.units,
        "clipped": sum(alone.clipped),
        "apart": {
            "loss": float(f"{max(losses):.2g}"),
            "clipped": sum(clipped),
            "weights": float(f"{max(weights):.2g}"),
        },
    }
