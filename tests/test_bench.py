"""`dist-agc bench`: what it times is what it says, in counts and in gradients; no test asserts a time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import turns
from dist_agc import AGCConfig, Clipper
from dist_agc.cli import build
from dist_agc.engine import row_norms
from dist_agc.lab import contenders, growing, synthetic, timing

CONFIG = AGCConfig(clipping_threshold=0.01)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 30), nn.ConvTranspose1d(6, 4, 3, groups=2), nn.LayerNorm(7))


class Layer(nn.Module):
    """With the names by which tensor parallelism cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(12, 9)
        self.o_proj = nn.Linear(9, 12)


def layered() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 12), nn.Sequential(Layer(), Layer()), nn.LayerNorm(13))


def made(fraction: float) -> tuple[nn.Module, int]:
    weights, gradients = small(), small()
    synthetic.fill(weights)
    clipped = synthetic.turn_into_gradients(weights, gradients, fraction, CONFIG)
    for parameter, gradient in zip(weights.parameters(), gradients.parameters(), strict=True):
        parameter.grad = gradient.detach()
    return weights, clipped


def grads_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def method(model: nn.Module, name: str) -> timing.Method:
    return next(m for m in contenders.on_gradients(model, "plain", CONFIG) if m.name == name)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_exactly_this_share_of_units_is_clipped(fraction: float) -> None:
    model, clipped = made(fraction)
    stats = Clipper(model, CONFIG).clip()
    assert stats is not None
    assert int(stats.clipped_units) == clipped == round(fraction * stats.units)


def test_every_call_starts_from_the_same_gradients() -> None:
    """The timed ones and those that are counted; in the order in which backward leaves gradients, the first last."""
    model, clipped = made(0.25)
    agc = method(model, contenders.AGC)
    seen: list[int] = []

    def look() -> None:
        assert agc.call is not None
        seen.append(int(agc.call().clipped_units))

    methods = [
        timing.Method("one", look, agc.before),
        timing.Method("two", look, agc.before),
        timing.Method("three", reason="not here"),
    ]
    timing.time_together(methods, 3, lambda: None)
    assert seen == [clipped] * (2 * (2 + 3) + 2 * 2)
    assert [len(m.seconds) for m in methods] == [3, 3, 0]
    model, _ = made(1.0)
    before = [g.clone() for g in grads_of(model)]
    agc = method(model, contenders.AGC)
    versions = [g._version for g in grads_of(model)]
    timing.time_together([agc], 1, lambda: None)
    assert not any(torch.equal(g, b) for g, b in zip(grads_of(model), before, strict=True))
    agc.before()
    assert all(torch.equal(g, b) for g, b in zip(grads_of(model), before, strict=True))
    assert all(g._version > v for g, v in zip(grads_of(model), versions, strict=True))


def test_gradients_are_laid_down_in_the_order_of_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made(0.25)
    agc, order, real = method(model, contenders.AGC), [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: order.append(self.data_ptr()) or real(self, other))
    agc.before()
    assert order == [g.data_ptr() for g in reversed(grads_of(model))]


def test_a_norm_that_is_infinite_writes_and_changes_nothing() -> None:
    model, _ = made(1.0)
    before, versions = [g.clone() for g in grads_of(model)], [g._version for g in grads_of(model)]
    norm = method(model, contenders.NORM)
    assert norm.call is not None
    norm.call()
    assert [g._version for g in grads_of(model)] == [v + 1 for v in versions], "every gradient was written once"
    assert all(torch.equal(g, b) for g, b in zip(grads_of(model), before, strict=True))


def test_what_repeats_is_taken_over_whole_periods() -> None:
    """One call in ten that measures weights counts for its tenth, and a median does not hide it."""
    rare = timing.Method("rare", period=3, seconds=[1.0, 1.0, 7.0, 1.0, 7.0, 1.0, 9.0])
    every = timing.Method("every", seconds=[1.0, 2.0, 3.0, 2.0, 2.0, 2.0, 9.0])
    assert rare.typical == 3.0 and every.typical == 2.0
    assert rare.ratio(every) == 1.5
    alone = timing.Method("rare", period=10, call=lambda: None)
    timing.time_together([alone], 9, lambda: None)
    assert alone.call is None and "10 calls" in alone.reason


