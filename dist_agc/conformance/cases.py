"""Every layout that a suite can build out of a plain module, and what each needs to run."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ..model.kinds import register_units
from . import sharding
from .losses import Loss
from .megatron import Megatron
from .ranks import NotSetUp
from .sharding import Units
from .stages import Stages, StagesOfDeepSpeed
from .subjects import Subject, ZeroSubject, is_engine


@dataclass(frozen=True)
class Case:
    """One layout.

    Args:
        shard: spreads a fresh module over the ranks, given the modules that FSDP shall gather by themselves; or makes a
            `Subject` of it.
        least, most: ranks that it needs, in a ``multiple`` of some number.
        same_batch: so many neighbouring ranks hold one copy together, and take the same share of the suite's own batch;
            0: all of them. A user's loss knows its own share.
        averages: every rank has a whole model, and nothing of torch or DeepSpeed averages their gradients.
    """

    name: str
    shard: Callable[[nn.Module, Units], nn.Module | Subject]
    least: int = 1
    multiple: int = 1
    most: float = math.inf
    same_batch: int = 1
    averages: bool = False

    def needs(self) -> str | None:
        """What is missing on this machine; None where it can run."""
        if self.name == "megatron":
            if importlib.util.find_spec("megatron") is None:
                return "needs Megatron-core: pip install 'dist-agc[megatron]'"
            if not torch.cuda.is_available():
                return "needs a GPU: Megatron-core asks CUDA for its device"
        found = importlib.util.find_spec("deepspeed")
        if self.name.startswith(("zero", "autotp", "deepspeed")) and found is None:
            return "needs DeepSpeed: pip install 'dist-agc[deepspeed]'"
        if (
            found
            and self.name == "autotp"
            and not Path(found.origin or "", "../checkpoint/affine.py").resolve().exists()
        ):
            return "needs DeepSpeed 0.19.8, whose AutoTP says how it cuts"
        size = dist.get_world_size()
        if size < self.least or size % self.multiple:
            multiple = f", and a multiple of {self.multiple}" if self.multiple > 1 else ""
            return f"needs at least {self.least} ranks{multiple}"
        return f"needs at most {self.most} ranks" if size > self.most else None

    def build(self, model: nn.Module, loss: Loss | None) -> Subject:
        sharded = self.shard(model, sharding.layers(model))
        if loss is odd_loss:
            loss = partial(odd_loss, share=dist.get_rank() // self.same_batch if self.same_batch else 0)
        if isinstance(sharded, Subject):
            sharded.loss, sharded.averages = loss, self.averages
            return sharded
        return ZeroSubject(sharded, loss) if is_engine(sharded) else Subject(sharded, loss, self.averages)


class Experts(nn.Module):
    """Stacked experts in both layouts, (experts, out, in) and (experts, in, out), with a vector for each."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Parameter(torch.randn(3, 5, 10) * 0.4)
        self.outward = nn.Parameter(torch.randn(3, 5, 10) * 0.4)
        self.shift = nn.Parameter(torch.randn(3, 10) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.tanh(torch.einsum("bi,eoi->beo", x, self.inward))
        return x + (torch.einsum("bei,eio->beo", inside, self.outward) + self.shift).mean(1)


register_units(Experts, {"inward": (0, 1), "outward": (0, 2), "shift": 0})


class Dead(nn.Linear):
    """Has no part in what comes out."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class Odd(nn.Module):
    """Sizes that no number of ranks divides: uneven, empty and cut shards, a grouped ConvTranspose, a dead layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(8, 6, 3, padding=1)
        self.deconv = nn.ConvTranspose2d(6, 10, 2, groups=2)
        self.norm = nn.LayerNorm(10)
        self.experts = Experts()
        self.up = nn.Linear(10, 7)
        self.down = nn.Linear(7, 5)
        self.thin = nn.Linear(5, 2)
        self.single = nn.Linear(2, 1)
        self.head = nn.Linear(1, 9)
        self.dead = Dead(3, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens
        for layer in self.layers():
            x = layer(x)
        return x

    def layers(self) -> list[Callable[[Tensor], Tensor]]:
        """What a forward pass runs, one after the other."""
        enter = [self.embedding, lambda x: x.transpose(1, 2).reshape(-1, 8, 4, 4), self.conv, torch.tanh, self.deconv]
        inner = [lambda x: x.flatten(2).mean(2), self.norm, self.experts, self.up, torch.tanh, self.down]
        return [*enter, *inner, self.thin, self.dead, self.single, self.head]


def odd_model() -> nn.Module:
    """The same weights on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Odd()


def odd_batch(share: int = 0) -> tuple[Tensor, Tensor]:
    """This share of a batch: tokens (6, 16) and classes (6,)."""
    generator = torch.Generator().manual_seed(100 + share)
    tokens = torch.randint(11, (6, 16), generator=generator).to(sharding.device())
    return tokens, torch.randint(9, (6,), generator=generator).to(sharding.device())


def odd_loss(model: nn.Module, share: int = 0) -> Tensor:
    tokens, classes = odd_batch(share)
    return nn.functional.cross_entropy(model(tokens), classes)


def _cut(model: nn.Module, mesh: DeviceMesh) -> None:
    if not isinstance(model, Odd):
        raise NotSetUp("needs a plan for the model's layers: shard it in the factory and use --layout as-is")
    # Kept as DTensors between the two, because a plain tensor no longer says that its shards are uneven.
    plan: dict[str, Any] = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
    rows, ranks = model.embedding.num_embeddings, mesh.size()
    if -(-rows // ranks) * (ranks - 1) < rows:  # torch looks nothing up where a rank has no rows
        plan["embedding"] = RowwiseParallel(input_layouts=Replicate())  # whole gradients, without FSDP2
    parallelize_module(model, mesh, plan)


def _pipeline(model: nn.Module, units: Units) -> Any:
    if not isinstance(model, Odd):
        raise NotSetUp("needs the model as a list of layers, which dist_agc cannot make of it")
    engine = sharding.pipeline(model.layers(), nn.functional.cross_entropy)
    names = {id(p): name for name, p in model.named_parameters()}
    return StagesOfDeepSpeed(engine, odd_batch(engine.grid.get_data_parallel_rank()), names)


def _zero(model: nn.Module, units: Units, *, stage: int, **extra: Any) -> Any:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    return sharding.zero(model, stage, optimizer, **extra)


def _autotp(model: nn.Module, units: Units) -> Any:
    """DeepSpeed's tensor parallelism, two by two, under ZeRO 1: 7 rows and columns, of which one rank has 4."""
    if not isinstance(model, Odd):
        raise NotSetUp("needs a plan for the model's layers: shard it in the factory and use --layout as-is")
    specs = [
        {"patterns": [rf"(^|\.){name}\.weight$"], "partition_type": kind}
        for name, kind in (("up", "column"), ("down", "row"))
    ]
    plan = {"use_default_specs": False, "layer_specs": specs}
    return _zero(model, units, stage=1, tensor_parallel={"autotp_size": 2, "partition_config": plan})


_FSDP1 = {"full": "FULL_SHARD", "grad-op": "SHARD_GRAD_OP", "no-shard": "NO_SHARD", "hybrid": "HYBRID_SHARD"}
_HALVES: dict[str, Any] = {"least": 4, "multiple": 2}  # of the ranks, each with a whole copy

CASES = [
    Case("plain", lambda model, units: model, averages=True),
    Case("ddp", lambda model, units: sharding.ddp(model, find_unused_parameters=True)),
    *(
        Case(
            f"fsdp1 {name}{suffix}",
            partial(sharding.fsdp1, strategy=strategy, use_orig_params=bool(suffix)),
            **_HALVES if name == "hybrid" else {},
        )
        for name, strategy in _FSDP1.items()
        for suffix in (" orig", "")
    ),
    Case("fsdp2", sharding.fsdp2),
    Case("hsdp", sharding.hsdp, **_HALVES),
    # At most 7: rows of the layer that is cut. DTensor keeps no empty gradients.
    Case("tp", lambda model, units: sharding.tp(model, _cut), least=2, most=7, same_batch=0),
    Case("tp+fsdp2", partial(sharding.tp_fsdp2, cut=_cut), **_HALVES, same_batch=2),
    Case("hsdp+tp", partial(sharding.hsdp_tp, cut=_cut), least=8, multiple=4, same_batch=2),
    Case("pipeline", lambda model, units: Stages(model), least=2, averages=True),
    *(Case(f"zero{stage}", partial(_zero, stage=stage)) for stage in range(4)),
    Case("autotp", _autotp, least=2, multiple=2, same_batch=2),
    Case("deepspeed pipeline", _pipeline, least=2, multiple=2),
    Case("megatron", lambda model, units: Megatron(model)),
]
AS_IS = Case("as-is", lambda made, units: made)
