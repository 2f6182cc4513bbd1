"""FSDP2, ``fully_shard``: DTensor parameters with Shard(0), uneven rows, empty shards, split 1-D parameters."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dist_agc
import helpers
import models
import oracle
from conftest import World

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("ignore:.*returned a view tensor"),  # transformers' Conv1D does
]

STEPS = 4
LR = 0.1


def sharded(world: World, *, conv1d: bool = False, **settings: Any) -> models.Awkward:
    """Every layer a group of its own, but the tied ones, which have to stay in the root's."""
    model = models.awkward(conv1d=conv1d)
    for name, child in model.named_children():
        if name not in ("embedding", "head"):
            fully_shard(child, mesh=world.mesh(), **settings)
    fully_shard(model, mesh=world.mesh(), **settings)
    return model


def backward(model: nn.Module, world: World, step: int = 0) -> None:
    models.loss(model, *models.batch(step, rank=world.rank, size=world.size)).backward()


def local_grads(model: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's pieces, which change through these tensors."""
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert isinstance(p.grad, DTensor)
            found[name] = p.grad.to_local()
    return found


def rules(**overrides: tuple[int, ...]) -> dict[str, oracle.Units]:
    return oracle.unit_rules(models.awkward(conv1d=True), overrides)


def test_the_model_is_as_awkward_as_it_says(world: World) -> None:
    """Otherwise the tests below show less than they claim."""
    model = sharded(world)
    rows = {name: p.to_local().shape[0] for name, p in model.named_parameters() if isinstance(p, DTensor)}
    every = {name: [r[name] for r in world.gather(rows)] for name in rows}
    assert len(set(every["uneven.weight"])) > 1
    assert every["single.weight"] == [1] + [0] * (world.size - 1)
    assert every["uneven.bias"][0] < 7
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("conv1d", [False, True], ids=["plain", "conv1d"])
def test_single_clip(world: World, conv1d: bool) -> None:
    model = sharded(world, conv1d=conv1d)
    backward(model, world)
    expected = helpers.reference(model, rules(), models.THRESHOLD)
    where = helpers.storages(model)
    stats = helpers.agc(model, models.THRESHOLD)
    helpers.assert_clipped(model, stats, expected)
    helpers.assert_equal_everywhere(world, stats)
    assert helpers.storages(model) == where
    assert model.dead.weight.grad is None


def test_stacked_experts_by_override(world: World) -> None:
    model = sharded(world)
    backward(model, world)
    expected = helpers.reference(model, rules(**{"experts.weight": (0, 1)}), models.THRESHOLD)
    assert 0 < expected.per_parameter["experts.weight"].clipped_units < 15
    stats = helpers.agc(model, models.THRESHOLD, units={"experts.*": (0, 1)})
    helpers.assert_clipped(model, stats, expected)


@pytest.mark.parametrize("dims", [(), 1, 2, (0, 2), (1, 2)], ids=str)
def test_units_that_the_shards_cut(world: World, dims: int | tuple[int, ...]) -> None:
    """Units along other dims than the sharded one: every unit has pieces on every rank that has rows."""
    model = sharded(world)
    backward(model, world)
    normal = (dims,) if isinstance(dims, int) else dims
    expected = helpers.reference(model, rules(**{"experts.weight": normal}), models.THRESHOLD)
    stats = helpers.agc(model, models.THRESHOLD, units={"experts.weight": dims})
    helpers.assert_clipped(model, stats, expected)


@pytest.mark.parametrize("attach", [True, False], ids=["attach", "apply_agc"])
def test_training_equals_one_process(world: World, attach: bool) -> None:
    """Four steps against a float64 twin that sees the full batch: weights within 1e-5."""
    model, twin = sharded(world), models.awkward(dtype=torch.float64)
    batches = [models.batch(step) for step in range(STEPS)]
    references = oracle.train(twin, batches, models.loss, rules(), models.THRESHOLD, lr=LR, exclude=("head.bias",))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    config = dist_agc.AGCConfig(clipping_threshold=models.THRESHOLD, exclude="head.bias")
    hook = dist_agc.attach(model, optimizer, config) if attach else None
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, world, step)
        stats = None if hook else dist_agc.apply_agc(model, config)
        optimizer.step()
        stats = hook.stats if hook else stats
        assert stats is not None
        helpers.assert_some_clipped(references[step])
        helpers.assert_stats(stats, references[step], tolerance=1e-4)
        helpers.assert_equal_everywhere(world, stats)
    assert helpers.worst_distance(helpers.full_weights(model), helpers.full_weights(twin)) <= 1e-5


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_step_with_adam(world: World, kind: str) -> None:
    model = sharded(world)
    optimizer = OPTIMIZERS[kind](model.parameters())
    hook = dist_agc.attach(model, optimizer, clipping_threshold=models.THRESHOLD)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, world, step)
        expected = helpers.reference(model, rules(), models.THRESHOLD)
        optimizer.step()
        helpers.assert_clipped(model, hook.stats, expected)


