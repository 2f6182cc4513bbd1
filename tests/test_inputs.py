"""Bad input is refused in plain words before anything is touched: every gradient stays as it was."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_agc
import helpers


@pytest.fixture
def model() -> nn.Module:
    """Every unit of it would be clipped."""
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)))
    model.add_module("head", nn.Linear(3, 2))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    return model


@pytest.fixture
def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.fixture(autouse=True)
def _gradients_stay(model: nn.Module):
    yield
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad == 100.0).all()), f"the gradient of {name} changed"


THRESHOLDS = [
    (math.nan, ValueError, "nan"),
    (math.inf, ValueError, "inf"),
    (-math.inf, ValueError, "-inf"),
    (0, ValueError, "0"),
    (0.0, ValueError, r"0\.0"),
    (-1, ValueError, "-1"),
    ("x", TypeError, "'x'"),
    ("0.01", TypeError, "'0.01'"),
    (True, TypeError, "True"),
    ([0.01], TypeError, r"\[0\.01\]"),
    (1j, TypeError, "1j"),
]


def _ways(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Callable[..., Any]]:
    """Every way to give options."""
    return [
        lambda **options: dist_agc.AGCConfig(**options),
        lambda **options: dist_agc.apply_agc(model, **options),
        lambda **options: dist_agc.Clipper(model, **options),
        lambda **options: dist_agc.attach(model, optimizer, **options),
    ]


@pytest.mark.parametrize("way", range(4), ids=["AGCConfig", "apply_agc", "Clipper", "attach"])
@pytest.mark.parametrize(("threshold", "kind", "said"), THRESHOLDS, ids=lambda v: str(v))
def test_thresholds(model, optimizer, way: int, threshold: object, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=f"clipping_threshold .*{said}"):
        _ways(model, optimizer)[way](clipping_threshold=threshold)


def test_a_threshold_of_none_means_the_default_only_for_apply_agc(model, optimizer) -> None:
    with pytest.raises(TypeError, match="clipping_threshold"):
        dist_agc.AGCConfig(clipping_threshold=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="clipping_threshold"):
        dist_agc.attach(model, optimizer, clipping_threshold=None)


@pytest.mark.parametrize("threshold", [torch.tensor(0.01), torch.tensor(0.01, dtype=torch.float64)])
def test_a_tensor_is_no_threshold_and_says_so(model, threshold: Tensor) -> None:
    with pytest.raises(TypeError, match="clipping_threshold must be a number"):
        dist_agc.apply_agc(model, clipping_threshold=threshold)  # type: ignore[arg-type]


OPTIONS = [
    ({"eps": -1e-3}, ValueError, "eps"),
    ({"eps": math.nan}, ValueError, "eps"),
    ({"eps": math.inf}, ValueError, "eps"),
    ({"eps": "small"}, TypeError, "eps"),
    ({"eps": True}, TypeError, "eps"),
    ({"exclude": 3}, TypeError, "exclude"),
    ({"exclude": (3,)}, TypeError, "exclude"),
    ({"exclude": ("",)}, TypeError, "exclude"),
    ({"exclude": None}, TypeError, "exclude"),
    ({"exclude": {"head.*": True}}, TypeError, "exclude"),
    ({"units": "trailing"}, TypeError, "units"),
    ({"units": 0}, TypeError, "units"),
    ({"units": {"head.weight": "rows"}}, TypeError, "head.weight"),
    ({"units": {"head.weight": 1.5}}, TypeError, "head.weight"),
    ({"units": {"head.weight": True}}, TypeError, "head.weight"),
    ({"units": {"head.weight": (0, 0)}}, TypeError, "head.weight"),
    ({"units": {3: (0,)}}, TypeError, "units"),
    ({"on_nonfinite": "skip"}, ValueError, "keep, raise, zero"),
    ({"on_nonfinite": None}, ValueError, "keep, raise, zero"),
]


@pytest.mark.parametrize("way", range(4), ids=["AGCConfig", "apply_agc", "Clipper", "attach"])
@pytest.mark.parametrize(("options", "kind", "said"), OPTIONS, ids=[str(o) for o, _, _ in OPTIONS])
def test_options(model, optimizer, way: int, options: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        _ways(model, optimizer)[way](**options)


FITTING = [
    ({"units": {"head.weight": 2}}, "head.weight"),
    ({"units": {"head.weight": -3}}, "head.weight"),
    ({"units": {"head.bias": (0, 1)}}, "head.bias"),
    ({"units": {"*": (0, 1)}}, "bias"),
]


@pytest.mark.parametrize(("options", "said"), FITTING, ids=[str(o) for o, _ in FITTING])
def test_unit_dims_that_do_not_fit(model, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dist_agc.apply_agc(model, **options)


@pytest.mark.parametrize("way", range(4), ids=["AGCConfig", "apply_agc", "Clipper", "attach"])
def test_an_unknown_option_lists_the_known_ones(model, optimizer, way: int) -> None:
    with pytest.raises(TypeError, match="clip_treshold"):
        _ways(model, optimizer)[way](clip_treshold=0.01)
    if way:
        with pytest.raises(TypeError, match="clipping_threshold, eps, exclude"):
            _ways(model, optimizer)[way](clip_treshold=0.01)


def test_config_is_keyword_only_and_frozen() -> None:
    with pytest.raises(TypeError):
        dist_agc.AGCConfig(0.01)  # type: ignore[misc]
    config = dist_agc.AGCConfig(clipping_threshold=0.02)
    with pytest.raises(AttributeError):
        config.clipping_threshold = 0.03  # type: ignore[misc]
    assert config == dist_agc.AGCConfig(clipping_threshold=0.02)


def test_a_config_and_options_at_once(model, optimizer) -> None:
    config = dist_agc.AGCConfig()
    for call in (
        lambda: dist_agc.attach(model, optimizer, config, eps=0.1),
        lambda: dist_agc.Clipper(model, config, eps=0.1),
        lambda: dist_agc.apply_agc(model, config, eps=0.1),
    ):
        with pytest.raises(TypeError, match="not both"):
            call()


@pytest.mark.parametrize("config", [{"clipping_threshold": 0.01}, 0.01])
def test_something_else_as_config(model, optimizer, config: object) -> None:
    with pytest.raises(TypeError, match="AGCConfig"):
        dist_agc.attach(model, optimizer, config)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="AGCConfig"):
        dist_agc.Clipper(model, config)  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", ["exclude", "units"])
def test_a_pattern_that_matches_nothing_lists_near_names(model, optimizer, setting: str) -> None:
    for pattern, near in (
        ("haed.weight", "head.weight"),
        ("module.head.*", "head.weight"),
        ("body.1.weigth", "body.1.weight"),
    ):
        options: dict[str, Any] = {"exclude": ("head.*", pattern)} if setting == "exclude" else {"units": {pattern: 0}}
        for way in _ways(model, optimizer)[1:]:
            with pytest.raises(ValueError, match=setting) as error:
                way(**options)
            assert repr(pattern) in str(error.value)
            assert near in str(error.value)


def test_patterns_are_case_sensitive_globs_over_whole_names(model) -> None:
    for pattern in ("Head.*", "head", "weight"):
        with pytest.raises(ValueError, match="matches no parameter"):
            dist_agc.apply_agc(model, exclude=(pattern,))


NO_MODELS = [
    (lambda: iter(()), ValueError, "generator"),
    (lambda: [], ValueError, "no parameters"),
    (lambda: nn.ReLU(), ValueError, "no parameters"),
    (lambda: 3, TypeError, "nn.Module"),
    (lambda: None, TypeError, "nn.Module"),
    (lambda: [nn.Linear(2, 2), nn.Linear(2, 2).weight], TypeError, "Linear"),
    (lambda: [nn.Linear(2, 2).weight, nn.Linear(2, 2)], TypeError, "Linear at place 1"),
    (lambda: [3], TypeError, "int"),
    (lambda: [("a", 3)], TypeError, "place 0"),
    (lambda: nn.LazyLinear(3), ValueError, "forward"),
]


@pytest.mark.parametrize(("make", "kind", "said"), NO_MODELS)
def test_something_else_as_model(make, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        dist_agc.apply_agc(make(), clipping_threshold=0.01)


def test_an_exhausted_generator_is_refused(model) -> None:
    """torchtitan #1258, AReaL #335: a generator that was used up clipped nothing, silently."""
    parameters = model.parameters()
    assert len(list(parameters)) == 6
    with pytest.raises(ValueError, match="generator"):
        dist_agc.apply_agc(parameters, clipping_threshold=0.01)


