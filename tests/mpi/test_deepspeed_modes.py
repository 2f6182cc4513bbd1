"""DeepSpeed's other ways: fp16 with a loss scale, CPU Adam, NVMe, experts; and those that AGC refuses."""

import functools
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")
import deepspeed  # noqa: E402
import deepspeed_runs as runs  # noqa: E402
import torch  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.cpp_extension import _get_build_directory  # noqa: E402

import dist_agc  # noqa: E402
import models  # noqa: E402
import oracle  # noqa: E402
from dist_agc.integrations.deepspeed import initialize  # noqa: E402
from helpers import assert_some_clipped, assert_stats, worst_relative_error  # noqa: E402

accelerator: Any = get_accelerator()
pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def fp16(monkeypatch):
    """DeepSpeed refuses fp16 on CPUs without fp16 matrix units; torch computes it there all the same, slowly."""
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: True)
    return {"enabled": True, "loss_scale": 1024.0}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_carry_no_loss_scale_when_agc_sees_them(world, stage, fp16):
    if stage == 0:  # DeepSpeed 0.19.8 divides by the scale there, but never multiplied with it
        fp16["loss_scale"] = 1.0
    done = runs.parity(world, runs.config(world, stage, fp16=fp16), dtype=torch.half, twin_tolerance=None)
    assert done.expected.grad_norm == pytest.approx(done.reference.grad_norm, rel=0.05)  # not 1024 times that
    done.engine.destroy()


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_fp16_optimizer(world, dtype, fp16, monkeypatch):
    """ZeRO 0 flattens whole groups for FusedAdam; here DeepSpeed is told that SGD is one, which needs no compiler."""
    monkeypatch.setattr("deepspeed.runtime.engine.FusedAdam", torch.optim.SGD)
    low = "fp16" if dtype is torch.half else "bf16"
    block = fp16 | {"loss_scale": 1.0} if low == "fp16" else {"enabled": True}
    settings = runs.config(world, 0, data_types={"grad_accum_dtype": low}) | {low: block}
    done = runs.parity(world, settings, dtype=dtype, groups=runs.two_groups, twin_tolerance=None)
    assert type(done.engine.optimizer).__name__ == "FP16_Optimizer"
    done.engine.destroy()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflowed_step_is_skipped_and_never_clipped(world, stage, fp16):
    runs.prepare()
    model = models.awkward().half()
    engine: Any = initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=runs.LR),
        config=runs.config(
            world,
            stage,
            fp16={"enabled": True, "loss_scale": 0, "initial_scale_power": 20, "hysteresis": 1},
            adaptive_gradient_clipping={"clipping_threshold": models.THRESHOLD},
        ),
    )[0]
    skipped = 0
    for step in range(16):
        runs.one_step(world, engine, step)
        if engine.skipped_steps == step + 1:
            skipped += 1
            assert not engine.agc.stats
        else:
            break
    stats: Any = engine.agc.stats
    assert skipped and int(stats.clipped_units) > 0 and int(stats.nonfinite_units) == 0
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_torch_autocast_in_float16_skips_on_all_ranks_together(world, stage, monkeypatch):
    """The scale of its GradScaler is taken off before AGC sees a gradient. One rank alone has an overflow."""
    from deepspeed.runtime import torch_autocast

    monkeypatch.setattr(torch_autocast, "TORCH_AUTOCAST_INITIALIZED", False)  # DeepSpeed never takes it back
    scaler = functools.partial(torch.amp.GradScaler, init_scale=1024.0)
    monkeypatch.setattr("torch.amp.GradScaler", lambda device: scaler(device))
    settings = runs.config(world, stage, torch_autocast={"enabled": True, "dtype": "float16"})
    done = runs.parity(world, settings, twin_tolerance=None, tolerance=2e-5)
    assert done.expected.grad_norm == pytest.approx(done.reference.grad_norm, rel=0.05)  # not 1024 times that
    trained = [p for p in done.engine.module.parameters() if p.requires_grad]
    every = lambda: [(p, safe_get_full_fp32_param(p)) for p in trained]  # noqa: E731
    held = lambda: [(p if full is None else full).detach().clone() for p, full in every()]  # noqa: E731
    steps, before = done.engine.agc.steps, held()
    tokens, classes = models.batch(3, rank=world.rank, size=world.size)
    bad = float("inf") if world.rank == 1 else 1.0
    done.engine.backward(models.loss(done.engine, tokens, classes) * bad)
    done.engine.step()
    assert done.engine.agc.steps == steps
    same = [torch.equal(a, b) for a, b in zip(before, held(), strict=True)]
    world.check(all(same), "an overflowed step was taken")
    done.engine.destroy()


