"""A Llama in tiny, cut by transformers' own tensor parallelism, for the Trainer; and what the oracle makes of it."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import oracle

STEPS, LR, THRESHOLD, EXCLUDE = 3, 0.05, 0.05, "lm_head.*"


def sentences() -> Tensor:
    """The whole data set is one batch."""
    return torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(2))


def dataset() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in sentences()]


def whole() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3, use_cache=False))


def cut(folder: str) -> Any:
    """The same over two ranks."""
    from transformers import LlamaForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    path = Path(folder, "whole")
    if dist.get_rank() == 0:
        whole().save_pretrained(path)
    dist.barrier()
    return LlamaForCausalLM.from_pretrained(
        path, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"), use_cache=False
    )


def loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return model(input_ids=ids, labels=labels).loss


def reference() -> tuple[list[oracle.Reference], dict[str, Tensor]]:
    """The oracle's statistics of every step and its weights after the last."""
    model = whole().double()
    rules, ids = oracle.unit_rules(model), sentences()
    found = oracle.train(model, [(ids, ids)] * STEPS, loss, rules, THRESHOLD, lr=LR, exclude=("lm_head.weight",))
    return found, {name: p.detach() for name, p in model.named_parameters()}
