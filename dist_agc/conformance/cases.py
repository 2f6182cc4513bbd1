"""Every layout that a suite can build out of a plain module, and what each needs to run."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .subjects import Loss, Subject, ZeroSubject, is_engine

Build = Callable[[nn.Module, "Loss | None"], Subject]


@dataclass(frozen=True)
class Case:
    """One layout. ``needs`` says what is missing, None where it can run; ``build`` shards a fresh module."""

    name: str
    needs: Callable[[bool], str | None]
    build: Build


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
    tokens = torch.randint(11, (6, 16), generator=generator).to(device())
    classes = torch.randint(9, (6,), generator=generator).to(device())
    return nn.functional.cross_entropy(model(tokens), classes)


def device() -> torch.device:
    """An accelerator where every local rank has one and its collectives, else the CPU."""
    if torch.cuda.is_available() and "nccl" in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


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


def _mesh(*shape: int, names: tuple[str, ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device().type, shape, mesh_dim_names=names)


def _share(loss: Loss | None, share: int) -> Loss | None:
    """The suite's own loss on this rank's share; a user's loss knows its own."""
    return (lambda model: odd_loss(model, share)) if loss is odd_loss else loss


def _plain(model: nn.Module, loss: Loss | None) -> Subject:
    return Subject(model, loss)


def _ddp(model: nn.Module, loss: Loss | None) -> Subject:
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    return Subject(wrapped, _share(loss, dist.get_rank()))


def _fsdp1(strategy: str, use_orig_params: bool) -> Build:
    def build(model: nn.Module, loss: Loss | None) -> Subject:
        from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

        options: dict[str, Any] = {"use_orig_params": use_orig_params, "device_id": device()}
        if strategy == "HYBRID_SHARD":
            options["device_mesh"] = _mesh(2, dist.get_world_size() // 2, names=("replicate", "shard"))
        kind = ShardingStrategy[strategy]
        children = list(model.named_children())
        for name, child in children[: len(children) // 2]:  # several flat parameters, one of them the root's
            if any(p.requires_grad for p in child.parameters()):
                setattr(model, name, FullyShardedDataParallel(child, sharding_strategy=kind, **options))
        wrapped = FullyShardedDataParallel(model, sharding_strategy=kind, **options)
        return Subject(wrapped, _share(loss, dist.get_rank()))

    return build


def _fsdp2(model: nn.Module, loss: Loss | None, mesh: Any = None, share: int | None = None) -> Subject:
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or _mesh(dist.get_world_size(), names=("shard",))
    children = list(model.children())
    for child in children[: len(children) // 2]:
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Subject(model, _share(loss, dist.get_rank() if share is None else share))


def _hsdp(model: nn.Module, loss: Loss | None) -> Subject:
    return _fsdp2(model, loss, _mesh(2, dist.get_world_size() // 2, names=("replicate", "shard")))


def _parallelize(model: nn.Module, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    # Kept as DTensors between the two, because a plain tensor no longer says that its shards are uneven.
    parallelize_module(model, mesh, {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()})


def _tp(model: nn.Module, loss: Loss | None) -> Subject:
    _parallelize(model, _mesh(dist.get_world_size(), names=("tp",)))
    return Subject(model, _share(loss, 0))


def _tp_fsdp2(model: nn.Module, loss: Loss | None) -> Subject:
    mesh = _mesh(dist.get_world_size() // 2, 2, names=("dp", "tp"))
    _parallelize(model, mesh["tp"])
    return _fsdp2(model, loss, mesh["dp"], mesh["dp"].get_local_rank())


def _hsdp_tp(model: nn.Module, loss: Loss | None) -> Subject:
    mesh = _mesh(2, dist.get_world_size() // 4, 2, names=("replicate", "shard", "tp"))
    _parallelize(model, mesh["tp"])
    return _fsdp2(model, loss, mesh["replicate", "shard"], dist.get_rank() // 2)


def _zero(stage: int) -> Build:
    def build(model: nn.Module, loss: Loss | None) -> Subject:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if device().type == "cpu":
            # An optional collective that DeepSpeed would compile now, for minutes, and wait for without a timeout.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": any(p.dtype is torch.bfloat16 for p in model.parameters())},
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return ZeroSubject(engine, _share(loss, dist.get_rank()))

    return build


def _deepspeed(own_model: bool) -> str | None:
    if importlib.util.find_spec("deepspeed") is None:
        return "needs DeepSpeed: pip install 'dist-agc[deepspeed]'"
    return None


_ALWAYS = _ranks(1)
_STRATEGIES = {"FULL_SHARD": "full", "SHARD_GRAD_OP": "grad-op", "NO_SHARD": "no-shard", "HYBRID_SHARD": "hybrid"}

CASES = [
    Case("plain", _ALWAYS, _plain),
    Case("ddp", _ALWAYS, _ddp),
    *(
        Case(
            f"fsdp1 {short}{' orig' if original else ''}",
            _ranks(4, 2) if strategy == "HYBRID_SHARD" else _ALWAYS,
            _fsdp1(strategy, original),
        )
        for (strategy, short), original in itertools.product(_STRATEGIES.items(), (True, False))
    ),
    Case("fsdp2", _ALWAYS, _fsdp2),
    Case("hsdp", _ranks(4, 2), _hsdp),
    Case("tp", _tensor_parallel(2, most=7), _tp),  # rows of the layer that is cut: DTensor keeps no empty gradients
    Case("tp+fsdp2", _tensor_parallel(4, 2), _tp_fsdp2),
    Case("hsdp+tp", _tensor_parallel(8, 4), _hsdp_tp),
    *(Case(f"zero{stage}", _deepspeed, _zero(stage)) for stage in range(4)),
]
AS_IS = Case("as-is", _ALWAYS, lambda made, loss: (ZeroSubject if is_engine(made) else Subject)(made, loss))