def compiled(world, name):
    """Build an operator of DeepSpeed's once, by rank 0, while the others sleep."""
    builder: Any = accelerator.create_op_builder(name)
    if shutil.which("c++") is None or not builder.is_compatible():
        pytest.skip(f"DeepSpeed cannot compile {builder.NAME} here: it needs a C++ compiler, async_io also libaio-dev")
    if world.rank == 0:
        lock = Path(_get_build_directory(builder.NAME, False)) / "lock"
        if lock.exists() and time.time() - lock.stat().st_mtime > 600:
            lock.unlink()  # of a build that was cut short: everyone would wait for it for ever
        builder.load(verbose=False)
    world.gather(None)


@pytest.mark.timeout(400, method="thread")  # the first time it compiles
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_cpu_adam(world, stage):
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    compiled(world, "CPUAdamBuilder")
    done = runs.parity(
        world,
        runs.config(world, stage, zero={"offload_optimizer": {"device": "cpu", "pin_memory": False}}),
        optimizer=lambda groups: DeepSpeedCPUAdam(groups, lr=1e-2),
        twin_tolerance=None,
    )
    done.engine.destroy()


@pytest.mark.skipif("DIST_AGC_TEST_NVME" not in os.environ, reason="compiles async_io: set DIST_AGC_TEST_NVME=1")
@pytest.mark.timeout(1500, method="thread")
def test_nvme(world, tmp_path):
    """Sub-groups that wait on disk are in memory while they are clipped."""
    compiled(world, "AsyncIOBuilder")
    path = world.gather(str(tmp_path))[0]
    done = runs.parity(
        world,
        runs.config(
            world,
            3,
            zero={
                "sub_group_size": 100,
                "offload_optimizer": {"device": "nvme", "nvme_path": path, "pin_memory": False, "buffer_count": 4},
            },
            aio={"block_size": 4096, "queue_depth": 4, "thread_count": 1},
        ),
        optimizer=lambda groups: torch.optim.Adam(groups, lr=1e-2),
        twin_tolerance=None,
    )
    assert done.calls > 2
    done.engine.destroy()


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


class Mixture(nn.Module):
    def __init__(self, experts: int, ep_size: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.inner = nn.Linear(5, 6)
        self.moe = MoE(6, Expert(), num_experts=experts, ep_size=ep_size, k=1, min_capacity=64)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.moe(torch.tanh(self.inner(x)))[0])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_experts(world, stage):
    """Experts are cut over fewer ranks than the rest; statistics cover those of all ranks."""
    runs.prepare()
    for ep_size in (n for n in range(1, world.size + 1) if world.size % n == 0):
        _train_experts(world, stage, ep_size)


