"""FSDP1: every strategy, both kinds of parameters, and what else may lie in a flat parameter."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffload, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

import dist_agc
from helpers import full, trainable
from models import Awkward, awkward, batch, loss
from parity import check_one_clip, check_training

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("ignore:FSDP"),
    pytest.mark.filterwarnings("ignore:Deallocating Tensor that still has live PyObject"),  # torch 2.7, without AGC too
    pytest.mark.filterwarnings("ignore:The `?NO_SHARD`? sharding strategy is deprecated"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

ORIGINALS = pytest.mark.parametrize("use_orig_params", [True, False], ids=["originals", "flat"])
CPU = torch.device("cpu")


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    with FSDP.summon_full_params(model, writeback=False):
        return {name: full(p) for name, p in trainable(model).items() if "_flat_param" not in name}


def full_grads(model: nn.Module) -> dict[str, Tensor]:
    """Torch itself gathers them: for a moment they stand where the weights are. No gradient counts as zero."""
    weights = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
        found = full_weights(model)
        for p, weight in zip(model.parameters(), weights, strict=True):
            p.copy_(weight)
    return found


def wrap(model: Awkward, *names: str, **options: Any) -> FSDP:
    """Nested: the layers named are flat parameters of their own, the root takes the rest."""
    options = {"device_id": CPU, **options}
    for name in names:
        setattr(model, name, FSDP(getattr(model, name), **options))
    return FSDP(model, **options)


def check(world: Any, model: nn.Module, all_reduces: int = 1, twin: nn.Module | None = None, **options: Any) -> None:
    check_training(
        world,
        model,
        twin or awkward(dtype=torch.float64),
        all_reduces=all_reduces,
        weights=full_weights,
        grads=full_grads,
        **options,
    )


STRATEGIES = [
    ShardingStrategy.FULL_SHARD,
    ShardingStrategy.SHARD_GRAD_OP,
    ShardingStrategy.HYBRID_SHARD,
    ShardingStrategy._HYBRID_SHARD_ZERO2,
    ShardingStrategy.NO_SHARD,
]


@ORIGINALS
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
def test_strategy(world: Any, strategy: ShardingStrategy, use_orig_params: bool) -> None:
    mesh = world.mesh()
    if "HYBRID" in strategy.name:
        mesh = world.mesh((2, 2) if world.size == 4 else (1, world.size), ("replicate", "shard"))
    # The frozen layer lies in a flat parameter with others where FSDP allows it.
    layers = ["conv", "deconv", "uneven"] + ([] if use_orig_params else ["frozen"])
    model = wrap(awkward(), *layers, sharding_strategy=strategy, use_orig_params=use_orig_params, device_mesh=mesh)
    check(world, model, all_reduces=int(strategy != ShardingStrategy.NO_SHARD))


# ------------------------------------------------------------------------------------- what else may be in a flat one


@ORIGINALS
def test_accumulation_and_ignored_modules(world: Any, use_orig_params: bool) -> None:
    """Two halves of a batch, the first without communication; a module that FSDP leaves to the user."""
    inner = awkward()
    ignored = [inner.thin]
    layers = ["conv"] if use_orig_params else ["conv", "frozen"]
    model = wrap(inner, *layers, use_orig_params=use_orig_params, ignored_modules=ignored)

    def backward(step: int) -> None:
        tokens, classes = batch(step, rank=world.rank, size=world.size)
        with model.no_sync():
            (loss(model, tokens[::2], classes[::2]) * len(classes[::2]) / len(classes)).backward()
        (loss(model, tokens[1::2], classes[1::2]) * len(classes[1::2]) / len(classes)).backward()
        for parameter in inner.thin.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= world.size

    check(world, model, backward=backward)


@ORIGINALS
def test_cpu_offload(world: Any, use_orig_params: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pinned memory and a stream to wait for are all that FSDP1 asks of an accelerator here.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda stream: None, raising=False)
    layers = ["conv"] if use_orig_params else ["conv", "frozen"]
    model = wrap(awkward(), *layers, use_orig_params=use_orig_params, cpu_offload=CPUOffload(offload_params=True))
    # With original parameters torch 2.13 itself trains elsewhere on a CPU, AGC or not; what it clips is right.
    check(world, model, drift=None if use_orig_params else 1e-5)


@ORIGINALS
@pytest.mark.parametrize("keep", [False, True], ids=["fp32 gradients", "bf16 gradients"])
def test_mixed_precision(world: Any, keep: bool, use_orig_params: bool) -> None:
    precision = MixedPrecision(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.bfloat16 if keep else torch.float32,
        keep_low_precision_grads=keep,
    )
    layers = ["conv"] if use_orig_params else ["conv", "frozen"]
    inner, twin = awkward(), awkward(dtype=torch.float64)
    if keep:  # torch 2.13 cannot give the two names of a tied weight a gradient in another dtype
        for one in (inner, twin):
            one.head.weight = nn.Parameter(one.embedding.weight.detach().clone())
    model = wrap(inner, *layers, use_orig_params=use_orig_params, mixed_precision=precision)
    # The weights stay in float32; a clipped bf16 gradient is off by its last bit at most.
    check(world, model, twin=twin, drift=None, tolerance=2**-8 if keep else 1e-6)


@ORIGINALS
def test_channels_last_weights_are_flattened_in_memory_order(world: Any, use_orig_params: bool) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(
            nn.Conv2d(5, 7, 3), nn.ConvTranspose2d(6, 4, (3, 2), groups=2), nn.ConvTranspose2d(3, 5, 2)
        )
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def shard(model: nn.Module) -> nn.Module:
        assert not model[0].weight.is_contiguous()  # type: ignore[index]
        return FSDP(model, device_id=CPU, use_orig_params=use_orig_params)

    check_one_clip(world, make, shard, all_reduces=1)


@ORIGINALS
def test_a_unit_over_all_ranks(world: Any, use_orig_params: bool) -> None:
    """And ranks that hold nothing of a parameter, padding at the end, and nothing but padding on the last rank."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(41, 1, bias=False), nn.LayerNorm(3), nn.Linear(1, 3))

    def shard(model: nn.Module) -> nn.Module:
        return FSDP(model, device_id=CPU, use_orig_params=use_orig_params)

    check_one_clip(world, make, shard, all_reduces=1)
    check_one_clip(world, lambda: nn.Linear(1, 2), shard, all_reduces=1)


