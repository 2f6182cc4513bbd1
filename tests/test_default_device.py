"""torch.set_default_device may name another device than the parameters': nothing of ours lies there.

Several ranks: tests/mpi/test_default_device_ranks.py.
"""

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._device import _device_constructors

import dist_agc
import oracle
from helpers import assert_clipped, full_weights, median_threshold, noisy_grads, reference

PACKAGE = Path(dist_agc.__file__).parent
# These make models and samples of their own, which may well lie on the default device.
COMMANDS = ("cli", "lab", "conformance")


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def network() -> tuple[nn.Sequential, dict[str, oracle.Units], float]:
    """Dense and sparse gradients, wide and narrow units, and a threshold between them."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(9, 5), nn.Conv1d(5, 4, 3), nn.Linear(4, 6), nn.LayerNorm(6))
    noisy_grads(model)
    rules = oracle.unit_rules(model)
    threshold = median_threshold(model, rules)
    rows: Any = model[0].weight
    rows.grad = rows.grad.to_sparse(1)
    return model, rules, threshold


def apply(model: nn.Module, threshold: float, **options: Any) -> Any:
    return dist_agc.apply_agc(model, threshold, **options)


def in_step(model: nn.Module, threshold: float, **options: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, foreach=False)
    with default_device("meta"):
        hook = dist_agc.attach(model, optimizer, clipping_threshold=threshold, **options)
        optimizer.step()
        return hook.stats


OPTIONS = {
    "exact": {},
    "zero": {"on_nonfinite": "zero"},
    "interval": {"weight_norm_interval": 2},
    "cpu_kernel": {"cpu_kernel": True},
}
WAYS = [pytest.param(way, o, id=f"{way.__name__}-{name}") for way in (apply, in_step) for name, o in OPTIONS.items()]


@pytest.mark.parametrize(("way", "options"), [*WAYS, pytest.param(apply, {"compile": True}, id="compile")])
@pytest.mark.filterwarnings("ignore:`?torch.jit:DeprecationWarning")  # torch's own, while it compiles
def test_clipping(way: Callable[..., Any], options: dict[str, Any]) -> None:
    model, rules, threshold = network()
    expected = reference(model, rules, threshold)
    with default_device("meta"):
        stats = way(model, threshold, **options)
        said = stats.as_dict(per_parameter=True)
    assert_clipped(model, stats, expected)
    assert said["agc/clipped_units"] == expected.clipped_units


def test_thresholds_of_groups_and_a_parameter_that_is_frozen_later() -> None:
    model, rules, threshold = network()
    per_group = {name: threshold / 3 if name.startswith("1.") else threshold for name, _ in model.named_parameters()}
    groups = [
        {"params": list(model[1].parameters()), "clipping_threshold": threshold / 3},
        {"params": [p for i in (0, 2, 3) for p in model[i].parameters()]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.0, foreach=False)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=threshold)
    expected = reference(model, rules, per_group)
    with default_device("meta"):
        optimizer.step()
    assert_clipped(model, hook.stats, expected)
    gain: Any = model[3].weight
    gain.requires_grad_(False)
    gain.grad = None
    with default_device("meta"):
        optimizer.step()
        assert hook.stats is not None and hook.stats.units == expected.units - 1
        assert hook.stats.as_dict()["agc/clipped_units"] == 0


def test_during_backward() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6))
    x, rules = torch.randn(3, 5), oracle.unit_rules(model)
    model(x).square().sum().backward()
    threshold = median_threshold(model, rules)
    expected = reference(model, rules, threshold)
    model.zero_grad()
    with default_device("meta"):
        hook = dist_agc.attach(model, clipping_threshold=threshold, during_backward=True)
        model(x).square().sum().backward()
    assert_clipped(model, hook.stats, expected)


def test_ratios_and_units() -> None:
    model, rules, threshold = network()
    expected = reference(model, rules, threshold)
    weights = full_weights(model)
    with default_device("meta"):
        found = dist_agc.ratios(model, [threshold / 4, threshold])
        rows = dist_agc.units(model)
    assert {n: (found.units[n], above[1]) for n, above in found.above.items()} == {
        name: (of.units, of.clipped_units) for name, of in expected.per_parameter.items()
    }
    assert {row.name: row.count for row in rows} == {name: of.units for name, of in expected.per_parameter.items()}
    assert all(torch.equal(weight, weights[name]) for name, weight in full_weights(model).items())


def test_units_of_a_model_that_runs() -> None:
    layer, x = nn.Linear(4, 3), torch.ones(2, 4)
    with default_device("meta"):
        assert dist_agc.units(layer, run=lambda: layer(x))[0].observed == (0,)


FACTORIES = {made.__name__ for made in _device_constructors()}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_whatever_makes_a_tensor_says_where(path: Path) -> None:
    """Calls that the default device has a say in: ``torch.zeros`` and its like, by their name or imported."""
    assert {"tensor", "zeros", "empty", "arange", "full", "sparse_coo_tensor"} <= FACTORIES
    if path.relative_to(PACKAGE).parts[0] in COMMANDS:
        return
    silent = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert not FACTORIES & {alias.name for alias in node.names}, "write torch.zeros, so that this test sees it"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called = node.func
        of_torch = isinstance(called.value, ast.Name) and called.value.id == "torch"
        if of_torch and called.attr in FACTORIES and "device" not in {word.arg for word in node.keywords}:
            silent.append(f"line {node.lineno}: torch.{called.attr}")
    assert not silent, f"say device=: {silent}"
