"""Weights that begin at zero are named by every rank or by none: only what all of them hold whole is looked at."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import dist_agc
from test_zero_weights import adapted, said

pytestmark = [pytest.mark.mpi(min_size=2)]


def test_a_rank_that_holds_a_piece_says_nothing(world: Any) -> None:
    """Rank 0 has the row of ones, and rank 1 zeros alone."""
    half = adapted()
    with torch.no_grad():
        half.get_parameter("B0.weight")[0] = 1.0
    sharded = adapted()
    for model in (half, sharded):
        fully_shard(model, mesh=world.mesh())
        assert said(model) == []
        assert all("all 0" not in row.why for row in dist_agc.units(model))


def test_copies_are_named_by_every_rank(world: Any) -> None:
    assert len(said(DistributedDataParallel(adapted()))) == 1
    replicated = nn.Linear(3, 2, bias=False)
    replicated.weight = nn.Parameter(distribute_tensor(torch.zeros(2, 3), world.mesh(), [Replicate()]))
    assert len(said(replicated)) == 1
