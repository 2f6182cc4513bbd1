"""Ways to spread a model over processes, each in one function; a training loop needs to know nothing else of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import dist_agc

from ..conformance import sharding
from .console import require


@dataclass(frozen=True)
class Trainee:
    """A model that is ready to train, and what differs between torch and an engine such as DeepSpeed."""

    model: Callable[[Tensor], Tensor]
    step: Callable[[Tensor], None]  # of a loss: backward, update, gradients cleared
    attach: Callable[..., dist_agc.AGCHook]  # with the settings of AGC as keywords
    optimizer: torch.optim.Optimizer  # that steps on the gradients once they are reduced


Backend = Callable[[nn.Module, float], Trainee]  # of a model with `.blocks` and a learning rate


def _trainee(model: nn.Module, lr: float) -> Trainee:
    optimizer = _sgd(model, lr)

    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Trainee(model, step, partial(dist_agc.attach, model, optimizer), optimizer)


def _sgd(model: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("blocks").children())


def zero(model: nn.Module, lr: float, *, stage: int) -> Trainee:
    require("deepspeed", "deepspeed")
    optimizer = _sgd(model, lr)
    engine = sharding.zero(model, stage, optimizer)

    def step(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return Trainee(engine, step, partial(dist_agc.attach, engine), optimizer)


BACKENDS: dict[str, Backend] = {
    "fsdp2": lambda model, lr: _trainee(sharding.fsdp2(model, _blocks(model)), lr),
    "ddp": lambda model, lr: _trainee(sharding.ddp(model), lr),
    "fsdp1": lambda model, lr: _trainee(sharding.fsdp1(model, _blocks(model), use_orig_params=True), lr),
    **{f"zero{stage}": partial(zero, stage=stage) for stage in (1, 2, 3)},
}
