"""One process: training against the oracle, the handle, optimizers, scalers, sparse and odd gradients, statistics."""

import copy
import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_agc
import helpers
import models
import oracle
from dist_agc.engine import execution

STEPS = 4
LR = 0.1


def backward(model: nn.Module, step: int = 0, *, scale: float = 1.0) -> None:
    (models.loss(model, *models.batch(step)) * scale).backward()


def train_reference(twin: nn.Module, threshold: Any = models.THRESHOLD, **settings: Any) -> list[oracle.Reference]:
    batches = [models.batch(step) for step in range(STEPS)]
    rules = oracle.unit_rules(twin)
    references = oracle.train(twin, batches, models.loss, rules, threshold, lr=LR, **settings)
    for reference in references:
        helpers.assert_some_clipped(reference)
    return references


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


class TestTraining:
    """Several optimizer steps against a float64 twin: weights within 1e-5, statistics of every step."""

    @pytest.mark.parametrize("extras", [False, True], ids=["plain", "scalar-and-conv1d"])
    def test_attach(self, extras: bool) -> None:
        model = models.awkward(scalar=extras, conv1d=extras)
        twin = models.awkward(scalar=extras, conv1d=extras, dtype=torch.float64)
        references = train_reference(twin)
        optimizer = sgd(model)
        hook = dist_agc.attach(model, optimizer, clipping_threshold=models.THRESHOLD)
        assert not hook.stats
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            assert hook.stats is not None
            helpers.assert_stats(hook.stats, references[step], tolerance=1e-4)
        assert helpers.worst_distance(helpers.full_weights(model), helpers.full_weights(twin)) <= 1e-5

    def test_apply_agc(self) -> None:
        model, twin = models.awkward(), models.awkward(dtype=torch.float64)
        references = train_reference(twin, eps=1e-2, exclude=("head.bias", "conv.weight", "conv.bias"))
        optimizer = sgd(model)
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, step)
            stats = helpers.agc(model, models.THRESHOLD, eps=1e-2, exclude=("head.bias", "conv.*"))
            optimizer.step()
            helpers.assert_stats(stats, references[step], tolerance=1e-4)
        assert helpers.worst_distance(helpers.full_weights(model), helpers.full_weights(twin)) <= 1e-5

    def test_clipper_and_apply_agc_and_attach_are_one_thing(self) -> None:
        results = []
        for way in range(3):
            model = models.awkward()
            backward(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            if way == 0:
                stats = dist_agc.apply_agc(model, models.THRESHOLD)
            elif way == 1:
                stats = dist_agc.Clipper(model, dist_agc.AGCConfig(clipping_threshold=models.THRESHOLD)).clip()
            else:
                hook = dist_agc.attach(model, optimizer, dist_agc.AGCConfig(clipping_threshold=models.THRESHOLD))
                optimizer.step()
                stats = hook.stats
            assert stats is not None
            results.append((stats.as_dict(per_parameter=True), helpers.full_grads(model)))
        for stats, grads in results[1:]:
            assert stats == results[0][0]
            assert all(torch.equal(grads[name], grad) for name, grad in results[0][1].items())

    def test_accumulated_gradients_are_clipped_once(self) -> None:
        """Two backwards, one step: the sum is judged, not its parts."""
        model = models.awkward()
        optimizer = sgd(model)
        hook = dist_agc.attach(model, optimizer, clipping_threshold=models.THRESHOLD)
        backward(model, 0)
        one = helpers.full_grads(model)
        backward(model, 1)
        rules = oracle.unit_rules(model)
        expected = helpers.reference(model, rules, models.THRESHOLD)
        assert expected.grads["uneven.weight"].norm() != one["uneven.weight"].norm()
        optimizer.step()
        helpers.assert_clipped(model, hook.stats, expected)


class TestHandle:
    def test_stats_and_remove(self) -> None:
        model = models.awkward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        hook = dist_agc.attach(model, optimizer, clipping_threshold=models.THRESHOLD)
        backward(model)
        raw = helpers.full_grads(model)
        optimizer.step()
        first = hook.stats
        assert first is not None and int(first.clipped_units) > 0
        hook.remove()
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        assert helpers.worst_relative_error(helpers.full_grads(model), raw) == 0.0
        again = dist_agc.attach(model, optimizer, clipping_threshold=models.THRESHOLD)
        optimizer.step()
        assert again.stats is not None
        assert again.stats.as_dict() == first.as_dict()

    def test_context_manager(self) -> None:
        model = models.awkward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with pytest.raises(KeyError), dist_agc.attach(model, optimizer, clipping_threshold=1e-3):
            raise KeyError
        backward(model)
        raw = helpers.full_grads(model)
        optimizer.step()
        assert helpers.worst_relative_error(helpers.full_grads(model), raw) == 0.0

    def test_several_optimizers(self) -> None:
        """Every optimizer clips what it holds; the statistics cover the whole step."""
        model = models.awkward(scalar=True)
        rules = oracle.unit_rules(model)
        parameters = list(model.parameters())
        optimizers = [torch.optim.SGD(parameters[:9], lr=0.0), torch.optim.Adam(parameters[9:], lr=0.0)]
        hook = dist_agc.attach(model, optimizers, clipping_threshold=models.THRESHOLD)
        for step in range(2):
            model.zero_grad()
            backward(model, step)
            expected = helpers.reference(model, rules, models.THRESHOLD)
            for optimizer in optimizers:
                optimizer.step()
            helpers.assert_clipped(model, hook.stats, expected)

    def test_parameters_outside_the_optimizer_are_left_alone(self) -> None:
        model = models.awkward()
        held = [p for name, p in model.named_parameters() if not name.startswith("conv")]
        optimizer = torch.optim.SGD(held, lr=0.0)
        dist_agc.attach(model, optimizer, clipping_threshold=1e-3)
        backward(model)
        raw = helpers.full_grads(model)
        optimizer.step()
        after = helpers.full_grads(model)
        assert torch.equal(after["conv.weight"], raw["conv.weight"])
        assert not torch.equal(after["deconv.weight"], raw["deconv.weight"])

    def test_an_optimizer_with_parameters_of_two_models(self) -> None:
        model, other = models.awkward(), models.awkward(seed=1)
        optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.0)
        with pytest.warns(UserWarning, match="does not clip 21 tensors"):
            hook = dist_agc.attach(model, optimizer, clipping_threshold=models.THRESHOLD)
        backward(model)
        backward(other)
        raw = helpers.full_grads(other)
        expected = helpers.reference(model, oracle.unit_rules(model), models.THRESHOLD)
        optimizer.step()
        helpers.assert_clipped(model, hook.stats, expected)
        assert helpers.worst_relative_error(helpers.full_grads(other), raw) == 0.0


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.05, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_attach_equals_clipping_by_hand(kind: str) -> None:
    """For every optimizer: hooked, bitwise the same weights as apply_agc before each step."""
    hooked, by_hand = models.awkward(), models.awkward()
    one, two = OPTIMIZERS[kind](hooked.parameters()), OPTIMIZERS[kind](by_hand.parameters())
    hook = dist_agc.attach(hooked, one, clipping_threshold=models.THRESHOLD)
    for step in range(3):
        for model, optimizer in ((hooked, one), (by_hand, two)):
            optimizer.zero_grad()
            backward(model, step)
            if model is by_hand:
                stats = helpers.agc(model, models.THRESHOLD)
                assert 0 < int(stats.clipped_units) < stats.units
            optimizer.step()
    assert hook.stats is not None
    for (name, a), (_, b) in zip(hooked.named_parameters(), by_hand.named_parameters(), strict=True):
        assert torch.equal(a, b), name


