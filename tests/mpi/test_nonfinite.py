"""inf and nan under every layout: kept, raised or zeroed, alike on all ranks, and no neighbour is touched."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import dist_agc
import oracle
from dist_agc.conformance.subjects import Subject
from helpers import agc, full, full_grads, trainable, worst_relative_error
from models import THRESHOLD, awkward, batch, loss

# FSDP1 is deprecated, DeepSpeed imports what is: nothing to be learnt from their warnings here.
pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.filterwarnings("ignore")]

BAD = {"uneven.weight": (2, 3), "norm.bias": (4,), "conv.weight": (5, 7, 2, 2)}
VALUES = {"uneven.weight": float("inf"), "norm.bias": float("nan"), "conv.weight": float("-inf")}


def ddp(world: Any, model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp1(world: Any, model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(
        model, use_orig_params=True, sharding_strategy=ShardingStrategy.FULL_SHARD, device_id=torch.device("cpu")
    )


def fsdp1_flat(world: Any, model: nn.Module) -> nn.Module:
    flat: dict[str, Any] = {"use_orig_params": False, "device_id": torch.device("cpu")}
    model.frozen = FullyShardedDataParallel(
        model.get_submodule("frozen"), **flat
    )  # frozen and trained ones cannot share a flat one
    return FullyShardedDataParallel(model, **flat)


def fsdp2(world: Any, model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=world.mesh())
    return model


def hsdp(world: Any, model: nn.Module) -> nn.Module:
    shape = (2, 2) if world.size == 4 else (1, world.size)
    fully_shard(model, mesh=world.mesh(shape, ("replicate", "shard")))
    return model


def tp(world: Any, model: nn.Module) -> nn.Module:
    plan = {"uneven": ColwiseParallel(use_local_output=False), "frozen": RowwiseParallel()}
    return parallelize_module(model, world.mesh(names=("tp",)), plan)


def rows_cut(world: Any, model: nn.Module) -> nn.Module:
    """Every parameter cut along its last dim, as tensor parallelism may."""
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.requires_grad:
                continue
            how = [Shard(parameter.ndim - 1)]
            made = nn.Parameter(distribute_tensor(parameter.detach(), world.mesh(), how))
            if parameter.grad is not None:
                made.grad = distribute_tensor(parameter.grad, world.mesh(), how)
            setattr(module, name, made)
    return model


LAYOUTS: dict[str, Callable[[Any, nn.Module], nn.Module]] = {
    "plain": lambda world, model: model,
    "ddp": ddp,
    "fsdp1": fsdp1,
    "fsdp1 flat": fsdp1_flat,
    "fsdp2": fsdp2,
    "hsdp": hsdp,
    "tp": tp,
    "rows cut": rows_cut,
}


def flat_parameters(model: nn.Module) -> bool:
    return isinstance(model, FullyShardedDataParallel) and not model._use_orig_params


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            yield
    else:
        yield


def everything(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if flat_parameters(model):
        return Subject(model).tensors()
    with whole(model):
        return {name: full(p) for name, p in trainable(model).items()}, full_grads(model)


def spoil(model: nn.Module, bad: dict[str, tuple[int, ...]] = BAD) -> None:
    """Put values that are not finite into gradients, on whichever rank holds the place."""
    if flat_parameters(model):
        return spoil_flat(model, bad)
    with whole(model):
        for name, place in bad.items():
            grad = trainable(model)[name].grad
            assert grad is not None
            if isinstance(grad, DTensor):
                changed = grad.full_tensor()
                changed[place] = VALUES[name]
                grad.to_local().copy_(distribute_tensor(changed, grad.device_mesh, grad.placements).to_local())
            else:
                grad[place] = VALUES[name]


def spoil_flat(model: Any, bad: dict[str, tuple[int, ...]]) -> None:
    """Parameters lie one after the other, with padding between them, and equal pieces of the whole on the ranks."""
    flat, at = model._handle.flat_param, 0
    originals = iter(zip(flat._param_infos, flat._shapes, strict=True))
    for numel, padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not padding:
            info, shape = next(originals)
            place = bad.get(f"{info.module_name}.{info.param_name}")
            if place is not None:
                inside = int(torch.arange(numel).view(shape)[place])
                rank, local = divmod(at + inside, flat.grad.numel())
                if rank == torch.distributed.get_rank():
                    flat.grad[local] = VALUES[f"{info.module_name}.{info.param_name}"]
        at += numel


def sharded(world: Any, name: str) -> nn.Module:
    """A model with gradients, in this layout."""
    model = awkward()
    if name == "rows cut":
        loss(model, *batch(0)).backward()
        return rows_cut(world, model)
    model = LAYOUTS[name](world, model)
    share = (0, 1) if name in ("plain", "tp") else (world.rank, world.size)
    loss(model, *batch(0, rank=share[0], size=share[1])).backward()
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_or_zeroed_and_the_neighbours_clipped_as_ever(world: Any, layout: str) -> None:
    rules = oracle.unit_rules(awkward())
    model = sharded(world, layout)
    spoil(model)
    weights, grads = everything(model)
    for on_nonfinite in ("keep", "zero"):  # kept ones are still there to be zeroed
        expected = oracle.clip(weights, grads, rules, THRESHOLD, on_nonfinite=on_nonfinite)
        assert expected.nonfinite_units == 3 and 0 < expected.clipped_units < expected.units
        stats = agc(model, THRESHOLD, on_nonfinite=on_nonfinite)
        assert int(stats.nonfinite_units) == 3
        after = everything(model)[1]
        assert worst_relative_error(after, expected.grads) < 1e-6
        if on_nonfinite == "keep":
            assert int(stats.clipped_units) == expected.clipped_units
            for name in BAD:  # to the last bit, the finite elements of the bad unit too
                unit = BAD[name][0] if grads[name].ndim > 1 else slice(None)
                assert torch.equal(after[name][unit].nan_to_num(), grads[name][unit].nan_to_num())
        else:
            assert all(bool(grad.isfinite().all()) for grad in after.values())
    assert int(agc(model, THRESHOLD).nonfinite_units) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_raised_on_every_rank_alike_before_anything_changes(world: Any, layout: str) -> None:
    model = sharded(world, layout)
    spoil(model, {"uneven.weight": BAD["uneven.weight"]})
    before = everything(model)[1]
    with pytest.raises(FloatingPointError) as raised:
        dist_agc.apply_agc(model, THRESHOLD, on_nonfinite="raise")
    assert set(world.gather(str(raised.value))) == {str(raised.value)}
    assert "1 units" in str(raised.value) and "uneven.weight" in str(raised.value)
    after = everything(model)[1]
    assert all(torch.equal(after[name].nan_to_num(), grad.nan_to_num()) for name, grad in before.items())


@pytest.mark.parametrize("fused", [False, True])
def test_gradscaler_still_sees_the_overflow(world: Any, fused: bool) -> None:
    """ "keep", the default: the step is skipped and the scale halved as without AGC, and the next step is clean."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(6, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with dist_agc.attach(model, optimizer, clipping_threshold=0.01) as hook:
        for overflow in (True, False):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(4, 6)).square().mean()).backward()
            if overflow and world.rank == 0:
                assert model.module.weight.grad is not None
                model.module.weight.grad[1, 2] = float("inf")
            if overflow:  # gradients were reduced before this: every rank has what one of them had
                torch.distributed.broadcast(model.module.weight.grad, 0)
            scaler.step(optimizer)
            scaler.update()
            same = all(torch.equal(before[name], p) for name, p in model.named_parameters())
            assert same == overflow
            assert scaler.get_scale() == 512.0
        assert hook.stats is not None and int(hook.stats.clipped_units) > 0
        assert int(hook.stats.nonfinite_units) == 0


