"""What an optimizer holds changes while it trains: whatever it steps is clipped, or somebody is told."""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_agc
import oracle
from helpers import assert_some_clipped, full_grads, full_weights, noisy_grads, reference, worst_relative_error

THRESHOLD = 0.3


def spread(module: nn.Module, seed: int = 0) -> None:
    """Gradients of many sizes, unit by unit, so that about half of them are clipped."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        size = torch.randn(len(parameter), *[1] * (parameter.ndim - 1), generator=generator).mul(2).exp()
        parameter.grad = (noise * size * 0.2).to(parameter.dtype)


def step_is_clipped(module: nn.Module, optimizer: torch.optim.Optimizer, threshold: float = THRESHOLD) -> Any:
    """One step, whose gradients must be those of the float64 reference."""
    optimizer.zero_grad()
    spread(module)
    expected = reference(module, oracle.unit_rules(module), threshold)
    assert_some_clipped(expected)
    optimizer.step()
    assert set(full_grads(module)) == set(expected.grads)
    assert worst_relative_error(full_grads(module), expected.grads) <= 1e-6
    return expected


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))


@pytest.fixture(autouse=True)
def _every_warning_counts() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ------------------------------------------------------------------ other tensors in the place of the first


def grown_rows(old: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat([old.detach(), old.detach() * 0.5]))


def test_a_parameter_that_is_replaced_in_its_group_by_a_longer_one() -> None:
    """Gaussian splatting densifies so: every tensor of the optimizer becomes another one, all at once."""
    cloud = nn.ParameterDict({"xyz": torch.rand(6, 3) + 0.1, "color": torch.rand(6, 4, 3) + 0.1})
    optimizer = torch.optim.SGD([{"params": [p], "name": name} for name, p in cloud.items()], lr=0.01)
    hook = dist_agc.attach(list(cloud.items()), optimizer, clipping_threshold=THRESHOLD, units={"color": 0})
    for rows in (6, 12, 24):
        assert len(cloud["xyz"]) == rows
        expected = step_is_clipped(cloud, optimizer)
        assert hook.stats.units == expected.units == 2 * rows
        assert set(hook.stats.per_parameter) == {"xyz", "color"}
        for group in optimizer.param_groups:
            group["params"][0] = cloud[group["name"]] = grown_rows(group["params"][0])


def test_a_new_head_in_the_model_and_in_its_group(model: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD)
    step_is_clipped(model, optimizer)
    model[1] = nn.Linear(8, 3)
    optimizer.param_groups[0]["params"][2:] = list(model[1].parameters())
    expected = step_is_clipped(model, optimizer)
    assert hook.stats.units == expected.units == 13


@pytest.mark.parametrize("given", ["module", "list"])
def test_an_added_group(model: nn.Sequential, given: str) -> None:
    """peft adds adapters to a model that trains. Where no model was given, the shape alone says what the units are."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hook = dist_agc.attach(
        model if given == "module" else list(model.named_parameters()), optimizer, clipping_threshold=THRESHOLD
    )
    step_is_clipped(model, optimizer)
    model.add_module("adapter", nn.Linear(5, 4))
    optimizer.add_param_group({"params": list(model[2].parameters())})
    if given == "list":
        with pytest.warns(UserWarning, match=r"has 2 tensors of shape \(4, 5\), \(4,\) since AGC was attached"):
            step_is_clipped(model, optimizer)
    expected = step_is_clipped(model, optimizer)
    assert hook.stats.units == expected.units == 20
    assert ("adapter.weight" if given == "module" else "param_groups.1.0") in hook.stats.per_parameter


def test_what_the_model_does_not_have_is_clipped_by_shape_and_said(model: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD)
    head = nn.Linear(5, 3)
    optimizer.add_param_group({"params": list(head.parameters())})
    both = nn.ModuleList([model, head])
    with pytest.warns(UserWarning, match=r"attach to both: dist_agc.attach\(\[model, module\], optimizer\)") as said:
        step_is_clipped(both, optimizer)
    assert len(said) == 1
    step_is_clipped(both, optimizer)


def test_what_the_model_never_had_is_not_clipped_and_said(model: nn.Sequential) -> None:
    other = nn.Linear(5, 3)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.01)
    with pytest.warns(
        UserWarning, match=r"does not clip 2 tensors of shape \(3, 5\), \(3,\) in the optimizer SGD"
    ) as said:
        dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD)
    assert len(said) == 1
    spread(other)
    before = full_grads(other)
    step_is_clipped(model, optimizer)
    spread(other)
    assert worst_relative_error(full_grads(other), before) == 0


