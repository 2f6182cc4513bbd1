"""`dist-agc units` as a user starts it: the table, JSON, what products say, and what is said of mistakes."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import dist_agc
from dist_agc.cli import build
from dist_agc.lab import shapes
from dist_agc.lab.console import display

DOCS = Path(__file__).parents[1] / "docs"

MODELS = '''
import torch
from torch import nn


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 6, 5)), nn.Parameter(torch.randn(4, 5, 6))
        self.scale = nn.Parameter(torch.ones(2, 5))

    def forward(self, x):
        return torch.relu(x @ self.w1.mT) @ self.w2.mT * self.scale[0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Experts(), Experts(), Experts()])
        self.up, self.head = nn.ConvTranspose1d(6, 8, 5, groups=2), nn.Linear(5, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Tall(Net):
    """One of its layers is larger."""

    def __init__(self):
        super().__init__()
        self.layers[1].w1 = nn.Parameter(torch.randn(4, 9, 5))


def loss(model):
    return model(torch.randn(7, 5)).sum()


def net():
    return Net(), loss


def tall():
    return Tall()


def right():
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)), loss


def of_layers():
    """A layer of torch that is used otherwise than torch does: what holds it can be registered."""
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 5, bias=False)

        def forward(self, x):
            return x @ self.inner.weight

    return Odd(), loss


def huge():
    return nn.Sequential(nn.Linear(10**6, 10**6, bias=False), nn.Linear(10**6, 10**5, bias=False))


def values():
    return nn.Linear(3, int(torch.ones(1).item()))


def missing():
    import no_such_module


def no_model():
    return 3


def batch():
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)), torch.ones(7, 5)


def lazy():
    return nn.LazyLinear(3)
'''


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "units_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)


def run(model: str, *arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(build(), ["units", "--model", model, *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == exit_code, result.output
    return result.output


def said(model: str, *arguments: str) -> str:
    """Of a mistake: in one line, without the frame."""
    return " ".join(run(f"units_models:{model}", *arguments, exit_code=2).replace("│", " ").split())


def units_of(model: Any, **options: Any) -> int:
    return sum(row.count for row in dist_agc.units(model, **options))


def line(text: str, name: str) -> list[str]:
    (found,) = [row for row in text.splitlines() if row.startswith(f"   {name} ")]
    return re.split(r"\s{2,}", found.strip())


# ---------------------------------------------------------------------------------------------------------- the table


def test_rows_that_repeat_are_one() -> None:
    text = run("units_models:net")
    assert line(text, "layers.*.w1") == ["layers.*.w1", "x3", "4×6×5", "0", "4"]
    assert line(text, "up.weight") == ["up.weight", "6×4×5 as 2×3×4×5", "0, 2", "8"]
    assert line(text, "head.bias") == ["head.bias", "2", "whole", "1"]
    assert "Linear: rows" in text and "ConvTranspose1d: one for each output channel" in text
    assert text.index("Linear: rows") < text.index("a vector: one unit") < text.index("guess: dim 0")


def test_what_differs_is_a_row_of_its_own() -> None:
    rows = [row.split() for row in run("units_models:tall").splitlines() if row.startswith("   layers.*.w1")]
    assert rows == [["layers.*.w1", "x2", "4×6×5", "0", "4"], ["layers.*.w1", "4×9×5", "0", "4"]]


def test_the_sum_and_the_line_that_settles_guesses() -> None:
    text = " ".join(run("units_models:net").split())
    model = dist_agc.units(_net())
    units, elements = sum(row.count for row in model), sum(torch.Size(row.shape).numel() for row in model)
    assert f"13 parameters with {elements} elements: {units} units. 9 guessed, 6 of them with three dims" in text
    assert "units={ 'layers.*.w1': 0, 'layers.*.w2': 0, }" in text
    settled = run("units_models:net", "--units", "layers.*.w?=0,1")
    assert line(settled, "layers.*.w1") == ["layers.*.w1", "x3", "4×6×5", "0, 1", "24"]
    assert "often wrong" not in settled and "3 guessed, 0 of them" in settled


def _net() -> Any:
    return shapes.named("units_models:net")()[0]


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_gets_no_line_that_is_too_long(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for lines of code, which are there to be copied. Nothing is cut off."""
    out = io.StringIO()
    terminal = Console(file=out, width=columns, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(display, "console", lambda here: terminal)
    run("units_models:net", "--observe", exit_code=1)
    text = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())
    assert max(len(row.rstrip()) for row in text.splitlines() if not row.startswith("    ")) <= columns
    assert "…" not in text and ("leaves (0, 1)" in text) and "6×4×5 as 2×3×4×5" in text and "layers.*.scale" in text


def test_a_pipe_gets_a_row_a_line() -> None:
    assert line(run("units_models:net"), "layers.*.scale")[-1] == "2"
    text = run("units_models:net", "--observe", exit_code=1)
    assert line(text, "layers.*.w1")[-1] == "DISAGREES: leaves (0, 1)"


def test_a_model_of_any_size_on_meta() -> None:
    assert "1,100,000,000,000 elements: 1,100,000 units." in run("units_models:huge")


# --------------------------------------------------------------------------------------------------------------- JSON


