"""Megatron-core in the suite: its distributed optimizer, which lays all parameters into buckets and cuts these."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..attach import attach
from ..config import AGCConfig
from ..hook import AGCHook
from ..model.names import entries
from .ranks import NotSetUp
from .whole_steps import Piece, WholeSteps


class Megatron(WholeSteps):
    """A module of any kind in Megatron's DistributedDataParallel, without slices of its own."""

    def __init__(self, model: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Apex and Transformer Engine, which it can do without
            chunk, self._megatron = _sharded(model)
        (inner,) = self._megatron.chained_optimizers
        super().__init__(chunk, inner.optimizer)
        self._inner = inner
        self._names = {id(entry.tensor): entry.name for entry in entries(chunk)}

    def attached(self, config: AGCConfig) -> AGCHook:
        return attach([self.model], self._megatron, config)

    def train(self) -> None:
        if self.loss is None:
            raise NotSetUp("needs a loss: Megatron gathers no gradients but those of a backward pass")
        self.model.zero_grad_buffer()
        self._megatron.zero_grad()
        self.loss(self.model).backward()
        self.model.finish_grad_sync()
        self._megatron.step()

    def pieces(self) -> list[Piece]:
        """As Megatron's own map of the distributed optimizer has them."""
        groups = zip(self._inner.model_fp32_groups, self._inner.shard_fp32_groups, strict=True)
        pairs = [pair for group in groups for pair in zip(*group, strict=True)]
        starts = [self._inner._get_model_param_range_map(p)["param"].start for p, _ in pairs]
        return [
            Piece(shard, self._names[id(p)], tuple(p.shape), start)
            for (p, shard), start in zip(pairs, starts, strict=True)
        ]


def _sharded(model: nn.Module) -> tuple[Any, Any]:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    if any(p.dtype is not torch.float32 for p in model.parameters()):
        raise NotSetUp("is tried with float32 parameters alone")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    if parallel_state.get_data_parallel_world_size() < dist.get_world_size():
        raise NotSetUp("wants all ranks data-parallel: Megatron was initialised with fewer of them")
    # The size says nothing of this module, and Megatron wants one.
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    chunk = DistributedDataParallel(config, ddp, model)
    settings = OptimizerConfig(
        optimizer="adam", lr=0.0, weight_decay=0.0, clip_grad=0.0, use_distributed_optimizer=True
    )
    return chunk, get_megatron_optimizer(settings, [chunk], use_gloo_process_groups=False)
