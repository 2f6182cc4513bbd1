"""ZeRO 0 to 3 and everything that moves gradients about, against the oracle, on real DeepSpeed engines."""

from typing import Any

import pytest

pytest.importorskip("deepspeed")
import deepspeed_runs as runs  # noqa: E402
import torch  # noqa: E402

import models  # noqa: E402

# DeepSpeed and what it imports warn about each other's ways; dist_agc logs.
pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.filterwarnings("ignore")]

CPU = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_three_steps_are_the_oracles(world, stage):
    done = runs.parity(world, runs.config(world, stage))
    assert done.calls == 1
    assert done.engine.gradient_clipping() == 0.0  # DeepSpeed's default of 1.0 does not stack
    if stage:  # plain fp32 engines report no norm
        assert float(done.engine.get_global_grad_norm()) == pytest.approx(done.reference.grad_norm, rel=1e-5)
    done.engine.destroy()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_groups_have_thresholds_of_their_own(world, stage):
    done = runs.parity(world, runs.config(world, stage), groups=runs.two_groups)
    assert done.calls == 2
    done.engine.destroy()


def test_sub_groups(world):
    done = runs.parity(world, runs.config(world, 3, zero={"sub_group_size": 100}), groups=runs.two_groups)
    assert done.calls > 2  # more than there are groups
    done.engine.destroy()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accumulated_gradients_are_clipped_once(world, stage):
    accumulation = 2 if models.FULL_BATCH // world.size % 2 == 0 else 3
    done = runs.parity(world, runs.config(world, stage, accumulation=accumulation))
    done.engine.destroy()


@pytest.mark.parametrize("stage", [1, 2])
def test_round_robin_gradients(world, stage):
    done = runs.parity(
        world,
        runs.config(world, stage, zero={"round_robin_gradients": True}),
        order=lambda order: runs.round_robin(order, world.size),
    )
    done.engine.destroy()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_to_cpu(world, stage):
    runs.parity(world, runs.config(world, stage, zero=CPU), groups=runs.two_groups).engine.destroy()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_activation_checkpointing(world, stage):
    runs.parity(world, runs.config(world, stage), checkpointed=True, steps=2).engine.destroy()


def test_secondary_partitions(world):
    """hpZ keeps a second copy of the weights in smaller groups; masters and gradients stay cut over all ranks."""
    size = 2 if world.size % 2 == 0 else world.size
    runs.parity(world, runs.config(world, 3, zero={"zero_hpz_partition_size": size})).engine.destroy()


BF16: dict[str, Any] = {"bf16": {"enabled": True}}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16(world, stage):
    """The masters are fp32, so the clipped flat gradients are as exact as in fp32."""
    settings = runs.config(world, stage, **BF16, data_types={"grad_accum_dtype": "bf16"})
    done = runs.parity(world, settings, dtype=torch.bfloat16, twin_tolerance=None)
    assert type(done.engine.optimizer).__name__ != "BF16_Optimizer"
    done.engine.destroy()


@pytest.mark.parametrize("groups", [runs.one_group, runs.two_groups])
def test_bf16_optimizer(world, groups):
    """bf16 parameters with fp32 accumulation under ZeRO 1."""
    settings = runs.config(world, 1, **BF16, data_types={"grad_accum_dtype": "fp32"})
    done = runs.parity(world, settings, dtype=torch.bfloat16, twin_tolerance=None, groups=groups)
    assert type(done.engine.optimizer).__name__ == "BF16_Optimizer"
    assert done.calls == 1  # all groups in one
    done.engine.destroy()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_all_reduce_a_call(world, stage):
    done = runs.parity(world, runs.config(world, stage), groups=runs.two_groups, steps=1)
    with torch.autograd.profiler.profile() as profile:
        runs.one_step(world, done.engine, 1)
    assert done.calls == 2
    assert profile is not None and profile.function_events is not None
    assert sum(event.name == "dist_agc::all_reduce" for event in profile.function_events) == 2
    done.engine.destroy()
