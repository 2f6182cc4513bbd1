"""One training run over all processes: the same steps and figures however many there are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import dist_agc

from .backends import Backend, Trainee
from .tasks import Split, Task


@dataclass(frozen=True)
class Step:
    """One step of a run, over all processes; loss and accuracy are those of the batch before its update."""

    number: int  # from 1
    loss: float
    accuracy: float
    stats: dict[str, Any]  # what docs/logging.md describes; empty without AGC

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.loss)

    @property
    def clip_fraction(self) -> float | None:
        return self.stats.get("agc/clip_fraction")


@dataclass
class Run:
    """A run and what became of it. `clipping_threshold` None: without AGC."""

    name: str
    label: str
    clipping_threshold: float | None
    steps: list[Step] = field(default_factory=list)
    test_loss: float | None = None  # both None until it ended, and where it diverged
    test_accuracy: float | None = None

    @property
    def diverged(self) -> bool:
        return self.steps[-1].diverged

    @property
    def failed(self) -> bool:
        """Diverged, or ended worse than it began."""
        return not self.steps[-1].loss <= self.steps[0].loss


def train(run: Run, task: Task, backend: Backend, seed: int, details: int | None = None) -> Iterator[Step]:
    """Train a new model, fill `run`, hand out each step. Stops early, without a test, when the loss is not finite.

    Each `details` steps the statistics tell every parameter apart and count ratios, which costs another clipping.
    """
    torch.manual_seed(seed)  # every process makes the same weights
    trainee = backend(task.model(), task.lr)
    hook, counter = None, _Ratios(trainee.optimizer)
    if run.clipping_threshold is not None:
        hook = counter.hook = trainee.attach(clipping_threshold=run.clipping_threshold, exclude=task.exclude)
    for number, batch in enumerate(batches(len(task.train.inputs), task.batch_size, task.steps, seed), start=1):
        loss, losses, correct = forward(trainee, task.train, batch)
        step = Step(number, losses, correct, {})
        if not step.diverged:
            detailed = details is not None and number % details == 0
            counter.wanted = detailed
            trainee.step(loss)
            if hook is not None and hook.stats:
                counts = counter.counts if detailed else {}
                step = Step(number, losses, correct, hook.stats.as_dict(per_parameter=detailed) | counts)
        run.steps.append(step)
        yield step
        if step.diverged:
            return
    if isinstance(trainee.model, nn.Module):
        trainee.model.eval()
    with torch.no_grad():
        _, run.test_loss, run.test_accuracy = forward(trainee, task.test, torch.arange(len(task.test.inputs)))


class _Ratios:
    """Counts ratios where an optimizer is about to step, before AGC, which is attached later, changes them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.hook: dist_agc.AGCHook | None = None
        self.wanted = False
        self.counts: dict[str, Any] = {}
        optimizer.register_step_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        if self.wanted and self.hook is not None:
            self.counts = dist_agc.ratios(self.hook.clipper).as_dict()


def batches(samples: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of indices, epoch after epoch in a new order, the same in every process and in every run."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(left) < size:
            left = torch.cat([left, torch.randperm(samples, generator=generator)])
        yield left[:size]
        left = left[size:]


def forward(trainee: Trainee, split: Split, batch: Tensor) -> tuple[Tensor, float, float]:
    """The loss to differentiate on this process's part of a batch; loss and accuracy of the whole batch."""
    mine = batch[dist.get_rank() :: dist.get_world_size()]
    targets = split.targets[mine].flatten()
    logits = trainee.model(split.inputs[mine]).flatten(0, -2)
    positions = len(batch) * split.targets[0].numel()
    # A sum over the whole batch's size, so that parts of unequal length weigh what they hold; gradients are averaged
    # over the processes, which the factor undoes.
    loss = F.cross_entropy(logits, targets, reduction="sum") / positions
    totals = torch.stack([loss.detach(), (logits.argmax(-1) == targets).sum() / positions])
    dist.all_reduce(totals)
    mean_loss, accuracy = totals.tolist()
    return loss * dist.get_world_size(), mean_loss, accuracy