def test_tensors_of_somebody_else_are_an_error_in_the_step(model: nn.Sequential) -> None:
    """A wrapper may flatten what the optimizer holds: nothing is known of it any more."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD)
    step_is_clipped(model, optimizer)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    before = flat.detach().clone()
    for _ in range(2):  # as often as it is tried
        with pytest.raises(ValueError, match=r"steps on 1 tensor of shape \(101,\).*attach\(engine\)"):
            optimizer.step()
    assert torch.equal(flat, before) and torch.equal(flat.grad, torch.ones_like(flat))
    assert hook.steps == 1


def test_masters_in_the_places_of_the_parameters(model: nn.Sequential) -> None:
    """fp32 copies that a wrapper steps on have the shapes of what they stand for."""
    model = model.bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD, exclude="1.bias")
    masters = copy.deepcopy(model).float()
    optimizer.param_groups[0]["params"] = list(masters.parameters())
    for _ in range(2):
        spread(masters)
        rules = oracle.unit_rules(masters)
        expected = oracle.clip(full_weights(masters), full_grads(masters), rules, THRESHOLD, exclude=("1.bias",))
        optimizer.step()
        assert worst_relative_error(full_grads(masters), expected.grads) <= 1e-6
        assert set(hook.stats.per_parameter) == {"0.weight", "0.bias", "1.weight"}


# ------------------------------------------------------------------ the same tensors, otherwise


def doubled(module: nn.Module) -> None:
    module.double()


def grown(module: nn.Module) -> None:
    """As resize_token_embeddings may: another tensor under the same Parameter."""
    for parameter in module.parameters():
        parameter.data = torch.cat([parameter.data, parameter.data * 2])


@pytest.mark.parametrize("change", [doubled, grown])
@pytest.mark.parametrize("way", ["attach", "attach to a list", "Clipper", "apply_agc", "ratios"])
def test_a_parameter_that_changes_its_shape_or_type(
    model: nn.Sequential, change: Callable[..., None], way: str
) -> None:
    """Half of the gradients used to be scaled before the sizes were seen to differ."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    given: Any = list(model.named_parameters()) if way == "attach to a list" else model
    clipper = dist_agc.Clipper(given, clipping_threshold=THRESHOLD)
    if way.startswith("attach"):
        dist_agc.attach(given, optimizer, clipping_threshold=THRESHOLD)
    for changes in (False, True):
        if changes:
            change(model)
        spread(model)
        expected = reference(model, oracle.unit_rules(model), THRESHOLD)
        assert_some_clipped(expected)
        if way == "ratios":
            found = dist_agc.ratios(clipper, [THRESHOLD])
            assert sum(above for (above,) in found.above.values()) == expected.clipped_units
            continue
        if way.startswith("attach"):
            optimizer.step()
        else:
            stats = clipper.clip() if way == "Clipper" else dist_agc.apply_agc(model, THRESHOLD)
            assert stats is not None and stats.units == expected.units
        assert worst_relative_error(full_grads(model), expected.grads) <= 1e-6


@pytest.mark.parametrize("way", ["Clipper", "apply_agc"])
def test_a_new_module_without_an_optimizer(model: nn.Sequential, way: str) -> None:
    clipper = dist_agc.Clipper(model, clipping_threshold=THRESHOLD)
    for _ in range(2):
        spread(model)
        expected = reference(model, oracle.unit_rules(model), THRESHOLD)
        stats = clipper.clip() if way == "Clipper" else dist_agc.apply_agc(model, THRESHOLD)
        assert stats is not None and stats.units == expected.units
        assert worst_relative_error(full_grads(model), expected.grads) <= 1e-6
        model[1] = nn.Linear(8, 3)


# ------------------------------------------------------------------ several models


def two_models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ConvTranspose1d(8, 5, 2)), nn.Sequential(nn.Linear(5, 4))


