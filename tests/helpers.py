"""Between a torch model, sharded or not, and the oracle: gather, compare, count collectives."""

import gc
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import dist_agc
import oracle

_WRAPPERS = ("module.", "_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


def quiet_deepspeed() -> None:
    """Without DeepSpeed's own all-reduce through shared memory, which it takes where all ranks are on one machine.

    That spins and has no timeout: a rank that dies, or cores that other tests share, leave the others waiting.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def agc(model: Any, *args: Any, **options: Any) -> dist_agc.ClipStats:
    """``apply_agc`` where statistics are asked for, so never None."""
    stats = dist_agc.apply_agc(model, *args, **options)
    assert stats is not None
    return stats


def clean(name: str) -> str:
    """The name as the user wrote the model."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, dense and in float64, on every rank; a collective for DTensors."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to_dense().to(torch.float64, copy=True)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an optimizer would step: torch steps whatever has a gradient, frozen or not."""
    return {clean(name): p for name, p in model.named_parameters() if p.requires_grad or p.grad is not None}


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(p) for name, p in trainable(model).items()}


def full_grads(model: nn.Module) -> dict[str, Tensor]:
    """By name, of the parameters that have a gradient."""
    return {name: full(p.grad) for name, p in trainable(model).items() if p.grad is not None}


def noisy_grads(module: nn.Module, spread: float = 3.0) -> None:
    """Gradients whose units are small and large: some are clipped and some are not."""
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        size = torch.randn(parameter.shape, generator=generator).mul(spread).exp()
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * size).to(parameter.dtype)
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def median_threshold(module: nn.Module, rules: dict[str, oracle.Units]) -> float:
    """A threshold that half of the units are above."""
    ratios = []
    for name, parameter in module.named_parameters():
        labels, units = oracle.unit_labels(tuple(parameter.shape), rules[name])
        grad = parameter.grad
        assert grad is not None
        for unit in range(units):
            members = labels == unit
            ratios.append(float(grad[members].norm() / parameter.detach()[members].norm().clamp(min=1e-3)))
    return float(torch.tensor(ratios).median()) * 1.01


def reference(
    model: nn.Module,
    rules: Mapping[str, oracle.Units],
    clipping_threshold: float | Mapping[str, float | None],
    **settings: Any,
) -> oracle.Reference:
    """What the oracle makes of the model's weights and gradients as they are now."""
    return oracle.clip(full_weights(model), full_grads(model), rules, clipping_threshold, **settings)


def worst_relative_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest |a - b| / |b| of any element; clipping only scales, so no element may be off by more.

    Elements that are equal, not finite ones included, count as 0; anything else against a zero or a non-finite
    number is infinitely wrong.
    """
    assert set(actual) == set(expected), f"only one side has {sorted(set(actual) ^ set(expected))}"
    worst = 0.0
    for name, b in expected.items():
        a = actual[name]
        assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        error = (a - b).abs() / b.abs()
        error[(a == b) | (a.isnan() & b.isnan())] = 0.0
        worst = max([worst, *error.nan_to_num(nan=float("inf")).flatten().tolist()])
    return worst


def worst_distance(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest ||a - b|| / ||b|| of any parameter, for weights after several steps."""
    assert set(actual) == set(expected)
    return max(float((actual[name] - b).norm() / b.norm()) for name, b in expected.items())


def assert_stats(stats: Any, expected: oracle.Reference, *, tolerance: float = 1e-6) -> None:
    """Counts exactly, norms within ``tolerance``, overall and per parameter."""
    assert stats.units == expected.units
    assert int(stats.clipped_units) == expected.clipped_units
    assert int(stats.nonfinite_units) == expected.nonfinite_units
    assert float(stats.clip_fraction) == _about(expected.clip_fraction, tolerance)
    assert float(stats.grad_norm) == _about(expected.grad_norm, tolerance)
    for name in ("max_ratio", "max_ratio_above_eps"):
        assert float(getattr(stats, name)) == _about(getattr(expected, name), tolerance), name
        where = getattr(stats, f"{name}_parameter")  # several may have the same ratio but for rounding
        of = 0.0 if where is None else getattr(expected.per_parameter[where], name)
        assert of == _about(getattr(expected, name), tolerance), (name, where)
    assert set(stats.per_parameter) == set(expected.per_parameter)
    for name, parameter in expected.per_parameter.items():
        got = stats.per_parameter[name]
        assert (name, got.units) == (name, parameter.units)
        assert (name, int(got.clipped_units)) == (name, parameter.clipped_units)
        assert (name, int(got.nonfinite_units)) == (name, parameter.nonfinite_units)
        assert (name, float(got.clip_fraction)) == (name, _about(parameter.clip_fraction, tolerance))
        assert (name, float(got.grad_norm)) == (name, _about(parameter.grad_norm, tolerance))


def _about(value: float, tolerance: float) -> Any:
    import pytest

    return pytest.approx(value, rel=tolerance, abs=0.0, nan_ok=True)


def assert_some_clipped(expected: oracle.Reference) -> None:
    """A parity test in which nothing, or everything, is clipped shows nothing."""
    assert 0 < expected.clipped_units < expected.units, f"{expected.clipped_units} of {expected.units} units clipped"


def assert_clipped(model: nn.Module, stats: Any, expected: oracle.Reference, *, tolerance: float = 1e-6) -> None:
    """The model's gradients and the statistics are the oracle's, and the case shows something."""
    assert_some_clipped(expected)
    error = worst_relative_error(full_grads(model), expected.grads)
    assert error <= tolerance, f"worst relative error of a gradient element: {error:.3g}"
    assert_stats(stats, expected, tolerance=tolerance)


def assert_equal_everywhere(world: Any, stats: Any) -> None:
    """Every rank has the same statistics to the last bit; without a collective, so rank 0 may read them alone."""
    where = stats.max_ratio_parameter, stats.max_ratio_above_eps_parameter
    every = world.gather((stats.as_dict(per_parameter=True), where))
    assert all(other == every[0] for other in every), f"statistics differ between ranks: {every}"


@dataclass
class Collectives:
    """Collectives by operator name, filled at the end of the ``with`` block."""

    counts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.counts.values())


@contextmanager
def collectives() -> Iterator[Collectives]:
    """Count collectives, through torch's own CommDebugMode.

    >>> with collectives() as seen:
    ...     pass
    >>> seen.total
    0
    """
    seen, mode = Collectives(), CommDebugMode()
    with mode:
        yield seen
    seen.counts.update({str(operator).split(".")[-1]: n for operator, n in mode.get_comm_counts().items() if n})


def storages(model: nn.Module) -> dict[str, int]:
    """Where each gradient lies, to see that clipping works in place."""
    found = {}
    for name, p in trainable(model).items():
        if p.grad is not None and not p.grad.is_sparse:
            local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            found[name] = local.data_ptr()
    return found


@contextmanager
def told(*messages: str) -> Iterator[None]:
    """These warnings of ours, in this order, and no other."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    ours = [str(w.message) for w in seen if "dist_agc" in str(w.message)]
    assert len(ours) == len(messages) and all(a in b for a, b in zip(messages, ours, strict=True)), ours


@contextmanager
def passing_groups() -> Iterator[None]:
    """Process groups that are made within are ended after it. Each has threads that wake up again and again, which
    hundreds of groups make felt. Not for groups of a DeviceMesh: torch remembers the meshes of DTensors."""
    world, before = dist.group.WORLD, set(dist.distributed_c10d._world.pg_map)
    yield
    if dist.group.WORLD is not world:  # made anew after a failure
        return
    for group in set(dist.distributed_c10d._world.pg_map) - before:
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()
