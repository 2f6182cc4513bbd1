"""`weight_norm_interval`: weights that someone beside the optimizer has written are measured anew."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dist_agc

EVERY = 100
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-4),
    "SGD, one by one": lambda p: torch.optim.SGD(p, lr=1e-4, foreach=False, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
}


def load(model: nn.Module) -> None:
    model.load_state_dict({name: 10 * value for name, value in model.state_dict().items()})


def load_by_reference(model: nn.Module) -> None:
    model.load_state_dict({name: 10 * value for name, value in model.state_dict().items()}, assign=True)


def swap_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = 10 * p.data


def write_one(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p *= 10


def measured(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether weights were measured, by call."""
    from dist_agc.engine.execution import _Bound

    calls, real = [], _Bound.judge_all

    def judge_all(self: Any, weights: Any, *rest: Any) -> None:
        calls.append(bool(weights))
        real(self, weights, *rest)

    monkeypatch.setattr(_Bound, "judge_all", judge_all)
    return calls


@pytest.mark.parametrize("write", [load, load_by_reference, swap_data, write_one])
@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_written_weights(
    kind: str, at: int, write: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whichever step; and an optimizer alone does not count as someone."""
    torch.manual_seed(0)
    calls = measured(monkeypatch)
    model = nn.Linear(5, 4, bias=False)
    optimizer = OPTIMIZERS[kind](model.parameters())
    hook = dist_agc.attach(model, optimizer, clipping_threshold=0.01, weight_norm_interval=EVERY)
    for step in range(8):
        if step == at:
            write(model)
            if write is load_by_reference:
                optimizer.param_groups[0]["params"] = list(model.parameters())
        weights = model.weight.detach().double().norm(dim=1)
        model.weight.grad = torch.full_like(model.weight, 7.0)
        optimizer.step()
        if step in (0, at):
            assert float(hook.stats.max_ratio) == pytest.approx(float((7 * 5**0.5 / weights).max()), rel=1e-5)
    assert calls[:2] == [True, True] and not any(calls[2:at]) and not any(calls[at + 2 :]), calls


def test_a_long_run_measures_its_weights_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = measured(monkeypatch)
    model = nn.Linear(5, 4)
    optimizer = torch.optim.Adam(model.parameters())
    dist_agc.attach(model, optimizer, clipping_threshold=0.01, weight_norm_interval=10)
    for _ in range(30):
        optimizer.zero_grad()
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
    assert [i for i, anew in enumerate(calls) if anew] == [0, 1, 10, 20]
