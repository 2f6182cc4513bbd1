"""Train a sharded norm-free ResNet with AGC: one script for every launcher in this folder.

    bash launch/torchrun.sh                                     # FSDP2, 2 processes on this machine
    bash launch/torchrun.sh --config launch/zero/ds_zero2.json  # DeepSpeed, as the JSON says

CUDA and NCCL where there are GPUs, CPU and gloo elsewhere. Losses are those of the whole batch, so they are the same
however many processes there are and whoever started them.
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import dist_agc
from dist_agc.lab.console import require
from dist_agc.lab.tasks import Task, load

# What every launcher here tells each process.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Trainee:
    """A sharded model with AGC attached."""

    model: Callable[[Tensor], Tensor]
    step: Callable[[Tensor], None]  # of a loss: backward, clipping, update
    batch_size: int  # of all processes together
    agc: dist_agc.AGCHook | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="train with DeepSpeed, as this JSON says, instead of FSDP2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--log-every", type=int, default=5, help="print every so many steps")
    options = parser.parse_args()
    if options.config and not options.config.is_file():
        parser.error(f"--config {options.config}: there is no such file (from {Path.cwd()})")
    require("demo", "sklearn")
    if options.config:
        require("deepspeed", "deepspeed")

    device = join()
    rank, world = dist.get_rank(), dist.get_world_size()
    task = load("digits")
    torch.manual_seed(0)  # the same weights on every rank
    model = task.model().to(device)
    trainee = deepspeed(model, options.config) if options.config else fsdp2(model, task, device)
    if trainee.batch_size % world:
        sys.exit(
            f"{world} processes cannot share batches of {trainee.batch_size} equally: start a number that divides it."
        )

    order = torch.Generator().manual_seed(0)  # the same batches on every rank; each takes its share
    for step in range(1, options.steps + 1):
        mine = torch.randperm(len(task.train.inputs), generator=order)[: trainee.batch_size][rank::world]
        inputs, targets = task.train.inputs[mine].to(device), task.train.targets[mine].to(device)
        loss = F.cross_entropy(trainee.model(inputs), targets)
        trainee.step(loss)
        if step == 1 or step % options.log_every == 0:
            total = loss.detach().clone()
            dist.all_reduce(total)
            if rank == 0:
                print(f"step {step:3}  loss {total.item() / world:8.4f}  {clipped(trainee.agc)}", flush=True)

    with torch.no_grad():
        right = (trainee.model(task.test.inputs.to(device)).argmax(-1).cpu() == task.test.targets).float().mean()
    if rank == 0:
        print(f"accuracy on test data {right:.1%} ({world} processes, {device.type})", flush=True)
    dist.destroy_process_group()
    if device.type == "cpu":
        # A thread of gloo that gives up its last tensor when the interpreter has begun to end aborts the process
        # (pytorch #179291). While this one sleeps, it can.
        time.sleep(0.1)


def join() -> torch.device:
    """Enter the process group; returns where this process computes."""
    if missing := [name for name in VARIABLES if name not in os.environ]:
        sys.exit(f"{', '.join(missing)} not set: start this script by a launcher, such as bash launch/torchrun.sh")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed
        dist.init_process_group("gloo")
        return torch.device("cpu")
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= gpus:
        sys.exit(f"process {local_rank + 1} of this host, which has {gpus} GPUs: start one per GPU (NPROC={gpus}).")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def fsdp2(model: nn.Module, task: Task, device: torch.device) -> Trainee:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=0.9)
    # After sharding. From here on every optimizer.step() clips first.
    agc = dist_agc.attach(model, optimizer, clipping_threshold=task.clipping_threshold, exclude=task.exclude)

    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Trainee(model, step, task.batch_size, agc)


def deepspeed(model: nn.Module, config: Path) -> Trainee:
    from dist_agc.integrations.deepspeed import initialize  # in place of deepspeed.initialize

    # torch deprecates, call by call, collectives that DeepSpeed 0.19 uses.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Optimizer, batch size and AGC are in the JSON.
    engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=str(config))

    def step(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return Trainee(engine, step, engine.train_batch_size(), engine.agc)


def clipped(agc: dist_agc.AGCHook | None) -> str:
    """Waits for the device, so it belongs where something is printed anyway."""
    return "without AGC" if agc is None or not agc.stats else f"clipped {float(agc.stats.clip_fraction):6.1%}"


if __name__ == "__main__":
    main()
