"""One test per class of bug that gradient clipping is known to have in public projects (docs/guarantees.md lists the
projects' issues, and for each test a change to the code that makes it fail)."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import dist_agc
import oracle
from dist_agc.engine import collectives as sending
from elsewhere import Journeys
from helpers import (
    agc,
    assert_clipped,
    assert_equal_everywhere,
    collectives,
    full_grads,
    median_threshold,
    noisy_grads,
    reference,
    storages,
    worst_relative_error,
)

pytestmark = pytest.mark.mpi(min_size=2)


class Bag(nn.Module):
    """Parameters by name, with gradients whose units are large and small."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(*shape)))
        noisy_grads(self)
        # Well apart on every rank, so that a norm of one shard leads to another factor than the norm of all.
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad *= torch.linspace(1, 4, parameter.numel()).view(parameter.shape)


def spread(bag: nn.Module, mesh: Any, placements: Mapping[str, Sequence[Any]]) -> nn.Module:
    """Make DTensors of the parameters named, gradients too; each rank starts from the same full tensors."""
    for name, how in placements.items():
        parameter = getattr(bag, name)
        assert parameter.grad is not None
        grad = distribute_tensor(parameter.grad, mesh, how)
        setattr(bag, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, how)))
        getattr(bag, name).grad = grad
    return bag


def rows(bag: nn.Module) -> dict[str, oracle.Units]:
    return {name: oracle.Units((0,) if p.ndim > 1 else ()) for name, p in bag.named_parameters()}


def check(
    world: Any, bag: nn.Module, threshold: float, rules: dict[str, oracle.Units] | None = None, **options: Any
) -> Any:
    expected = reference(bag, rules or rows(bag), threshold)
    stats = agc(bag, threshold, **options)
    assert_clipped(bag, stats, expected)
    said = world.gather(repr(stats.as_dict(per_parameter=True)))  # as text, because nan is not equal to itself
    assert set(said) == {said[0]}
    return stats


def threshold_of(bag: nn.Module) -> float:
    return median_threshold(bag, rows(bag))


def test_local_norm_used_as_global(world: Any) -> None:
    bag = Bag({"bias": (24,), "gain": (7,), "weight": (5, 12), "other": (4, 6)})
    threshold = threshold_of(bag)
    spread(bag, world.mesh(), {"bias": [Shard(0)], "gain": [Shard(0)], "weight": [Shard(1)], "other": [Shard(0)]})
    check(world, bag, threshold)


def test_replicas_counted_twice_in_hsdp(world: Any) -> None:
    shape = (2, 2) if world.size == 4 else (world.size, 1)
    bag = Bag({"bias": (9,), "weight": (6, 5)})
    threshold = threshold_of(bag)
    spread(bag, world.mesh(shape, ("replicate", "shard")), dict.fromkeys(("bias", "weight"), [Replicate(), Shard(0)]))
    check(world, bag, threshold)


def test_duplicates_of_tensor_parallel_counted_twice(world: Any) -> None:
    shape = (2, 2) if world.size == 4 else (1, world.size)
    bag = Bag({"norm": (8,), "bias": (5,), "column": (6, 5), "row": (5, 6)})
    threshold = threshold_of(bag)
    how = {
        "norm": [Shard(0), Replicate()],
        "bias": [Replicate(), Replicate()],
        "column": [Replicate(), Shard(0)],
        "row": [Shard(0), Shard(1)],
    }
    check(world, spread(bag, world.mesh(shape, ("dp", "tp")), how), threshold)


def test_experts_missing(world: Any) -> None:
    """Each rank holds other experts whole: nothing is cut, yet counts and norms are those of all experts."""
    bag = Bag({"experts": (world.size * 2 + 1, 3, 4), "router": (5, 4)})
    rules = {"experts": oracle.Units((0, 1)), "router": oracle.Units((0,))}
    threshold = median_threshold(bag, rules)
    spread(bag, world.mesh(), {"experts": [Shard(0)], "router": [Replicate()]})
    stats = check(world, bag, threshold, rules, units={"experts": (0, 1)})
    assert stats.units == (world.size * 2 + 1) * 3 + 5


def test_mixed_tensors_and_dtensors(world: Any) -> None:
    bag = Bag({"plain": (4, 3), "sharded": (8, 3), "bias": (6,), "plain_bias": (3,)})
    threshold = threshold_of(bag)
    check(world, spread(bag, world.mesh(), {"sharded": [Shard(1)], "bias": [Shard(0)]}), threshold)


