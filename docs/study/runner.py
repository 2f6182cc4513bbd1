"""One training of the study, in a process of its own or shared by several: the code is the same."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import cache, partial
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

import dist_agc
from dist_agc.conformance.sharding import fsdp2
from dist_agc.lab.backends import Trainee
from dist_agc.lab.console import launch
from dist_agc.lab.tasks import Task, load
from dist_agc.lab.training import Run, train

from .networks import NETWORKS
from .trials import Case, Clipping, Study, Trial

WARM_UP = 0.1  # of all steps

_load = cache(load)


def run(study: Study, trial: Trial) -> dict[str, Any]:
    """Train alone, on one thread. Returns the line for the results; JSON knows no inf and nan, they are None there."""
    began = time.process_time()
    torch.set_num_threads(1)
    with launch.process_group(launch.ALONE):
        done = trained(prepared(trial, study), trial.clipping, trial.seed)
    last = [step.loss for step in done.steps[-max(1, len(done.steps) // 10) :]]
    clipped = [step.clip_fraction for step in done.steps if step.clip_fraction is not None]
    return trial.as_dict() | {
        "accuracy": _rounded(done.test_accuracy, 4),
        "loss": _rounded(done.test_loss, 4),
        "train": _rounded(fmean(last), 4),
        "diverged": len(done.steps) if done.diverged else None,
        "clipped": _rounded(fmean(clipped), 3) if clipped else None,
        "seconds": round(time.process_time() - began, 1),
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return round(value, digits) if value is not None and math.isfinite(value) else None


def prepared(what: Trial | Case, study: Study) -> Task:
    """The task as the demo knows it, with the network and the settings of the study."""
    network = NETWORKS[what.network]
    task = _load(network.task)
    if isinstance(what, Case):
        steps = study.sharded_steps
    elif task.name == "text":
        steps = study.text_steps
    else:
        steps = round(study.epochs * len(task.train.inputs) / what.batch)
    return replace(
        task,
        model=network.make or task.model,
        batch_size=what.batch,
        steps=steps,
        lr=what.lr,
        exclude=() if what.clipping.kind == "agc+last" else task.exclude,
    )


def trained(task: Task, clipping: Clipping, seed: int) -> Run:
    """Train on all processes of the default group, sharded by FSDP2 where there are several."""
    threshold = clipping.at if clipping.kind in ("agc", "agc+last") else None
    done = Run("study", str(clipping), threshold)
    for _ in train(done, task, partial(_trainee, task=task, clipping=clipping), seed):
        pass
    return done


def _trainee(model: nn.Module, lr: float, *, task: Task, clipping: Clipping) -> Trainee:
    if dist.get_world_size() > 1:
        fsdp2(model, list(model.get_submodule("blocks").children()))
    parameters = list(model.parameters())
    if task.name == "text":
        optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.1)
    else:
        optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True)
    schedule = LambdaLR(optimizer, partial(_share_of_rate, steps=task.steps))

    def step(loss: Tensor) -> None:
        loss.backward()
        if clipping.kind == "norm":
            clip_grad_norm_(parameters, clipping.at)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return Trainee(model, step, partial(dist_agc.attach, model, optimizer), optimizer)


def _share_of_rate(step: int, steps: int) -> float:
    """Linear from almost nothing to one, then half a cosine to zero."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