class TestGradScaler:
    """A loss scale is divided out before the threshold is judged, whoever unscales: the scaler or the optimizer."""

    SCALE = 1024.0

    def scaler(self) -> torch.amp.GradScaler:  # type: ignore[name-defined]
        return torch.amp.GradScaler("cpu", init_scale=self.SCALE, growth_interval=1000)  # type: ignore[attr-defined]

    @pytest.mark.parametrize("unscale_first", [True, False])
    @pytest.mark.parametrize("kind", ["sgd", "sgd-fused", "adam", "adamw-fused"])
    def test_training_equals_training_without_a_scaler(self, kind: str, unscale_first: bool) -> None:
        """A power of two scales exactly, so the weights agree to rounding."""
        plain, scaled = models.awkward(), models.awkward()
        one, two = OPTIMIZERS[kind](plain.parameters()), OPTIMIZERS[kind](scaled.parameters())
        hook_one = dist_agc.attach(plain, one, clipping_threshold=models.THRESHOLD)
        hook_two = dist_agc.attach(scaled, two, clipping_threshold=models.THRESHOLD)
        scaler = self.scaler()
        for step in range(3):
            one.zero_grad()
            two.zero_grad()
            backward(plain, step)
            scaler.scale(models.loss(scaled, *models.batch(step))).backward()
            if unscale_first:
                scaler.unscale_(two)
            one.step()
            scaler.step(two)
            scaler.update()
            assert hook_one.stats is not None and hook_two.stats is not None
            assert 0 < int(hook_one.stats.clipped_units) < hook_one.stats.units
            assert hook_two.stats.as_dict() == pytest.approx(hook_one.stats.as_dict(), rel=1e-5)
        assert scaler.get_scale() == self.SCALE
        assert helpers.worst_distance(helpers.full_weights(scaled), helpers.full_weights(plain)) <= 1e-5

    @pytest.mark.parametrize("kind", ["sgd", "adamw-fused"])
    def test_an_overflow_is_still_seen_and_skips_the_step(self, kind: str) -> None:
        model = models.awkward()
        optimizer = OPTIMIZERS[kind](model.parameters())
        dist_agc.attach(model, optimizer, clipping_threshold=models.THRESHOLD)
        scaler = self.scaler()
        before = helpers.full_weights(model)
        scaler.scale(models.loss(model, *models.batch(0))).backward()
        assert model.conv.weight.grad is not None
        model.conv.weight.grad[1, 2] = math.inf
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == self.SCALE / 2
        after = helpers.full_weights(model)
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_apply_agc_after_unscale(self) -> None:
        model = models.awkward()
        optimizer = sgd(model)
        scaler = self.scaler()
        scaler.scale(models.loss(model, *models.batch(0))).backward()
        scaler.unscale_(optimizer)
        expected = helpers.reference(model, oracle.unit_rules(model), models.THRESHOLD)
        helpers.assert_clipped(model, helpers.agc(model, models.THRESHOLD), expected)

    def test_scaled_gradients_keep_their_scale(self) -> None:
        """Clipper's own argument, which integrations use: judged as if divided, changed in place."""
        model = models.awkward()
        backward(model, scale=self.SCALE)
        expected = helpers.reference(
            model, oracle.unit_rules(model), models.THRESHOLD, loss_scale=self.SCALE, exclude=("head.bias",)
        )
        clipper = dist_agc.Clipper(model, clipping_threshold=models.THRESHOLD, exclude="head.bias")
        stats = clipper.clip(grad_scale=torch.tensor(self.SCALE))
        helpers.assert_clipped(model, stats, expected)


