"""Which parameter has the largest ratio, and the largest among units that do not begin at zero."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_agc
import helpers
import oracle
from dist_agc.cli.report import page
from dist_agc.cli.runs import read

pytestmark = pytest.mark.filterwarnings("ignore:the weights of:UserWarning")


def adapted() -> nn.Sequential:
    """A layer, and an adapter that begins at zero, as LoRA's B: its ratios are 1000 times as large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5, bias=False), nn.Linear(5, 3))
    nn.init.zeros_(model.get_parameter("1.weight"))
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.9, 1e3])
def test_both_are_the_oracles(eps: float) -> None:
    model = adapted()
    expected = helpers.reference(model, oracle.unit_rules(model), 0.5, eps=eps)
    stats = helpers.agc(model, 0.5, eps=eps)
    helpers.assert_stats(stats, expected)
    assert stats.max_ratio_parameter == "1.weight" or eps >= 0.9
    assert stats.max_ratio_above_eps_parameter != "1.weight"
    if eps == 1e3:
        assert stats.max_ratio_above_eps_parameter is None and float(stats.max_ratio_above_eps) == 0.0


def test_of_equal_ratios_the_first_parameter_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
    for p in model.parameters():
        p.grad = p.detach().clone()
    assert helpers.agc(model).max_ratio_parameter == "0.weight"


def test_nothing_is_named_where_every_gradient_is_zero_or_missing() -> None:
    model = adapted()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert helpers.agc(model).max_ratio_parameter is None
    model.zero_grad()
    stats = helpers.agc(model)
    assert stats.max_ratio_parameter is stats.max_ratio_above_eps_parameter is None
    assert dist_agc.attach(model, torch.optim.SGD(model.parameters(), lr=0.1)).stats.max_ratio_parameter is None


def test_of_two_optimizers_in_one_step() -> None:
    """Each part has places of its own for its parameters."""
    model = adapted()
    expected = helpers.reference(model, oracle.unit_rules(model), 0.01)
    both = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.SGD(model[1:].parameters(), lr=0.1)]
    hook = dist_agc.attach(model, both, clipping_threshold=0.01)
    for optimizer in both:
        optimizer.step()
    helpers.assert_stats(hook.stats, expected)
    assert hook.stats.max_ratio_parameter == "1.weight"


def test_a_parameter_that_was_frozen_since_and_an_excluded_one() -> None:
    """Places are those of the plan, which goes on with what does not train now."""
    model = adapted()
    clipper = dist_agc.Clipper(model, exclude="0.bias", dry_run=True)
    clipper.clip()
    model.get_parameter("0.weight").requires_grad_(False).grad = None
    stats = clipper.clip()
    assert stats is not None
    assert stats.max_ratio_parameter == "1.weight" and "0.weight" not in stats.per_parameter
    assert stats.max_ratio_above_eps_parameter in ("2.weight", "2.bias")


def test_it_is_printed_and_the_numbers_are_logged() -> None:
    stats = helpers.agc(adapted())
    values: dict[str, Any] = stats.as_dict()
    assert values["agc/max_ratio"] > 100 > values["agc/max_ratio_above_eps"] > 0.0
    assert all(type(value) is float for value in values.values())
    assert "max_ratio_parameter='1.weight'" in repr(stats)
    assert f"max_ratio_above_eps_parameter={stats.max_ratio_above_eps_parameter!r}" in repr(stats)


def test_the_report_names_the_parameter_of_the_largest_ratio(tmp_path: Path) -> None:
    stats = helpers.agc(adapted())
    first = stats.as_dict() | {"step": 1, "run": "named", "agc/max_ratio_parameter": stats.max_ratio_parameter}
    lines = [
        first,
        {"step": 2, "run": "named", "agc/max_ratio": 0.5},
        {"step": 1, "run": "numbers", "agc/max_ratio": 2},
    ]
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    text = re.sub(r"<wbr>|</?code>", "", page(read([path]), "two"))
    assert f"<td>largest ratio</td><td>{float(stats.max_ratio):.3g} in 1.weight</td><td>2</td>" in text
