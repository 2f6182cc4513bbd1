"""What a unit is: the oracle's rules against autograd's own view of fan-in, then the package against the oracle."""

import pytest
import torch
from torch import Tensor, nn

import helpers
import models
import oracle

GUESSED = pytest.mark.filterwarnings("ignore:dist_agc does not know the modules:UserWarning")

CONVOLUTIONS = [
    pytest.param(lambda: nn.Linear(5, 4), (3, 5), id="linear"),
    pytest.param(lambda: nn.Conv1d(4, 6, 3), (2, 4, 7), id="conv1d"),
    pytest.param(lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), id="conv2d-groups"),
    pytest.param(lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4), id="conv3d"),
    pytest.param(lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5), id="conv-transpose1d"),
    pytest.param(lambda: nn.ConvTranspose1d(6, 9, 3, groups=3), (2, 6, 5), id="conv-transpose1d-groups"),
    pytest.param(lambda: nn.ConvTranspose2d(4, 3, 2), (2, 4, 3, 3), id="conv-transpose2d"),
    pytest.param(lambda: nn.ConvTranspose2d(6, 10, 2, groups=2), (2, 6, 3, 3), id="conv-transpose2d-groups"),
    pytest.param(lambda: nn.ConvTranspose3d(4, 6, 2, groups=2), (1, 4, 2, 2, 2), id="conv-transpose3d-groups"),
    pytest.param(lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), (1, 4, 3, 3), id="conv-transpose2d-depthwise"),
    pytest.param(lambda: _conv1d(5, 3), (2, 5), id="transformers-conv1d"),
]


def _conv1d(inputs: int, outputs: int) -> nn.Module:
    utils = pytest.importorskip("transformers.pytorch_utils")
    return utils.Conv1D(outputs, inputs)


class Holder(nn.Module):
    """One parameter of any shape, in a module of no known type."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


@pytest.mark.parametrize(("make", "shape"), CONVOLUTIONS)
def test_a_unit_is_the_fan_in_of_one_output(make, shape: tuple[int, ...]) -> None:
    """The weights that output channel c depends on are unit c's, and no others: by autograd, from no formula."""
    module = make()
    rule = oracle.unit_rules(module)["weight"]
    labels, units = oracle.unit_labels(tuple(module.weight.shape), rule)
    out = module(torch.rand(shape) + 0.5)
    channels = out.movedim(-1 if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" else 1, 0)
    assert units == len(channels)
    seen = set()
    for channel in channels:
        (touched,) = torch.autograd.grad(channel.sum(), module.weight, retain_graph=True)
        members = {int(label) for label in labels[touched != 0]}
        assert len(members) == 1, f"one output depends on the units {members}"
        assert int((touched != 0).sum()) == int((labels == next(iter(members))).sum())
        seen |= members
    assert seen == set(range(units))


MODULES = [
    *[pytest.param(case.values[0], id=case.id) for case in CONVOLUTIONS],
    pytest.param(lambda: nn.Embedding(7, 3), id="embedding"),
    pytest.param(lambda: nn.EmbeddingBag(7, 3), id="embedding-bag"),
    pytest.param(lambda: nn.LSTM(3, 4, num_layers=2), id="lstm"),
    pytest.param(lambda: nn.GRU(3, 4, bidirectional=True), id="gru"),
    pytest.param(lambda: nn.Bilinear(3, 4, 5), id="bilinear"),
    pytest.param(lambda: nn.MultiheadAttention(8, 2), id="attention"),
    pytest.param(lambda: nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.BatchNorm1d(2), nn.PReLU()), id="norms"),
    pytest.param(lambda: nn.Sequential(Holder(), Holder(5), Holder(4, 1), Holder(1, 4), Holder(1, 1)), id="thin"),
    pytest.param(
        lambda: nn.Sequential(Holder(3, 2, 2, 2, 2), Holder(2, 2, 2, 1, 2, 2)), id="5-d-and-6-d", marks=GUESSED
    ),
    pytest.param(lambda: nn.Sequential(Holder(3), Holder(0), Holder(0, 4), Holder(4, 0), Holder(4, 2)), id="empty"),
    pytest.param(lambda: models.awkward(scalar=True, conv1d=True), id="awkward"),
]


@pytest.mark.parametrize("make", MODULES)
def test_units_by_module(make) -> None:
    module = make()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    helpers.noisy_grads(module)
    rules = oracle.unit_rules(module)
    threshold = helpers.median_threshold(module, rules)
    expected = helpers.reference(module, rules, threshold)
    stats = helpers.agc(module, clipping_threshold=threshold)
    helpers.assert_clipped(module, stats, expected)