@pytest.mark.parametrize("way", ["attach", "Clipper", "apply_agc"])
def test_a_list_of_models(way: str) -> None:
    a, b = two_models()
    both = nn.ModuleList([a, b])
    rules = oracle.unit_rules(both)
    for _ in range(2):
        spread(both)
        expected = reference(both, rules, THRESHOLD)
        assert_some_clipped(expected)
        if way == "attach":
            optimizer = torch.optim.SGD(both.parameters(), lr=0.01)
            hook = dist_agc.attach([a, b], optimizer, clipping_threshold=THRESHOLD)
            optimizer.step()
            stats: Any = hook.stats
        else:
            stats = dist_agc.Clipper([a, b], clipping_threshold=THRESHOLD).clip() if way == "Clipper" else None
            stats = stats or dist_agc.apply_agc([a, b], THRESHOLD)
        assert worst_relative_error(full_grads(both), expected.grads) <= 1e-6
        # 0.weight is in both, 1.weight in the first alone.
        assert set(stats.per_parameter) == {"0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias", "1.weight", "1.bias"}


def test_patterns_over_a_list_of_models() -> None:
    a, b = two_models()
    rows = {row.name: row for row in dist_agc.units([a, b])}
    assert rows["1.weight"].dims == (1,), "what the modules say is known"
    clipper = dist_agc.Clipper([a, b], exclude=("0.1.*", "1.0.bias"), units={"0.weight": ()})
    excluded = {p.name for p, rule in zip(clipper.parameters, clipper.rules, strict=True) if rule is None}
    assert excluded == {"1.weight", "1.bias", "1.0.bias"}
    whole = {p.name for p, rule in zip(clipper.parameters, clipper.rules, strict=True) if rule and rule.count == 1}
    assert whole == {"0.0.weight", "0.0.bias", "1.0.weight"}


def test_tied_weights_of_two_models_count_once() -> None:
    a, b = two_models()
    b.add_module("tied", a[0])  # type: ignore[index]
    assert dist_agc.Clipper([a, b]).clip().units == 8 + 1 + 5 + 1 + 4 + 1  # type: ignore[union-attr]


def test_optimizers_that_share_a_trunk() -> None:
    """Its parameters are in both, and in the statistics once, as the first step of the two found them."""
    trunk, heads = nn.Linear(6, 8), [nn.Linear(8, 5), nn.Linear(8, 3)]
    net = nn.ModuleList([trunk, *heads])
    optimizers = [torch.optim.SGD([*trunk.parameters(), *head.parameters()], lr=0.0) for head in heads]
    hook = dist_agc.attach(net, optimizers, clipping_threshold=THRESHOLD, exclude="2.bias")
    rules = oracle.unit_rules(net)
    for steps in (1, 2):
        spread(net)
        expected = oracle.clip(full_weights(net), full_grads(net), rules, THRESHOLD, exclude=("2.bias",))
        for optimizer in optimizers:
            optimizer.step()
        assert worst_relative_error(full_grads(net), expected.grads) <= 1e-6
        assert (hook.stats.units, int(hook.stats.clipped_units)) == (expected.units, expected.clipped_units)
        assert float(hook.stats.grad_norm) == pytest.approx(expected.grad_norm, rel=1e-6)
        assert hook.steps == steps


# ------------------------------------------------------------------ classes of optimizers


class Preconditioned(torch.optim.SGD):
    """Changes gradients in its own step and then calls that of its base class, whose hooks run once more."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(100)
        return super().step(closure)


@pytest.mark.parametrize("base_was_used", [True, False])
def test_a_class_that_calls_the_step_of_its_base(model: nn.Sequential, base_was_used: bool) -> None:
    class Own(Preconditioned):
        pass

    if base_was_used:
        for kind in (torch.optim.SGD, Preconditioned):
            kind(nn.Linear(2, 2).parameters(), lr=0.1)
    optimizer = Own(model.parameters(), lr=0.0)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD)
    for steps in (1, 2):
        spread(model)
        expected = reference(model, oracle.unit_rules(model), THRESHOLD)
        optimizer.step()
        found = {name: grad / 100 for name, grad in full_grads(model).items()}
        assert worst_relative_error(found, expected.grads) <= 1e-6
        assert int(hook.stats.clipped_units) == expected.clipped_units
        assert hook.steps == steps


def test_a_step_that_failed_is_followed_by_one_that_clips(model: nn.Sequential) -> None:
    optimizer = Preconditioned(model.parameters(), lr=0.0)
    dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD)
    spread(model)
    next(model.parameters()).grad = None
    with pytest.raises(AttributeError):
        optimizer.step()
    spread(model)
    expected = reference(model, oracle.unit_rules(model), THRESHOLD)
    optimizer.step()
    found = {name: grad / 100 for name, grad in full_grads(model).items()}
    assert worst_relative_error(found, expected.grads) <= 1e-6


class Around(torch.optim.Optimizer):
    """The shape of Lookahead and ScheduleFreeWrapper: no hooks of its own, and another optimizer inside."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.param_groups = base, base.param_groups

    def step(self, closure: Any = None) -> None:
        self.base.step(closure)


