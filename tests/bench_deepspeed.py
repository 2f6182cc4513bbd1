"""The cost of AGC in ``engine.step()``, against the same engine with ``gradient_clipping: 1.0``. Not a test.

    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 tests/bench_deepspeed.py 1 2 3

Two engines in the same processes take turns, each with gradients of its own, so that whatever else the machine does
meets both alike.
"""

import argparse
import logging
import statistics
import time
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from dist_agc.integrations.deepspeed import initialize


@dataclass
class Cost:
    stage: int
    parameters: int
    norm_clip: float  # seconds of engine.step(), median
    agc: float
    clip_fraction: float

    @property
    def ratio(self) -> float:
        return self.agc / self.norm_clip


def _engine(stage: int, width: int, depth: int, clipping_threshold: float | None) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    if clipping_threshold is None:
        config["gradient_clipping"] = 1.0
    else:
        config |= {"gradient_clipping": 0.0, "adaptive_gradient_clipping": {"clipping_threshold": clipping_threshold}}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    return initialize(model=model, optimizer=optimizer, config=config)[0]


def engine_step_cost(
    stage: int, *, rounds: int = 15, width: int = 1792, depth: int = 8, clipping_threshold: float = 0.01
) -> Cost:
    """The median seconds of ``engine.step()`` (Adam, fp32) on 25.7 million parameters by default."""
    engines = {"norm_clip": _engine(stage, width, depth, None), "agc": _engine(stage, width, depth, clipping_threshold)}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for round in range(rounds + 2):
        for name in sorted(engines, reverse=bool(round % 2)):
            engine = engines[name]
            x = torch.randn(4, width, generator=torch.Generator().manual_seed(round * 64 + dist.get_rank()))
            engine.backward(engine(x).square().mean())
            dist.barrier()
            began = time.perf_counter()
            engine.step()
            dist.barrier()
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(seconds[2:]) for name, seconds in times.items()}
    clipped = float(engines["agc"].agc.stats.clip_fraction)
    for engine in engines.values():
        engine.destroy()
    return Cost(stage, depth * (width * width + width), clip_fraction=clipped, **medians)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clipping-threshold", type=float, default=0.01)
    options = parser.parse_args()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for inference alone
    deepspeed.init_distributed("gloo", verbose=False)
    for stage in options.stages:
        cost = engine_step_cost(stage, rounds=options.rounds, clipping_threshold=options.clipping_threshold)
        if dist.get_rank() == 0:
            print(
                f"ZeRO {stage}  {cost.parameters / 1e6:.1f} M parameters  norm clip {cost.norm_clip * 1e3:7.1f} ms  "
                f"AGC {cost.agc * 1e3:7.1f} ms  ratio {cost.ratio:.3f}  clipped {cost.clip_fraction:.0%}",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
