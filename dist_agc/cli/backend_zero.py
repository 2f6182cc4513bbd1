"""DeepSpeed's ZeRO as a way to spread the demo's model, on this machine's CPU."""

from __future__ import annotations

import logging
import os
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dist_agc

from . import require

if TYPE_CHECKING:
    from .backends import Trainee


def deepspeed_on_cpu() -> Any:
    """The package, before its first use in this process: on the CPU, saying nothing, compiling nothing."""
    require("deepspeed", "deepspeed")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))  # mpirun says it in another variable
    import deepspeed

    # torch deprecates, call by call, collectives that DeepSpeed 0.19 uses.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # An operator for inference that DeepSpeed would compile for half a minute before the first step.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def zero(model: nn.Module, lr: float, *, stage: int) -> Trainee:
    from .backends import Trainee

    deepspeed = deepspeed_on_cpu()
    config = {
        "train_micro_batch_size_per_gpu": 1,  # for its own bookkeeping; batches are cut here
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return Trainee(engine, step, partial(dist_agc.attach, engine), optimizer)