class TestGroups:
    """``param_group["clipping_threshold"]``, at any time."""

    def setup_method(self) -> None:
        self.model = models.awkward()
        self.rules = oracle.unit_rules(self.model)
        body = [p for name, p in self.model.named_parameters() if name.startswith(("conv", "deconv"))]
        held = {id(p) for p in body}
        rest = [p for p in self.model.parameters() if id(p) not in held]
        self.optimizer = torch.optim.SGD([{"params": body}, {"params": rest}], lr=0.0)
        self.hook = dist_agc.attach(self.model, self.optimizer, clipping_threshold=models.THRESHOLD)

    def check(self, body: float | None, rest: float | None) -> None:
        self.model.zero_grad()
        backward(self.model)
        thresholds = {name: body if name.startswith(("conv", "deconv")) else rest for name in self.rules}
        expected = helpers.reference(self.model, self.rules, thresholds)
        self.optimizer.step()
        helpers.assert_clipped(self.model, self.hook.stats, expected)

    def test_changed_between_steps(self) -> None:
        groups = self.optimizer.param_groups
        self.check(models.THRESHOLD, models.THRESHOLD)
        groups[0]["clipping_threshold"] = 0.9
        self.check(0.9, models.THRESHOLD)
        groups[1]["clipping_threshold"] = 1.5
        self.check(0.9, 1.5)
        groups[0]["clipping_threshold"] = None
        self.check(None, 1.5)
        groups[0]["clipping_threshold"] = 0.05
        groups[1]["clipping_threshold"] = None
        self.check(0.05, None)
        del groups[0]["clipping_threshold"], groups[1]["clipping_threshold"]
        self.check(models.THRESHOLD, models.THRESHOLD)

    def test_none_keeps_every_bit(self) -> None:
        self.optimizer.param_groups[0]["clipping_threshold"] = None
        self.optimizer.param_groups[1]["clipping_threshold"] = 1e-6
        backward(self.model)
        raw = helpers.full_grads(self.model)
        self.optimizer.step()
        assert torch.equal(helpers.full_grads(self.model)["conv.weight"], raw["conv.weight"])

    def test_an_ordinary_scheduler_drives_it(self) -> None:
        self.optimizer.param_groups[0]["clipping_threshold"] = 1.0
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        for factor in (1.0, 0.5, 0.25):
            self.optimizer.param_groups[0]["clipping_threshold"] = factor
            self.check(factor, models.THRESHOLD)
            scheduler.step()

    def test_it_survives_a_state_dict(self) -> None:
        self.optimizer.param_groups[0]["clipping_threshold"] = 0.9
        state = copy.deepcopy(self.optimizer.state_dict())
        self.optimizer.param_groups[0]["clipping_threshold"] = 0.1
        with pytest.warns(UserWarning, match="clipping_threshold of 0.9 from the checkpoint"):
            self.optimizer.load_state_dict(state)
        self.check(0.9, models.THRESHOLD)

    def test_an_added_group(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        optimizer = torch.optim.SGD(model[0].parameters(), lr=0.0)
        hook = dist_agc.attach(model, optimizer, clipping_threshold=0.01)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert hook.stats is not None and set(hook.stats.per_parameter) == {"0.weight", "0.bias"}
        optimizer.add_param_group({"params": list(model[1].parameters()), "clipping_threshold": 0.02})
        expected = helpers.reference(
            model, oracle.unit_rules(model), {n: 0.01 if n < "1" else 0.02 for n in oracle.unit_rules(model)}
        )
        optimizer.step()
        assert helpers.worst_relative_error(helpers.full_grads(model), expected.grads) <= 1e-6
        assert set(hook.stats.per_parameter) == {"0.weight", "0.bias", "1.weight", "1.bias"}


class TestSparse:
    """Gradients of ``Embedding(sparse=True)``: rows that were not looked up have no gradient and are not clipped."""

    def model(self, *, repeats: bool) -> nn.Sequential:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
        tokens = torch.tensor([1, 5, 5, 7, 1, 5] if repeats else [1, 5, 7])
        weights = torch.linspace(0.5, 3.0, len(tokens))[:, None]
        (model(tokens) * weights).sum().backward()
        return model

    @pytest.mark.parametrize("coalesced", [True, False])
    def test_parity(self, coalesced: bool) -> None:
        model = self.model(repeats=True)
        embedding = model[0].weight
        assert isinstance(embedding, nn.Parameter) and embedding.grad is not None
        assert not embedding.grad.is_coalesced()
        if coalesced:
            embedding.grad = embedding.grad.coalesce()
        rules = oracle.unit_rules(model)
        dense = embedding.grad.to_dense()
        ratios = sorted(
            float(g.norm() / w.norm()) for g, w in zip(dense, embedding.detach(), strict=True) if g.norm() > 0
        )
        threshold = (ratios[0] + ratios[1]) / 2
        expected = helpers.reference(model, rules, threshold)
        assert expected.per_parameter["0.weight"].clipped_units == 2
        stats = helpers.agc(model, threshold)
        helpers.assert_clipped(model, stats, expected)
        assert embedding.grad.is_sparse
        helpers.agc(model, threshold)
        assert helpers.worst_relative_error(helpers.full_grads(model), expected.grads) <= 1e-6

    def test_training_with_sparse_adam(self) -> None:
        model = self.model(repeats=True)
        dense = [p for p in model[1].parameters()]
        optimizers = [torch.optim.SparseAdam(list(model[0].parameters()), lr=0.1), torch.optim.Adam(dense, lr=0.1)]
        hook = dist_agc.attach(model, optimizers, clipping_threshold=0.1)
        expected = helpers.reference(model, oracle.unit_rules(model), 0.1)
        for optimizer in optimizers:
            optimizer.step()
        helpers.assert_clipped(model, hook.stats, expected)

    def test_excluded_sparse_gradients_still_count_in_the_norm(self) -> None:
        model = self.model(repeats=True)
        expected = helpers.reference(model, oracle.unit_rules(model), 30.0, exclude=("0.weight",))
        helpers.assert_clipped(model, helpers.agc(model, 30.0, exclude="0.*"), expected)

    def test_embeddings_that_are_added_share_the_memory_of_their_gradients(self) -> None:
        """Autograd hands both the same values: scaled in place, they would be scaled twice."""
        torch.manual_seed(4)
        model = nn.ModuleDict({"token": nn.Embedding(9, 4, sparse=True), "place": nn.Embedding(9, 4, sparse=True)})
        embedded = model["token"](torch.tensor([1, 5, 7])) + model["place"](torch.tensor([1, 5, 7]))
        (embedded * torch.tensor([[0.5], [1.5], [30.0]])).sum().backward()
        token, place = (p.grad for p in model.parameters())
        assert token is not None and place is not None
        assert token._values().data_ptr() == place._values().data_ptr(), "else the case shows nothing"
        expected = helpers.reference(model, oracle.unit_rules(model), 2.0)
        helpers.assert_clipped(model, helpers.agc(model, 2.0), expected)

    def test_a_sparse_gradient_without_rows(self) -> None:
        model = self.model(repeats=False)
        embedding = model[0].weight
        assert isinstance(embedding, nn.Parameter)
        embedding.grad = torch.zeros(9, 4).to_sparse(1)
        expected = helpers.reference(model, oracle.unit_rules(model), 0.1)
        assert expected.per_parameter["0.weight"].grad_norm == 0.0
        helpers.assert_clipped(model, helpers.agc(model, 0.1), expected)

    def test_a_sparse_gradient_with_a_bad_row(self) -> None:
        for mode in ("keep", "zero"):
            model = self.model(repeats=True)
            embedding = model[0].weight
            assert isinstance(embedding, nn.Parameter) and embedding.grad is not None
            embedding.grad._values()[0] = math.nan
            expected = helpers.reference(model, oracle.unit_rules(model), 0.5, on_nonfinite=mode)
            stats = helpers.agc(model, 0.5, on_nonfinite=mode)
            assert expected.nonfinite_units == 1
            helpers.assert_clipped(model, stats, expected)


class TestUntouched:
    def test_gradients_keep_their_storage(self) -> None:
        model = models.awkward(scalar=True, conv1d=True)
        backward(model)
        grads, where = [p.grad for p in model.parameters()], helpers.storages(model)
        helpers.agc(model, models.THRESHOLD)
        assert helpers.storages(model) == where
        assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))

    def test_excluded_and_gradientless_parameters(self) -> None:
        """What has a gradient is clipped even where it is frozen, since an optimizer would step it."""
        model = models.awkward()
        backward(model)
        model.frozen.weight.grad = torch.full_like(model.frozen.weight, 7.0)  # left over from before it was frozen
        raw = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        weights = [p.detach().clone() for p in model.parameters()]
        stats = helpers.agc(model, 1e-4, exclude=("conv.*", "*.bias"))
        for name, parameter in model.named_parameters():
            if name.startswith("conv.") or name.endswith("bias"):
                assert raw[name] is None or torch.equal(parameter.grad, raw[name]), name  # type: ignore[arg-type]
            elif name.startswith("dead"):
                assert parameter.grad is None
            else:
                assert not torch.equal(parameter.grad, raw[name]), name  # type: ignore[arg-type]
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
        assert set(stats.per_parameter) == {
            name for name, p in model.named_parameters() if not name.startswith("conv.") and not name.endswith("bias")
        }
        assert "frozen.weight" in stats.per_parameter
        assert stats.units == 11 + 10 + 1 + 3 + 7 + 7 + 2 + 1 + 8 + 5
        norm = torch.linalg.vector_norm(model.frozen.weight.grad, dim=1)
        limit = 1e-4 * torch.linalg.vector_norm(model.frozen.weight, dim=1).clamp(min=1e-3)
        torch.testing.assert_close(norm, limit, rtol=1e-5, atol=0)

    def test_frozen_parameters_without_a_gradient_are_left_out(self) -> None:
        model = models.awkward()
        backward(model)
        stats = helpers.agc(model, 1e-4)
        assert model.frozen.weight.grad is None
        assert set(stats.per_parameter) == {name for name, p in model.named_parameters() if p.requires_grad}

    def test_exclusion_is_by_name_not_by_order(self) -> None:
        """timm leaves out the last two parameters; here the head is defined first."""
        model = nn.Sequential()
        model.add_module("head", nn.Linear(3, 3))
        model.add_module("body", nn.Linear(3, 3))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        helpers.agc(model, 1e-3, exclude=("head.*",))
        grads = helpers.full_grads(model)
        assert bool((grads["head.weight"] == 1).all()) and bool((grads["head.bias"] == 1).all())
        assert bool((grads["body.weight"] < 1).all()) and bool((grads["body.bias"] < 1).all())

    def test_freezing_and_unfreezing_between_steps(self) -> None:
        model = models.awkward()
        rules = oracle.unit_rules(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        hook = dist_agc.attach(model, optimizer, clipping_threshold=models.THRESHOLD)
        for frozen in (["frozen"], ["frozen", "conv"], [], ["frozen"]):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.split(".")[0] not in frozen)
            model.zero_grad()
            backward(model)
            expected = helpers.reference(model, rules, models.THRESHOLD)
            optimizer.step()
            helpers.assert_clipped(model, hook.stats, expected)

    def test_a_gradient_that_appears_later(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
        clipper = dist_agc.Clipper(model, clipping_threshold=0.6)
        rules = oracle.unit_rules(model)
        x = torch.linspace(-1, 1, 8).reshape(2, 4)
        for used in ([0], [0, 1], [1], [0]):
            model.zero_grad()
            sum(model[i](x).square().mean() for i in used).backward()  # type: ignore[union-attr]
            expected = helpers.reference(model, rules, 0.6)
            stats = clipper.clip()
            helpers.assert_clipped(model, stats, expected)

    def test_no_grad_graph_is_left_behind(self) -> None:
        model = models.awkward()
        backward(model)
        stats = helpers.agc(model, models.THRESHOLD)
        assert not stats.grad_norm.requires_grad
        assert all(p.grad is None or not p.grad.requires_grad for p in model.parameters())


class TestStatistics:
    def test_as_dict(self) -> None:
        model = models.awkward()
        backward(model)
        stats = helpers.agc(model, models.THRESHOLD, exclude="head.*")
        plain = stats.as_dict()
        assert all(type(value) is float for value in plain.values())
        assert {"agc/units", "agc/clipped_units", "agc/clip_fraction", "agc/nonfinite_units", "agc/grad_norm"} <= set(
            plain
        )
        assert plain["agc/clip_fraction"] == pytest.approx(float(stats.clip_fraction))
        assert plain["agc/max_ratio"] == pytest.approx(float(stats.max_ratio))
        detailed = stats.as_dict(per_parameter=True)
        assert detailed["agc/clip_fraction/uneven.weight"] == float(stats.per_parameter["uneven.weight"].clip_fraction)
        assert "agc/clip_fraction/head.bias" not in detailed
        assert f"clipped_units={int(stats.clipped_units)}" in repr(stats)

    def test_grad_norm_is_torchs(self) -> None:
        """Of every gradient before clipping, excluded ones too: nobody needs clip_grad_norm_ for logging."""
        model = models.awkward()
        backward(model)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        total = float(torch.nn.utils.get_total_norm(grads))
        stats = helpers.agc(model, models.THRESHOLD, exclude=("head.*", "conv.*"))
        assert float(stats.grad_norm) == pytest.approx(total, rel=1e-6)
        with pytest.raises(KeyError):
            stats.per_parameter["head.bias"]

    def test_stats_are_of_their_step(self) -> None:
        """Buffers are reused from step to step; what a user kept does not change under them."""
        model = models.awkward()
        optimizer = sgd(model)
        hook = dist_agc.attach(model, optimizer, clipping_threshold=models.THRESHOLD)
        kept, seen = [], []
        for step in range(3):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            assert hook.stats is not None
            kept.append(hook.stats)
            seen.append(hook.stats.as_dict(per_parameter=True))
        assert seen[0] != seen[1] != seen[2]
        assert [stats.as_dict(per_parameter=True) for stats in kept] == seen

    def test_dry_run_measures_and_clips_nothing(self) -> None:
        model = models.awkward()
        backward(model)
        raw = helpers.full_grads(model)
        expected = helpers.reference(model, oracle.unit_rules(model), models.THRESHOLD)
        stats = helpers.agc(model, models.THRESHOLD, dry_run=True)
        helpers.assert_some_clipped(expected)
        helpers.assert_stats(stats, expected)
        assert helpers.worst_relative_error(helpers.full_grads(model), raw) == 0.0

    def test_without_statistics_the_gradients_are_the_same(self) -> None:
        model = models.awkward()
        backward(model)
        expected = helpers.reference(model, oracle.unit_rules(model), models.THRESHOLD)
        helpers.assert_some_clipped(expected)
        assert dist_agc.apply_agc(model, models.THRESHOLD, statistics=False) is None
        assert helpers.worst_relative_error(helpers.full_grads(model), expected.grads) <= 1e-6

    def test_weight_norm_interval(self) -> None:
        """Between two measurements the old weight norms are used, and only those."""
        model = models.awkward()
        clipper = dist_agc.Clipper(model, clipping_threshold=models.THRESHOLD, weight_norm_interval=3)
        rules = oracle.unit_rules(model)
        weights: dict[str, Tensor] = {}
        for step in range(7):
            if step % 3 == 0 or step == 1:
                weights = helpers.full_weights(model)
            model.zero_grad()
            backward(model, step)
            expected = oracle.clip(weights, helpers.full_grads(model), rules, models.THRESHOLD)
            stats = clipper.clip()
            helpers.assert_clipped(model, stats, expected)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)