def test_attaching_is_all_or_nothing(model: nn.Sequential) -> None:
    first = torch.optim.SGD(model[0].parameters(), lr=0.01)
    around = Around(torch.optim.SGD(model[1].parameters(), lr=0.01))
    with pytest.raises(ValueError, match=r"Around takes no step hooks.*inside of it: optimizer\.base"):
        dist_agc.attach(model, [first, around], clipping_threshold=THRESHOLD)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.01)
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        dist_agc.attach(model, [first, other], clipping_threshold=THRESHOLD)
    spread(model)
    before = full_grads(model)
    first.step()
    assert worst_relative_error(full_grads(model), before) == 0
    dist_agc.attach(model, [first, around.base], clipping_threshold=THRESHOLD)


@pytest.mark.parametrize("kind", ["PostLocalSGDOptimizer", "DPOptimizer"])
def test_an_optimizer_around_another_is_unwrapped_where_that_is_right(model: nn.Sequential, kind: str) -> None:
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    attribute = {"PostLocalSGDOptimizer": "optim", "DPOptimizer": "original_optimizer"}[kind]
    around = type(kind, (Around,), {"step": lambda self: getattr(self, attribute).step()})(inner)
    setattr(around, attribute, inner)
    dist_agc.attach(model, around, clipping_threshold=THRESHOLD)
    spread(model)
    expected = reference(model, oracle.unit_rules(model), THRESHOLD)
    around.step()
    assert worst_relative_error(full_grads(model), expected.grads) <= 1e-6


# ------------------------------------------------------------------ the handle


def test_a_threshold_in_the_place_of_the_config(model: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(TypeError, match=r"config must be an AGCConfig, got 0\.01: write clipping_threshold=0\.01"):
        dist_agc.attach(model, optimizer, 0.01)  # type: ignore[arg-type]


def test_none_is_no_threshold(model: nn.Sequential) -> None:
    noisy_grads(model)
    before = full_grads(model)
    for way in (
        lambda: dist_agc.apply_agc(model, None),  # type: ignore[arg-type]
        lambda: dist_agc.attach(model, torch.optim.SGD(model.parameters()), clipping_threshold=None),
    ):
        with pytest.raises(TypeError, match="clipping_threshold must be a number, got None"):
            way()
    assert worst_relative_error(full_grads(model), before) == 0


def test_stats_before_the_first_step_are_empty_and_false(model: nn.Sequential) -> None:
    hook = dist_agc.attach(model, torch.optim.SGD(model.parameters(), lr=0.01), clipping_threshold=THRESHOLD)
    assert not hook.stats
    assert hook.stats.units == 0 and hook.stats.per_parameter == {}
    assert set(hook.stats.as_dict(per_parameter=True).values()) == {0.0}
    spread(model)
    dist_agc.apply_agc(model)
    assert not dist_agc.attach(model, during_backward=True).stats


def test_a_dry_run_says_so_in_the_logs(model: nn.Sequential) -> None:
    spread(model)
    for dry_run in (True, False):
        stats = dist_agc.apply_agc(model, THRESHOLD, dry_run=dry_run)
        assert stats is not None and stats.as_dict().get("agc/dry_run") == (1.0 if dry_run else None)


def test_what_a_handle_prints(model: nn.Sequential) -> None:
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=0.25, exclude="1.bias")
    model[0](torch.ones(1, 6)).sum().backward()
    optimizer.step()
    text = str(hook)
    for part in (
        "3 parameters whole on every rank",
        "2 governed (13 units, 0 of them guessed), 1 excluded, 1 frozen",
        "clipping_threshold=0.25",
        "steps clipped so far: 1",
    ):
        assert part in text
    assert "thresholds of groups" not in text
    optimizer.param_groups[0]["clipping_threshold"] = 0.5
    assert "thresholds of groups: 0.5 in param_groups[0] of SGD" in str(hook)


def test_a_handle_is_not_copied(model: nn.Sequential) -> None:
    hook = dist_agc.attach(model, torch.optim.SGD(model.parameters(), lr=0.01))
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(hook)


# ------------------------------------------------------------------ nothing to clip


