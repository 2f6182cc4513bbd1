"""``attach([stage, ...], optimizers, pipeline=group)``: torch's own schedules, against an oracle of the whole model."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B

import dist_agc
import oracle
from helpers import assert_equal_everywhere, assert_stats, collectives, full, worst_distance, worst_relative_error

pytestmark = pytest.mark.mpi(min_size=2)

WIDTH, CLASSES, BATCH, STEPS, LR = 6, 5, 12, 3, 0.1
THRESHOLD = 0.06


class Layer(nn.Module):
    def __init__(self, outputs: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.norm(x)))


class Part(nn.Module):
    """Layers of a model that go by their names in the whole of it, as torchtitan cuts models."""

    def __init__(self, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def whole_model(layers: int, dtype: torch.dtype = torch.float32) -> Part:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Part(nn.ModuleDict({str(i): Layer(CLASSES if i == layers - 1 else WIDTH) for i in range(layers)})).to(
            dtype
        )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(50 + step)
    x = torch.randn(BATCH, WIDTH, generator=generator)
    return x, torch.randint(CLASSES, (BATCH,), generator=generator)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def gathered(world: Any, local: dict[str, Tensor]) -> dict[str, Tensor]:
    """What all ranks hold, by name."""
    found: dict[str, Tensor] = {}
    for one in world.gather({name: tensor.numpy() for name, tensor in local.items()}):
        found |= {name: torch.as_tensor(value).double() for name, value in one.items()}
    return found


def held(parts: Sequence[nn.Module], *, grads: bool = False) -> dict[str, Tensor]:
    pairs = [(name, p) for part in parts for name, p in part.named_parameters()]
    return {name: full(p.grad if grads and p.grad is not None else p) for name, p in pairs}


class Pipeline:
    """Two stages on every rank of a pipeline: the first and the last ones are far apart."""

    def __init__(self, group: Any, *, shards: Any = None) -> None:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        self.model = whole_model(2 * size)
        layers = [(str(i), self.model.layers[str(i)]) for i in (rank, rank + size)]
        self.parts = [Part(nn.ModuleDict({name: layer})) for name, layer in layers]
        if shards is not None:
            for part in self.parts:
                fully_shard(part, mesh=shards)
        self.optimizers = [torch.optim.SGD(part.parameters(), lr=LR, momentum=0.9) for part in self.parts]
        stages: list[Any] = [
            PipelineStage(part, index, 2 * size, torch.device("cpu"), group=group)
            for part, index in zip(self.parts, (rank, rank + size), strict=True)
        ]
        self.schedule = ScheduleInterleaved1F1B(stages, n_microbatches=size, loss_fn=F.cross_entropy)
        self.first, self.last = rank == 0, rank == size - 1

    def backward(self, x: Tensor, y: Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        inputs: Any = [x] if self.first else []
        self.schedule.step(*inputs, target=y if self.last else None)


def check_training(
    world: Any, pipeline: Pipeline, hook: Any, all_reduces: int, share: tuple[int, int] = (0, 1), drift: bool = True
) -> None:
    """Three steps: gradients, statistics and collectives of each, against the whole model's; and the weights after,
    where the optimizers are SGD."""
    twin = whole_model(len(pipeline.model.layers), torch.float64)
    rules, rows = oracle.unit_rules(twin), [batch(step) for step in range(STEPS)]
    exclude = [name for name, _ in twin.named_parameters() if name.startswith("layers.0.norm")]
    doubles = [(x.double(), y) for x, y in rows]
    references = oracle.train(twin, doubles, loss, rules, THRESHOLD, lr=LR, exclude=exclude)
    mine = slice(share[0], None, share[1])
    for step, (x, y) in enumerate(rows):
        pipeline.backward(x[mine], y[mine])
        before = gathered(world, held(pipeline.parts)), gathered(world, held(pipeline.parts, grads=True))
        expected = oracle.clip(*before, rules, THRESHOLD, exclude=exclude)
        assert 0 < expected.clipped_units < expected.units
        with collectives() as seen:
            for optimizer in pipeline.optimizers:
                optimizer.step()
        error = worst_relative_error(gathered(world, held(pipeline.parts, grads=True)), expected.grads)
        assert error <= 1e-6, f"worst relative error of a gradient element: {error:.3g}"
        assert_stats(hook.stats, expected, tolerance=2e-6)
        assert_equal_everywhere(world, hook.stats)
        assert not drift or int(hook.stats.clipped_units) == references[step].clipped_units
        assert not step or seen.counts == {"allreduce_": all_reduces}
    assert hook.steps == STEPS
    final = {name: p.detach() for name, p in twin.named_parameters()}
    assert not drift or worst_distance(gathered(world, held(pipeline.parts)), final) <= 1e-5


# A pattern of which most stages have nothing.
CONFIG = dist_agc.AGCConfig(clipping_threshold=THRESHOLD, exclude=("layers.0.norm.*",))


def test_interleaved_stages(world):
    """One collective a step for the two stages of a rank, each with an optimizer of its own."""
    pipeline = Pipeline(dist.group.WORLD)
    with dist_agc.attach(pipeline.parts, pipeline.optimizers, CONFIG, pipeline=dist.group.WORLD) as hook:
        assert not hook.stats and hook.stats.units == 0
        check_training(world, pipeline, hook, all_reduces=1)


@pytest.mark.mpi(min_size=4)
def test_sharded_stages(world):
    """FSDP2 inside of stages: its own axis, one for each stage of a rank, and that of the pipeline."""
    if world.size != 4:
        pytest.skip("two stages of two ranks")
    mesh = world.mesh((2, 2), ("pp", "dp"))
    group = mesh["pp"].get_group()
    pipeline = Pipeline(group, shards=mesh["dp"])
    with dist_agc.attach(pipeline.parts, pipeline.optimizers, CONFIG, pipeline=group) as hook:
        check_training(world, pipeline, hook, all_reduces=3, share=(mesh["dp"].get_local_rank(), 2))


def test_torchtitans_optimizers(world):
    """Its container is one optimizer around one for each model part."""
    optimizer = pytest.importorskip("torchtitan.components.optimizer")
    pipeline = Pipeline(dist.group.WORLD)
    groups = [optimizer.ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3})]
    config = optimizer.OptimizersContainer.Config(implementation="for-loop", param_groups=groups)
    container = optimizer.OptimizersContainer(config, model_parts=pipeline.parts)
    pipeline.optimizers = [container]
    with dist_agc.attach(pipeline.parts, container, CONFIG, pipeline=dist.group.WORLD) as hook:
        check_training(world, pipeline, hook, all_reduces=1, drift=False)


def stage_of(world: Any) -> tuple[Any, torch.optim.Optimizer]:
    """One whose names every rank has, after a backward of its own."""
    torch.manual_seed(world.rank)
    stage = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    stage(torch.ones(2, 3)).square().sum().backward()
    return stage, torch.optim.SGD(stage.parameters(), lr=0.1)


def test_names_that_all_stages_have(world):
    stage, optimizer = stage_of(world)
    hook = dist_agc.attach(stage, optimizer, pipeline=dist.group.WORLD, exclude=("1.bias",), dry_run=True)
    optimizer.step()
    grads = {f"pipeline{world.rank}.{name}": full(p.grad) for name, p in stage.named_parameters() if p.grad is not None}
    norms = {name: float(grad.norm()) for name, grad in gathered(world, grads).items()}
    assert {name for name in norms if not name.endswith("1.bias")} == set(hook.stats.per_parameter)
    for name, of in hook.stats.per_parameter.items():
        assert float(of.grad_norm) == pytest.approx(norms[name], rel=1e-6)
    assert float(hook.stats.grad_norm) == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5, rel=1e-6)
    assert hook.stats.as_dict()["agc/dry_run"] == 1.0
    assert hook.stats.max_ratio_parameter in hook.stats.per_parameter
    assert_equal_everywhere(world, hook.stats)
    hook.remove()


def test_without_statistics_nothing_is_sent(world):
    stage, optimizer = stage_of(world)
    hook = dist_agc.attach(stage, optimizer, clipping_threshold=1e-3, pipeline=dist.group.WORLD, statistics=False)
    before = held([stage], grads=True)
    with collectives() as seen:
        optimizer.step()
    assert seen.total == 0 and not hook.stats
    assert any(not torch.equal(a, b) for a, b in zip(before.values(), held([stage], grads=True).values(), strict=True))
    hook.remove()


def test_a_layer_that_is_thawed_later_is_told(world):
    stage, optimizer = stage_of(world)
    stage[0].requires_grad_(False)
    optimizer.zero_grad()
    hook = dist_agc.attach(stage, optimizer, clipping_threshold=0.01, pipeline=dist.group.WORLD)
    stage[0].requires_grad_(True)
    for expected in (True, False):
        stage(torch.ones(2, 3)).square().sum().backward()
        with pytest.warns(UserWarning) if expected else nullcontext() as seen:
            optimizer.step()
        assert seen is None or "the statistics of the pipeline are without it" in str(seen[0].message)
    assert hook.stats.units == 3 * world.size  # two rows and a bias
    hook.remove()


def test_a_layer_that_grows_later_is_told(world):
    stage, optimizer = stage_of(world)
    with dist_agc.attach(stage, optimizer, clipping_threshold=1e-4, pipeline=dist.group.WORLD) as hook:
        stage[1] = nn.Linear(4, 6)
        optimizer.param_groups[0]["params"] = list(stage.parameters())
        stage(torch.ones(2, 3)).square().sum().backward()
        with pytest.warns(UserWarning, match="'1.weight' has 6 units since AGC was attached.*by the 2 that it had"):
            optimizer.step()
    assert hook.stats


def test_what_no_optimizer_given_holds_is_not_counted(world):
    stage, _ = stage_of(world)
    optimizer = torch.optim.SGD(stage[0].parameters(), lr=0.1)
    with dist_agc.attach(stage, optimizer, clipping_threshold=1e-4, pipeline=dist.group.WORLD) as hook:
        optimizer.step()
    assert hook.stats.units == int(hook.stats.clipped_units) == 5 * world.size  # four rows and a bias


def test_excluded_in_another_order(world):
    stage, optimizer = stage_of(world)
    order = ("0.bias", "1.bias") if world.rank else ("1.bias", "0.bias")
    dist_agc.attach(stage, optimizer, exclude=order, pipeline=dist.group.WORLD).remove()


@pytest.mark.parametrize("setting", ["exclude", "units"])
def test_a_pattern_that_no_stage_has(world, setting):
    stage, optimizer = stage_of(world)
    options: dict[str, Any] = {setting: ("2.*",) if setting == "exclude" else {"2.*": 0}}
    with pytest.raises(ValueError, match="'2.*' matches no parameter of any stage; near names: "):
        dist_agc.attach(stage, optimizer, pipeline=dist.group.WORLD, **options)
    assert not optimizer._optimizer_step_pre_hooks


def test_everything_excluded_on_all_stages_or_on_one(world):
    stage, optimizer = stage_of(world)
    with pytest.warns(UserWarning, match="leaves out every parameter of every stage"):
        dist_agc.attach(stage, optimizer, pipeline=dist.group.WORLD, exclude=("*",)).remove()
    if world.rank == 0:
        stage = nn.ModuleDict({"head": nn.Linear(3, 2)})
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    dist_agc.attach(stage, optimizer, pipeline=dist.group.WORLD, exclude=("head.*",)).remove()


def test_one_stage_that_cannot_be_set_up_stops_all(world):
    stage, optimizer = stage_of(world)
    if world.rank == 1:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
        with pytest.raises(ValueError, match="holds none of the model's parameters"):
            dist_agc.attach(stage, optimizer, pipeline=dist.group.WORLD)
    else:
        with pytest.raises(RuntimeError, match="on no stage of the pipeline, because of rank 1: the optimizer SGD"):
            dist_agc.attach(stage, optimizer, pipeline=dist.group.WORLD)
    assert not optimizer._optimizer_step_pre_hooks


def test_settings_that_differ(world):
    stage, optimizer = stage_of(world)
    with pytest.raises(RuntimeError, match="the stages of a pipeline have different settings: rank 0 has"):
        dist_agc.attach(stage, optimizer, clipping_threshold=0.01 + world.rank, pipeline=dist.group.WORLD)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"during_backward": True}, ValueError, "during_backward=True is not for a pipeline"),
        ({"on_nonfinite": "raise"}, ValueError, "on_nonfinite='raise' is not for a pipeline"),
        ({"pipeline": "pp"}, TypeError, "pipeline must be the torch.distributed process group .* got str"),
    ],
)
def test_what_a_pipeline_cannot_have(world, options, kind, said):
    stage, optimizer = stage_of(world)
    with pytest.raises(kind, match=said):
        dist_agc.attach(stage, optimizer, **{"pipeline": dist.group.WORLD, **options})
    assert not optimizer._optimizer_step_pre_hooks


def test_a_pipeline_of_one_rank_is_none(world):
    alone = [dist.new_group([rank]) for rank in range(world.size)][world.rank]
    stage, optimizer = stage_of(world)
    with pytest.raises(ValueError, match="matches no parameter; near names"):
        dist_agc.attach(stage, optimizer, pipeline=alone, exclude=("2.*",))
    with dist_agc.attach(stage, optimizer, pipeline=alone) as hook:
        optimizer.step()
        assert hook.stats.units == 8


def test_ranks_of_one_stage_are_no_pipeline(world):
    """Each of them would count all of it."""
    stage, optimizer = stage_of(world)
    sharded = nn.parallel.DistributedDataParallel(stage)
    with pytest.raises(ValueError, match="shall hold different stages of a pipeline, and parameter '0.weight' of one"):
        dist_agc.attach(sharded, optimizer, pipeline=dist.group.WORLD)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_warning_that_is_an_error_on_one_stage(world):
    stage, optimizer = stage_of(world)
    if world.rank == 1:
        nn.init.zeros_(stage[1].weight)
        with pytest.raises(UserWarning, match="are all zero now"):
            dist_agc.attach(stage, optimizer, pipeline=dist.group.WORLD)
    else:
        with pytest.raises(RuntimeError, match="on no stage of the pipeline, because of rank 1: the weights of"):
            dist_agc.attach(stage, optimizer, pipeline=dist.group.WORLD)
