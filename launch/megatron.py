"""Train a small GPT with Megatron-core and AGC: tensor parallelism, a distributed optimizer, bf16.

    pip install '.[megatron]'
    torchrun --nproc-per-node 4 launch/megatron.py --tensor 2

Megatron-core wants CUDA: one GPU for each process. The data are numbers that count upwards, so the loss falls fast.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

import dist_agc

VOCABULARY, LENGTH, MICRO_BATCH, MICRO_BATCHES = 64, 32, 4, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel processes")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--log-every", type=int, default=5, help="print every so many steps")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("launch/megatron.py needs a GPU for each process: Megatron-core asks for CUDA, here there is none.")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel(options.tensor, create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    train(options.tensor, options.steps, options.log_every)
    dist.destroy_process_group()


def train(tensor: int, steps: int, log_every: int) -> dist_agc.AGCHook:
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH).to(torch.cuda.current_device())
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    chunks = [DistributedDataParallel(config, ddp, Float16Module(config, model))]
    # clip_grad is 1.0 by default, and would clip the norm of all gradients before AGC sees them.
    settings = OptimizerConfig(
        lr=3e-3, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True, clip_grad=0.0
    )
    optimizer = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)
    hook = dist_agc.attach(chunks, optimizer, clipping_threshold=0.02, exclude=("output_layer.*",))
    config.finalize_model_grads_func = finalize_model_grads

    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    for step in range(1, steps + 1):
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        run = get_forward_backward_func()
        losses: Any = run(
            forward_step_func=forward_step,
            data_iterator=batches(generator),
            model=chunks[0],
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()  # clips first
        if dist.get_rank() == 0 and (step == 1 or step % log_every == 0):
            loss = sum(float(one["loss"]) for one in losses) / len(losses)
            # The same norm that Megatron returns: nothing has clipped before.
            clipped = f"clipped {float(hook.stats.clip_fraction):6.1%}  norm {float(hook.stats.grad_norm):.4f}"
            print(f"step {step:3}  loss {loss:8.4f}  {clipped} ({norm:.4f})", flush=True)
    return hook


def batches(generator: torch.Generator) -> Iterator[Tensor]:
    """Numbers that count upwards from a random one."""
    while True:
        first = torch.randint(VOCABULARY, (MICRO_BATCH, 1), generator=generator)
        yield ((first + torch.arange(LENGTH + 1)) % VOCABULARY).to(torch.cuda.current_device())


def forward_step(data: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Callable[..., object]]:
    tokens = next(data)
    positions = torch.arange(LENGTH, device=tokens.device).expand(MICRO_BATCH, LENGTH)
    mask = torch.ones(1, 1, LENGTH, LENGTH, device=tokens.device).triu(1).bool()
    losses = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
    return losses, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})


if __name__ == "__main__":
    main()
