"""Plans for clusters that are not here: `dist-agc plan` and the arithmetic under it."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from dist_agc import AGCConfig
from dist_agc.cli import build
from dist_agc.cli.plan import Planned, planned
from dist_agc.frameworks import virtual
from dist_agc.lab import shapes
from dist_agc.model.blocks import Axis
from dist_agc.model.units import unit_rules

MILLION = 1_000_000


def plan(model: str, layout: str, world: int, **sizes: int) -> Planned:
    sizes = sizes or {"tp+fsdp2": {"tensor": 8}, "hsdp": {"shard": 64}}.get(layout, {})
    here = virtual.World(world, world // 2, **sizes)
    return planned(shapes.load(model), layout, here, AGCConfig(units=shapes.UNITS.get(model)))


@pytest.mark.parametrize(
    ("model", "parameters", "tensors"),
    [
        ("resnet50", 25_557_032, 161),  # torchvision's
        ("gpt2-small", 124_439_808, 148),  # transformers'
        ("llama3-8b", 8_030_261_248, 291),
        ("llama3-70b", 70_553_706_496, 723),
        ("llama3-405b", 405_853_388_800, 1137),
        # Those that transformers 5.23 builds from its config classes; tests/test_units_command.py compares every shape.
        ("mixtral-8x7b", 46_702_792_704, 291),
        ("qwen3-30b-a3b", 30_532_122_624, 531),
        ("deepseek-v3", 671_026_404_352, 909),
        ("gpt-oss-120b", 116_829_156_672, 615),
        ("moe-8x7b", 46_702_792_704, 291),
    ],
)
def test_presets_have_the_sizes_of_the_models(model: str, parameters: int, tensors: int) -> None:
    found = list(shapes.load(model).parameters())
    assert (sum(p.numel() for p in found), len(found)) == (parameters, tensors)


@pytest.mark.parametrize(
    ("model", "units"),
    [
        ("mixtral-8x7b", 32 * 8 * (2 * 14336 + 4096)),
        ("qwen3-30b-a3b", 48 * 128 * (2 * 768 + 2048)),
        ("deepseek-v3", 58 * 256 * (2 * 2048 + 7168)),
        ("gpt-oss-120b", 36 * 128 * (2 * 2880 + 2880)),
    ],
)
def test_presets_count_rows_of_experts(model: str, units: int) -> None:
    found = virtual.parameters(shapes.load(model), "ddp", virtual.World(1, 0))
    rules = unit_rules(found, AGCConfig(units=shapes.UNITS[model]))
    pairs = zip(found, rules, strict=True)
    assert sum(rule.count for p, rule in pairs if rule and ".experts." in p.name and len(p.shape) == 3) == units


FLAT = ("fsdp1", "zero1", "zero2", "zero3")


@pytest.mark.parametrize("layout", virtual.LAYOUTS)
@pytest.mark.parametrize("model", [name for name in shapes.PRESETS if name != "moe-8x7b"])
def test_agc_sends_next_to_nothing_where_ranks_have_much(model: str, layout: str) -> None:
    # A border inside of a transposed expert, (experts, in, out), cuts all of its units, so where ranks are many all
    # units of GPT-OSS are cut. Two squares of 4 bytes each are sent twice then, beside the 4 bytes of each of its 2880
    # elements: no buffer that one all-reduce adds up is smaller.
    most = 1.01 * 16 / (4 * 2880) if model == "gpt-oss-120b" and layout in FLAT else 0.001
    rows = [plan(model, layout, size) for size in (64, 1024, 16384)]
    for row in rows:
        assert row.elements_per_rank < MILLION or row.share < most, row


@pytest.mark.parametrize("layout", virtual.LAYOUTS)
def test_ranks_together_hold_every_element_once(layout: str) -> None:
    model = shapes.load("resnet50")
    size = 24
    sizes = {"tp+fsdp2": {"tensor": 4}, "hsdp": {"shard": 6}}.get(layout, {})
    copies = {"ddp": 24, "zero0": 24, "hsdp": 4, "tp+fsdp2": 4}.get(layout, 1)  # names of ResNet: nothing to cut by tp
    held = 0
    for rank in range(size):
        parameters = virtual.parameters(model, layout, virtual.World(size, rank, **sizes))
        for parameter, rule in zip(parameters, unit_rules(parameters, AGCConfig()), strict=True):
            for block in parameter.pieces(rule).blocks:
                flat = block.sizes is not None
                held += block.length if flat else parameter.weight().numel()
    assert held == copies * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("layout", ["fsdp1", "zero1", "zero3"])
def test_every_rank_has_the_same_slots(layout: str) -> None:
    model = shapes.load("resnet50")
    rows = [planned(model, layout, virtual.World(7, rank), AGCConfig()) for rank in range(7)]
    assert len({(row.units, row.split_units, row.payload_bytes) for row in rows}) == 1
    assert rows[0].split_units > 0


def test_whole_rows_need_no_slots() -> None:
    row = plan("llama3-8b", "fsdp2", 1024)
    assert row.split_units == 65  # the norms' gains alone, which are 1-D
    assert plan("llama3-8b", "ddp", 1024).all_reduces == 0


def test_a_plan_does_not_grow_with_the_square_of_tensors_or_ranks() -> None:
    """Counted in slots and kept bytes, which do not depend on the machine."""
    few, many = plan("llama3-8b", "fsdp1", 1024), plan("llama3-8b", "fsdp1", 8192)
    more = 8191 / 1023 * 1.01  # borders between ranks, of which now and then one falls between two rows
    assert many.split_units <= more * few.split_units
    assert many.plan_bytes <= more * few.plan_bytes


def calls(run: Callable[[], object]) -> int:
    """How many functions are called, in Python and from it: what a plan costs, on any machine."""
    count = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("layout", virtual.LAYOUTS)
def test_every_tensor_costs_the_same_few_calls_to_plan(layout: str) -> None:
    """However many there are, and on however many ranks; the torch calls among them take rows, not elements."""

    def cost(tensors: int, world: int) -> int:
        model = shapes.build({f"layers.{i}.weight": (96, 64) for i in range(tensors)})
        sizes = {"tp+fsdp2": {"tensor": 8}, "hsdp": {"shard": 32}}.get(layout, {})
        return calls(lambda: planned(model, layout, virtual.World(world, world // 2, **sizes), AGCConfig()))

    few, many = cost(64, 64), cost(256, 64)
    assert many < 1.02 * 4 * few and many / 256 < 400, (few, many)
    assert cost(64, 16384) < 1.3 * few


def test_axes_compare_by_their_ranks() -> None:
    assert Axis((0, 1, 2), 1) == Axis((0, 1, 2), 1)
    assert hash(Axis((0, 1, 2), 1)) == hash(Axis((0, 1, 2), 1))
    assert Axis((0, 1, 2), 1) != Axis((0, 5, 2), 1)


def test_worlds_must_fit() -> None:
    with pytest.raises(ValueError, match="tensor=3 does not divide"):
        virtual.World(8, 0, tensor=3)
    with pytest.raises(ValueError, match="not in a world"):
        virtual.World(8, 8)
    with pytest.raises(ValueError, match="'fsdp3' is not known"):
        virtual.parameters(nn.Linear(2, 2), "fsdp3", virtual.World(2, 0))


def make_model() -> nn.Module:
    return nn.Linear(3, 2)


def test_models_of_the_user() -> None:
    assert shapes.load("test_plan:make_model").get_parameter("weight").device == torch.device("meta")
    with pytest.raises(ValueError, match="is no preset"):
        shapes.load("resnet5000")
    with pytest.raises(ValueError, match="cannot be loaded"):
        shapes.load("test_plan:missing")


# ---------------------------------------------------------------------------------------------------------- the command


def run(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(build(), ["plan", *arguments])
    assert result.exit_code == exit_code, result.output
    return result.output


def test_the_table() -> None:
    text = run("--model", "resnet50", "--model", "gpt2-small", "--world", "64", "--world", "128")
    assert "resnet50" in text and "gpt2-small" in text
    for layout in virtual.LAYOUTS:
        rows = [line for line in text.splitlines() if line.startswith(f" {layout} ")]
        assert len(rows) == 4, f"{layout}: two models and two worlds"
    assert "CPU s" in text and "bytes that a rank sends in a step" in " ".join(text.split())


def test_lines_of_json() -> None:
    lines = run("--model", "llama3-8b", "--layout", "fsdp1", "--layout", "hsdp", "--world", "256", "--json")
    flat, hybrid = map(json.loads, lines.splitlines())
    assert (flat["layout"], flat["world"], flat["model"]) == ("fsdp1", 256, "llama3-8b")
    expected = plan("llama3-8b", "fsdp1", 256)
    for name in ("split_units", "payload_bytes", "sent_bytes", "gradient_bytes", "elements_per_rank", "plan_bytes"):
        assert flat[name] == getattr(expected, name)
    assert 0 < flat["share"] < 0.001 and flat["seconds"] > 0
    assert hybrid["elements_per_rank"] == 4 * flat["elements_per_rank"], "shards of 64 ranks of 256"


def test_the_rank_and_the_sizes_are_the_users() -> None:
    chosen = ["--model", "llama3-8b", "--layout", "tp+fsdp2", "--world", "64", "--json"]
    first, last = (json.loads(run(*chosen, "--rank", rank)) for rank in ("0", "63"))
    assert first["units"] == last["units"] and first["all_reduces"] == last["all_reduces"]
    narrow = json.loads(run(*chosen, "--tensor", "2"))
    assert narrow["elements_per_rank"] != first["elements_per_rank"]
    halves = json.loads(run(*chosen, "--gradient-bytes", "2"))
    assert halves["gradient_bytes"] == first["gradient_bytes"] / 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layout", "fsdp3"], "'fsdp3' is not known"),
        (["--model", "nothing"], "is no preset"),
        (["--layout", "tp+fsdp2", "--tensor", "7"], "does not divide"),
        (["--world", "8", "--layout", "ddp", "--rank", "8"], "not in a world of 8"),
    ],
)
def test_mistakes(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert says in run(*arguments, exit_code=2)