def test_attaching_twice(model, optimizer) -> None:
    first = dist_agc.attach(model, optimizer)
    with pytest.raises(ValueError, match="already"):
        dist_agc.attach(model, optimizer)
    with pytest.raises(ValueError, match="already"):
        dist_agc.attach(model, [torch.optim.SGD(model.parameters(), lr=0.1), optimizer])
    first.remove()
    first.remove()
    with dist_agc.attach(model, optimizer):
        pass


def test_a_refused_attach_leaves_no_hook_behind(model, optimizer) -> None:
    other = torch.optim.SGD(model.parameters(), lr=0.0)
    with dist_agc.attach(model, optimizer), pytest.raises(ValueError, match="already"):
        dist_agc.attach(model, [other, optimizer])
    with pytest.raises(ValueError, match="twice"):
        dist_agc.attach(model, [other, other])
    other.step()  # a hook left on it would clip, which the fixture would see
    dist_agc.attach(model, other).remove()


def test_a_foreign_optimizer(model) -> None:
    stranger = torch.optim.SGD(nn.Linear(4, 3).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none of the model's parameters"):
        dist_agc.attach(model, stranger)
    with pytest.raises(ValueError, match="none of the model's parameters"):
        dist_agc.attach(model, [torch.optim.SGD(model.parameters(), lr=0.1), stranger])


@pytest.mark.parametrize("bad", [None, "sgd", 3, [None], []])
def test_something_else_as_optimizer(model, bad: object) -> None:
    with pytest.raises((TypeError, ValueError), match="optimizer|Optimizer"):
        dist_agc.attach(model, bad)  # type: ignore[arg-type]


def test_a_scheduler_is_no_optimizer(model, optimizer) -> None:
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(TypeError, match="StepLR"):
        dist_agc.attach(model, scheduler)  # type: ignore[arg-type]


@pytest.mark.parametrize("positional", [True, False])
def test_closures_are_refused(model, optimizer, positional: bool) -> None:
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> float:
        raise AssertionError("the closure ran")

    with dist_agc.attach(model, optimizer), pytest.raises(ValueError, match="closure"):
        if positional:
            optimizer.step(closure)
        else:
            optimizer.step(closure=closure)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_lbfgs_is_refused_by_its_closure(model) -> None:
    lbfgs = torch.optim.LBFGS(model.parameters())
    with dist_agc.attach(model, lbfgs), pytest.raises(ValueError, match="closure"):
        lbfgs.step(lambda: torch.tensor(0.0))


@pytest.mark.parametrize("threshold", [0, -1, math.nan, math.inf, "x", True])
def test_a_bad_threshold_in_a_group_stops_the_step(model, threshold: object) -> None:
    groups = [{"params": list(model.body.parameters())}, {"params": list(model.head.parameters())}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with dist_agc.attach(model, optimizer):
        optimizer.param_groups[1]["clipping_threshold"] = threshold
        with pytest.raises((TypeError, ValueError), match=r"param_groups\[1\]"):
            optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


class Strange(Tensor):
    """A tensor subclass with a layout of its own, as quantized and sharded tensors are."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)

    def __tensor_flatten__(self):
        return [], None

    @staticmethod
    def make(shape: tuple[int, ...]) -> "Strange":
        return Tensor._make_wrapper_subclass(Strange, shape, dtype=torch.float32, requires_grad=True)  # type: ignore


def test_an_unknown_layout_names_the_parameter_and_touches_nothing(model) -> None:
    """The known parameters before it must not be clipped (Composer's and timm's half-clipped models)."""
    parameters = [*model.named_parameters(), ("odd.weight", Strange.make((2, 2)))]
    with pytest.raises(ValueError, match="odd.weight.*Strange"):
        dist_agc.apply_agc(parameters, clipping_threshold=0.01)


def test_an_unknown_layout_that_is_frozen_does_no_harm(model) -> None:
    """Quantised base weights below trained adapters."""
    odd = Strange.make((2, 2)).requires_grad_(False)
    parameters = [*model.named_parameters(), ("odd.weight", odd)]
    clipper = dist_agc.Clipper(parameters, clipping_threshold=0.01, dry_run=True)
    stats = clipper.clip()
    assert stats is not None and stats.units > 0 and "odd.weight" not in stats.per_parameter
    odd.requires_grad_(True)
    with pytest.raises(ValueError, match="odd.weight.*Strange"):
        clipper.clip()


def test_an_expanded_gradient_touches_nothing(model) -> None:
    extra = nn.Parameter(torch.ones(3, 4))
    extra.grad = torch.full((1, 4), 8.0).expand(3, 4)
    with pytest.raises(ValueError, match=r"'extra' has a gradient with several elements in one place.*clone\(\)"):
        dist_agc.apply_agc([*model.named_parameters(), ("extra", extra)], clipping_threshold=1e-4)
    assert extra.grad.tolist() == [[8.0] * 4] * 3


def test_two_parameters_under_one_name(model) -> None:
    other = nn.Linear(3, 2)
    pairs = [*other.named_parameters(), *nn.Linear(2, 2).named_parameters()]
    with pytest.raises(ValueError, match="'weight' names more than one parameter"):
        dist_agc.apply_agc(pairs, clipping_threshold=0.01)


def test_a_gradient_of_another_layout_touches_nothing(model) -> None:
    """Refused in the first of the two phases, at the last parameter, when all others would have been clipped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        extra = nn.Parameter(torch.ones(4, 4).to_sparse_csr())
        extra.grad = torch.ones(4, 4).to_sparse_csr()
    with pytest.raises(ValueError, match="extra"):
        dist_agc.apply_agc([*model.named_parameters(), ("extra", extra)], clipping_threshold=0.01)


def test_a_sparse_gradient_whose_units_are_not_rows(model) -> None:
    extra = nn.Embedding(5, 3, sparse=True)
    extra(torch.tensor([1, 2])).sum().backward()
    named = [*model.named_parameters(), ("extra", extra.weight)]
    grad = extra.weight.grad
    assert grad is not None and grad.is_sparse
    before = grad.to_dense()
    with pytest.raises(ValueError, match="extra.*sparse"):
        dist_agc.apply_agc(named, clipping_threshold=1e-4, units={"extra": 1})
    assert torch.equal(grad.to_dense(), before)
    with pytest.raises(ValueError, match="extra.*sparse"):
        dist_agc.apply_agc(named, clipping_threshold=1e-4, units={"extra": ()})


def test_errors_say_what_was_expected_what_came_and_what_to_do() -> None:
    with pytest.raises(ValueError) as error:
        dist_agc.AGCConfig(clipping_threshold=-1)
    assert str(error.value) == "clipping_threshold must be a positive finite number, got -1; try 0.01."


def test_good_values_of_every_kind_are_taken() -> None:
    """Whole numbers, one pattern as a string, lists for tuples."""
    assert dist_agc.AGCConfig(clipping_threshold=1).clipping_threshold == 1.0
    assert dist_agc.AGCConfig(eps=0).eps == 0.0
    assert dist_agc.AGCConfig(exclude="head.*").exclude == ("head.*",)
    assert dist_agc.AGCConfig(exclude=["head.*"]).exclude == ("head.*",)  # type: ignore[arg-type]
    assert helpers.agc(nn.Linear(2, 2), units={"weight": [0]}).units == 3  # type: ignore[dict-item]
