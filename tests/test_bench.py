"""`dist-agc bench`: what it times is what it says, in counts and in gradients; no test asserts a time."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from dist_agc import AGCConfig, Clipper
from dist_agc.cli import build, growing, timing

CONFIG = AGCConfig(clipping_threshold=0.01)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 30), nn.ConvTranspose1d(6, 4, 3, groups=2), nn.LayerNorm(7))


def made(fraction: float) -> tuple[nn.Module, int]:
    weights, gradients = small(), small()
    timing.fill(weights)
    clipped = timing.turn_into_gradients(weights, gradients, fraction, CONFIG)
    for parameter, gradient in zip(weights.parameters(), gradients.parameters(), strict=True):
        parameter.grad = gradient.detach()
    return weights, clipped


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_exactly_this_share_of_units_is_clipped(fraction: float) -> None:
    model, clipped = made(fraction)
    stats = Clipper(model, CONFIG).clip()
    assert stats is not None
    assert int(stats.clipped_units) == clipped == round(fraction * stats.units)


def test_every_method_starts_from_the_same_gradients_and_leaves_them() -> None:
    model, clipped = made(0.25)
    seen: list[int] = []

    def look() -> None:
        stats = Clipper(model, CONFIG).clip()
        assert stats is not None
        seen.append(int(stats.clipped_units))

    grads = [p.grad for p in model.parameters() if p.grad is not None]
    before = [g.clone() for g in grads]
    methods = [timing.Method("one", look), timing.Method("two", look), timing.Method("three", reason="not here")]
    timing.time_together(methods, grads, 3, lambda: None)
    assert set(seen[:10]) == {clipped}
    assert [len(m.seconds) for m in methods] == [3, 3, 0]
    assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))


def test_a_norm_that_is_infinite_writes_and_changes_nothing() -> None:
    model, _ = made(1.0)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = next(m for m in timing.methods(model, "plain", CONFIG) if m.name == timing.NORM)
    assert norm.call is not None
    norm.call()
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True) if p.grad is not None)


def test_the_command(tmp_path: Path) -> None:
    arguments = ["bench", "--model", "test_bench:small", "--rounds", "2", "--clipped", "0.25", "--json"]
    result = CliRunner().invoke(build(), [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = {row["method"]: row for row in json.loads(result.stdout.splitlines()[-1])["clipped"]["0.25"]}
    assert found[timing.AGC]["median_ms"] > 0
    assert found[timing.AGC]["collectives"] == 0
    assert found[timing.FLOOR]["operations"] == 2 * len(list(small().parameters()))
    assert all("median_ms" in row or row["unavailable"] for row in found.values())
    (chart,) = tmp_path.glob("*.png")
    assert chart.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--model", "nothing"], "is no preset"), (["--layout", "zero9", "--nproc", "1"], "zero9")],
)
def test_mistakes(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(build(), ["bench", *arguments, "--out", str(tmp_path)])
    assert result.exit_code != 0
    assert says in result.output


def test_the_power_of_a_curve() -> None:
    assert growing.Curve("clip()", "tensors", [(n, 3.0 * n) for n in (10, 100, 1000)]).power == pytest.approx(1)
    assert growing.Curve("clip()", "tensors", [(n, 0.1 * n**2) for n in (10, 100, 1000)]).power == pytest.approx(2)