def test_json_has_every_row() -> None:
    found = json.loads(run("units_models:net", "--json"))
    rows = dist_agc.units(_net())
    assert [row["name"] for row in found["rows"]] == [row.name for row in rows]
    assert [tuple(row["dims"]) for row in found["rows"]] == [row.dims for row in rows]
    assert (found["parameters"], found["guesses"], found["guesses_of_three_dims"]) == (13, 9, 6)
    assert found["units"] == sum(row.count for row in rows) and "seen" not in found
    seen = json.loads(run("units_models:net", "--json", "--observe", exit_code=1))
    assert (seen["seen"], seen["disagree"]) == (7, 6)
    (w1,) = [row for row in seen["rows"] if row["name"] == "layers.0.w1"]
    assert (w1["observed"], w1["disagrees"]) == ([0, 1], True)


# ------------------------------------------------------------------------------------------------------------ products


def test_a_disagreement_is_loud() -> None:
    text = run("units_models:net", "--observe", exit_code=1)
    assert line(text, "head.weight")[-1] == "agrees" and line(text, "layers.*.scale")[-1] == "not seen"
    assert line(text, "head.bias")[-1] == "1", "nothing is said of a vector"
    assert "layers.*.w1 disagrees: the products of the forward pass leave (0, 1) of 4×6×5, and (0,) number" in text
    assert "    units={'layers.*.w1': (0, 1)}" in text
    assert "    dist_agc.register_units(Experts, {'w1': (0, 1)})" in text
    assert "often wrong" not in text, "it is settled by what was said already"
    assert "7 seen in products, of which 6 disagree." in text


def test_what_is_said_settles_it() -> None:
    text = run("units_models:net", "--observe", "--units", "layers.*.w1=0,1", "--units", "layers.*.w2=0,1")
    assert "DISAGREES" not in text and "7 seen in products, of which 0 disagree." in text
    assert "0 disagree" in run("units_models:right", "--observe")
    assert "2 seen in products, of which 0 disagree" in run("units_models:batch", "--observe")


def test_a_layer_of_torch_is_not_registered_for_good() -> None:
    text = run("units_models:of_layers", "--observe", exit_code=1)
    assert "dist_agc.register_units(Odd, {'inner.weight': (1,)})" in text


def test_products_are_seen_on_meta_too() -> None:
    assert "6 disagree" in run("units_models:net", "--observe", "--device", "meta", exit_code=1)


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tall", "--observe"], "must return (module, loss)"),
        (["values"], "fails on the meta device, where tensors have no values. Try --device cpu"),
        (["missing"], "No module named 'no_such_module'"),
        (["no_model"], "must return a module, (module, loss) or (module, batch), got int"),
        (["nothing"], "cannot be loaded"),
        (["lazy"], "has no shape yet: run one forward pass"),
        (["net", "--device", "cuda"], "'cuda' is not one of meta, cpu"),
        (["net", "--units", "nothing=0"], "'nothing' matches no parameter"),
        (["net", "--units", "layers.*.w1=zero"], "expected GLOB=DIMS"),
    ],
)
def test_mistakes(arguments: list[str], says: str) -> None:
    assert says in said(*arguments)


def test_what_fails_on_meta_is_built_for_real() -> None:
    assert "2 parameters with 4 elements: 2 units. None is guessed." in run("units_models:values", "--device", "cpu")


# ------------------------------------------------------------------------------------------------------- on the pages


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factories that docs/units.md shows, as my_models."""
    pytest.importorskip("transformers", minversion="5")
    (code,) = re.findall(r"^```python\n(# my_models.py\n.*?)^```", (DOCS / "units.md").read_text(), re.M | re.S)
    (tmp_path / "my_models.py").write_text(code)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)


@pytest.mark.parametrize(
    ("factory", "preset", "row"),
    [
        ("mixtral", "mixtral-8x7b", ["x32", "8×28672×4096", "0, 1", "229,376"]),
        ("gpt_oss", "gpt-oss-120b", ["x36", "128×2880×5760", "0, 2", "737,280"]),
        ("deepseek_v3", "deepseek-v3", ["x58", "256×4096×7168", "0, 1", "1,048,576"]),
        ("qwen3_30b", "qwen3-30b-a3b", ["x48", "128×1536×2048", "0, 1", "196,608"]),
    ],
)
@pytest.mark.usefixtures("page")
def test_the_factories_of_the_page(factory: str, preset: str, row: list[str]) -> None:
    """And the presets of `dist-agc plan` are these models: the same parameters, with as many units."""
    assert line(run(f"my_models:{factory}"), "model.layers.*.mlp.experts.gate_up_proj")[1:] == row
    model, plan = shapes.load(f"my_models:{factory}"), shapes.load(preset)
    of_model = {name.removeprefix("model."): p.shape for name, p in model.named_parameters()}
    assert of_model == {name: p.shape for name, p in plan.named_parameters()}
    units: Any = shapes.UNITS[preset]
    assert units_of(model) == units_of(plan, units=units) > 8_000_000


@pytest.mark.usefixtures("page")
def test_a_loss_of_the_page_shows_the_products_of_experts() -> None:
    text = run("my_models:small_mixtral", "--observe")
    assert line(text, "model.layers.*.mlp.experts.down_proj")[1:] == ["x2", "8×32×48", "0, 1", "256", "agrees"]
