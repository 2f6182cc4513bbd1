"""Ways to spread a model over processes, each in one function; a training loop needs to know nothing else of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dist_agc

from .backend_zero import zero


@dataclass(frozen=True)
class Trainee:
    """A model that is ready to train, and what differs between torch and an engine such as DeepSpeed."""

    model: Callable[[Tensor], Tensor]
    step: Callable[[Tensor], None]  # of a loss: backward, update, gradients cleared
    attach: Callable[..., dist_agc.AGCHook]  # with the settings of AGC as keywords
    optimizer: torch.optim.Optimizer  # that steps on the gradients once they are reduced


Backend = Callable[[nn.Module, float], Trainee]  # of a model with `.blocks` and a learning rate


def _trainee(model: nn.Module, lr: float) -> Trainee:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Trainee(model, step, partial(dist_agc.attach, model, optimizer), optimizer)


def fsdp2(model: nn.Module, lr: float) -> Trainee:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _trainee(model, lr)


def fsdp1(model: nn.Module, lr: float) -> Trainee:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(block) for block in model.get_submodule("blocks").children()})
    cpu = torch.device("cpu")
    return _trainee(FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu), lr)


def ddp(model: nn.Module, lr: float) -> Trainee:
    return _trainee(nn.parallel.DistributedDataParallel(model), lr)


BACKENDS: dict[str, Backend] = {
    "fsdp2": fsdp2,
    "ddp": ddp,
    "fsdp1": fsdp1,
    **{f"zero{stage}": partial(zero, stage=stage) for stage in (1, 2, 3)},
}