def _train_experts(world, stage, ep_size):
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    torch.manual_seed(0)
    model = Mixture(2 * ep_size, ep_size)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "deepspeed_experts" in name:  # another expert on every expert-parallel rank
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(world.rank % ep_size)) * 0.3)
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    local = runs.order_of(model, groups)
    engine, *_ = initialize(
        model=model,
        optimizer=torch.optim.SGD(groups, lr=runs.LR),
        config=runs.config(
            world,
            stage,
            adaptive_gradient_clipping={"clipping_threshold": 0.02, "exclude": ["*.deepspeed_experts.1.*"]},
        ),
    )
    watch = runs.Watch(runs.inner(engine))
    for step in range(3):
        x = torch.randn(4, 16, 5, generator=torch.Generator().manual_seed(10 * step + world.rank))
        engine.backward(engine(x).square().mean())
        engine.step()
        calls = watch.take()
        whole = {
            what: _experts_together(world, [t for c in calls for t in getattr(c, what)], local, stage, ep_size)
            for what in ("weights", "raw", "clipped")
        }
        rules = {name: oracle.Units((0,) if w.ndim > 1 else ()) for name, w in whole["weights"].items()}
        out = {name for name in rules if ".deepspeed_experts.1." in name}
        expected = oracle.clip(whole["weights"], whole["raw"], rules, 0.02, exclude=out)
        assert len(rules) == 2 + 1 + 2 + 4 * 2 * ep_size and len(out) == 4
        assert_some_clipped(expected)
        assert worst_relative_error(whole["clipped"], expected.grads) <= 1e-5
        assert_stats(engine.agc.stats, expected, tolerance=1e-6)
    watch.remove()
    engine.destroy()


def _experts_together(world, flats, local, stage, ep_size):
    """Full parameters by name, experts numbered over all ranks: rank r is expert-parallel rank r % ep_size."""
    if stage == 0:  # one holder a parameter, the group's order
        flats = [torch.cat([flats.pop(0).flatten() for _ in group]) for group in local]
    every = world.gather([f.numpy() for f in flats])
    found = {}
    for i, group in enumerate(local):
        experts = any("deepspeed_experts" in name for name, _ in group)
        for ep in range(ep_size) if experts else [0]:
            ranks = range(ep, world.size, ep_size) if experts else range(world.size)
            ranks = list(ranks)[:1] if stage == 0 else ranks
            flat = torch.cat([torch.as_tensor(every[rank][i]) for rank in ranks])
            for name, value in runs.split(flat, group).items():
                number = lambda m, ep=ep: f"deepspeed_experts.{int(m[1]) + 2 * ep}."  # noqa: E731
                found[re.sub(r"deepspeed_experts\.(\d)\.", number, name)] = value
    return found


class NoHooks:
    """An optimizer that is none of torch's."""

    def __init__(self, parameters) -> None:
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]
        self.state = {}

    def step(self) -> None: ...


def test_ways_of_stepping_that_agc_cannot_reach_are_refused(world):
    runs.prepare()

    model = models.awkward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=runs.config(world, 1))[0]
    true: Any = engine.optimizer
    for change, says in [
        (lambda: setattr(true, "zenflow", True), "ZenFlow"),
        (lambda: vars(true).update(torch_autocast_gradscaler=object(), compute_grad_norm=False), "GradScaler"),
        (lambda: vars(engine).update(torch_autocast_z0_gradscaler=object(), autotp_size=lambda: 2), "each rank's own"),
        (lambda: setattr(true, "optimizer", NoHooks([])), "takes no step hooks"),
        (lambda: setattr(engine, "mpu", _Tensor()), "mpu of your own"),
        (lambda: setattr(engine, "optimizer", None), "no optimizer"),
    ]:
        kept = {thing: dict(vars(thing)) for thing in (true, engine)}
        change()
        with pytest.raises(ValueError, match=says):
            dist_agc.attach(engine)
        for thing, attributes in kept.items():
            vars(thing).clear()
            vars(thing).update(attributes)
    true.__class__ = type("SomethingNew", (type(true),), {})
    with pytest.raises(ValueError, match="SomethingNew is not a way of stepping that dist_agc knows.*0.19"):
        dist_agc.attach(engine)
    true.__class__ = true.__class__.__mro__[1]
    del true.round_robin_bit16_groups
    with pytest.raises(RuntimeError, match="reads DeepSpeedZeroOptimizer.round_robin_bit16_groups.*supported is"):
        dist_agc.attach(engine)
    assert engine.gradient_clipping() == 1.0


class _Tensor:
    def get_model_parallel_world_size(self):
        return 2
