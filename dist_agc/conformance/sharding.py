"""Shards a plain module, one function for each way: what check, bench, the demo and tests do this with."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.optim import Optimizer

from ..model.names import entries

Cut = Callable[[nn.Module, DeviceMesh], object]  # makes a module tensor parallel over a mesh of one dim, in place
Units = Sequence[nn.Module]  # modules that FSDP gathers by themselves, inner ones first; the rest is one more


def device() -> torch.device:
    """An accelerator where every local rank has one and its collectives, else the CPU."""
    if torch.cuda.is_available() and "nccl" in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def mesh(**sizes: int) -> DeviceMesh:
    """By the names of its dims; without any, one dim of all ranks."""
    sizes = sizes or {"shard": dist.get_world_size()}
    return init_device_mesh(device().type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def two_copies() -> DeviceMesh:
    """Two halves of the ranks, each of which holds a whole model."""
    return mesh(replicate=2, shard=dist.get_world_size() // 2)


def average_gradients(model: nn.Module) -> None:
    """Over ranks that each have the whole model and data of their own, where no framework does it.

    A rank without some gradient counts as one whose gradient is zero.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    anywhere = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=device())
    dist.all_reduce(anywhere)
    for parameter, ranks in zip(trained, anywhere.tolist(), strict=True):
        if ranks:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
            total = grad.contiguous() / dist.get_world_size()
            dist.all_reduce(total)
            parameter.grad = torch.empty_like(parameter).copy_(total)


def ddp(model: nn.Module, **options: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, **options)


def fsdp1(model: nn.Module, units: Units = (), strategy: str = "FULL_SHARD", **options: Any) -> nn.Module:
    """A unit of which nothing is trained stays with what is around it."""
    if strategy == "HYBRID_SHARD":
        options.setdefault("device_mesh", two_copies())
    options = {"device_id": device(), "sharding_strategy": ShardingStrategy[strategy], **options}
    places = {id(child): (module, name) for module in model.modules() for name, child in module.named_children()}
    for unit in units:
        if any(p.requires_grad for p in unit.parameters()):
            around, name = places[id(unit)]
            setattr(around, name, FullyShardedDataParallel(unit, **options))
    return FullyShardedDataParallel(model, **options)


def fsdp2(model: nn.Module, units: Units = (), over: DeviceMesh | None = None, **options: Any) -> nn.Module:
    options["mesh"] = mesh() if over is None else over
    for unit in units:
        if any(True for _ in unit.parameters()):
            fully_shard(unit, **options)
    fully_shard(model, **options)
    return model


def hsdp(model: nn.Module, units: Units = (), **options: Any) -> nn.Module:
    return fsdp2(model, units, two_copies(), **options)


def tp(model: nn.Module, cut: Cut) -> nn.Module:
    cut(model, mesh(tp=dist.get_world_size()))
    return model


def tp_fsdp2(model: nn.Module, units: Units, cut: Cut) -> nn.Module:
    """Neighbouring ranks share a copy by tensor parallelism, two by two."""
    both = mesh(dp=dist.get_world_size() // 2, tp=2)
    cut(model, both["tp"])
    return fsdp2(model, units, both["dp"])


def hsdp_tp(model: nn.Module, units: Units, cut: Cut) -> nn.Module:
    cube = mesh(replicate=2, shard=dist.get_world_size() // 4, tp=2)
    cut(model, cube["tp"])
    return fsdp2(model, units, cube["replicate", "shard"])


def zero(model: nn.Module, stage: int, optimizer: Optimizer, **extra: Any) -> Any:
    """DeepSpeed's engine, in bf16 where the model is. ``extra``: more of its config."""
    config = {
        "train_micro_batch_size_per_gpu": 1,  # for its own bookkeeping: the caller cuts batches
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": any(p.dtype is torch.bfloat16 for p in model.parameters())},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        **extra,
    }
    return _deepspeed().initialize(model=model, optimizer=optimizer, config=config)[0]


def pipeline(layers: Sequence[Callable[..., Any]], loss: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """DeepSpeed's engine of a pipeline of two stages, which trains with a learning rate of 0."""
    _deepspeed()
    from deepspeed.pipe import PipelineModule

    with redirect_stdout(io.StringIO()):  # it prints how it cuts the layers
        module = PipelineModule(list(layers), num_stages=2, loss_fn=loss, partition_method="uniform")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    return _deepspeed().initialize(model=module, optimizer=optimizer, config=config)[0]


def _deepspeed() -> Any:
    """The package. It says nothing and compiles nothing before the first step."""
    rank, on_cpu = dist.get_rank(), device().type == "cpu"
    # DeepSpeed reads them even where the group exists, and mpirun sets none.
    for name, value in (("RANK", rank), ("WORLD_SIZE", dist.get_world_size()), ("LOCAL_RANK", rank)):
        os.environ.setdefault(name, str(value))
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # torch deprecates, call by call, collectives that DeepSpeed 0.19 uses.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if on_cpu:  # an optional collective that DeepSpeed would compile now, for minutes, and wait for without a timeout
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if (
        getattr(deepspeed.utils.groups, "mesh_device", None) is not None
    ):  # of another engine, whose ranks share otherwise
        deepspeed.utils.groups._release_process_group_references(group=None)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed


def layers(model: nn.Module) -> list[nn.Module]:
    """What one shards by itself: the layers in the outermost lists of them, else the first half of the children.

    What holds no parameter, cannot be called, or shares a parameter with some other place stays with the rest.
    """
    children = list(model.children())
    found = list(_listed(model)) or [child for child in children[: len(children) // 2] if _runs(child)]
    tied = {id(entry.tensor) for entry in entries(model) if len(entry.names) > 1}
    owned = [(layer, {id(p) for p in layer.parameters()}) for layer in found]
    return [layer for layer, parameters in owned if parameters and not parameters & tied]


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    is_list = not module._parameters and all(name.isdigit() for name in module._modules)
    for child in module.children():
        if is_list and _runs(child):
            yield child
        else:
            yield from _listed(child)


def _runs(module: nn.Module) -> bool:
    """Whether it has a forward, which a ModuleList has not."""
    return type(module).forward is not nn.Module.forward


def numbered(model: nn.Module) -> list[nn.Module]:
    """The modules of every list of layers (``layers.0``), inner ones before those around them."""
    lists = [m for m in model.modules() if m._modules and all(name.isdigit() for name in m._modules)]
    return [layer for layers in reversed(lists) for layer in layers.children()]
