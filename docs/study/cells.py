"""Results over seeds, and how settings are held against each other."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from .trials import Clipping, Trial

CHANCE = 0.1  # a run on images that diverged guesses one of ten digits
TRAINS = 0.5  # test accuracy from which on a network is said to train at all
SEEDS = 3  # fewer decide nothing


@dataclass(frozen=True)
class Cell:
    """One setting at one learning rate. `scores`, one a seed: the larger the better, of images the test accuracy and of
    text the negative test loss; minus infinity where that is not finite."""

    lr: float
    scores: tuple[float, ...]
    clipped: float | None  # mean share of units clipped, over steps and seeds
    diverged: int  # seeds

    @property
    def median(self) -> float:
        return median(self.scores)

    @property
    def range(self) -> tuple[float, float]:
        return min(self.scores), max(self.scores)


@dataclass(frozen=True, order=True)
class Setting:
    network: str
    batch: int
    clipping: Clipping


Cells = dict[Setting, list[Cell]]  # cells by learning rate, ascending


def cells(results: Mapping[Trial, Mapping[str, Any]]) -> Cells:
    """Everything that there is, by setting and learning rate."""
    found: dict[Setting, dict[float, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for trial, record in results.items():
        found[Setting(trial.network, trial.batch, trial.clipping)][trial.lr].append(record)
    return {
        setting: [_cell(lr, found[setting][lr], setting.network) for lr in sorted(found[setting])]
        for setting in sorted(found)
    }


def _cell(lr: float, records: list[Mapping[str, Any]], network: str) -> Cell:
    if network == "gpt":
        scores = [-math.inf if r["loss"] is None else -r["loss"] for r in records]
    else:
        scores = [CHANCE if r["accuracy"] is None else r["accuracy"] for r in records]
    clipped = [r["clipped"] for r in records if r["clipped"] is not None]
    return Cell(lr, tuple(scores), fmean(clipped) if clipped else None, sum(r["diverged"] is not None for r in records))


def best(cells: Iterable[Cell]) -> Cell:
    """At the learning rate of the highest median; of equal ones, at the lowest."""
    return max(cells, key=lambda cell: (cell.median, -cell.lr))


def largest_rate(cells: Iterable[Cell]) -> float | None:
    """At which the network trains from every seed."""
    return max((cell.lr for cell in cells if cell.range[0] >= TRAINS), default=None)


def against(one: Cell, other: Cell) -> int:
    """1 where every seed of `one` is better than every seed of `other`, -1 where it is worse, else 0: undecided."""
    if min(len(one.scores), len(other.scores)) < SEEDS:
        return 0
    return (one.range[0] > other.range[1]) - (one.range[1] < other.range[0])
