"""One rank of tests/test_faults.py: python fault_ranks.py SCENARIOS RANK SIZE STORE. Says how each ended, in JSON.

Not started by torchrun, which ends the other ranks as soon as one fails: here each has to come to its own end.
"""

import json
import logging
import os
import sys
import time
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import dist_agc
from dist_agc.engine import execution
from helpers import quiet_deepspeed

TIMEOUT = 8.0


def model_of(size: int, width: int = 5) -> nn.Module:
    """A weight with every row cut and a bias that is cut, with gradients."""
    torch.manual_seed(0)
    model, mesh = nn.Linear(8, width), init_device_mesh("cpu", (size,))
    for name, dim in (("weight", 1), ("bias", 0)):
        parameter = nn.Parameter(distribute_tensor(getattr(model, name).detach(), mesh, [Shard(dim)]))
        parameter.grad = distribute_tensor(torch.randn(parameter.shape), mesh, [Shard(dim)])
        setattr(model, name, parameter)
    return model


def misplaced(parameter: Any) -> DTensor:
    """A gradient that does not lie as its parameter does; made without a collective."""
    return DTensor.from_local(torch.ones(parameter.shape), parameter.device_mesh, [Partial()], run_check=False)


def fsdp1() -> nn.Module:
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    model = FullyShardedDataParallel(nn.Linear(8, 5), use_orig_params=True, device_id=torch.device("cpu"))
    model(torch.ones(2, 8)).sum().backward()
    return model


def zero(rank: int, size: int, threshold: float) -> Any:
    """A DeepSpeed engine that is ready to step. AGC runs inside of its step, on flat partitions."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), DS_ACCELERATOR="cpu")
    quiet_deepspeed()
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    model = nn.Linear(8, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    dist_agc.attach(engine, clipping_threshold=threshold)
    backward(engine)
    return engine


def backward(engine: Any) -> None:
    engine.backward(engine(torch.ones(2, 8)).sum())


def state_of(model: Any) -> list[torch.Tensor]:
    """What must not change: gradients; of an engine, whose step clips, the partitions that it updates."""
    if hasattr(model, "basic_optimizer"):
        return [p.detach().clone() for p in model.optimizer.single_partition_of_fp32_groups]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [g.to_local().clone() if hasattr(g, "to_local") else g.clone() for g in grads]  # type: ignore[operator]


def clip(model: nn.Module, odd: bool, **options: Any) -> None:
    dist_agc.apply_agc(model, **{"clipping_threshold": 0.01, **options})


def construct(model: nn.Module, odd: bool) -> None:
    """A pattern that matches nothing, on one rank, which lives on: the others make their Clippers, and wait for it."""
    try:
        dist_agc.Clipper(model, exclude=("head.*",) if odd else ()).clip()
    finally:
        time.sleep(TIMEOUT + 4 if odd else 0)


def scenario(name: str, rank: int, size: int) -> tuple[nn.Module, Any]:
    """The model, and what this rank does with it. Rank 1 is the odd one."""
    odd = rank == 1
    if name == "copies":  # nothing is sent between copies, so only the check can tell
        model: nn.Module = DistributedDataParallel(nn.Linear(3, 2))
        model(torch.ones(1, 3)).sum().backward()
        return model, lambda: clip(model, odd, clipping_threshold=0.02 if odd else 0.01)
    if name == "mesh of two axes":
        mesh = init_device_mesh("cpu", (2, 2))
        model = nn.Linear(8, 6, bias=False)
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0), Shard(1)]))
        model.weight.grad = model.weight.detach().clone()
        return model, lambda: clip(model, odd, eps=0.1 if odd else 0.001)
    if name == "fsdp1 threshold":
        model = fsdp1()
        return model, lambda: clip(model, odd, clipping_threshold=0.02 if odd else 0.01)
    if name.startswith("zero"):
        engine = zero(rank, size, 0.02 if odd and name == "zero threshold" else 0.01)
        if name == "zero dies":
            engine.step()  # a good first one
            backward(engine)
            dist.barrier()
            if odd:
                execution.all_reduce = lambda buffer, axis: os._exit(9)
        return engine, engine.step
    model = fsdp1() if name == "fsdp1 dies" else model_of(size, 6 if odd and name == "model" else 5)
    if name == "constructor":
        return model, lambda: construct(model, odd)
    different: dict[str, dict[str, Any]] = {
        "threshold": {"clipping_threshold": 0.02},
        "exclude": {"exclude": ("bias",)},
        "units": {"units": {"weight": ()}},
        "statistics": {"statistics": False},
        "model": {},
    }
    if name in different:
        return model, lambda: clip(model, odd, **(different[name] if odd else {}))
    if name == "frozen" and odd:
        model.bias.requires_grad_(False)
        model.bias.grad = None  # pyright: ignore[reportArgumentType]
    if name == "first gradient" and odd:
        model.bias.grad = misplaced(model.bias)
    clipper = dist_agc.Clipper(model, clipping_threshold=0.01)
    if name in ("frozen", "first gradient"):
        return model, clipper.clip
    clipper.clip()  # a good first step: from here on nobody checks
    dist.barrier()
    if name == "later gradient" and odd:
        model.bias.grad = misplaced(model.bias)
    elif name in ("dies", "fsdp1 dies") and odd:
        execution.all_reduce = lambda buffer, axis: os._exit(9)  # in the middle of clip(), after the local norms
    elif name == "stays away" and odd:
        return model, lambda: time.sleep(TIMEOUT + 4)
    return model, clipper.clip


def main(names: str, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
    )
    for name in names.split(","):
        model, act = scenario(name, rank, size)
        before = state_of(model)
        dist.barrier()
        began, error = time.monotonic(), None
        try:
            act()
        except Exception as raised:
            error = raised
        seconds = time.monotonic() - began
        unchanged = all(torch.equal(a, b) for a, b in zip(state_of(model), before, strict=True))
        kind = type(error).__name__ if error else ""
        print(
            json.dumps({"error": kind, "message": str(error), "seconds": seconds, "unchanged": unchanged}), flush=True
        )
    os._exit(0)  # the group may be broken: no orderly way out of it


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
