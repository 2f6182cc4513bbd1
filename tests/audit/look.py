"""Looks at one model: runs it once under `dist_agc.units` and sums up what its rows say."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import dist_agc
from dist_agc import UnitRow

HEADINGS = ("architecture", "parameters", "units", "seen", "guesses", "disagree")


@dataclass(frozen=True)
class Found:
    """``seen``: the share of the weights that products took, of all of two dims or more that are not looked up.
    ``guesses``: of three dims or more. ``experts``: of every stack of experts, its name and dims, and whether it was
    seen."""

    name: str
    parameters: int
    units: int
    seen: float
    guesses: list[str]
    disagreements: list[str]
    experts: list[tuple[str, tuple[int, ...], tuple[int, ...], bool]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        cells = (self.name, f"{self.parameters:,}", f"{self.units:,}", f"{self.seen:.0%}")
        return row(*cells, str(len(self.guesses)), str(len(self.disagreements)))


def row(name: str, parameters: str, units: str, seen: str, guesses: str, disagree: str) -> str:
    return f"{name:<32} {parameters:>12} {units:>9} {seen:>5} {guesses:>8} {disagree:>9}"


def look(name: str, model: nn.Module, run: Callable[[], Any]) -> Found:
    with torch.no_grad():
        rows = dist_agc.units(model, run=run)
    # In the model that was looked at, a tied weight goes by its first name.
    owners = {
        f"{path}.{own}" if path else own: module
        for path, module in model.named_modules()
        for own, _ in module.named_parameters(recurse=False)
    }
    weights = [r for r in rows if len(r.shape) > 1 and not (_looked_up(owners[r.name]) and r.observed is None)]
    stacks = [r for r in rows if len(r.shape) == 3 and _holds_experts(owners[r.name])]
    return Found(
        name,
        parameters=sum(math.prod(r.shape) for r in rows),
        units=sum(r.count for r in rows),
        seen=sum(map(_size, (r for r in weights if r.observed is not None))) / max(1, sum(map(_size, weights))),
        guesses=[f"{r.name} {r.shape}" for r in rows if r.guessed and len(r.shape) > 2],
        disagreements=[f"{r.name} {r.shape}: {r.why} says {r.dims}, seen {r.observed}" for r in rows if r.disagrees],
        experts=[(r.name, r.shape, r.dims, r.observed is not None) for r in stacks],
    )


def _size(row: UnitRow) -> int:
    return math.prod(row.shape)


def _looked_up(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _holds_experts(module: nn.Module) -> bool:
    return any("Experts" in kind.__name__ or "ExpertGLU" in kind.__name__ for kind in type(module).__mro__)
