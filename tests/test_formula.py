"""The formula in one process: hand-made numbers, Composer's rule, precision, and what must never change."""

import math

import pytest
import torch
from torch import Tensor, nn

import helpers
import oracle

# That the units of a tensor of three dims are guessed here is told; tests/test_guesses.py looks at that.
pytestmark = pytest.mark.filterwarnings("ignore:dist_agc does not know the modules:UserWarning")


class Holder(nn.Module):
    def __init__(self, weight: Tensor, grad: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.weight.grad = grad


def clip(weight: object, grad: object, threshold: float = 0.5, **settings) -> Tensor:
    """The clipped gradient of one parameter given as nested lists."""
    module = Holder(torch.tensor(weight, dtype=torch.float32), torch.tensor(grad, dtype=torch.float32))
    helpers.agc(module, threshold, **settings)
    assert module.weight.grad is not None
    return module.weight.grad


# The expected values of Composer's own tests (tests/algorithms/test_gradient_clipping.py), which no eps changes.
COMPOSER_CASES = [
    ([3.0, 4.0], [7.0, 24.0], 0.5, [0.7, 2.4]),
    ([[3.0, 4.0], [9.0, 40.0]], [[7.0, 24.0], [5.0, 12.0]], 0.5, [[0.7, 2.4], [5.0, 12.0]]),
    (
        [[[3.0, 8.0, 2.0], [1.0, 1.0, 1.0]], [[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]],
        [[[6.0, 4.0, 0.0], [0.0, 0.0, 0.0]], [[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]],
        1 / 3,
        None,
    ),
]


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize(("weight", "grad", "threshold", "clipped"), COMPOSER_CASES, ids=["1d", "2d", "3d"])
def test_hand_made_numbers(weight, grad, threshold: float, clipped, eps: float) -> None:
    got = clip(weight, grad, threshold, eps=eps)
    by_composer = oracle.composer(torch.tensor(weight), torch.tensor(grad), threshold)
    torch.testing.assert_close(got.double(), by_composer, rtol=1e-6, atol=0)
    if clipped is not None:
        torch.testing.assert_close(got, torch.tensor(clipped), rtol=1e-6, atol=0)


def test_the_paper_formula() -> None:
    """G <- threshold * max(||W||, eps) / ||G|| * G where ||G|| / max(||W||, eps) > threshold."""
    got = clip([[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]], [[6.0, 8.0], [6.0, 8.0], [0.3, 0.4]], 0.5, eps=0.25)
    assert got[0].norm().item() == pytest.approx(0.5 * 5.0)
    assert got[1].norm().item() == pytest.approx(0.5 * 0.25)
    assert got[2].tolist() == torch.tensor([0.3, 0.4]).tolist()


def test_a_unit_with_zero_weights_can_train_unless_eps_is_zero() -> None:
    weight, grad = [[0.0, 0.0], [3.0, 4.0]], [[6.0, 8.0], [6.0, 8.0]]
    assert clip(weight, grad)[0].norm().item() == pytest.approx(0.5 * 1e-3)
    assert clip(weight, grad, eps=0.0)[0].tolist() == [0.0, 0.0]
    assert clip(weight, grad, eps=0.0)[1].norm().item() == pytest.approx(2.5)


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_zero_gradients_stay_zero_and_finite(eps: float) -> None:
    got = clip([[0.0, 0.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]], eps=eps)
    assert got.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    module = Holder(torch.zeros(2, 2), torch.zeros(2, 2))
    stats = helpers.agc(module, 0.5, eps=eps)
    assert int(stats.clipped_units) == 0
    assert int(stats.nonfinite_units) == 0
    assert float(stats.grad_norm) == 0.0


def test_statistics_of_no_gradient_at_all() -> None:
    stats = helpers.agc(nn.Linear(3, 2), 0.5)
    assert stats.units == 3
    assert all(math.isfinite(value) for value in stats.as_dict().values())
    assert float(stats.clip_fraction) == float(stats.max_ratio) == float(stats.grad_norm) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_eps_zero_is_composers_rule(seed: int) -> None:
    """Random shapes of every ndim, zero weights, zero gradients and both at once among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(torch.randint(1, 5, (seed % 6,), generator=generator).tolist())
    weight = torch.randn(shape, generator=generator)
    grad = torch.randn(shape, generator=generator) * 3
    weight[torch.rand(shape, generator=generator) < 0.3] = 0.0
    grad[torch.rand(shape, generator=generator) < 0.3] = 0.0
    if len(shape) >= 2 and seed % 2:
        weight[0] = 0.0
        grad[-1] = 0.0
    module = Holder(weight.clone(), grad.clone())
    helpers.agc(module, 0.7, eps=0.0)
    got = helpers.full_grads(module)
    expected = {"weight": oracle.composer(weight, grad, 0.7)}
    assert helpers.worst_relative_error(got, expected) <= 1e-6


def test_the_oracle_with_eps_zero_is_composers_rule() -> None:
    weight, grad = torch.randn(6, 5), torch.randn(6, 5) * 2
    weight[0] = 0.0
    weight[1] = grad[1] = 0.0
    grad[2] = 0.0
    for rule, dims in ((oracle.Units((0,)), (6, 5)), (oracle.Units(()), (30,))):
        w, g = weight.reshape(dims), grad.reshape(dims)
        ours = oracle.clip({"w": w}, {"w": g}, {"w": rule}, 0.9, eps=0.0).grads["w"]
        torch.testing.assert_close(ours, oracle.composer(w, g, 0.9), rtol=1e-12, atol=0)


def test_clipping_twice_equals_clipping_once() -> None:
    """To the last bit, though the norm of a clipped unit is only within rounding of its limit."""
    for seed in range(10):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(50, 40), nn.Conv2d(3, 9, 3), nn.LayerNorm(33))
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter) * torch.randn_like(parameter).exp()
        threshold = helpers.median_threshold(module, oracle.unit_rules(module))
        first = helpers.agc(module, threshold)
        assert 0 < int(first.clipped_units) < first.units
        once = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        second = helpers.agc(module, threshold)
        assert int(second.clipped_units) == 0
        for parameter, grad in zip(module.parameters(), once, strict=True):
            assert parameter.grad is not None and torch.equal(parameter.grad, grad)


def test_units_below_the_threshold_keep_every_bit() -> None:
    module = nn.Linear(64, 32)
    module.weight.grad = torch.randn(32, 64) * torch.logspace(-3, 3, 32)[:, None]
    module.bias.grad = torch.randn(32) * 1e-6
    before = module.weight.grad.clone()
    expected = helpers.reference(module, oracle.unit_rules(module), 0.5)
    helpers.assert_some_clipped(expected)
    helpers.agc(module, 0.5)
    kept = (expected.grads["weight"] == before.double()).all(dim=1)
    assert 0 < int(kept.sum()) < 32
    assert torch.equal(module.weight.grad[kept], before[kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0], ids=["tiny", "one", "large"])
def test_low_precision_gradients_have_fp32_sums(dtype: torch.dtype, scale: float) -> None:
    """65,536 elements a unit: bf16 and fp16 sums lose the third digit, overflow or underflow here."""
    torch.manual_seed(1)
    module = nn.Linear(65_536, 4, dtype=dtype)
    spread = torch.tensor([1e-2, 0.5, 1.0, 2.0])[:, None]
    module.weight.grad = (torch.randn(4, 65_536) * spread * scale).to(dtype)
    module.bias.grad = torch.zeros(4, dtype=dtype)
    rules = oracle.unit_rules(module)
    norms = [
        float(row.double().norm() / weight.detach().double().norm())
        for row, weight in zip(module.weight.grad, module.weight, strict=True)
    ]
    threshold = math.sqrt(norms[1] * norms[2])
    expected = helpers.reference(module, rules, threshold)
    stats = helpers.agc(module, threshold)
    assert module.weight.grad.dtype == dtype
    helpers.assert_some_clipped(expected)
    # Statistics come from the sums alone, which coarse numbers round all in one direction: 5e-6 instead of 1e-7.
    helpers.assert_stats(stats, expected, tolerance=1e-5)
    # A gradient element is rounded once to its dtype.
    got, want = module.weight.grad.double(), expected.grads["weight"]
    smallest = torch.finfo(dtype).tiny if dtype == torch.bfloat16 else 2.0**-24
    assert bool(((got - want).abs() <= want.abs() * torch.finfo(dtype).eps * 0.51 + smallest).all())


def test_float64_gradients_keep_their_digits() -> None:
    module = nn.Linear(30, 20, dtype=torch.float64)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter) * torch.randn_like(parameter).exp()
    threshold = helpers.median_threshold(module, oracle.unit_rules(module))
    expected = helpers.reference(module, oracle.unit_rules(module), threshold)
    stats = helpers.agc(module, threshold)
    helpers.assert_clipped(module, stats, expected, tolerance=1e-13)


@pytest.mark.skipif(not hasattr(nn.Parameter(torch.zeros(1)), "grad_dtype"), reason="torch refuses to set one here")
def test_master_weights_and_gradients_of_different_dtypes() -> None:
    """Gradients in bf16 of fp32 weights: the sums are fp32 and the gradient keeps its dtype."""
    module = nn.Linear(40, 12)
    weight, bias = torch.randn(12, 40).bfloat16(), torch.randn(12).bfloat16()
    module.weight.grad_dtype = module.bias.grad_dtype = None
    module.weight.grad, module.bias.grad = weight, bias
    expected = helpers.reference(module, oracle.unit_rules(module), 11.0)
    helpers.assert_some_clipped(expected)
    stats = helpers.agc(module, 11.0)
    helpers.assert_stats(stats, expected)
    assert module.weight.grad.dtype == torch.bfloat16
    assert helpers.worst_relative_error(helpers.full_grads(module), expected.grads) <= 2**-8


@pytest.mark.parametrize("elements", [100_000, 3_000_000])
def test_long_rows_keep_their_precision(elements: int) -> None:
    """A plain running sum in fp32 is off by 1e-5 at a million elements."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.rand(1, elements, generator=generator) + 0.5
    grad = torch.rand(1, elements, generator=generator) + 0.5
    module = Holder(weight, grad.clone())
    stats = helpers.agc(module, 0.5)
    coefficient = 0.5 * float(weight.double().norm()) / float(grad.double().norm())
    assert float(stats.grad_norm) == pytest.approx(float(grad.double().norm()), rel=1e-6)
    assert module.weight.grad is not None
    assert module.weight.grad[0, 7].item() == pytest.approx(grad[0, 7].item() * coefficient, rel=1e-6)


LARGE = {
    "linear": (nn.Linear, (2000, 90), {}),
    "long-rows": (nn.Linear, (70_000, 4), {}),
    "conv": (nn.Conv2d, (64, 96, 5), {}),
    "deconv": (nn.ConvTranspose2d, (64, 96, 5), {}),
    "deconv-groups": (nn.ConvTranspose2d, (64, 96, 7), {"groups": 4}),
    "deconv1d": (nn.ConvTranspose1d, (500, 40, 15), {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", ["contiguous", "transposed"])
@pytest.mark.parametrize("kind", LARGE)
def test_tensors_too_large_for_one_pass(kind: str, memory: str, dtype: torch.dtype) -> None:
    """Large tensors are measured and scaled in pieces: none may be left out, or taken twice."""
    make, shape, options = LARGE[kind]
    model = make(*shape, **options).to(dtype)
    helpers.noisy_grads(model, spread=1.0)
    if memory == "transposed":
        for parameter in model.parameters():
            assert parameter.grad is not None
            if parameter.ndim > 1:
                parameter.grad = parameter.grad.transpose(0, 1).contiguous().transpose(0, 1)
    rules = oracle.unit_rules(model)
    threshold = helpers.median_threshold(model, rules)
    expected = helpers.reference(model, rules, threshold)
    stats = helpers.agc(model, threshold)
    if dtype == torch.float32:
        helpers.assert_clipped(model, stats, expected)
    else:
        helpers.assert_some_clipped(expected)
        helpers.assert_stats(stats, expected, tolerance=1e-5)
        assert helpers.worst_relative_error(helpers.full_grads(model), expected.grads) <= 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [512, 515], ids=["aligned", "odd"])
@pytest.mark.parametrize("memory", ["contiguous", "shifted", "transposed"])
def test_few_clipped_rows_of_a_large_tensor(memory: str, width: int, dtype: torch.dtype) -> None:
    """Only they are written: the others keep every bit."""
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(400, width, generator=generator).to(dtype)
    grad = (torch.randn(400, width, generator=generator) * 0.1).to(dtype)
    large = [0, 17, 18, 399]
    grad[large] *= 30
    if memory == "shifted":
        grad = torch.cat([torch.zeros(1, dtype=dtype), grad.flatten()])[1:].view(400, width)
    if memory == "transposed":
        grad = grad.T.contiguous().T
    module, before = Holder(weight, grad), grad.clone()
    expected = helpers.reference(module, {"weight": oracle.Units((0,))}, 0.5)
    stats = helpers.agc(module, 0.5)
    assert int(stats.clipped_units) == len(large)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    assert helpers.worst_relative_error(helpers.full_grads(module), expected.grads) <= tolerance
    others = [row for row in range(400) if row not in large]
    assert torch.equal(grad[others], before[others])


STRIDES = {
    "channels-last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every-other": lambda t: torch.stack([t, torch.zeros_like(t)], dim=-1)[..., 0],
    "flipped-dims": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("module", ["conv", "deconv"])
@pytest.mark.parametrize("weights", STRIDES)
@pytest.mark.parametrize("grads", STRIDES)
def test_any_strides(weights: str, grads: str, module: str) -> None:
    model: nn.Module = nn.Conv2d(8, 6, 3) if module == "conv" else nn.ConvTranspose2d(6, 8, 3, groups=2)
    weight = model.weight
    assert isinstance(weight, nn.Parameter)
    spread = torch.randn(weight.shape[0], weight.shape[1], 1, 1).mul(2).exp()
    with torch.no_grad():
        weight.data = STRIDES[weights](weight.data)
    grad = weight.grad = STRIDES[grads](torch.randn(weight.shape) * spread)
    layout, where = grad.stride(), grad.data_ptr()
    expected = helpers.reference(model, oracle.unit_rules(model), 40.0 if module == "conv" else 60.0)
    stats = helpers.agc(model, 40.0 if module == "conv" else 60.0)
    helpers.assert_clipped(model, stats, expected)
    assert weight.grad is grad
    assert (grad.stride(), grad.data_ptr()) == (layout, where)


class TestNonfinite:
    """A unit with a bad gradient is kept, raised for, or zeroed; its neighbours are clipped as if it were not there."""

    @staticmethod
    def model(bad: float) -> nn.Linear:
        torch.manual_seed(3)
        model = nn.Linear(6, 5)
        model.weight.grad = torch.randn(5, 6)
        model.weight.grad[1] *= 1e-3
        model.weight.grad[2, 3] = bad
        model.bias.grad = torch.randn(5)
        return model

    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("mode", ["keep", "zero"])
    def test_keep_and_zero(self, bad: float, mode: str) -> None:
        model = self.model(bad)
        assert model.weight.grad is not None
        row = model.weight.grad[2].clone()
        expected = helpers.reference(model, oracle.unit_rules(model), 0.5, on_nonfinite=mode)
        stats = helpers.agc(model, 0.5, on_nonfinite=mode)
        helpers.assert_clipped(model, stats, expected)
        assert int(stats.nonfinite_units) == 1
        assert math.isfinite(float(stats.max_ratio))
        left = model.weight.grad[2]
        if mode == "zero":
            assert left.tolist() == [0.0] * 6
        else:
            torch.testing.assert_close(left, row, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    def test_raise_leaves_every_gradient_as_it_was(self, bad: float) -> None:
        model = self.model(bad)
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with pytest.raises(FloatingPointError, match="weight"):
            helpers.agc(model, 0.5, on_nonfinite="raise")
        for parameter, grad in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0, equal_nan=True)

    def test_raise_is_silent_on_finite_gradients(self) -> None:
        model = self.model(1.0)
        expected = helpers.reference(model, oracle.unit_rules(model), 0.5)
        helpers.assert_clipped(model, helpers.agc(model, 0.5, on_nonfinite="raise"), expected)

    def test_excluded_parameters_do_not_count(self) -> None:
        model = self.model(math.inf)
        stats = helpers.agc(model, 0.5, exclude="weight", on_nonfinite="raise")
        assert int(stats.nonfinite_units) == 0
        assert math.isinf(float(stats.grad_norm))
