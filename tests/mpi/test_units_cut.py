"""Units that are not rows, under every layout that can cut them: ConvTranspose with groups or without, Conv1D."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers.pytorch_utils import Conv1D

from parity import check_one_clip

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("ignore:FSDP:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Deallocating Tensor that still has live PyObject"),  # torch 2.7, without AGC too
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


def make() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        OrderedDict(
            channels=nn.ConvTranspose1d(5, 7, 3),
            grouped=nn.ConvTranspose2d(9, 9, (2, 3), groups=3),
            depthwise=nn.ConvTranspose3d(4, 4, (3, 1, 2), groups=4),
            columns=Conv1D(7, 5),
            one=Conv1D(1, 9),
            thin=nn.ConvTranspose1d(1, 6, 1),
        )
    )


def flat(model: nn.Module, use_orig_params: bool) -> nn.Module:
    return FSDP(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)


def fsdp2(model: nn.Module, dim: int | None, mesh: Any) -> nn.Module:
    def place(p: nn.Parameter) -> Shard | None:
        ok = dim is not None and p.ndim > dim and p.shape[dim] % mesh.size() == 0
        return Shard(dim) if ok and dim is not None else None

    fully_shard(model, mesh=mesh, shard_placement_fn=place if dim is not None else None)
    return model


def placed(model: nn.Module, mesh: Any, *dims: int | None) -> nn.Module:
    """Every weight cut along the same dims, one for each axis; None leaves copies along that axis."""
    for path, module in model.named_modules():
        for name, p in list(module.named_parameters(recurse=False)):
            cuts = [Shard(d) if d is not None and d < p.ndim else Replicate() for d in dims]
            if "grouped" in path or "depthwise" in path:
                cuts = [Replicate() if cuts.count(cut) > 1 and i == 0 else cut for i, cut in enumerate(cuts)]
            module.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, cuts)))
    return model


def layouts(world: Any) -> Iterator[tuple[str, Callable[[nn.Module], nn.Module], int]]:
    mesh, size = world.mesh(), world.size
    yield "DDP", DDP, 0
    for use_orig_params in (True, False):
        yield f"FSDP1 {use_orig_params}", partial(flat, use_orig_params=use_orig_params), 1
    for dim in (None, 1, 2):
        yield f"FSDP2 {dim}", partial(fsdp2, dim=dim, mesh=mesh), 1
    for dim in range(5):
        yield f"tensor parallel {dim}", lambda m, d=dim: placed(m, mesh, d), 1
    if size == 4:
        square = world.mesh((2, 2), ("outer", "inner"))
        for a, b in ((None, 0), (0, None), (0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (0, 0)):
            # Where units are cut along both axes or counted along one, each axis has its collective.
            yield f"two axes {a} {b}", lambda m, a=a, b=b: placed(m, square, a, b), 1 if None in (a, b) else 2


def test_every_layout(world: Any) -> None:
    seen = []
    for name, shard, all_reduces in layouts(world):
        try:
            check_one_clip(world, make, shard, all_reduces=all_reduces)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        seen.append(name)
    assert len(seen) == (19 if world.size == 4 else 11)