def spoil_one_element(grad: Tensor) -> Tensor:
    grad = grad.clone()
    grad[1, 2] = float("inf")
    return grad


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_overflow(world: Any, stage: int) -> None:
    """From ZeRO 1 on DeepSpeed skips a step with a value that is not finite (fp32 too; it refuses fp16 on a CPU), so
    AGC never sees it, and the next step is as ever. At ZeRO 0 the value reaches AGC."""
    pytest.importorskip("deepspeed")
    from deepspeed_runs import config, full_weights, prepare

    from dist_agc.integrations.deepspeed import initialize

    prepare()
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    spoiler = model[2].get_parameter("weight").register_hook(spoil_one_element)
    before = [p.detach().clone() for p in model.parameters()]
    settings = {**config(world, stage), "adaptive_gradient_clipping": {"on_nonfinite": "zero"}}
    engine: Any
    engine, *_ = initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=settings)

    def step() -> list[Tensor]:
        engine.backward(engine(torch.ones(4, 5)).square().mean())
        engine.step()
        return full_weights(engine)

    after = step()
    if stage:
        assert not engine.agc.stats
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    else:
        assert int(engine.agc.stats.nonfinite_units) == 1
        assert torch.equal(after[2][1], before[2][1]) and not torch.equal(after[2][0], before[2][0])
    spoiler.remove()
    last = step()
    assert engine.agc is not None and engine.agc.stats is not None
    assert int(engine.agc.stats.nonfinite_units) == 0 and int(engine.agc.stats.clipped_units) > 0
    assert all(bool(w.isfinite().all()) and not torch.equal(w, b) for w, b in zip(last, after, strict=True))
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("on_nonfinite", ["keep", "zero", "raise"])
def test_deepspeed_in_bf16_hands_such_values_over(world: Any, stage: int, on_nonfinite: str) -> None:
    """Where DeepSpeed is told not to look for overflow, flat partitions with values that are not finite reach AGC.
    ZeRO 3 looks all the same."""
    pytest.importorskip("deepspeed")
    import deepspeed_runs as runs

    from dist_agc.integrations.deepspeed import initialize

    runs.prepare()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).bfloat16()
    order = runs.order_of(model, [{"params": list(model.parameters())}])
    rules = oracle.unit_rules(model)
    model[2].get_parameter("weight").register_hook(spoil_one_element)
    bf16 = {"enabled": True, "check_grad_overflow": False}
    block = {"on_nonfinite": on_nonfinite, "clipping_threshold": 0.3}
    settings = {**runs.config(world, stage), "bf16": bf16, "adaptive_gradient_clipping": block}
    engine: Any
    engine, *_ = initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=settings)
    watch, before = runs.Watch(runs.inner(engine)), runs.full_weights(engine)
    engine.backward(engine(torch.ones(4, 5, dtype=torch.bfloat16)).square().mean())
    if on_nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="in 2.weight; no gradient was changed"):
            engine.step()
        assert all(torch.equal(a, b) for a, b in zip(runs.full_weights(engine), before, strict=True))
    else:
        engine.step()
        (call,) = watch.take()
        weights, raw, clipped = (
            runs.together(world, found, order, runs.kind_of(stage)) for found in (call.weights, call.raw, call.clipped)
        )
        expected = oracle.clip(weights, raw, rules, 0.3, on_nonfinite=on_nonfinite)
        assert expected.nonfinite_units == 1 and 0 < expected.clipped_units < expected.units
        assert worst_relative_error(clipped, expected.grads) < 1e-5
        assert int(engine.agc.stats.nonfinite_units) == 1
        assert int(engine.agc.stats.clipped_units) == expected.clipped_units
    watch.remove()
    engine.destroy()
