"""``exclude`` is a way out: what dist_agc cannot clip is left alone, and whatever can be read counts in grad_norm.

Several ranks: tests/mpi/test_excluded_ranks.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import dist_agc
import oracle
from helpers import assert_clipped, assert_some_clipped, assert_stats, full, median_threshold, noisy_grads, told

SAID = "grad_norm is without the gradients of"


def body() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4))
    noisy_grads(model)
    return model


def with_odd(weight: Tensor, grad: Tensor | None) -> tuple[Any, dict[str, oracle.Units], float]:
    """A model with one odd parameter; the units of the others and a threshold amid these."""
    model = body()
    rules = oracle.unit_rules(model)
    threshold = median_threshold(model, rules)
    model.odd = nn.Module()
    model.odd.weight = nn.Parameter(weight)
    model.odd.weight.grad = grad
    return model, rules, threshold


def expected_of(model: nn.Module, rules: dict[str, oracle.Units], threshold: float, *, counted: bool) -> Any:
    """What the oracle makes of it; whether the odd gradient is ``counted`` in the norm of all."""
    odd = ("odd.weight",)
    chosen = {name: p for name, p in model.named_parameters() if counted or name not in odd}
    weights = {name: full(p) for name, p in chosen.items()}
    grads = {name: None if p.grad is None else full(p.grad) for name, p in chosen.items()}
    return oracle.clip(weights, grads, rules, threshold, exclude=odd)


def check_others(model: nn.Module, stats: Any, expected: oracle.Reference) -> None:
    """All gradients but the odd one are the oracle's, and so are the statistics."""
    assert_some_clipped(expected)
    for name, parameter in model.named_parameters():
        if name != "odd.weight":
            assert parameter.grad is not None
            assert float((full(parameter.grad) - expected.grads[name]).norm()) <= 1e-6 * float(
                expected.grads[name].norm()
            )
    assert_stats(stats, expected)


def unknown() -> tuple[Any, dict[str, oracle.Units], float]:
    """A tensor made of others that trains, as a quantised weight may."""
    ones = torch.full((3, 2), 50.0)
    return with_odd(TwoTensor(torch.ones(3, 2), torch.ones(3, 2)), TwoTensor(ones, ones.clone()))


def test_a_layout_that_is_not_known() -> None:
    model, rules, threshold = unknown()
    with pytest.raises(ValueError, match=r"'odd\.weight' is a TwoTensor, a layout that dist_agc does not know"):
        dist_agc.apply_agc(model, threshold)
    expected = expected_of(model, rules, threshold, counted=False)
    with told(f"{SAID} 'odd.weight': they are excluded, and dist_agc cannot read them. parameter 'odd.weight' is a"):
        stats = dist_agc.apply_agc(model, threshold, exclude="odd.*")
    check_others(model, stats, expected)
    odd = model.odd.weight.grad
    assert bool((odd.a == 50.0).all()) and bool((odd.b == 50.0).all())


@pytest.mark.parametrize("kept", [True, False], ids=["two optimizers", "thawed"])
def test_it_is_said_once(kept: bool) -> None:
    """Whatever plans are made later, and how many steps there are."""
    model, _, threshold = unknown()
    if not kept:
        model[1].requires_grad_(False)
        for parameter in model[1].parameters():
            parameter.grad = None
    groups = [[model.odd.weight, *model[0].parameters()], list(model[1].parameters())]
    made = [torch.optim.SGD(group, lr=0.0, foreach=False) for group in (groups if kept else [sum(groups, [])])]
    hook = dist_agc.attach(model, made, clipping_threshold=threshold, exclude="odd.*")
    with told(SAID):
        for step in range(3):
            if step == 1:
                model[1].requires_grad_(True)
            for optimizer in made:
                optimizer.step()
        dist_agc.ratios(hook.clipper)


def test_it_is_not_said_where_no_norm_is_asked_for() -> None:
    model, _, threshold = unknown()
    with told():
        assert dist_agc.apply_agc(model, threshold, exclude="odd.*", statistics=False) is None


def test_during_backward() -> None:
    model, _, threshold = unknown()
    model.zero_grad()
    with told(SAID):
        hook = dist_agc.attach(model, clipping_threshold=threshold, exclude="odd.*", during_backward=True)
        (model[1](model[0](torch.ones(2, 5))).square().sum() + (model.odd.weight * 3).sum()).backward()
    assert hook.stats is not None and hook.stats.units == 7 + 1 + 4 + 1 and float(hook.stats.grad_norm) > 0
    with pytest.raises(RuntimeError, match="parameter '[^']*': backward added to a gradient that was clipped already"):
        (model.odd.weight * 3).sum().backward()


def test_a_layer_without_a_shape() -> None:
    model = nn.Sequential(*body(), nn.LazyLinear(2))
    rules = oracle.unit_rules(body())
    threshold = median_threshold(body(), rules)
    known: Any = list(model.named_parameters())[:4]
    weights, grads = {name: full(p) for name, p in known}, {name: full(p.grad) for name, p in known}
    expected = oracle.clip(weights, grads, rules, threshold)
    with told(f"{SAID} '2.weight', '2.bias': they are excluded"):
        stats = dist_agc.apply_agc(model, threshold, exclude="2.*")
    assert_some_clipped(expected)
    assert_stats(stats, expected)


def test_a_gradient_that_has_several_elements_in_one_place() -> None:
    """It cannot be scaled in place, and is not: it can be read."""
    model, rules, threshold = with_odd(torch.ones(3, 4), torch.full((1, 4), 8.0).expand(3, 4))
    with pytest.raises(ValueError, match=r"'odd\.weight' has a gradient with several elements in one place"):
        dist_agc.apply_agc(model, threshold)
    expected = expected_of(model, rules, threshold, counted=True)
    with told():
        stats = dist_agc.apply_agc(model, threshold, exclude="odd.*")
    assert_clipped(model, stats, expected)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_gradient_of_another_layout() -> None:
    weight = torch.ones(4, 4)
    model, rules, threshold = with_odd(weight.to_sparse_csr(), (weight * 40).to_sparse_csr())
    expected = expected_of(model, rules, threshold, counted=False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.0)
    optimizer.add_param_group({"params": [*model[1].parameters(), model.odd.weight]})
    clipper = dist_agc.Clipper(model, clipping_threshold=threshold, exclude="odd.*")
    with told(f"{SAID} 'odd.weight': they are excluded, and dist_agc cannot read them. parameter 'odd.weight' has a"):
        stats = clipper.clip()
        check_others(model, stats, expected)
        clipper.clip()
    assert bool((full(model.odd.weight.grad) == 40.0).all())


def test_everything_is_excluded_and_nothing_can_be_read() -> None:
    model, _, _ = unknown()
    with told(SAID):
        stats = dist_agc.apply_agc([("odd.weight", model.odd.weight)], 0.1, exclude="*")
    assert stats is not None and stats.units == 0 and float(stats.grad_norm) == 0.0


def test_weights_of_eight_bits() -> None:
    small = torch.full((4, 4), 2.0).to(torch.float8_e4m3fn)
    model, rules, threshold = with_odd(small, small.clone())
    with pytest.raises(ValueError, match=r"'odd\.weight' is of torch\.float8_e4m3fn, in which torch finds no norms"):
        dist_agc.apply_agc(model, threshold)
    expected = expected_of(model, rules, threshold, counted=False)
    with told(f"{SAID} 'odd.weight'"):
        stats = dist_agc.apply_agc(model, threshold, exclude="odd.*")
    check_others(model, stats, expected)
