"""What the demo trains: real data that comes with the installation, and small models, no download.

Both tasks are classification of every position of a tensor, so one loss, one accuracy and one training loop serve both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import Tensor, nn

TASKS = ("digits", "text")


@dataclass(frozen=True)
class Split:
    """Inputs (samples, ...) and integer targets (samples,) or (samples, length)."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Task:
    """A model, its data, and the settings at which training without AGC is in trouble and training with it is not."""

    name: str
    title: str
    train: Split
    test: Split
    model: Callable[[], nn.Module]  # has `.blocks`, the pieces that are sharded one by one
    exclude: tuple[str, ...]  # the last linear layer, which AGC leaves alone (Brock et al. 2021, section 4.1)
    batch_size: int  # of all processes together
    steps: int
    lr: float
    clipping_threshold: float


def load(name: str) -> Task:
    """The task `name`, its data in memory; imports what that task needs and nothing else."""
    return import_module(f"{__name__}.{name}").task()
