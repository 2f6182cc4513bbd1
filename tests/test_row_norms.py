"""``cpu_kernel=True``: what it measures is right, what it does not serve is measured as ever, and what it needs."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import dist_agc
import helpers
import oracle
from dist_agc.engine import row_norms

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(2000, 90),
    "short-rows": lambda: nn.Linear(3, 4000),
    "long-rows": lambda: nn.Linear(70_000, 4),
    "embedding": lambda: nn.Embedding(500, 96),
    "conv": lambda: nn.Conv2d(33, 40, 3),
    "conv-channels-last": lambda: nn.Conv2d(33, 40, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_oracles_gradients(kind: str, measured: list[tuple[int, int]]) -> None:
    module = LAYERS[kind]()
    helpers.noisy_grads(module, spread=1.0)
    rules = oracle.unit_rules(module)
    threshold = helpers.median_threshold(module, rules)
    expected = helpers.reference(module, rules, threshold)
    helpers.assert_clipped(module, helpers.agc(module, threshold, cpu_kernel=True), expected)
    module = cast(Any, module)
    weight = module.weight
    bias = [(1, module.bias.numel())] if hasattr(module, "bias") else []
    assert measured == [*bias, (len(weight), weight[0].numel())] * 2, "gradients, then weights"


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 777])
def test_every_length(rows: int, threads: int) -> None:
    """Full vectors, their rests, pieces and their ends; no thread leaves a row out."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for length in [*range(1, 140), 2047, 8191, 8192, 8193, 16_385]:
            x = torch.randn(rows, length)
            out = torch.full((rows,), -1.0)
            assert row_norms.serves(x, (1,), out)
            row_norms.row_norms(x, (1,), out)
            torch.testing.assert_close(out.double(), x.double().square().sum(1).sqrt(), rtol=3e-7, atol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("clones", ['"avx2", "default"', None], ids=["avx2", "baseline"])
def test_older_processors(clones: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the loader would pick there, or all there is where nothing is picked, gives the same norms."""
    attribute, given = "__attribute__((target_clones(%s)))", '"avx512f", "avx2", "default"'
    text = row_norms.SOURCE.read_text()
    assert attribute % given in text
    source = tmp_path / "row_norms.cpp"
    source.write_text(text.replace(attribute % given, attribute % clones if clones else ""))
    monkeypatch.setattr(row_norms, "SOURCE", source)
    kernel = row_norms.load.__wrapped__()
    monkeypatch.setattr(row_norms, "load", lambda: kernel)
    for length in (1, 63, 64, 65, 768, 20_000):
        x, out = torch.randn(33, length), torch.empty(33)
        row_norms.row_norms(x, (1,), out)
        torch.testing.assert_close(out.double(), x.double().square().sum(1).sqrt(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("elements", [100_000, 20_000_000])
def test_long_rows_keep_their_precision(elements: int) -> None:
    x, out = torch.rand(1, elements, generator=torch.Generator().manual_seed(2)) + 0.5, torch.empty(1)
    row_norms.row_norms(x, (1,), out)
    assert out.item() == pytest.approx(float(x.double().norm()), rel=2e-7)


def test_what_is_not_finite_stays_so() -> None:
    x = torch.ones(4, 300)
    x[0, 7], x[1, 299], x[2, 0] = float("nan"), float("inf"), 3e19  # the square of the last is beyond fp32
    out = torch.empty(4)
    row_norms.row_norms(x, (1,), out)
    assert out[:3].isfinite().tolist() == [False] * 3
    assert out[3].item() == pytest.approx(300**0.5)


NOT_SERVED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "columns": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "negated": torch._neg_view,  # pyright: ignore[reportPrivateImportUsage]
}


@pytest.mark.parametrize("kind", NOT_SERVED)
def test_what_it_does_not_serve_is_measured_as_ever(kind: str, measured: list[tuple[int, int]]) -> None:
    torch.manual_seed(1)
    module: Any = nn.Linear(300, 700, bias=False)
    module.weight.data = NOT_SERVED[kind](module.weight.data)
    module.weight.grad = NOT_SERVED[kind](torch.randn(700, 300))
    rules = oracle.unit_rules(module)
    threshold = helpers.median_threshold(module, rules)
    expected = helpers.reference(module, rules, threshold)
    helpers.assert_some_clipped(expected)
    stats = helpers.agc(module, threshold, cpu_kernel=True)
    helpers.assert_stats(stats, expected, tolerance=1e-5)
    tolerance = 2**-8 if kind == "bfloat16" else 1e-6
    assert helpers.worst_relative_error(helpers.full_grads(module), expected.grads) <= tolerance
    assert not measured


def test_channels_last_that_number_the_units() -> None:
    """Of a transposed convolution with one input channel: what is a row in its shape is a column in memory."""
    x = torch.randn(1, 40, 9, 9).to(memory_format=torch.channels_last)
    assert not row_norms.serves(x, (0, 2, 3), torch.empty(40))
    assert row_norms.serves(x.contiguous(), (0, 2, 3), torch.empty(40))


def test_a_tensor_that_comes_to_lie_otherwise(measured: list[tuple[int, int]]) -> None:
    """The choice of a kernel is kept from call to call, and made anew where it no longer holds."""
    module: Any = nn.Linear(300, 700, bias=False)
    clipper = dist_agc.Clipper(module, clipping_threshold=0.5, cpu_kernel=True)
    transposed, negated = NOT_SERVED["transposed"], NOT_SERVED["negated"]
    for i, lay in enumerate([Tensor.contiguous, transposed, Tensor.contiguous, negated]):
        module.weight.grad = lay(torch.randn(700, 300))
        norm = float(module.weight.grad.double().norm())
        stats = clipper.clip()
        assert stats is not None and float(stats.grad_norm) == pytest.approx(norm, rel=1e-6)
        assert len(measured) == (2, 3, 5, 6)[i], "every weight, and gradients that lie in rows"


def test_without_a_compiler_nothing_is_clipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row_norms.load.cache_clear()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    module = nn.Linear(3, 2)
    module(torch.ones(1, 3)).sum().backward()
    before = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    failing = f"{sys.executable} -c 'import sys; sys.exit(\"fatal error: this is no C++\")'"
    for compiler, says in [("no-such-compiler", "No such file"), (failing, "this is no C\\+\\+")]:
        monkeypatch.setenv("CXX", compiler)
        with pytest.raises(RuntimeError, match=f"needs a C\\+\\+ compiler(.|\n)*CXX(.|\n)*{says}"):
            dist_agc.apply_agc(module, clipping_threshold=0.01, cpu_kernel=True)
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), before, strict=True) if p.grad is not None)
    monkeypatch.delenv("CXX")
    dist_agc.apply_agc(module, clipping_threshold=0.01, cpu_kernel=True)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled otherwise."""
    monkeypatch.setattr(row_norms, "load", lambda: pytest.fail("compiled"))
    module = nn.Linear(30, 20)
    module(torch.ones(1, 30)).sum().backward()
    assert helpers.agc(module, 0.01).units == 21