class TestModels:
    """What counts as a model, and what names its parameters have."""

    def test_iterables(self) -> None:
        results = []
        for make in (lambda m: list(m.parameters()), lambda m: m.parameters(), lambda m: m.named_parameters()):
            model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
            helpers.noisy_grads(model)
            threshold = helpers.median_threshold(model, oracle.unit_rules(model))
            expected = helpers.reference(model, oracle.unit_rules(model), threshold)
            stats = helpers.agc(make(model), threshold)
            helpers.assert_some_clipped(expected)
            assert helpers.worst_relative_error(helpers.full_grads(model), expected.grads) <= 1e-6
            results.append((stats.units, int(stats.clipped_units), float(stats.grad_norm)))
        assert len(set(results)) == 1

    def test_a_single_parameter(self) -> None:
        parameter = nn.Parameter(torch.ones(2, 2))
        parameter.grad = torch.ones(2, 2)
        assert int(helpers.agc(parameter, 0.5).clipped_units) == 2

    def test_named_pairs_can_be_excluded_by_name(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        helpers.noisy_grads(model)
        stats = helpers.agc(model.named_parameters(), 1e-3, exclude="1.*")
        assert set(stats.per_parameter) == {"0.weight", "0.bias"}

    def test_duplicates_in_a_list_count_once(self) -> None:
        model = nn.Linear(4, 3)
        helpers.noisy_grads(model)
        expected = helpers.reference(model, oracle.unit_rules(model), 1e-2)
        stats = helpers.agc([*model.parameters(), *model.parameters()], 1e-2)
        assert stats.units == expected.units == 4
        assert helpers.worst_relative_error(helpers.full_grads(model), expected.grads) <= 1e-6

    def test_names_are_the_users_under_compile_and_data_parallel(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        names = {name for name, _ in model.named_parameters()}
        helpers.noisy_grads(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DataParallel and compile announce deprecations on import
            wrappers = [torch.compile(model), nn.DataParallel(model), nn.DataParallel(torch.compile(model))]  # type: ignore[arg-type]
        for wrapped in wrappers:
            stats = helpers.agc(wrapped, 1.0, exclude=("1.bias",))
            assert set(stats.per_parameter) == names - {"1.bias"}

    def test_a_users_own_module_called_module(self) -> None:
        """Only wrappers lose their prefix."""
        model = nn.Sequential()
        model.add_module("module", nn.Linear(2, 2))
        helpers.noisy_grads(model)
        assert set(helpers.agc(model, 1.0).per_parameter) == {"module.weight", "module.bias"}

    def test_a_model_changed_after_the_first_call(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3))
        helpers.noisy_grads(model)
        assert helpers.agc(model, 1.0).units == 4
        model.append(nn.Linear(3, 2))
        helpers.noisy_grads(model)
        assert helpers.agc(model, 1.0).units == 7
        model[0] = nn.Linear(4, 5)
        helpers.noisy_grads(model)
        threshold = helpers.median_threshold(model, oracle.unit_rules(model))
        expected = helpers.reference(model, oracle.unit_rules(model), threshold)
        helpers.assert_clipped(model, helpers.agc(model, threshold), expected)

    def test_other_settings_on_the_next_call(self) -> None:
        for threshold in (0.5, 0.1, 2.0):
            model = models.awkward()
            for exclude in ((), ("conv.*",)):
                model.zero_grad()
                backward(model)
                names = [n for n in oracle.unit_rules(model) if exclude and n.startswith("conv.")]
                expected = helpers.reference(model, oracle.unit_rules(model), threshold, exclude=names)
                helpers.assert_clipped(model, helpers.agc(model, threshold, exclude=exclude), expected)

    def test_a_scheduled_threshold_plans_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made, plan = [], execution.Plan
        monkeypatch.setattr(execution, "Plan", lambda *a: made.append(1) or plan(*a))
        model = models.awkward()
        for step in range(4):
            model.zero_grad()
            backward(model)
            threshold = 0.1 * 2**step
            expected = helpers.reference(model, oracle.unit_rules(model), threshold)
            helpers.assert_clipped(model, helpers.agc(model, threshold), expected)
        assert len(made) == 1

    def test_no_holders_are_not_all_holders(self) -> None:
        model = nn.Linear(3, 2)
        helpers.noisy_grads(model)
        raw = helpers.full_grads(model)
        clipper = dist_agc.Clipper(model, clipping_threshold=1e-3)
        for holders, units in (([], 0), (None, 3), ([], 0)):
            stats = clipper.clip(holders)
            assert stats is not None and (stats.units, int(stats.clipped_units) > 0) == (units, units > 0)
            assert torch.equal(helpers.full_grads(model)["weight"], raw["weight"]) == (holders == [])
            raw = helpers.full_grads(model)

    def test_a_module_with_two_names_in_one_parent(self) -> None:
        layer = nn.Linear(3, 3)
        model = nn.Sequential(layer, nn.ReLU(), layer)
        helpers.noisy_grads(model)
        raw = helpers.full_grads(model)
        with pytest.warns(UserWarning, match="leaves out every parameter"):
            assert helpers.agc(model, 1e-3, exclude=("2.*",)).units == 0
        assert helpers.worst_relative_error(helpers.full_grads(model), raw) == 0.0

    def test_weights_moved_by_data_or_by_loading(self) -> None:
        """The plan keeps no old storage: new data under the same parameter is what counts."""
        model, other = models.awkward(), models.awkward(seed=9)
        backward(model)
        helpers.agc(model, models.THRESHOLD)
        for move in (lambda: model.load_state_dict(other.state_dict()), lambda: model.double().float()):
            move()
            model.zero_grad()
            backward(model)
            expected = helpers.reference(model, oracle.unit_rules(model), models.THRESHOLD)
            helpers.assert_clipped(model, helpers.agc(model, models.THRESHOLD), expected)

    def test_a_model_whose_dtype_changes(self) -> None:
        model = models.awkward()
        backward(model)
        clipper = dist_agc.Clipper(model, clipping_threshold=models.THRESHOLD)
        clipper.clip()
        model.zero_grad()
        model.bfloat16()
        backward(model)
        expected = helpers.reference(model, oracle.unit_rules(model), models.THRESHOLD)
        stats = clipper.clip()
        helpers.assert_some_clipped(expected)
        assert helpers.worst_relative_error(helpers.full_grads(model), expected.grads) <= 2**-8
        helpers.assert_stats(stats, expected, tolerance=1e-5)

    @pytest.mark.parametrize("make", [lambda: nn.Linear(3, 2), lambda: nn.Sequential(nn.Linear(3, 2))])
    def test_nothing_keeps_a_model_alive(self, make: Callable[[], nn.Module]) -> None:
        """apply_agc keeps its plan with the model; the plan must not keep the model."""
        model = make()
        helpers.noisy_grads(model)
        helpers.agc(model, 1.0)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None

    def test_nothing_keeps_an_optimizer_alive(self) -> None:
        model = models.awkward()
        optimizer = sgd(model)
        hook = dist_agc.attach(model, optimizer)
        gone = weakref.ref(optimizer)
        del hook, optimizer
        gc.collect()
        assert gone() is None

    def test_complex_parameters(self) -> None:
        """The squared absolute value sums over real and imaginary parts; the oracle sees both as plain numbers."""
        weight = torch.randn(4, 3, dtype=torch.complex64)
        grad = torch.randn(4, 3, dtype=torch.complex64) * torch.tensor([0.01, 1.0, 5.0, 0.1])[:, None]
        parameter = nn.Parameter(weight.clone())
        parameter.grad = grad.clone()
        stats = helpers.agc([parameter], 0.5)
        real = torch.view_as_real
        expected = oracle.clip({"w": real(weight)}, {"w": real(grad)}, {"w": oracle.Units((0,))}, 0.5)
        helpers.assert_some_clipped(expected)
        assert helpers.worst_relative_error({"w": real(parameter.grad).double()}, expected.grads) <= 1e-6
        assert int(stats.clipped_units) == expected.clipped_units


def test_an_empty_gradient_may_have_strides_of_zero() -> None:
    """Arithmetic on empty tensors makes them: torch.randn(2, 0, 1) * 4 has strides (0, 1, 0)."""
    empty, full = nn.Parameter(torch.zeros(2, 0, 1)), nn.Parameter(torch.ones(2, 3))
    empty.grad = torch.zeros(2, 0, 1).as_strided((2, 0, 1), (0, 1, 0))
    full.grad = torch.full((2, 3), 8.0)
    stats = dist_agc.apply_agc([("empty", empty), ("full", full)], clipping_threshold=0.01)
    assert stats is not None and stats.clipped_units == stats.units == 2
