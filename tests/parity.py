"""Train a sharded model next to the oracle: gradients, statistics and collectives of each step, the weights after."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

import dist_agc
import oracle
from helpers import (
    agc,
    assert_equal_everywhere,
    assert_some_clipped,
    assert_stats,
    collectives,
    full_grads,
    full_weights,
    median_threshold,
    noisy_grads,
    worst_distance,
    worst_relative_error,
)
from models import THRESHOLD, batch, loss

STEPS = 3

Tensors = Callable[[nn.Module], dict[str, Tensor]]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def check_training(
    world: Any,
    model: nn.Module,
    twin: nn.Module,
    *,
    share: tuple[int, int] | None = None,
    all_reduces: int,
    weights: Tensors = full_weights,
    grads: Tensors = full_grads,
    lr: float = 0.1,
    clipping_threshold: float = THRESHOLD,
    exclude: Collection[str] = (),
    units: Mapping[str, tuple[int, ...]] | None = None,
    known: Mapping[str, oracle.Units] | None = None,
    backward: Callable[[int], object] | None = None,
    tolerance: float = 1e-6,
    drift: float | None = 1e-5,
    batches: Callable[..., tuple[Tensor, Tensor]] = batch,
    loss: Loss = loss,
) -> None:
    """Every promise of a layout at once.

    Args:
        twin: the same model, not sharded, in float64.
        share: (place, places) of this rank's share of the batch; by default its rank among all.
        units, known: of some parameters, by name; the package is told of ``units`` and knows the others by itself.
        all_reduces: how many collectives clipping may take from its second call on; there must be no others.
        weights, grads: full tensors by name.
        backward: given the step, runs forward and backward in place of the usual way.
        tolerance: of one clipping, on every element of every gradient; ``drift``: of the weights in the end,
            against training in float64; None where the layout computes gradients in low precision.
    """
    share = share or (world.rank, world.size)
    rules = oracle.unit_rules(twin, units) | dict(known or {})
    rows = [batches(step) for step in range(STEPS)]
    doubles = [(x.double() if x.is_floating_point() else x, y) for x, y in rows]
    references = oracle.train(twin, doubles, loss, rules, clipping_threshold, lr=lr, exclude=exclude)
    # foreach would mix tensors of different meshes in one call, which DTensor refuses.
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, foreach=False)
    options = {"exclude": tuple(exclude), "units": dict(units) if units else None}
    with dist_agc.attach(model, optimizer, clipping_threshold=clipping_threshold, **options) as hook:
        for step in range(STEPS):
            optimizer.zero_grad()
            if backward is not None:
                backward(step)
            else:
                loss(model, *batches(step, rank=share[0], size=share[1])).backward()
            expected = oracle.clip(weights(model), grads(model), rules, clipping_threshold, exclude=exclude)
            assert_some_clipped(expected)
            with collectives() as seen:
                optimizer.step()
            error = worst_relative_error(grads(model), expected.grads)
            assert error <= tolerance, f"step {step}: worst relative error of a gradient element: {error:.3g}"
            assert hook.stats is not None
            assert_stats(hook.stats, expected, tolerance=max(tolerance, 2e-6))
            assert_equal_everywhere(world, hook.stats)
            assert hook.stats.units == references[step].units
            assert drift is None or int(hook.stats.clipped_units) == references[step].clipped_units, f"step {step}"
            if step:
                assert seen.counts == ({"allreduce_": all_reduces} if all_reduces else {}), (
                    f"step {step}: {seen.counts}"
                )
    final = {name: p.detach() for name, p in twin.named_parameters() if p.requires_grad}
    error = worst_distance(weights(model), final)
    assert drift is None or error <= drift, f"worst relative error of a parameter after {STEPS} steps: {error:.3g}"


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def distribute(model: nn.Module, mesh: DeviceMesh, placements: Mapping[str, Sequence[Any]]) -> nn.Module:
    """The parameters named become DTensors; the others stay plain."""
    for name, placed in placements.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        spread = distribute_tensor(getattr(module, attribute).detach(), mesh, list(placed), src_data_rank=None)
        module.register_parameter(attribute, nn.Parameter(spread))
    return model


def planted(
    make: Callable[[], nn.Module], values: Mapping[str, Tensor], shard: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """A sharded model that holds ``values``: weights, or gradients in the places of the weights."""
    module = make()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name])
    return shard(module)


def check_one_clip(
    world: Any,
    make: Callable[[], nn.Module],
    shard: Callable[[nn.Module], nn.Module],
    *,
    all_reduces: int | None = None,
    units: Mapping[str, tuple[int, ...]] | None = None,
    known: Mapping[str, oracle.Units] | None = None,
    tolerance: float = 1e-6,
    cpu_kernel: bool = False,
    **settings: Any,
) -> oracle.Reference:
    """Weights, gradients and the oracle's gradients are sharded alike, so no test gathers anything.

    ``units``, ``known``: see `check_training`.

    Clipping twice equals clipping once, and the second time takes ``all_reduces`` collectives.
    """
    source = make()
    noisy_grads(source)
    weights = {name: p.detach() for name, p in source.named_parameters()}
    grads = {name: p.grad for name, p in source.named_parameters()}
    rules = oracle.unit_rules(source, units) | dict(known or {})
    threshold = median_threshold(source, rules)
    expected = oracle.clip(weights, grads, rules, threshold, **settings)
    assert_some_clipped(expected)

    model = planted(make, weights, shard)
    given = planted(make, {n: g for n, g in grads.items() if g is not None}, shard)
    wanted = planted(make, expected.grads, shard)
    for parameter, grad in zip(model.parameters(), given.parameters(), strict=True):
        parameter.grad = grad.detach() if grad.numel() else None
    options = {"clipping_threshold": threshold, "units": dict(units) if units else None, "cpu_kernel": cpu_kernel}
    options |= settings
    stats = agc(model, **options)
    assert_stats(stats, expected, tolerance=2e-6)
    assert_equal_everywhere(world, stats)
    clipped = [None if p.grad is None else local(p.grad).clone() for p in model.parameters()]
    for (name, want), got in zip(wanted.named_parameters(), clipped, strict=True):
        if got is not None:
            error = worst_relative_error({name: got.double()}, {name: local(want.detach()).double()})
            assert error <= tolerance, f"{name}: worst relative error of an element: {error:.3g}"
    with collectives() as seen:
        again = agc(model, **options)
    assert int(again.clipped_units) == 0
    for parameter, once in zip(model.parameters(), clipped, strict=True):
        assert parameter.grad is None or (once is not None and torch.equal(local(parameter.grad), once))
    if all_reduces is not None:
        assert seen.counts == ({"allreduce_": all_reduces} if all_reduces else {}), seen.counts
    return expected