@pytest.mark.parametrize("cpu_kernel", [False, True])
def test_whole_units_are_bitwise_those_of_one_process(world: World, cpu_kernel: bool) -> None:
    """Where no unit is split the arithmetic is the same, to the last bit."""
    model = sharded(world)
    backward(model, world)
    alone = models.awkward()
    for (name, p), (other, q) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        assert name == other and isinstance(p, DTensor)
        q.data = p.full_tensor().data.clone()
        q.grad = p.grad.full_tensor().clone() if isinstance(p.grad, DTensor) else None
    helpers.agc(model, models.THRESHOLD, cpu_kernel=cpu_kernel)
    stats = helpers.agc(alone, models.THRESHOLD, cpu_kernel=cpu_kernel)
    whole = [
        name for name, p in alone.named_parameters() if p.ndim >= 2 and p.grad is not None and "deconv" not in name
    ]
    assert "uneven.weight" in whole and 0 < int(stats.clipped_units) < stats.units
    got, expected = helpers.full_grads(model), helpers.full_grads(alone)
    for name in whole:
        assert torch.equal(got[name], expected[name]), name


class Payload(TorchDispatchMode):
    """The number of elements of every all-reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.numels: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "allreduce" in str(func) or "all_reduce" in str(func):
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self.numels += [t.numel() for t in tensors]
        return func(*args, **(kwargs or {}))


class TestCollectives:
    def test_one_packed_all_reduce(self, world: World) -> None:
        """The first call checks that ranks agree, too; from then on there is one all-reduce and nothing else."""
        model = sharded(world)
        clipper = dist_agc.Clipper(model, clipping_threshold=models.THRESHOLD)
        for step in range(3):
            model.zero_grad()
            backward(model, world, step)
            with helpers.collectives() as seen:
                stats = clipper.clip()
            assert sum(n for name, n in seen.counts.items() if "reduce" in name) == 1, seen.counts
            assert step == 0 or seen.total == 1, seen.counts
            assert stats is not None and 0 < int(stats.clipped_units) < stats.units

    def test_payload(self, world: World) -> None:
        """Two numbers per split unit, three per parameter for its statistics, one per rank for the largest ratio."""
        model = sharded(world)
        backward(model, world)
        clipper = dist_agc.Clipper(model, clipping_threshold=models.THRESHOLD)
        clipper.clip()
        with Payload() as payload:
            clipper.clip()
        vectors = [n for n, p in model.named_parameters() if p.requires_grad and p.ndim == 1]
        parameters = [n for n, p in model.named_parameters() if p.requires_grad]
        split = len(vectors) + 10  # the units of the ConvTranspose with groups, whose rows are inputs
        assert len(payload.numels) == 1
        assert payload.numels[0] <= 2 * split + 3 * len(parameters) + world.size

    def test_reading_statistics_needs_none(self, world: World) -> None:
        """Rank 0 alone logs them: if that were a collective, it would wait for the others here."""
        model = sharded(world)
        backward(model, world)
        stats = helpers.agc(model, models.THRESHOLD)
        if world.rank == 0:
            with helpers.collectives() as seen:
                values = stats.as_dict(per_parameter=True)
                assert float(stats.per_parameter["uneven.bias"].clip_fraction) in (0.0, 1.0)
            assert seen.counts == {}
            assert values["agc/units"] == stats.units

    def test_none_without_statistics_and_split_units(self, world: World) -> None:
        """Whole rows and nothing to report: nothing to send."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9, bias=False), nn.Linear(9, 5, bias=False))
        fully_shard(model, mesh=world.mesh())
        model(torch.randn(4, 6) + world.rank).square().mean().backward()
        clipper = dist_agc.Clipper(model, clipping_threshold=0.1, statistics=False)
        assert clipper.clip() is None  # with the check that ranks agree
        model.zero_grad()
        model(torch.randn(4, 6) + world.rank).square().mean().backward()
        expected = helpers.reference(model, oracle.unit_rules(model), 0.1)
        with helpers.collectives() as seen:
            assert clipper.clip() is None
        assert seen.counts == {}
        helpers.assert_some_clipped(expected)
        assert helpers.worst_relative_error(helpers.full_grads(model), expected.grads) <= 1e-6

    def test_the_same_collectives_whatever_gradients_exist(self, world: World) -> None:
        """A rank without a gradient adds zeros; nobody waits for it, and all agree on the result."""
        for missing in (["conv.weight", "uneven.bias"], None):  # None: all of them
            model = sharded(world)
            clipper = dist_agc.Clipper(model, clipping_threshold=models.THRESHOLD)
            backward(model, world)
            gone = [p for name, p in model.named_parameters() if missing is None or name in missing]
            for p in gone:
                if isinstance(p.grad, DTensor) and world.rank == 0:
                    p.grad.to_local().zero_()
            expected = helpers.reference(model, rules(), models.THRESHOLD)
            for p in gone:
                if world.rank == 0:
                    p.grad = None
            with helpers.collectives() as seen:
                stats = clipper.clip()
            assert stats is not None
            assert world.gather(seen.counts) == [seen.counts] * world.size
            helpers.assert_some_clipped(expected)
            helpers.assert_stats(stats, expected)
            helpers.assert_equal_everywhere(world, stats)
            for p in gone:
                if p.requires_grad and p.grad is None and isinstance(p, DTensor):
                    p.grad = torch.zeros_like(p)
            got = {name: grad for name, grad in helpers.full_grads(model).items() if name in expected.grads}
            assert helpers.worst_relative_error(got, expected.grads) <= 1e-6

    def test_no_gradient_anywhere(self, world: World) -> None:
        stats = helpers.agc(sharded(world), models.THRESHOLD)
        assert float(stats.grad_norm) == float(stats.max_ratio) == float(stats.clip_fraction) == 0.0
        assert stats.units == sum(
            oracle.unit_labels(tuple(p.shape), rules()[name])[1]
            for name, p in models.awkward().named_parameters()
            if p.requires_grad
        )


