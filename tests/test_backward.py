"""Clipping during backward: right where it is allowed, refused where it cannot be, and what it saves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.profiler import ProfilerActivity, profile
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

import dist_agc
import oracle
from helpers import (
    assert_equal_everywhere,
    assert_some_clipped,
    assert_stats,
    collectives,
    full,
    full_grads,
    full_weights,
    trainable,
    worst_distance,
    worst_relative_error,
)
from models import THRESHOLD, Awkward, awkward, batch, loss
from parallel import parallel, sequence_loss, sequences, tensor_parallel
from parity import STEPS

pytestmark = [
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
    pytest.mark.filterwarnings("ignore:FSDP:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Deallocating Tensor that still has live PyObject"),  # torch 2.7, without AGC too
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # CommDebugMode's
]


def step_in_backward(model: nn.Module, seen: dict[str, Tensor], **options: Any) -> dist_agc.AGCHook:
    """Attach, then register what a user would: a hook that steps an optimizer of one parameter and frees its gradient.

    ``seen`` has each gradient as that hook met it.
    """
    named = trainable(model)
    optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9, foreach=False) for p in named.values()}
    hook = dist_agc.attach(model, list(optimizers.values()), during_backward=True, **options)

    def stepping(name: str) -> Callable[[Tensor], None]:
        def step(parameter: Tensor) -> None:
            assert parameter.grad is not None
            seen[name] = parameter.grad.detach().clone()
            optimizers[parameter].step()  # type: ignore[index]
            parameter.grad = None

        return step

    for name, parameter in named.items():
        parameter.register_post_accumulate_grad_hook(stepping(name))
    return hook


def check(
    make: Callable[[], nn.Module],
    rank: int,
    size: int,
    world: Any = None,
    *,
    twin: nn.Module | None = None,
    batches: Callable[..., tuple[Tensor, Tensor]] = batch,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = loss,
    clipping_threshold: float = THRESHOLD,
    **options: Any,
) -> None:
    twin = twin or awkward(dtype=torch.float64)
    rules = oracle.unit_rules(twin)
    rows = [tuple(t.double() if t.is_floating_point() else t for t in batches(s)) for s in range(STEPS)]
    references = oracle.train(twin, rows, loss, rules, clipping_threshold, lr=0.1)  # type: ignore[arg-type]
    model, unclipped, seen = make(), make(), {}
    with step_in_backward(model, seen, clipping_threshold=clipping_threshold, **options) as hook:
        for step in range(STEPS):
            seen.clear()
            loss(model, *batches(step, rank=rank, size=size)).backward()
            assert all(p.grad is None for p in model.parameters())
            grads = {name: full(grad) for name, grad in seen.items()}
            expected, tolerance = references[step], 1e-4  # the weights have drifted apart by rounding
            if step == 0:
                loss(unclipped, *batches(step, rank=rank, size=size)).backward()
                expected = oracle.clip(full_weights(unclipped), full_grads(unclipped), rules, clipping_threshold)
                assert worst_relative_error(grads, expected.grads) <= 1e-6
                tolerance = 2e-6
            assert_some_clipped(expected)
            assert worst_distance(grads, expected.grads) <= tolerance
            assert bool(hook.stats) == (options.get("statistics") is not False)
            if hook.stats:
                assert_stats(hook.stats, expected, tolerance=tolerance)
                assert hook.stats.units == references[step].units
            if hook.stats and world is not None:
                assert_equal_everywhere(world, hook.stats)
    final = {name: p.detach() for name, p in twin.named_parameters() if p.requires_grad}
    assert worst_distance(full_weights(model), final) <= 1e-5


def sharded(mesh: Any) -> Awkward:
    model = awkward()
    for layer in (model.conv, model.deconv, model.uneven, model.thin):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def test_one_process() -> None:
    check(awkward, 0, 1)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("statistics", [True, False])
def test_fsdp2(world: Any, statistics: bool) -> None:
    check(lambda: sharded(world.mesh()), world.rank, world.size, world, statistics=statistics)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("version", "refused"), [("2.6.0", True), ("2.12.1", True), ("2.13.0", False)])
def test_gradients_on_their_way_to_the_host_are_refused(
    world: Any, monkeypatch: pytest.MonkeyPatch, version: str, refused: bool
) -> None:
    """FSDP2 with CPUOffloadPolicy before torch 2.13. The CPU's mesh says here that it is an accelerator's, as the mesh
    of parameters that are kept on the CPU does there."""
    model = sharded(world.mesh())
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    dist_agc.attach(model, during_backward=True).remove()  # nothing is offloaded
    monkeypatch.setattr(DeviceMesh, "device_type", property(lambda mesh: "cuda"))
    if refused:
        with pytest.raises(ValueError, match="copies an offloaded gradient .* use a newer torch"):
            dist_agc.attach(model, during_backward=True)
    else:
        dist_agc.attach(model, during_backward=True).remove()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("placement", ["rows", "columns"])
def test_hsdp(world: Any, placement: str) -> None:
    """Copies of shards, rows whole and rows cut."""
    mesh = world.mesh((2, 2) if world.size == 4 else (1, world.size), ("replicate", "shard"))

    def cut(parameter: nn.Parameter) -> Shard | None:
        even = placement == "columns" and parameter.ndim > 1 and parameter.shape[1] % mesh.size(1) == 0
        return Shard(1) if even else None

    def make() -> nn.Module:
        model = awkward()
        fully_shard(model, mesh=mesh, shard_placement_fn=cut)
        return model

    check(make, world.rank, world.size, world)


@pytest.mark.mpi(min_size=2)
def test_tensor_parallel(world: Any) -> None:
    """Gradients of replicated norms are shares of a sum when the hook meets them."""
    check(
        lambda: tensor_parallel(parallel(), world.mesh(names=("tp",))),
        0,
        1,
        world,
        twin=parallel(torch.float64),
        batches=sequences,
        loss=sequence_loss,
        clipping_threshold=0.03,
    )


@pytest.mark.mpi(min_size=2)
def test_fsdp2_collectives(world: Any) -> None:
    """One for every parameter with statistics; without, one for every parameter that has split units."""
    plain = sharded(world.mesh())
    loss(plain, *batch(0)).backward()
    with collectives() as unclipped:
        loss(plain, *batch(0)).backward()
    for statistics in (True, False):
        model = sharded(world.mesh())
        with step_in_backward(model, {}, clipping_threshold=THRESHOLD, statistics=statistics):
            loss(model, *batch(0)).backward()
            with collectives() as seen:
                loss(model, *batch(0)).backward()
        with_gradients = {n: p for n, p in trainable(model).items() if not n.startswith("dead")}
        cut = [n for n, p in with_gradients.items() if p.ndim == 1] + ["deconv.weight"] * (world.size in (3, 4))
        more = seen.counts.pop("allreduce_", 0) - unclipped.counts.get("allreduce_", 0)
        assert more == (len(with_gradients) if statistics else len(cut))


@pytest.mark.mpi(min_size=2)
def test_fsdp2_accumulates_without_sync(world: Any) -> None:
    """No hook runs before the synchronising backward: the whole sum is clipped, once."""
    model, unclipped = sharded(world.mesh()), sharded(world.mesh())
    rules = oracle.unit_rules(awkward())
    seen: dict[str, Tensor] = {}
    step_in_backward(model, seen, clipping_threshold=THRESHOLD)
    for one in (model, unclipped):
        for micro in range(3):
            one.set_requires_gradient_sync(micro == 2)  # type: ignore[attr-defined]
            assert not seen or one is unclipped
            loss(one, *batch(micro, rank=world.rank, size=world.size)).backward()
    expected = oracle.clip(full_weights(unclipped), full_grads(unclipped), rules, THRESHOLD)
    assert_some_clipped(expected)
    assert worst_relative_error({n: full(g) for n, g in seen.items()}, expected.grads) <= 1e-6


@pytest.mark.mpi(min_size=2)
def test_fsdp2_accumulating_with_sync_is_refused(world: Any) -> None:
    model = sharded(world.mesh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dist_agc.attach(model, optimizer, during_backward=True)
    loss(model, *batch(0)).backward()
    with pytest.raises(RuntimeError, match="added to a gradient that was clipped already.*set_requires_gradient_sync"):
        loss(model, *batch(0)).backward()


@pytest.mark.mpi(min_size=2)
def test_ddp_and_fsdp1_are_refused(world: Any) -> None:
    model = DDP(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="DistributedDataParallel reduces gradients after"):
        dist_agc.attach(model, during_backward=True)
    for hidden in (model.module, list(model.parameters()), replicate(nn.Linear(3, 2))):
        with pytest.raises(ValueError, match="DistributedDataParallel reduces gradients after"):
            dist_agc.attach(hidden, during_backward=True)
    model = FSDP(nn.Linear(3, 2), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match="FSDP1 hands over"):
        dist_agc.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), during_backward=True)


def test_accumulation_is_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = dist_agc.attach(model, during_backward=True, clipping_threshold=0.1)
    x = torch.ones(1, 3)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
        assert hook.stats is not None and int(hook.stats.clipped_units) == 3
        optimizer.zero_grad()
    for set_to_none in (None, False):  # zeros in place are a gradient too: nothing tells them from one that was clipped
        model(x).sum().backward()
        if set_to_none is not None:
            optimizer.zero_grad(set_to_none)
        with pytest.raises(RuntimeError, match="backward added to a gradient that was clipped already"):
            model(x).sum().backward()
        optimizer.zero_grad()
    model(x).sum().backward()
    hook.remove()
    model(x).sum().backward()


def test_parameters_that_are_frozen_and_unfrozen_later() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    hook = dist_agc.attach(model, during_backward=True, clipping_threshold=1e-3)
    x = torch.ones(1, 3)
    model(x).sum().backward()
    assert hook.stats is not None and hook.stats.units == 6
    model[1].requires_grad_(False)
    model.zero_grad()
    model(x).sum().backward()
    assert hook.stats.units == 3 and set(hook.stats.per_parameter) == {"2.weight", "2.bias"}
    model[0].requires_grad_(True)
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"'0\.weight' was frozen when AGC was attached.*attach again"):
        model(x).sum().backward()
    hook.remove()
    model.zero_grad()
    with dist_agc.attach(model, during_backward=True, clipping_threshold=1e-3) as hook:
        model(x).sum().backward()
        assert hook.stats is not None and hook.stats.units == 6


@pytest.mark.parametrize("unscale_first", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_scale_is_refused(fused: bool, unscale_first: bool) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    dist_agc.attach(model, optimizer, during_backward=True, clipping_threshold=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    if unscale_first:
        scaler.unscale_(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="cannot be right with a GradScaler"):
        scaler.step(optimizer)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


class Told(torch.optim.SGD):
    """Wants to be given the scaler, as optimizers were before they had attributes for it."""

    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        super().step(closure)


@pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")
def test_a_loss_scale_is_refused_for_an_optimizer_that_is_given_the_scaler() -> None:
    model = nn.Linear(3, 2)
    optimizer = Told(model.parameters(), lr=0.1)
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    hook: Any = dist_agc.attach(model, optimizer, during_backward=True, clipping_threshold=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    with pytest.raises(RuntimeError, match="cannot be right with a GradScaler"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert int(hook.stats.clipped_units) == 3


@pytest.mark.parametrize("fused", [True, False])
def test_a_scaler_that_is_switched_off_changes_nothing(fused: bool) -> None:
    """Training scripts step through one and the same scaler in every precision."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    hook: Any = dist_agc.attach(model, optimizer, during_backward=True, clipping_threshold=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = model.weight.detach().clone()
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert int(hook.stats.clipped_units) == 3 and not torch.equal(model.weight, before)


