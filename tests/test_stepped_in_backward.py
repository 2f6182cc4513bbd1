"""Optimizers that step inside of backward: clipped with during_backward=True, and said where AGC would never run."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import dist_agc
import oracle
from helpers import assert_some_clipped, full_grads, full_weights, reference, worst_distance, worst_relative_error
from lomo import Lomo

THRESHOLD, LR = 0.05, 0.1


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).to(dtype)


@pytest.fixture
def model() -> nn.Sequential:
    return net()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.logspace(-2, 0.5, 5)  # outputs of very different size: some units are clipped and some are not
    return [
        (torch.randn(7, 6, generator=generator), torch.randn(7, 5, generator=generator) * rows * 9) for _ in range(3)
    ]


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) * y).mean()


@pytest.fixture(autouse=True)
def _every_warning_counts() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ------------------------------------------------------------------ libraries that are known by their hooks


class OptimizersInBackwardContainer(Optimizer):
    """The shape of torchtitan's: optimizers of one parameter each, and a step that does nothing."""

    def __init__(self, model: nn.Module) -> None:
        each = {p: SGD([p], lr=LR) for p in model.parameters()}

        def optim_hook(param: Tensor) -> None:
            each[param].step()  # type: ignore[index]
            each[param].zero_grad()  # type: ignore[index]

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(optim_hook)
        self.optimizers = list(each.values())
        super().__init__(model.parameters(), {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


def of_torch(model: nn.Module) -> Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
    _apply_optimizer_in_backward(SGD, model.parameters(), {"lr": LR})
    return SGD(model.parameters(), lr=LR)  # "any other optimizer over this parameter will be a no-op"


LIBRARIES: dict[str, Callable[[nn.Module], Optimizer]] = {
    "torchtitan": OptimizersInBackwardContainer,
    "lomo": lambda model: Lomo(model, LR),
    "torch": of_torch,
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_clipped_during_backward_though_its_hooks_came_first(model: nn.Sequential, library: str) -> None:
    twin = net(torch.float64)
    rows = [(x.double(), y.double()) for x, y in batches()]
    references = oracle.train(twin, rows, loss, oracle.unit_rules(twin), THRESHOLD, lr=LR, momentum=0)
    optimizer = LIBRARIES[library](model)
    with dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD, during_backward=True) as hook:
        for (x, y), expected in zip(batches(), references, strict=True):
            assert_some_clipped(expected)
            if isinstance(optimizer, Lomo):
                optimizer.fused_backward(loss(model, x, y), LR)
            else:
                loss(model, x, y).backward()
                optimizer.step()
            assert not full_grads(model)
            assert int(hook.stats.clipped_units) == expected.clipped_units and hook.stats.units == expected.units
    assert worst_distance(full_weights(model), {name: p.detach() for name, p in twin.named_parameters()}) <= 1e-6


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_step_that_comes_after_all_was_stepped_is_refused(model: nn.Sequential, library: str) -> None:
    optimizer = LIBRARIES[library](model)
    before = dict(optimizer._optimizer_step_pre_hooks)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"'0\.weight' is stepped inside of backward, by .*: attach with during_backw"):
        dist_agc.attach(model, optimizer)
    assert optimizer._optimizer_step_pre_hooks == before  # type: ignore[attr-defined]
    other = nn.Linear(3, 2)
    dist_agc.attach([model, other], SGD(other.parameters(), lr=LR)).remove()  # these are not stepped so


def test_a_loss_scale_of_lomo_is_refused(model: nn.Sequential) -> None:
    optimizer = Lomo(model, LR)
    dist_agc.attach(model, optimizer, during_backward=True)
    optimizer.loss_scaler = object()  # made in the first backward of a loss in fp16
    with pytest.raises(RuntimeError, match="cannot be right with LOMO's loss scale"):
        optimizer.fused_backward(loss(model, *batches()[0]), LR)


# ------------------------------------------------------------------ hooks of one's own


def test_an_optimizer_that_steps_in_backward_is_said_once(model: nn.Sequential) -> None:
    outer = SGD(model.parameters(), lr=LR)
    each = {p: SGD([p], lr=LR) for p in model.parameters()}

    def own(p: Tensor) -> None:
        each[p].step()  # type: ignore[index]
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(own)
    dist_agc.attach(model, outer, clipping_threshold=THRESHOLD)
    with pytest.warns(UserWarning, match="this SGD steps inside of backward.*during_backward=True") as said:
        for x, y in batches():
            loss(model, x, y).backward()
            outer.step()
    assert len(said) == 1


def test_gradients_that_were_freed_before_the_step(model: nn.Sequential) -> None:
    """By something that is no optimizer of torch."""
    optimizer = SGD(model.parameters(), lr=LR)
    dist_agc.attach(model, optimizer)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.warns(UserWarning, match="has a gradient.*during_backward=True") as said:
        for x, y in batches():
            loss(model, x, y).backward()
            optimizer.step()
    assert len(said) == 1


def doubles(p: Any) -> None:
    p.grad.mul_(2)


def replaces(p: Any) -> None:
    p.grad = p.grad * 2


def on_the_node(p: Any) -> Any:
    node = p.expand_as(p).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: doubles(p))
    return node  # lives as long as somebody has it


