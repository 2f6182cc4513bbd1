"""A DeepSpeed training script with AGC: what it clips stands in the JSON, the script differs by one import.

bash launch/deepspeed/torchrun.sh ds_zero2.json      2 processes on this machine, by torchrun
bash launch/deepspeed/deepspeed.sh ds_zero3.json     the same by the DeepSpeed launcher
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn import functional as F

from dist_agc.cli.tasks import load
from dist_agc.integrations.deepspeed import initialize  # in place of deepspeed.initialize


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a norm-free ResNet on handwritten digits.")
    parser.add_argument("--config", required=True, help="a DeepSpeed JSON, such as launch/deepspeed/ds_zero2.json")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--local_rank", type=int, help="given by the DeepSpeed launcher, which also sets LOCAL_RANK")
    options = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    torch.manual_seed(0)
    task = load("digits")
    model = task.model()
    engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=options.config)
    device = engine.device
    size = engine.train_micro_batch_size_per_gpu()
    order = torch.Generator().manual_seed(0)

    for step in range(1, options.steps + 1):
        batch = torch.randperm(len(task.train.inputs), generator=order)[: size * world][rank::world]
        loss = F.cross_entropy(engine(task.train.inputs[batch].to(device)), task.train.targets[batch].to(device))
        engine.backward(loss)
        engine.step()
        if rank == 0 and (step % 5 == 0 or step == 1):
            clipped = f"clipped {float(engine.agc.stats.clip_fraction):6.1%}" if engine.agc else "without AGC"
            print(f"step {step:3}  loss {loss.item():8.4f}  {clipped}", flush=True)

    with torch.no_grad():
        right = (engine(task.test.inputs.to(device)).argmax(-1).cpu() == task.test.targets).float().mean()
    if rank == 0:
        print(f"accuracy on test data {right:.1%}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