def test_several_meshes(world: Any) -> None:
    shape = (2, 2) if world.size == 4 else (world.size, 1)
    bag = Bag({"one": (6, 5), "two": (8, 4), "bias": (7,)})
    threshold = threshold_of(bag)
    spread(bag, world.mesh(), {"one": [Shard(1)], "bias": [Shard(0)]})
    spread(bag, world.mesh(shape, ("a", "b")), {"two": [Shard(1), Shard(1)]})
    check(world, bag, threshold)


def test_cpu_offload_with_a_group_of_another_device(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients on the CPU, a group that only an accelerator can serve: the packed buffer travels there and back."""
    assert sending.communication_device(torch.device("cpu"), dist.group.WORLD) == torch.device("cpu")
    monkeypatch.setattr(sending.dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
    assert sending.communication_device(torch.device("cpu"), dist.group.WORLD) == torch.device("cpu")
    monkeypatch.undo()

    bag = Bag({"bias": (12,), "gain": (7,), "weight": (5, 12)})
    threshold = threshold_of(bag)
    spread(bag, world.mesh(), {"bias": [Shard(0)], "gain": [Shard(0)], "weight": [Shard(1)]})
    expected, raw = reference(bag, rows(bag), threshold), [local(p.grad).clone() for p in bag.parameters()]
    clipper = dist_agc.Clipper(bag, clipping_threshold=threshold)
    clipper.clip()  # the ranks agree, on the CPU
    for parameter, grad in zip(bag.parameters(), raw, strict=True):
        local(parameter.grad).copy_(grad)
    places = storages(bag)
    monkeypatch.setattr(sending.dist, "get_backend_config", lambda group: "cuda:nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)  # there is no such device, and none is used
    assert sending.communication_device(torch.device("cuda", 1), dist.group.WORLD) == torch.device("cuda", 1)
    with Journeys() as seen:
        stats = clipper.clip()
    monkeypatch.undo()
    assert_clipped(bag, stats, expected)
    (axis,) = clipper.execution().plan.axes
    assert [numel for numel, _ in seen.sent] == seen.back == [axis.numel()]
    assert not {place for _, place in seen.sent} & set(places.values()) and storages(bag) == places


def test_stages_of_a_pipeline(world: Any) -> None:
    """Each stage has layers of its own, here under equal names, sharded over its own ranks: no unit and no count of
    one is mixed with the other's, and no stage waits for another. Statistics are those of the stage."""
    shape = (2, 2) if world.size == 4 else (world.size, 1)
    mesh = world.mesh(shape, ("pp", "dp"))
    stage, ranks = mesh.get_local_rank("pp"), mesh["dp"].mesh.tolist()
    torch.manual_seed(10 + stage)
    bag = Bag({"weight": (5, 6), "bias": (9,)})
    for parameter in bag.parameters():
        assert parameter.grad is not None
        parameter.grad *= 3.0**stage
    threshold = world.gather(threshold_of(bag))[0]  # of the first stage, for all
    spread(bag, mesh["dp"], {"weight": [Shard(1)], "bias": [Shard(0)]})
    expected = reference(bag, rows(bag), threshold)
    clipper = dist_agc.Clipper(bag, clipping_threshold=threshold)
    planned = [axis.axis.ranks for axis in clipper.execution().plan.axes]
    assert planned == ([tuple(ranks)] if len(ranks) > 1 else [])
    stats = clipper.clip() if stage == 0 else None
    world.gather(None)  # the first stage is done before any other begins
    stats = clipper.clip() if stage else stats
    assert worst_relative_error(full_grads(bag), expected.grads) <= 1e-6
    assert stats is not None and stats.units == expected.units
    said = world.gather((stage, float(stats.grad_norm)))
    assert len({norm for other, norm in said if other == stage}) == 1
    assert len({norm for _, norm in said}) == len({other for other, _ in said}), "each stage has its own"


def test_a_rank_without_gradients(world: Any) -> None:
    """The others neither wait for it nor take its zeros for no norm."""
    bag = Bag({"bias": (12,), "gain": (8,), "weight": (4, 6)})
    for name in ("bias", "gain", "weight"):
        parameter = getattr(bag, name)
        dim = parameter.ndim - 1
        own = (
            parameter.grad.shape[dim] // world.size
            if parameter.grad.shape[dim] % world.size == 0
            else -(-parameter.grad.shape[dim] // world.size)
        )
        parameter.grad.narrow(dim, own, own).zero_()  # what rank 1 will have none of
    threshold = threshold_of(bag)
    rules = rows(bag)
    spread(bag, world.mesh(), {"bias": [Shard(0)], "gain": [Shard(0)], "weight": [Shard(1)]})
    expected = reference(bag, rules, threshold)
    kept = {name: p.grad for name, p in bag.named_parameters()}
    if world.rank == 1:
        for parameter in bag.parameters():
            parameter.grad = None
    stats = agc(bag, threshold)
    for name, parameter in bag.named_parameters():
        parameter.grad = kept[name]
    assert_clipped(bag, stats, expected)
    for parameter in bag.parameters():
        parameter.grad = None
    assert int(agc(bag, threshold).clipped_units) == 0  # nobody has any


def test_a_generator_that_was_used_up(world: Any) -> None:
    bag = Bag({"weight": (6, 5), "bias": (4,)})
    threshold = threshold_of(bag)
    parameters = (p for p in bag.parameters())
    assert sum(p.numel() for p in parameters) == 34
    with pytest.raises(ValueError, match="used up"):
        dist_agc.apply_agc(parameters, threshold)
    expected = reference(bag, rows(bag), threshold)
    stats = agc((p for p in bag.parameters()), threshold)
    assert worst_relative_error(full_grads(bag), expected.grads) <= 1e-6
    assert int(stats.clipped_units) == expected.clipped_units > 0


def test_norm_right_but_nothing_clipped(world: Any) -> None:
    """What the optimizer will read has changed, where it lay."""
    bag = Bag({"bias": (9,), "weight": (6, 5)})
    threshold = threshold_of(bag)
    spread(bag, world.mesh(), {"bias": [Shard(0)], "weight": [Shard(0)]})
    objects, places, before = {n: p.grad for n, p in bag.named_parameters()}, storages(bag), full_grads(bag)
    check(world, bag, threshold)
    assert storages(bag) == places
    assert all(p.grad is objects[name] for name, p in bag.named_parameters())
    assert any(not torch.equal(before[name], grad) for name, grad in full_grads(bag).items())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled_by_hand", [False, True])
def test_double_unscale(world: Any, fused: bool, unscaled_by_hand: bool) -> None:
    """Judged by the true gradient, whoever divides by the loss scale: the user, GradScaler or a fused optimizer."""
    torch.manual_seed(3)
    model, x = nn.Linear(6, 5), torch.randn(8, 6) * 5
    wrapped = DistributedDataParallel(model)
    model(x).square().mean().backward()
    true = full_grads(model)
    rules = {"weight": oracle.Units((0,)), "bias": oracle.Units(())}
    threshold = median_threshold(model, rules)
    expected = oracle.clip(dict(model.named_parameters()), true, rules, threshold)
    model.zero_grad()
    # lr 0: the weights stay, so that ratios can be compared after the step.
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with dist_agc.attach(wrapped, optimizer, clipping_threshold=threshold) as hook:
        scaler.scale(wrapped(x).square().mean()).backward()
        if unscaled_by_hand:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert hook.stats is not None
    assert 0 < expected.clipped_units < expected.units
    assert int(hook.stats.clipped_units) == expected.clipped_units
    assert float(hook.stats.grad_norm) == pytest.approx(expected.grad_norm, rel=1e-5)
    for name, grad in full_grads(model).items():
        assert torch.allclose(grad, expected.grads[name], rtol=1e-5), name


def test_scaled_gradients(world: Any) -> None:
    bag = Bag({"bias": (9,), "weight": (6, 5)})
    threshold = threshold_of(bag)
    spread(bag, world.mesh(), {"bias": [Shard(0)], "weight": [Shard(1)]})
    expected = reference(bag, rows(bag), threshold)
    for parameter in bag.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(4096.0)
    stats = dist_agc.Clipper(bag, clipping_threshold=threshold).clip(grad_scale=torch.tensor(4096.0))
    for parameter in bag.parameters():
        assert parameter.grad is not None
        parameter.grad.div_(4096.0)
    assert_clipped(bag, stats, expected)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_values(world: Any, bad: float) -> None:
    """One bad element: its unit is left as it is, every other unit gets the oracle's gradient."""
    bag = Bag({"weight": (6, 8), "bias": (9,), "gain": (5,)})
    threshold = threshold_of(bag)
    weight, bias = bag.weight.grad, bag.bias.grad
    assert isinstance(weight, torch.Tensor) and isinstance(bias, torch.Tensor)
    weight[2, 3] = bad
    bias[-1] = bad
    spread(bag, world.mesh(), {"weight": [Shard(1)], "bias": [Shard(0)], "gain": [Shard(0)]})
    stats = check(world, bag, threshold)
    assert int(stats.nonfinite_units) == 2


def test_transposed_units(world: Any) -> None:
    """A Linear is clipped per output, a ConvTranspose and a Conv1D of transformers too, whose outputs are columns."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 3), nn.ConvTranspose2d(4, 6, 2, groups=2), Conv1D(3, 8), nn.Conv1d(4, 3, 5))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * torch.randn_like(parameter).exp()
    rules = oracle.unit_rules(model)
    assert [rules[f"{i}.weight"].dims for i in range(4)] == [(0,), (1,), (1,), (0,)]
    threshold = median_threshold(model, rules)
    how: dict[tuple[int, str], list[Any]] = {(i, "weight"): [Shard(0)] for i in (0, 2, 3)}
    for (i, name), placements in how.items():
        spread(model[i], world.mesh(), {name: placements})
    check(world, model, threshold, rules)


def test_order_based_exclusion(world: Any) -> None:
    """Excluded by name, wherever it stands in the model; the last parameters are no head."""
    bag = Bag({"head_weight": (5, 6), "head_bias": (5,), "body": (6, 5), "last": (4,)})
    threshold = threshold_of(bag)
    before = {name: p.grad.clone() for name, p in bag.named_parameters() if p.grad is not None}
    spread(bag, world.mesh(), {"head_weight": [Shard(1)], "body": [Shard(1)], "last": [Shard(0)]})
    expected = reference(bag, rows(bag), threshold, exclude=("head_weight", "head_bias"))
    stats = agc(bag, threshold, exclude=("head_*",))
    assert_clipped(bag, stats, expected)
    for name in ("head_weight", "head_bias"):
        assert torch.equal(full_grads(bag)[name], before[name].double())
    assert set(stats.per_parameter) == {"body", "last"}
    with pytest.raises(ValueError, match=r"'heads\.\*' matches no parameter; near names: head_"):
        dist_agc.apply_agc(bag, threshold, exclude=("heads.*",))


def test_half_clipped_model_after_an_error(world: Any) -> None:
    """on_nonfinite="raise" raises on every rank alike, though one alone has the value, and changes nothing."""
    bag = Bag({"first": (6, 5), "bias": (9,), "last": (2 * world.size, 3)})
    threshold = threshold_of(bag)
    spread(bag, world.mesh(), {"first": [Shard(0)], "bias": [Shard(0)], "last": [Shard(0)]})
    if world.rank == 1:
        assert isinstance(bag.last.grad, DTensor)
        bag.last.grad.to_local()[0, 0] = float("inf")
    before = full_grads(bag)
    with pytest.raises(FloatingPointError, match="1 units have a gradient that is not finite, in last; no gradient"):
        dist_agc.apply_agc(bag, threshold, on_nonfinite="raise")
    assert all(torch.equal(grad, before[name]) for name, grad in full_grads(bag).items())


def test_mutation_before_validation(world: Any) -> None:
    """The last parameter's gradient is of a kind that cannot be clipped: those before it are as they were."""
    bag = Bag({"first": (6, 5), "second": (9,), "last": (8, 3)})
    threshold = threshold_of(bag)
    spread(bag, world.mesh(), {"first": [Shard(0)], "last": [Shard(0)]})
    bag.last.grad = DTensor.from_local(torch.ones(8, 3), world.mesh(), [Partial()])
    before = {name: local(p.grad).clone() for name, p in bag.named_parameters()}
    with pytest.raises(ValueError, match="parameter 'last' has placements .*Partial"):
        dist_agc.apply_agc(bag, threshold)
    assert all(torch.equal(local(p.grad), before[name]) for name, p in bag.named_parameters())


def local(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.to_local() if isinstance(grad, DTensor) else grad


def test_statistics_read_on_rank_0_alone(world: Any) -> None:
    """A logger on rank 0 reads everything; the others read nothing and wait for nobody."""
    bag = Bag({"weight": (6, 5), "bias": (9,)})
    threshold = threshold_of(bag)
    spread(bag, world.mesh(), {"weight": [Shard(1)], "bias": [Shard(0)]})
    stats = agc(bag, threshold)
    with collectives() as seen:
        if world.rank == 0:
            read = stats.as_dict(per_parameter=True)
            assert read["agc/clipped_units"] == int(stats.clipped_units) > 0
            assert "agc/clip_fraction/bias" in read and repr(stats)
    assert seen.total == 0
    assert_equal_everywhere(world, stats)
