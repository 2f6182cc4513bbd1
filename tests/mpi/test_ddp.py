"""DistributedDataParallel: every rank holds whole gradients, so AGC needs no collective at all."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_agc
import helpers
import models
import oracle
from conftest import World

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.filterwarnings("ignore:.*find_unused_parameters")]

STEPS = 4
LR = 0.1


def wrapped(*, extras: bool = False) -> DistributedDataParallel:
    # The dead layer never has a gradient.
    return DistributedDataParallel(models.awkward(scalar=extras, conv1d=extras), find_unused_parameters=True)


def backward(model: nn.Module, world: World, step: int = 0) -> None:
    models.loss(model, *models.batch(step, rank=world.rank, size=world.size)).backward()


def rules() -> dict[str, oracle.Units]:
    return oracle.unit_rules(models.awkward(scalar=True, conv1d=True))


def test_single_clip(world: World) -> None:
    model = wrapped(extras=True)
    backward(model, world)
    expected = helpers.reference(model, rules(), models.THRESHOLD)
    where = helpers.storages(model)
    stats = helpers.agc(model, models.THRESHOLD)
    helpers.assert_clipped(model, stats, expected)
    helpers.assert_equal_everywhere(world, stats)
    assert helpers.storages(model) == where
    assert model.module.dead.weight.grad is None


@pytest.mark.parametrize("attach", [True, False], ids=["attach", "apply_agc"])
def test_training_equals_one_process(world: World, attach: bool) -> None:
    """Four steps against a float64 twin that sees the full batch: weights within 1e-5."""
    model, twin = wrapped(), models.awkward(dtype=torch.float64)
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


def test_no_collectives(world: World) -> None:
    """But for the check at the first call that all ranks are set up alike."""
    model = wrapped()
    backward(model, world)
    clipper = dist_agc.Clipper(model, clipping_threshold=models.THRESHOLD)
    with helpers.collectives() as seen:
        clipper.clip()
    assert not any("reduce" in name for name in seen.counts), seen.counts
    model.zero_grad()
    backward(model, world, 1)
    with helpers.collectives() as seen:
        stats = clipper.clip()
        assert stats is not None and stats.as_dict(per_parameter=True)
    assert seen.counts == {}
    assert 0 < int(stats.clipped_units) < stats.units


def test_accumulation_without_sync(world: World) -> None:
    """Micro-batches under no_sync: local gradients are never clipped, their reduced sum is, once."""
    model, twin = wrapped(), models.awkward(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=models.THRESHOLD)
    with model.no_sync():
        backward(model, world, 0)
    backward(model, world, 1)
    for step in (0, 1):
        models.loss(twin, *models.batch(step)).backward()
    expected = helpers.reference(twin, rules(), models.THRESHOLD)
    optimizer.step()
    helpers.assert_some_clipped(expected)
    got = helpers.full_grads(model)
    assert helpers.worst_distance(got, expected.grads) <= 1e-5
    helpers.assert_stats(hook.stats, expected, tolerance=1e-4)


def test_a_layer_that_one_rank_alone_uses(world: World) -> None:
    """DDP gives its gradient to every rank; a layer that none uses has none."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.mine, self.nobodys = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.shared(x)
            return self.mine(x) if world.rank == 1 else x

    torch.manual_seed(0)
    plain = Routed()
    model = DistributedDataParallel(plain, find_unused_parameters=True)
    expected_rules = oracle.unit_rules(plain)
    clipper = dist_agc.Clipper(model, clipping_threshold=0.2)
    for _ in range(2):
        model.zero_grad()
        model(torch.full((3, 4), 0.5 + world.rank)).square().mean().backward()
        expected = helpers.reference(model, expected_rules, 0.2)
        stats = clipper.clip()
        helpers.assert_clipped(model, stats, expected)
        helpers.assert_equal_everywhere(world, stats)
        assert plain.mine.weight.grad is not None
        assert plain.nobodys.weight.grad is None


def test_sparse_gradients(world: World) -> None:
    """Ranks look up different rows; the reduced gradient has all of them, some twice."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    model = DistributedDataParallel(plain)
    tokens = torch.tensor([1, 5, 5, 2 + world.rank])
    (model(tokens) * torch.linspace(0.5, 3.0, 4)[:, None]).sum().backward()
    embedding = plain[0].weight
    assert isinstance(embedding, nn.Parameter) and embedding.grad is not None and embedding.grad.is_sparse
    expected = helpers.reference(model, oracle.unit_rules(plain), 1.0)
    assert 0 < expected.per_parameter["0.weight"].clipped_units < 9
    stats = helpers.agc(model, 1.0)
    helpers.assert_clipped(model, stats, expected)
    helpers.assert_equal_everywhere(world, stats)


def test_grad_scaler_and_fused_adam(world: World) -> None:
    """Gradients still carry the scale in the hook; weights equal those of training without a scaler."""
    plain, scaled = wrapped(), wrapped()
    one = torch.optim.AdamW(plain.parameters(), lr=0.01, fused=True)
    two = torch.optim.AdamW(scaled.parameters(), lr=0.01, fused=True)
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


def test_names_are_the_users(world: World) -> None:
    model = wrapped()
    backward(model, world)
    stats = helpers.agc(model, models.THRESHOLD, exclude=("head.*", "conv.weight"))
    assert "uneven.weight" in stats.per_parameter
    assert not {"conv.weight", "head.bias", "module.uneven.weight"} & set(stats.per_parameter)
    with pytest.raises(ValueError, match="head.bias"):
        helpers.agc(model, models.THRESHOLD, exclude=("module.head.bias",))