class Recomputed(nn.Module):
    """Layers whose activations are made again in backward, in an inner backward each where that is reentrant."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            made: Any = checkpoint(layer, x, use_reentrant=self.reentrant)
            x = torch.tanh(made)
        return x


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("reentrant", [True, False])
def test_fsdp2_with_activation_checkpointing(world: Any, reentrant: bool) -> None:
    model, plain = Recomputed(reentrant), Recomputed(False)
    rules, threshold = oracle.unit_rules(plain), 0.03
    for layer in model.layers:
        fully_shard(layer, mesh=world.mesh())
    fully_shard(model, mesh=world.mesh())
    hook: Any = dist_agc.attach(model, during_backward=True, clipping_threshold=threshold)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4 * world.size, 6, generator=generator)
        plain.zero_grad()
        plain(x.clone().requires_grad_()).square().mean().backward()
        expected = oracle.clip(full_weights(plain), full_grads(plain), rules, threshold)
        assert_some_clipped(expected)
        model.zero_grad()
        model(x.chunk(world.size)[world.rank].clone().requires_grad_()).square().mean().backward()
        assert worst_distance(full_grads(model), expected.grads) <= 1e-5
        assert_stats(hook.stats, expected, tolerance=1e-5)
        assert_equal_everywhere(world, hook.stats)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise KeyError("in the middle")


def test_an_error_in_an_inner_backward() -> None:
    """The next backward begins a record of its own."""
    model = Recomputed(reentrant=True)
    hook: Any = dist_agc.attach(model, during_backward=True, clipping_threshold=1e-6)
    x = torch.ones(1, 6, requires_grad=True)
    fails = lambda y: model.layers[1](Fails.apply(y))  # noqa: E731
    for _ in range(2):
        with pytest.raises(KeyError, match="in the middle"):
            made: Any = checkpoint(fails, model.layers[0](x), use_reentrant=True)
            model.layers[2](made).sum().backward()
        assert not hook.stats
        model.zero_grad()
    model(x).sum().backward()
    assert hook.stats.units == 21 and int(hook.stats.clipped_units) == 21
    model.zero_grad()
    model.layers[2](x).sum().backward()
    assert hook.stats.units == 21 and int(hook.stats.clipped_units) == 7


def test_hooks_that_would_run_first_are_refused() -> None:
    model = nn.Linear(3, 2)
    handle = model.bias.register_post_accumulate_grad_hook(lambda p: None)
    model.weight.register_hook(lambda grad: grad)  # of another kind: sees a gradient before it is final
    with pytest.raises(ValueError, match="'bias' has a post-accumulate-grad hook already.*attach first"):
        dist_agc.attach(model, during_backward=True)
    handle.remove()
    dist_agc.attach(model, during_backward=True).remove()


def test_thresholds_of_groups_and_an_error_in_between() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(7, 7))
    x = torch.ones(1, 3)
    groups = [{"params": [*model[0].parameters(), *model[2].parameters()]}, {"params": model[1].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    hook = dist_agc.attach(model, optimizer, during_backward=True, clipping_threshold=0.01)
    optimizer.load_state_dict(optimizer.state_dict())  # makes new groups
    optimizer.param_groups[1]["clipping_threshold"] = None

    def run() -> dict[str, float]:
        optimizer.zero_grad()
        model[1](model[0](x)).sum().backward()
        assert hook.stats is not None and hook.stats.units == 3 + 3 + 8  # the idle layer's too
        return {name: float(p.clip_fraction) for name, p in hook.stats.per_parameter.items()}

    wanted = {"0.weight": 1.0, "0.bias": 1.0, "1.weight": 0.0, "1.bias": 0.0, "2.weight": 0.0, "2.bias": 0.0}
    assert run() == wanted
    optimizer.zero_grad()
    handle = model[0].register_full_backward_pre_hook(lambda *_: exec("raise KeyError"))
    with pytest.raises(KeyError):
        model[1](model[0](x.clone().requires_grad_())).sum().backward()
    handle.remove()
    optimizer.param_groups[1]["clipping_threshold"] = 0.01
    assert run() == wanted | {"1.weight": 1.0, "1.bias": 1.0}


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that were allocated at once, beyond what there was before, by torch's own profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    held = most = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()  # type: ignore[attr-defined]
            most = max(most, held)
    return most


def test_memory() -> None:
    """Gradients that do not wait for the step: the peak of backward falls by nearly all of their bytes."""
    layers, width = 12, 256
    x, peaks = torch.randn(4, width), {}
    for in_backward in (False, True):
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        dist_agc.attach(model, optimizer, during_backward=in_backward, clipping_threshold=0.01)
        if in_backward:
            steps = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

            def step(parameter: Tensor, steps: Any = steps) -> None:
                steps[parameter].step()
                parameter.grad = None

            for p in model.parameters():
                p.register_post_accumulate_grad_hook(step)

        def run(model: nn.Module = model, optimizer: Any = optimizer) -> None:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        run()  # the vectors of the plan are made once
        peaks[in_backward] = peak_bytes(run)
    gradients = layers * (width + 1) * width * 4
    print(f"peak of a step: {peaks[False]:,} bytes, during backward {peaks[True]:,}; gradients {gradients:,}")
    assert peaks[False] - peaks[True] > 0.85 * gradients