def test_not_sharded_right_now(world: Any) -> None:
    """Inside of no_sync and of summon_full_params gradients are not what the optimizer sees: nothing is touched."""
    model = wrap(awkward(), "conv", "frozen", use_orig_params=False)
    with model.no_sync():
        loss(model, *batch(0, rank=world.rank, size=world.size)).backward()
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="not sharded right now.*no_sync"):
        dist_agc.apply_agc(model, clipping_threshold=0.01)
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert grad is None or (parameter.grad is not None and torch.equal(parameter.grad, grad))


def test_parameters_without_their_module(world: Any) -> None:
    model = wrap(awkward(), "conv", use_orig_params=True)
    with pytest.raises(ValueError, match="pass the FullyShardedDataParallel module itself"):
        dist_agc.apply_agc(model.parameters(), clipping_threshold=0.01)


@pytest.mark.parametrize("missing", ["_shapes", "_params", "_sharded_size"])
def test_a_torch_that_changed(world: Any, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(awkward(), "frozen", use_orig_params=False)
    handle = model._handle
    assert handle is not None
    monkeypatch.delattr(handle.flat_param, missing)
    with pytest.raises(RuntimeError, match=rf"reads \w+\.{missing}, which torch .* supported is torch 2.6 to 2.15"):
        dist_agc.Clipper(model, clipping_threshold=0.01)


def test_names_are_the_users(world: Any) -> None:
    twin = {name for name, p in awkward().named_parameters() if p.requires_grad}
    for use_orig_params in (True, False):
        model = wrap(awkward(), "conv", "frozen", use_orig_params=use_orig_params)
        clipper = dist_agc.Clipper(model, clipping_threshold=0.01, exclude=("conv.*", "head.weight"))
        plan = clipper.execution().plan
        names = {parameter.name for parameter in plan.parameters}
        # The tied weight goes by either name.
        assert names == twin
        excluded = {parameter.name for parameter in plan.parameters[plan.governed :]}
        assert excluded == {"conv.weight", "conv.bias", "embedding.weight"}