@pytest.mark.parametrize("how", ["attach", "Clipper", "apply_agc"])
def test_every_parameter_is_excluded(model: nn.Sequential, how: str) -> None:
    ways: dict[str, Callable[[], Any]] = {
        "attach": lambda: dist_agc.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), exclude="*"),
        "Clipper": lambda: dist_agc.Clipper(model, exclude="*"),
        "apply_agc": lambda: dist_agc.apply_agc(model, exclude=("0.*", "1.*")),
    }
    spread(model)
    with pytest.warns(UserWarning, match="leaves out every parameter, so AGC clips nothing") as said:
        ways[how]()
    assert len(said) == 1


def test_every_group_says_not_to_clip(model: nn.Sequential) -> None:
    """A checkpoint that was loaded before may have brought it."""
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "clipping_threshold": None}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    dist_agc.attach(model, optimizer).remove()
    optimizer.param_groups[0]["clipping_threshold"] = None
    with pytest.warns(UserWarning, match="every group .* clipping_threshold of None, so AGC clips nothing") as said:
        dist_agc.attach(model, optimizer)
    assert len(said) == 1


def test_a_step_without_a_gradient_says_so_once(model: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dist_agc.attach(model, optimizer)
    with pytest.warns(UserWarning, match="none of its 4 parameters has a gradient: AGC has nothing to clip") as said:
        optimizer.step()
    assert len(said) == 1
    optimizer.step()


def test_a_call_before_backward_says_so_once(model: nn.Sequential, caplog: pytest.LogCaptureFixture) -> None:
    other = nn.Linear(2, 2)
    other.bias.grad = torch.ones(2)
    dist_agc.apply_agc(other)
    assert not caplog.messages
    for _ in range(2):
        dist_agc.apply_agc(model)
        (said,) = caplog.messages
        assert said.startswith("no parameter that apply_agc governs has a gradient")
    spread(model)
    dist_agc.apply_agc(model)
    assert len(caplog.messages) == 1


def test_a_model_without_weights_yet() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="'weight' is on the meta device"):
        dist_agc.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))


class Sharpness(torch.optim.Optimizer):
    """The shape of SAM: two steps of its own, of which the second is that of an optimizer inside."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)
        self.base_optimizer = torch.optim.SGD(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    def second_step(self) -> None:
        self.base_optimizer.step()


def test_steps_that_never_call_the_hook(model: nn.Sequential) -> None:
    optimizer = Sharpness(model.parameters(), lr=0.0)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD)
    spread(model)
    with pytest.warns(UserWarning, match="which keeps this one as .base_optimizer, so its gradients are not clipped"):
        optimizer.second_step()
    hook.remove()
    dist_agc.attach(model, optimizer.base_optimizer, clipping_threshold=THRESHOLD)
    spread(model)
    expected = reference(model, oracle.unit_rules(model), THRESHOLD)
    optimizer.second_step()
    assert worst_relative_error(full_grads(model), expected.grads) <= 1e-6


NO_KEY = "none"


@pytest.mark.parametrize(
    ("was", "saved", "has", "place"),
    [
        (NO_KEY, 0.9, "a clipping_threshold of 0.9", 0.01),
        (0.3, 0.9, "a clipping_threshold of 0.9", 0.3),
        (None, 0.9, "a clipping_threshold of 0.9", None),
        (NO_KEY, None, "a clipping_threshold of None (not clipped)", 0.01),
        (0.3, None, "a clipping_threshold of None (not clipped)", 0.3),
        (0.3, NO_KEY, "no clipping_threshold of its own any more", 0.3),
        (None, NO_KEY, "no clipping_threshold of its own any more", None),
    ],
)
def test_a_threshold_from_a_checkpoint(model: nn.Sequential, was: Any, saved: Any, has: str, place: Any) -> None:
    """It travels with the optimizer's groups and goes before that of `attach`; so does its absence."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if saved != NO_KEY:
        optimizer.param_groups[0]["clipping_threshold"] = saved
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0].pop("clipping_threshold", None)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=0.01)
    if was != NO_KEY:
        optimizer.param_groups[0]["clipping_threshold"] = was
    with pytest.warns(
        UserWarning, match=rf"param_groups\[0\] has {re.escape(has)}.* takes the place of {place}"
    ) as said:
        optimizer.load_state_dict(state)
    assert len(said) == 1
    optimizer.load_state_dict(state)  # brings nothing new
    hook.remove()
    optimizer.param_groups[0]["clipping_threshold"] = 0.1
    optimizer.load_state_dict(state)