def test_a_subclass_has_the_rule_of_its_class() -> None:
    class Upsample(nn.ConvTranspose2d):
        pass

    module = Upsample(4, 6, 2, groups=2)
    helpers.noisy_grads(module)
    rules = oracle.unit_rules(module)
    threshold = helpers.median_threshold(module, rules)
    expected = helpers.reference(module, rules, threshold)
    assert expected.per_parameter["weight"].units == 6
    helpers.assert_clipped(module, helpers.agc(module, threshold), expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("new", [True, False], ids=["parametrization", "weight_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_weight_made_of_others_keeps_its_rule(new: bool, groups: int) -> None:
    """Its direction has the weight's shape and so its units; its magnitude, of another shape, has units by dim 0."""
    normalise = nn.utils.parametrizations.weight_norm if new else nn.utils.weight_norm
    module = normalise(nn.ConvTranspose2d(4, 6, 2, groups=groups), dim=1)
    size, direction = ("original0", "original1") if new else ("weight_g", "weight_v")
    prefix = "parametrizations.weight." if new else ""
    rules = {
        "bias": oracle.Units(()),
        f"{prefix}{size}": oracle.Units((0,)),  # (1, 6 / groups, 1, 1)
        f"{prefix}{direction}": oracle.Units((1,), groups=groups),
    }
    helpers.noisy_grads(module)
    threshold = helpers.median_threshold(module, rules)
    expected = helpers.reference(module, rules, threshold)
    assert expected.units == 1 + 1 + 6
    helpers.assert_clipped(module, helpers.agc(module, threshold), expected)


def test_other_parameters_of_a_transposed_convolution_are_rows() -> None:
    class Extended(nn.ConvTranspose2d):
        def __init__(self) -> None:
            super().__init__(4, 6, 2, groups=2)
            self.extra = nn.Parameter(torch.randn(3, 5))

    module = Extended()
    helpers.noisy_grads(module)
    rules = {**oracle.unit_rules(module), "extra": oracle.Units((0,))}
    threshold = helpers.median_threshold(module, rules)
    expected = helpers.reference(module, rules, threshold)
    helpers.assert_clipped(module, helpers.agc(module, threshold), expected)


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((3, 4, 5), (0, 1)),
        ((3, 4, 5), 0),
        ((3, 4, 5), 1),
        ((3, 4, 5), -1),
        ((3, 4, 5), (0, 2)),
        ((3, 4, 5), (1, 2)),
        ((3, 4, 5), (0, -1)),
        ((3, 4, 5), ()),
        ((3, 4, 5), (0, 1, 2)),
        ((4, 6), 1),
        ((7,), 0),
        ((7,), ()),
        ((2, 3, 4, 5), (0, 1)),
        ((2, 3, 4, 5), (0, 2, 3)),
    ],
    ids=str,
)
def test_units_by_override(shape: tuple[int, ...], dims: int | tuple[int, ...]) -> None:
    module = nn.Sequential(Holder(*shape), Holder(3, 3))
    helpers.noisy_grads(module)
    normal = tuple(sorted(d % len(shape) for d in ((dims,) if isinstance(dims, int) else dims)))
    rules = oracle.unit_rules(module, {"0.weight": normal})
    threshold = helpers.median_threshold(module, rules)
    expected = helpers.reference(module, rules, threshold)
    stats = helpers.agc(module, clipping_threshold=threshold, units={"0.*": dims})
    helpers.assert_clipped(module, stats, expected)


def test_units_leading_switches_the_module_rules_off() -> None:
    """Dim 0 of everything, as Composer and timm do."""
    module = models.awkward(scalar=True, conv1d=True)
    helpers.noisy_grads(module)
    rules = {name: oracle.Units((0,) if parameter.ndim >= 2 else ()) for name, parameter in module.named_parameters()}
    assert rules != oracle.unit_rules(module)
    threshold = 5.0
    expected = helpers.reference(module, rules, threshold)
    helpers.assert_clipped(module, helpers.agc(module, threshold, units="leading"), expected)


def test_stacked_experts_by_glob() -> None:
    module = models.awkward()
    helpers.noisy_grads(module)
    rules = oracle.unit_rules(module, {"experts.weight": (0, 1)})
    expected = helpers.reference(module, rules, 5.0)
    assert expected.per_parameter["experts.weight"].units == 3 * 5
    helpers.assert_clipped(module, helpers.agc(module, 5.0, units={"*experts.*": (0, 1)}), expected)


def test_a_plain_list_of_parameters_knows_no_modules() -> None:
    """Without modules there is only dim 0: the documented limit of passing no model, which is told."""
    module = nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.Linear(3, 3))
    helpers.noisy_grads(module)
    rules = {name: oracle.Units((0,) if p.ndim >= 2 else ()) for name, p in module.named_parameters()}
    threshold = helpers.median_threshold(module, rules)
    expected = helpers.reference(module, rules, threshold)
    with pytest.warns(UserWarning, match=r"modules of '0' \(4, 6, 3\) \(pass the model itself .* guesses that dim 0"):
        stats = helpers.agc(list(module.parameters()), threshold)
    helpers.assert_some_clipped(expected)
    assert helpers.worst_relative_error(helpers.full_grads(module), expected.grads) <= 1e-6
    assert (stats.units, int(stats.clipped_units)) == (expected.units, expected.clipped_units)


def test_a_tied_parameter_counts_once() -> None:
    module = models.awkward()
    assert module.head.weight is module.embedding.weight
    helpers.noisy_grads(module)
    rules = oracle.unit_rules(module)
    assert sum(p is module.embedding.weight for p in module.parameters()) == 1
    expected = helpers.reference(module, {n: r for n, r in rules.items() if n != "head.weight"}, 5.0)
    stats = helpers.agc(module, 5.0)
    helpers.assert_clipped(module, stats, expected)
    assert "head.weight" not in stats.per_parameter


def test_a_tied_parameter_is_found_by_either_name() -> None:
    for pattern in ("embedding.weight", "head.weight"):
        module = models.awkward()
        helpers.noisy_grads(module)
        before = module.embedding.weight.grad
        assert before is not None
        kept: Tensor = before.clone()
        stats = helpers.agc(module, 1e-6, exclude=(pattern,))
        assert torch.equal(before, kept)
        assert "embedding.weight" not in stats.per_parameter