@pytest.mark.parametrize("way", ["in place", "replaced", "on the node"])
def test_a_gradient_that_changes_after_it_was_clipped_is_said_once(model: nn.Sequential, way: str) -> None:
    """By hooks that come with the first forward pass, as those of transformers' tensor parallelism."""
    kept: list[Any] = []

    def at_first(module: nn.Module, args: Any) -> None:
        if not kept:
            for p in module.parameters():
                kept.append(
                    on_the_node(p)
                    if way == "on the node"
                    else p.register_post_accumulate_grad_hook(doubles if way == "in place" else replaces)
                )

    model[2].register_forward_pre_hook(at_first)
    dist_agc.attach(list(model.named_parameters()), clipping_threshold=THRESHOLD, during_backward=True)
    with pytest.warns(UserWarning, match=r"of '2\.\w+' and 1 more parameter changed after AGC had clipped it") as said:
        for x, y in batches():
            loss(model, x, y).backward()
            model.zero_grad()
    assert len(said) == 1


def test_a_gradient_that_stays_as_it_was_clipped(model: nn.Sequential) -> None:
    """With what is not finite, too."""
    optimizer = SGD(model.parameters(), lr=LR)
    dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD, during_backward=True)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: None)
    x, y = batches()[0]
    loss(model, x, y * torch.tensor([1.0, 1.0, float("nan"), 1.0, 1.0])).backward()
    optimizer.zero_grad()
    plain = net()
    loss(plain, x, y).backward()
    expected = reference(plain, oracle.unit_rules(plain), THRESHOLD)
    loss(model, x, y).backward()
    assert_some_clipped(expected)
    assert worst_relative_error(full_grads(model), expected.grads) <= 1e-6


# ------------------------------------------------------------------ what the optimizer holds


def test_tensors_that_no_model_has(model: nn.Sequential) -> None:
    other = nn.Linear(5, 3)
    optimizer = SGD([*model.parameters(), *other.parameters()], lr=LR)
    with pytest.warns(UserWarning, match=r"AGC does not clip 2 tensors of shape \(3, 5\), \(3,\) in the optimizer SGD"):
        dist_agc.attach(model, optimizer, during_backward=True).remove()
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        dist_agc.attach(model, SGD(other.parameters(), lr=LR), during_backward=True)


def test_a_parameter_that_the_model_gets_later(model: nn.Sequential) -> None:
    """Where no optimizer shows it."""
    dist_agc.attach(model, during_backward=True)
    model(torch.ones(2, 6)).sum().backward()
    model.zero_grad()
    model.append(nn.Linear(5, 3).requires_grad_(False))
    model(torch.ones(2, 6)).sum().backward()
    model.zero_grad()
    model[3].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"'3\.weight' has come since AGC was attached.*attach again"):
        model(torch.ones(2, 6)).sum().backward()


def test_tensors_that_come_later(model: nn.Sequential) -> None:
    optimizer = SGD(model.parameters(), lr=LR)
    dist_agc.attach(model, optimizer, during_backward=True)
    head = nn.Linear(5, 3)
    model.append(head)

    def step() -> None:
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizer.add_param_group({"params": head.parameters()})
    with pytest.warns(UserWarning, match=r"not clip 2 tensors of shape \(3, 5\), \(3,\).*and attach again") as said:
        step()
        step()
    assert len(said) == 1
    optimizer.param_groups[:] = [{**optimizer.param_groups[0], "params": [nn.Parameter(torch.ones(101))]}]
    model.pop(3)
    with pytest.raises(ValueError, match=r"steps on 1 tensor of shape \(101,\)"):
        step()