def test_reused_weight_norms_are_counted_over_their_period() -> None:
    """Nine of ten calls leave the weights alone, and the tenth counts for its tenth."""
    model, _ = made(0.0)
    methods = [method(model, name) for name in (contenders.AGC, contenders.REUSED)]
    timing.time_together(methods, 10, lambda: None)
    full, reused = (one.counts for one in methods)
    saved = (full["operations"] - reused["operations"]) / 0.9  # in each of the nine
    assert saved >= 2 and saved == pytest.approx(round(saved)), "a norm of each matrix"


TIMM = """
def adaptive_clip_grad(parameters, clip_factor=0.01, eps=1e-3, norm_type=2.0):
    for p in parameters:
        p.grad.mul_(clip_factor)
"""


def test_timm_is_one_file_whatever_its_package_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm" / "utils").mkdir(parents=True)
    (tmp_path / "timm" / "__init__.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "timm" / "utils" / "agc.py").write_text(TIMM)
    monkeypatch.syspath_prepend(str(tmp_path))
    model, _ = made(0.0)
    before = [g.clone() for g in grads_of(model)]
    timm = method(model, "timm")
    assert timm.call is not None, timm.reason
    timm.call()
    assert all(torch.equal(g, 0.01 * b) for g, b in zip(grads_of(model), before, strict=True))


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made(0.0)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    for name in ("timm", "Composer"):
        assert "No module named" in method(model, name).reason
    assert {m.reason for m in contenders.on_gradients(model, "fsdp2", CONFIG)[-2:]} == {"knows no shards"}


# ---------------------------------------------------------------------------------------------------------- the command


def run(arguments: list[str], out: Path) -> str:
    result = CliRunner().invoke(build(), ["bench", *arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command(tmp_path: Path) -> None:
    chosen = ["--model", "test_bench:small", "--rounds", "2", "--clipped", "0.25", "--json"]
    clipped = json.loads(run(chosen, tmp_path).splitlines()[-1])["clipped"]["0.25"]
    found = {row["method"]: row for row in clipped}
    assert found[contenders.AGC]["ms"] > 0
    assert found[contenders.AGC]["collectives"] == 0
    assert found[contenders.AGC]["clipped_units"] == round(0.25 * (30 + 1 + 4 + 1 + 2))
    assert found[contenders.FLOOR]["operations"] == 2 * len(list(small().parameters()))
    assert "10 calls" in found[contenders.REUSED]["unavailable"]
    assert all("ms" in row or row["unavailable"] for row in found.values())
    (chart,) = tmp_path.glob("*.png")
    assert chart.read_bytes()[:4] == b"\x89PNG"


def test_a_kernel_of_our_own_beside_torchs(tmp_path: Path) -> None:
    chosen = ["--model", "test_bench:small", "--rounds", "10", "--clipped", "0.25", "--json", "--cpu-kernel"]
    clipped = json.loads(run(chosen, tmp_path).splitlines()[-1])["clipped"]["0.25"]
    found = {row["method"]: row for row in clipped}
    for name in (contenders.KERNEL, contenders.KERNEL_REUSED):
        assert found[name]["ms"] > 0 and found[name]["clipped_units"] == found[contenders.AGC]["clipped_units"]
    # It does not go through torch's dispatcher: gradients and weights of the one matrix that lies in rows, and of
    # parameters of one unit, those of one length together.
    assert found[contenders.AGC]["operations"] - found[contenders.KERNEL]["operations"] == 2 * (1 + 3)


def test_the_tables(tmp_path: Path) -> None:
    text = run(["--model", "test_bench:small", "--rounds", "10", "--clipped", "0", "--clipped", "1"], tmp_path)
    assert "0% of units clipped" in text and "100% of units clipped" in text
    assert text.count(contenders.AGC) == 4 and text.count("W and G read once") == 2


COLLECTIVES = {"ddp": 0, "fsdp1": 1, "fsdp2": 1, "hsdp": 1, "tp+fsdp2": 2, "zero1": 1, "zero3": 1}
ARGUMENTS = ["--model", "test_bench:layered", "--rounds", "1", "--clipped", "0.5", "--json", "--out"]
joined = turns.fixture((2, ["fsdp1", "fsdp2", "zero1"]), (4, ["hsdp", "tp+fsdp2"]), read=lambda folder, log: log)


@pytest.mark.parametrize("layout", COLLECTIVES)
def test_every_layout_on_its_processes(layout: str, joined: turns.Trained, tmp_path: Path) -> None:
    if layout.startswith("zero"):
        pytest.importorskip("deepspeed")
    log = joined(layout) if layout not in ("ddp", "zero3") else started(layout, tmp_path)
    assert "50% of units clipped  3/3" in log, "progress, where stderr is no terminal"
    assert "profiler" not in log.replace("profiler results will not", ""), "torch's own lines"
    text = next(line for line in log.splitlines() if line.startswith('{"title"'))
    found: dict[str, Any] = {row["method"]: row for row in json.loads(text)["clipped"]["0.5"]}
    agc = found[contenders.AGC]
    assert agc["clipped_units"] == round(0.5 * (11 + 2 * (9 + 1 + 12 + 1) + 2))
    # In a step of DeepSpeed, what it sends itself comes on top.
    beside = found[contenders.NOTHING] if layout.startswith("zero") else {"collectives": 0, "bytes": 0}
    assert agc["collectives"] - beside["collectives"] == COLLECTIVES[layout]
    assert (agc["bytes"] > beside["bytes"]) == (COLLECTIVES[layout] > 0)
    baseline = {"fsdp1": f"FSDP1 {contenders.NORM}", "zero1": contenders.DEEPSPEED, "zero3": contenders.DEEPSPEED}
    assert found[baseline.get(layout, contenders.NORM)]["to_norm_clip"] == 1.0
    assert agc["to_norm_clip"] > 0


def started(layout: str, out: Path) -> str:
    """The command starts its processes itself."""
    command = [sys.executable, "-m", "dist_agc.cli", "bench", "--layout", layout, "--nproc", "2", *ARGUMENTS, str(out)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def join(layout: str, folder: str) -> None:
    """The command joins processes that a launcher has started."""
    build()(["bench", "--layout", layout, *ARGUMENTS, folder], standalone_mode=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "nothing"], "is no preset"),
        (["--layout", "zero9", "--nproc", "1"], "zero9"),
        (["--cpu-kernel"], "needs a C++ compiler"),
    ],
)
def test_mistakes(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("CXX", "no-such-compiler")
    row_norms.load.cache_clear()
    result = CliRunner().invoke(build(), ["bench", *arguments, "--out", str(tmp_path)])
    assert result.exit_code != 0
    assert says in result.output


# --------------------------------------------------------------------------------------------------------------- growth


def test_the_power_of_a_curve() -> None:
    assert growing.Curve("clip()", "tensors", [(n, 3.0 * n) for n in (10, 100, 1000)]).power == pytest.approx(1)
    assert growing.Curve("clip()", "tensors", [(n, 0.1 * n**2) for n in (10, 100, 1000)]).power == pytest.approx(2)


def test_growth(tmp_path: Path) -> None:
    """The curves themselves, at small sizes: each has a time for every size, and the chart a panel for every curve."""
    found = json.loads(run(["--growth", "--scale", "0.02", "--json"], tmp_path))
    assert [(curve["what"], curve["against"]) for curve in found] == [
        ("clip()", "rows of 1024"),
        ("clip()", "tensors"),
        ("planning", "rows of 1024"),
        ("planning", "tensors"),
        ("planning", "ranks"),
    ]
    for curve in found:
        sizes = [size for size, _ in curve["points"]]
        assert sizes == sorted(set(sizes)) and len(sizes) >= 4 and all(seconds > 0 for _, seconds in curve["points"])
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"
    assert "planning against ranks" in run(["--growth", "--scale", "0.01"], tmp_path)


if __name__ == "__main__":
    turns.take(join)
