"""Weights that begin at zero train at ``clipping_threshold * eps`` a step: said where they are looked at."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import dist_agc

SAID = "are all zero now"


def adapted(layers: int = 1) -> nn.Sequential:
    """Adapters as LoRA makes them (B at zero), with biases and a norm's shift that begin at zero."""
    model = nn.Sequential()
    for i in range(layers):
        model.add_module(f"A{i}", nn.Linear(4, 2))
        model.add_module(f"B{i}", nn.Linear(2, 4))
    model.add_module("norm", nn.LayerNorm(4))
    for name, p in model.named_parameters():
        if name.startswith("B") or name.endswith("bias"):
            nn.init.zeros_(p)
    return model


def said(model: nn.Module, *, lr: float = 0.1, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hook = dist_agc.attach(model, torch.optim.SGD(model.parameters(), lr=lr), **options)
    hook.remove()
    return [str(w.message) for w in seen if SAID in str(w.message)]


def test_attach_names_matrices_at_zero_once_and_what_to_do() -> None:
    (text,) = said(adapted(), clipping_threshold=0.02)
    assert "'B0.weight' are" in text and "0.02 * 0.001" in text and "exclude=('B0.weight',)" in text
    assert "B0.bias" not in text and "norm.bias" not in text
    (text,) = said(adapted(5))
    assert "'B0.weight', 'B1.weight', 'B2.weight' and 2 more" in text


def test_it_is_true_that_they_hardly_train() -> None:
    """One step of SGD moves each unit by lr * clipping_threshold * eps, and with eps=0 by nothing."""
    for eps in (1e-3, 0.0):
        model = adapted()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.warns(UserWarning, match=SAID):
            dist_agc.attach(model, optimizer, clipping_threshold=0.01, eps=eps)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        moved = model.get_parameter("B0.weight").norm(dim=1)
        assert moved.tolist() == pytest.approx([0.1 * 0.01 * eps] * 4, rel=1e-5)


@pytest.mark.parametrize("options", [{"exclude": "B0.weight"}, {"dry_run": True}])
def test_nothing_is_said_where_they_are_not_clipped(options: dict[str, Any]) -> None:
    assert not said(adapted(), **options)


def test_nothing_is_said_of_frozen_ones_nor_of_a_row() -> None:
    model = adapted()
    model.get_parameter("B0.weight").requires_grad_(False)
    assert not said(model)
    embedding = nn.Embedding(5, 3, padding_idx=0)  # its row 0 is zero
    assert not said(embedding)


def test_units_say_it_and_find_nothing_where_there_are_no_values() -> None:
    model = adapted()
    why = {row.name: row.why for row in dist_agc.units(model)}
    assert why["B0.weight"] == "Linear: rows; all 0 now, so clipped to clipping_threshold * eps"
    assert why["A0.weight"] == "Linear: rows" and why["B0.bias"] == "a vector: one unit"
    with torch.device("meta"):
        empty = nn.Linear(3, 2)
    assert [row.why for row in dist_agc.units(empty)] == ["Linear: rows", "a vector: one unit"]
    with torch._subclasses.FakeTensorMode():
        fake = nn.Linear(3, 2)
    assert [row.why for row in dist_agc.units(fake)] == ["Linear: rows", "a vector: one unit"]