class TestTrainingLoops:
    def test_accumulation_without_sync(self, world: World) -> None:
        model, twin = sharded(world), models.awkward(dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        hook = dist_agc.attach(model, optimizer, clipping_threshold=models.THRESHOLD)
        assert isinstance(model, nn.Module) and hasattr(model, "set_requires_gradient_sync")
        model.set_requires_gradient_sync(False)  # type: ignore[operator]
        backward(model, world, 0)
        model.set_requires_gradient_sync(True)  # type: ignore[operator]
        backward(model, world, 1)
        for step in (0, 1):
            models.loss(twin, *models.batch(step)).backward()
        expected = helpers.reference(twin, rules(), models.THRESHOLD)
        optimizer.step()
        helpers.assert_some_clipped(expected)
        assert helpers.worst_distance(helpers.full_grads(model), expected.grads) <= 1e-5
        helpers.assert_stats(hook.stats, expected, tolerance=1e-4)

    @pytest.mark.parametrize("settings", [{}, {"reshard_after_forward": False}], ids=["root", "all"])
    def test_attach_after_an_evaluation(self, world: World, settings: dict[str, bool]) -> None:
        """A forward pass alone leaves whole parameters behind, which no optimizer holds and no gradient reaches."""
        model = sharded(world, **settings)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with torch.no_grad():
            model(models.batch(0, rank=world.rank, size=world.size)[0])
        assert not isinstance(model.embedding.weight, DTensor)
        hook = dist_agc.attach(model, optimizer, clipping_threshold=models.THRESHOLD)
        backward(model, world)
        expected = helpers.reference(model, rules(), models.THRESHOLD)
        optimizer.step()
        helpers.assert_clipped(model, hook.stats, expected)
        with torch.no_grad():
            model(models.batch(0, rank=world.rank, size=world.size)[0])
        assert helpers.agc(model, models.THRESHOLD).units == expected.units

    def test_mixed_precision_judges_the_fp32_masters(self, world: World) -> None:
        """bf16 compute, fp32 sharded parameters: gradients and weights are the fp32 shards."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
        fully_shard(
            model,
            mesh=world.mesh(),
            mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        )
        model(torch.randn(4, 6) * (1 + world.rank)).float().square().mean().backward()
        grads = local_grads(model)
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        expected = helpers.reference(model, oracle.unit_rules(model), 0.1)
        helpers.assert_clipped(model, helpers.agc(model, 0.1), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_shards(self, world: World, dtype: torch.dtype) -> None:
        model = models.awkward().to(dtype)
        for name, child in model.named_children():
            if name not in ("embedding", "head"):
                fully_shard(child, mesh=world.mesh())
        fully_shard(model, mesh=world.mesh())
        backward(model, world)
        expected = helpers.reference(model, rules(), models.THRESHOLD)
        stats = helpers.agc(model, models.THRESHOLD)
        helpers.assert_some_clipped(expected)
        helpers.assert_stats(stats, expected)
        got = helpers.full_grads(model)
        smallest = 2.0**-24 if dtype == torch.float16 else 0.0
        for name, want in expected.grads.items():
            off = (got[name] - want).abs() - want.abs() * torch.finfo(dtype).eps * 0.51
            assert bool((off <= smallest).all()), name
        for grad in local_grads(model).values():
            assert grad.dtype == dtype

    @pytest.mark.parametrize("fused", [False, True])
    def test_grad_scaler(self, world: World, fused: bool) -> None:
        plain, scaled = sharded(world), sharded(world)
        one = torch.optim.AdamW(plain.parameters(), lr=0.01, fused=fused)
        two = torch.optim.AdamW(scaled.parameters(), lr=0.01, fused=fused)
        hook_one = dist_agc.attach(plain, one, clipping_threshold=models.THRESHOLD)
        hook_two = dist_agc.attach(scaled, two, clipping_threshold=models.THRESHOLD)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # type: ignore[attr-defined]
        for step in range(3):
            one.zero_grad()
            two.zero_grad()
            backward(plain, world, step)
            scaler.scale(models.loss(scaled, *models.batch(step, rank=world.rank, size=world.size))).backward()
            one.step()
            scaler.step(two)
            scaler.update()
            assert hook_one.stats is not None and hook_two.stats is not None
            assert 0 < int(hook_one.stats.clipped_units) < hook_one.stats.units
            assert hook_two.stats.as_dict() == pytest.approx(hook_one.stats.as_dict(), rel=1e-5)
        assert helpers.worst_distance(helpers.full_weights(scaled), helpers.full_weights(plain)) <= 1e-5

    def test_thresholds_of_groups(self, world: World) -> None:
        model = sharded(world)
        vectors = [p for p in model.parameters() if p.ndim == 1]
        matrices = [p for p in model.parameters() if p.ndim != 1]
        optimizer = torch.optim.SGD([{"params": vectors}, {"params": matrices}], lr=0.0)
        hook = dist_agc.attach(model, optimizer, clipping_threshold=models.THRESHOLD)
        for first, second in ((0.7, 0.3), (None, 0.3), (0.7, None), (0.1, 1.5)):
            optimizer.param_groups[0]["clipping_threshold"] = first
            optimizer.param_groups[1]["clipping_threshold"] = second
            model.zero_grad()
            backward(model, world)
            thresholds = {name: first if p.ndim == 1 else second for name, p in model.named_parameters()}
            expected = helpers.reference(model, rules(), thresholds)
            optimizer.step()
            helpers.assert_clipped(model, hook.stats, expected)

    def test_several_optimizers(self, world: World) -> None:
        model = sharded(world)
        parameters = list(model.parameters())
        optimizers = [torch.optim.SGD(parameters[:7], lr=0.0), torch.optim.SGD(parameters[7:], lr=0.0)]
        hook = dist_agc.attach(model, optimizers, clipping_threshold=models.THRESHOLD)
        backward(model, world)
        expected = helpers.reference(model, rules(), models.THRESHOLD)
        for optimizer in optimizers:
            optimizer.step()
        helpers.assert_clipped(model, hook.stats, expected)

    def test_weight_norms_reused(self, world: World) -> None:
        """Cut units keep the complete weight norm. What is sent stays as long."""
        model = sharded(world)
        clipper = dist_agc.Clipper(model, clipping_threshold=models.THRESHOLD, weight_norm_interval=3)
        weights, sent = {}, []
        for step in range(6):
            if step in (0, 1, 3):
                weights = helpers.full_weights(model)
            model.zero_grad()
            backward(model, world, step)
            expected = oracle.clip(weights, helpers.full_grads(model), rules(), models.THRESHOLD)
            with Payload() as payload:
                stats = clipper.clip()
            sent += payload.numels
            helpers.assert_clipped(model, stats, expected)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
        assert len(sent) == 6 and sent == sent[:1] * 6

    def test_clipping_twice_equals_clipping_once(self, world: World) -> None:
        model = sharded(world)
        backward(model, world)
        first = helpers.agc(model, models.THRESHOLD)
        once = {name: grad.clone() for name, grad in local_grads(model).items()}
        second = helpers.agc(model, models.THRESHOLD)
        assert 0 < int(first.clipped_units) < first.units
        assert int(second.clipped_units) == 0
        assert all(torch.equal(grad, once[name]) for name, grad in local_grads(model).items())

    def test_excluded_and_frozen_are_untouched(self, world: World) -> None:
        model = sharded(world)
        backward(model, world)
        raw = {name: grad.clone() for name, grad in local_grads(model).items()}
        expected = helpers.reference(
            model, rules(), 1e-4, exclude=[n for n in rules() if n.startswith("conv.") or n.endswith("bias")]
        )
        stats = helpers.agc(model, 1e-4, exclude=("conv.*", "*.bias"))
        helpers.assert_stats(stats, expected)
        for name, grad in local_grads(model).items():
            alone = name.startswith("conv.") or name.endswith("bias")
            assert alone == torch.equal(grad, raw[name]) or grad.numel() == 0, name
        assert "frozen.weight" not in raw and model.frozen.weight.grad is None

    def test_a_frozen_parameter_that_holds_a_gradient_is_clipped(self, world: World) -> None:
        """An optimizer would step it: torch looks at gradients, not at ``requires_grad``."""
        model = sharded(world)
        backward(model, world)
        model.frozen.weight.grad = torch.ones_like(model.frozen.weight)
        weight, grad = helpers.full(model.frozen.weight), helpers.full(model.frozen.weight.grad)
        expected = oracle.clip(
            {"frozen.weight": weight}, {"frozen.weight": grad}, {"frozen.weight": oracle.Units((0,))}, 1e-4
        )
        stats = helpers.agc(model, 1e-4)
        got = {"frozen.weight": helpers.full(model.frozen.weight.grad)}
        assert helpers.worst_relative_error(got, expected.grads) <= 1e-6
        assert int(stats.per_parameter["frozen.weight"].clipped_units) == expected.clipped_units == 7

    def test_some_of_the_parameters(self, world: World) -> None:
        """Clipper's ``holders``, as integrations use it: the rest is neither clipped nor counted."""
        model = sharded(world)
        backward(model, world)
        clipper = dist_agc.Clipper(model, clipping_threshold=models.THRESHOLD)
        raw = {name: grad.clone() for name, grad in local_grads(model).items()}
        stats = clipper.clip([p for name, p in model.named_parameters() if name.startswith("conv.")])
        assert stats is not None and set(stats.per_parameter) == {"conv.weight", "conv.bias"}
        for name, grad in local_grads(model).items():
            assert name.startswith("conv.") or torch.equal(grad, raw[name])

    def test_a_plain_list_of_dtensors(self, world: World) -> None:
        model = sharded(world)
        backward(model, world)
        plain = {name: oracle.Units((0,) if rule.dims else ()) for name, rule in rules().items()}
        expected = helpers.reference(model, plain, models.THRESHOLD)
        with pytest.warns(UserWarning, match="does not know the modules of 'conv.weight'"):
            stats = helpers.agc(model.named_parameters(), models.THRESHOLD)
        helpers.assert_clipped(model, stats, expected)


class TestNonfinite:
    """A bad piece of a unit on one rank concerns every rank that holds a piece of it, and no other unit."""

    def model(self, world: World, bad: float) -> models.Awkward:
        model = sharded(world)
        backward(model, world)
        grads = local_grads(model)
        if world.rank == world.size - 1:
            grads["uneven.bias"][-1:] = bad  # a split unit (7 over 4 ranks: the last has 1)
        if world.rank == 0:
            grads["conv.weight"][0, 1] = bad
        return model

    @pytest.mark.parametrize("mode", ["keep", "zero"])
    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    def test_keep_and_zero(self, world: World, bad: float, mode: str) -> None:
        model = self.model(world, bad)
        raw = {name: grad.clone() for name, grad in local_grads(model).items()}
        expected = helpers.reference(model, rules(), models.THRESHOLD, on_nonfinite=mode)
        assert expected.nonfinite_units == 2
        stats = helpers.agc(model, models.THRESHOLD, on_nonfinite=mode)
        helpers.assert_clipped(model, stats, expected)
        every = world.gather([float(stats.nonfinite_units), float(stats.max_ratio), float(stats.clipped_units)])
        assert all(other == every[0] for other in every)
        bias = local_grads(model)["uneven.bias"]
        if mode == "zero":
            assert bool((bias == 0).all())
        else:
            torch.testing.assert_close(bias, raw["uneven.bias"], rtol=0, atol=0, equal_nan=True)

    def test_raise_on_every_rank_alike(self, world: World) -> None:
        model = self.model(world, math.nan)
        raw = {name: grad.clone() for name, grad in local_grads(model).items()}
        with pytest.raises(FloatingPointError, match="uneven.bias") as error:
            helpers.agc(model, models.THRESHOLD, on_nonfinite="raise")
        assert world.gather(str(error.value)) == [str(error.value)] * world.size
        for name, grad in local_grads(model).items():
            torch.testing.assert_close(grad, raw[name], rtol=0, atol=0, equal_nan=True)


class TestRefused:
    """Each ends on every rank, with gradients as they were."""

    @pytest.mark.parametrize(
        "settings",
        [{"clipping_threshold": 0.02}, {"eps": 0.1}, {"exclude": ("conv.*",)}, {"units": {"experts.*": (0, 1)}}],
        ids=lambda s: next(iter(s)),
    )
    def test_ranks_configured_differently(self, world: World, settings: dict[str, Any]) -> None:
        model = sharded(world)
        backward(model, world)
        raw = {name: grad.clone() for name, grad in local_grads(model).items()}
        odd = settings if world.rank == 1 else {}
        clipper = dist_agc.Clipper(model, **{"clipping_threshold": models.THRESHOLD, **odd})
        for _ in range(2):  # trying again must not slip through
            with pytest.raises(RuntimeError, match=next(iter(settings))):
                clipper.clip()
        assert all(torch.equal(grad, raw[name]) for name, grad in local_grads(model).items())

    def test_an_unknown_placement_names_parameter_and_placement(self, world: World) -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        fully_shard(model[0], mesh=world.mesh())
        odd = DTensor.from_local(torch.ones(2, 3), world.mesh(), [Partial()], run_check=False)
        model[1].weight = nn.Parameter(odd)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises(ValueError, match=r"1.weight.*P(artial)?\("):
            helpers.agc(model, 1e-3)
        assert all(bool((grad == 1).all()) for grad in local_grads(model[0]).values())

    def test_a_gradient_that_lies_otherwise_than_its_parameter(self, world: World) -> None:
        """The error comes before the parameters in front of it are clipped."""
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
        fully_shard(model[0], mesh=world.mesh())
        model[1].weight = nn.Parameter(distribute_tensor(torch.ones(2, 3), world.mesh(), [Replicate()]))
        for parameter in model[0].parameters():
            parameter.grad = torch.ones_like(parameter)
        model[1].weight.grad = distribute_tensor(torch.ones(2, 3), world.mesh(), [Shard(0)])
        with pytest.raises(ValueError, match=r"1.weight.*S(hard)?\("):
            helpers.agc(model, 1e-3)
        assert all(bool((grad == 1).all()) for grad in local_grads(model[0]).values())

    def test_attach_before_sharding(self, world: World) -> None:
        model = nn.Sequential(nn.Linear(4, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fully_shard(model, mesh=world.mesh())
        with pytest.raises(ValueError, match="none of the model's parameters"):
            dist_agc.attach(model, optimizer)


@pytest.mark.parametrize("foreach", [True, False])
def test_written_weights_are_measured_anew(world: World, foreach: bool) -> None:
    """What goes through a DTensor is counted on it, and not on what it is around."""
    torch.manual_seed(0)
    model: Any = fully_shard(nn.Linear(5, 2 * world.size, bias=False), mesh=world.mesh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, foreach=foreach)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=1.0, weight_norm_interval=1000, dry_run=True)
    ratios = []
    for step in range(6):
        if step == 4:
            model.load_state_dict({name: 10 * tensor for name, tensor in model.state_dict().items()})
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        ratios.append(float(hook.stats.max_ratio))
    assert ratios == pytest.approx([ratios[0]] * 4 + [ratios[0] / 10] * 2, rel=1e-6)
    hook.remove()
