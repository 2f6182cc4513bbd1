"""A thousand steps on two ranks, 300 on more: no growth of memory or handles, no drift from the unsharded run, the same
bits when repeated."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import dist_agc
from helpers import full

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.timeout(240, method="thread"),
    pytest.mark.filterwarnings("ignore"),
]

REPEATED = 150
THRESHOLD = 0.05

Step = Callable[[int], dist_agc.ClipStats | None]
Weights = Callable[[], dict[str, Tensor]]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 5))


def data(step: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 6, generator=generator)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3], x[:, 4] * 3, x.sum(1)], 1) * 4
    share = slice(rank * 12 // size, (rank + 1) * 12 // size)
    return x[share], y[share]


def steps(world: Any) -> int:
    """On more ranks than cores each step waits longer, and shows nothing else."""
    return 1000 if world.size == 2 else 300


def unsharded(steps: int) -> tuple[dict[str, Tensor], int]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    clipped = 0
    with dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD) as hook:
        for step in range(steps):
            optimizer.zero_grad()
            x, y = data(step, 0, 1)
            (model(x) - y).square().mean().backward()
            optimizer.step()
            assert hook.stats is not None
            clipped += int(hook.stats.clipped_units)
    return {name: full(p) for name, p in model.named_parameters()}, clipped


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


def check(world: Any, make: Callable[[], tuple[Step, Weights]]) -> None:
    """Train twice from the start: all steps watched, and the first of them again."""
    step, weights = make()
    clipped, first, early, total = 0, (0, 0, 0), {}, steps(world)
    for number in range(total):
        stats = step(number)
        assert stats is not None
        clipped += int(stats.clipped_units)
        del stats
        if number == REPEATED - 1:
            early = weights()
        if number == total // 2:
            first = live_tensors(), handles(), resident()
    last = live_tensors(), handles(), resident()
    # What the second half adds to the first would be a leak.
    assert last[0] <= first[0], f"{last[0] - first[0]} more tensors after {total - total // 2} steps"
    assert last[1] <= first[1], f"{last[1] - first[1]} more open files"
    assert last[2] - first[2] < 8 << 20, f"{(last[2] - first[2]) >> 10} KiB more memory"
    final = weights()

    step, weights = make()
    for number in range(REPEATED):
        step(number)
    again = weights()
    assert all(torch.equal(early[name], again[name]) for name in early), "another run, other bits"

    # As near to the unsharded run as another order of the same sums allows; a unit at its limit may fall either way.
    want, expected = world.gather(unsharded(total) if world.rank == 0 else None)[0]
    assert 0 < expected < total * 20 and abs(clipped - expected) <= expected // 200 + 5
    for name, weight in want.items():
        error = float((final[name] - weight).norm() / weight.norm())
        assert error < 1e-4, f"{name} drifted by {error:.2g}"
    print(f"\n{total} steps: {clipped} units clipped ({expected} unsharded), {(last[2] - first[2]) >> 10} KiB")


def test_fsdp2_a_thousand_steps(world: Any) -> None:
    def make() -> tuple[Step, Weights]:
        model = network()
        fully_shard(model, mesh=world.mesh())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        hook = dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD)

        def step(number: int) -> dist_agc.ClipStats | None:
            optimizer.zero_grad()
            x, y = data(number, world.rank, world.size)
            (model(x) - y).square().mean().backward()
            optimizer.step()
            return hook.stats

        return step, lambda: {name: full(p) for name, p in model.named_parameters()}

    check(world, make)


def test_zero2_a_thousand_steps(world: Any) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.utils import safe_get_full_fp32_param
    from deepspeed_runs import config, prepare

    from dist_agc.integrations.deepspeed import initialize

    def make() -> tuple[Step, Weights]:
        prepare()
        model = network()
        settings = {**config(world, 2), "adaptive_gradient_clipping": {"clipping_threshold": THRESHOLD}}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        engine, *_ = initialize(model=model, optimizer=optimizer, config=settings)

        def step(number: int) -> dist_agc.ClipStats | None:
            x, y = data(number, world.rank, world.size)
            engine.backward((engine(x) - y).square().mean())
            engine.step()
            return engine.agc.stats

        def weights() -> dict[str, Tensor]:
            found = {}
            for name, parameter in engine.module.named_parameters():
                weight = safe_get_full_fp32_param(parameter)
                assert weight is not None
                found[name] = full(weight)
            return found

        return step, weights

    check(world, make)
