"""Every layout that a suite can build out of a plain module, and what each needs to run."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from . import sharding
from .subjects import Loss, Subject, ZeroSubject, is_engine


@dataclass(frozen=True)
class Case:
    """One layout.

    Args:
        needs: says what is missing here (for a model of the user's own, if it is given True), None where it can run.
        shard: spreads a fresh module over the ranks.
        same_batch: so many neighbouring ranks hold one copy together, and take the same share of the suite's own batch;
            0: all of them. A user's loss knows its own share.
    """

    name: str
    needs: Callable[[bool], str | None]
    shard: Callable[[nn.Module], nn.Module]
    same_batch: int = 1

    def build(self, model: nn.Module, loss: Loss | None) -> Subject:
        sharded = self.shard(model)
        if loss is odd_loss:
            loss = partial(odd_loss, share=dist.get_rank() // self.same_batch if self.same_batch else 0)
        return (ZeroSubject if is_engine(sharded) else Subject)(sharded, loss)


class Odd(nn.Module):
    """Sizes that no number of ranks divides: uneven, empty and cut shards, a grouped ConvTranspose, a dead layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(8, 6, 3, padding=1)
        self.deconv = nn.ConvTranspose2d(6, 10, 2, groups=2)
        self.norm = nn.LayerNorm(10)
        self.up = nn.Linear(10, 7)
        self.down = nn.Linear(7, 5)
        self.thin = nn.Linear(5, 2)
        self.single = nn.Linear(2, 1)
        self.head = nn.Linear(1, 9)
        self.dead = nn.Linear(3, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).transpose(1, 2).reshape(-1, 8, 4, 4)
        x = self.norm(self.deconv(torch.tanh(self.conv(x))).flatten(2).mean(2))
        return self.head(self.single(self.thin(self.down(torch.tanh(self.up(x))))))


def odd_model() -> nn.Module:
    """The same weights on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Odd()


def odd_loss(model: nn.Module, share: int = 0) -> Tensor:
    """Of this share of a batch; ranks that hold parts of one copy (tensor parallel) take the same share."""
    generator = torch.Generator().manual_seed(100 + share)
    tokens = torch.randint(11, (6, 16), generator=generator).to(sharding.device())
    classes = torch.randint(9, (6,), generator=generator).to(sharding.device())
    return nn.functional.cross_entropy(model(tokens), classes)


def _ranks(least: int, multiple: int = 1, most: float = math.inf) -> Callable[[bool], str | None]:
    def needs(own_model: bool) -> str | None:
        size = dist.get_world_size()
        if size < least or size % multiple:
            return f"needs at least {least} ranks{f', and a multiple of {multiple}' if multiple > 1 else ''}"
        return f"needs at most {most} ranks" if size > most else None

    return needs


def _tensor_parallel(least: int, multiple: int = 1, most: float = math.inf) -> Callable[[bool], str | None]:
    enough = _ranks(least, multiple, most)
    return lambda own: (
        "needs a plan for the model's layers: shard it in the factory and use --layout as-is" if own else enough(own)
    )


def _ddp(model: nn.Module) -> nn.Module:
    return sharding.ddp(model, find_unused_parameters=True)


def _fsdp1(model: nn.Module, strategy: str, use_orig_params: bool) -> nn.Module:
    # Several flat parameters, one of them the root's.
    return sharding.fsdp1(model, sharding.first_half(model), strategy, use_orig_params=use_orig_params)


def _cut(model: nn.Module, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    # Kept as DTensors between the two, because a plain tensor no longer says that its shards are uneven.
    parallelize_module(model, mesh, {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()})


def _zero(model: nn.Module, stage: int) -> Any:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    return sharding.zero(model, stage, optimizer)


def _deepspeed(own_model: bool) -> str | None:
    if importlib.util.find_spec("deepspeed") is None:
        return "needs DeepSpeed: pip install 'dist-agc[deepspeed]'"
    return None


_ALWAYS, _HALVES = _ranks(1), _ranks(4, 2)
_STRATEGIES = {"FULL_SHARD": "full", "SHARD_GRAD_OP": "grad-op", "NO_SHARD": "no-shard", "HYBRID_SHARD": "hybrid"}

CASES = [
    Case("plain", _ALWAYS, lambda model: model, same_batch=0),
    Case("ddp", _ALWAYS, _ddp),
    *(
        Case(
            f"fsdp1 {short}{' orig' if original else ''}",
            _HALVES if strategy == "HYBRID_SHARD" else _ALWAYS,
            partial(_fsdp1, strategy=strategy, use_orig_params=original),
        )
        for (strategy, short), original in itertools.product(_STRATEGIES.items(), (True, False))
    ),
    Case("fsdp2", _ALWAYS, lambda model: sharding.fsdp2(model, sharding.first_half(model))),
    Case("hsdp", _HALVES, lambda model: sharding.hsdp(model, sharding.first_half(model))),
    # At most 7: rows of the layer that is cut. DTensor keeps no empty gradients.
    Case("tp", _tensor_parallel(2, most=7), lambda model: sharding.tp(model, _cut), same_batch=0),
    *(
        Case(
            name,
            _tensor_parallel(least, least // 2),
            lambda model, shard=shard: shard(model, sharding.first_half(model), _cut),
            same_batch=2,
        )
        for name, least, shard in (("tp+fsdp2", 4, sharding.tp_fsdp2), ("hsdp+tp", 8, sharding.hsdp_tp))
    ),
    *(Case(f"zero{stage}", _deepspeed, partial(_zero, stage=stage)) for stage in range(4)),
]
AS_IS = Case("as-is", _ALWAYS, lambda made: made)
