"""Optimizers around another one, of the packages that people have them from: clipped once, or an error that helps."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dist_agc
import oracle
from helpers import assert_clipped, assert_some_clipped, median_threshold, reference

LR = 0.1


def lookahead(model: nn.Module, inner: torch.optim.Optimizer) -> Any:
    return pytest.importorskip("pytorch_optimizer").Lookahead(inner, k=5)


def trac(model: nn.Module, inner: torch.optim.Optimizer) -> Any:
    return pytest.importorskip("pytorch_optimizer").TRAC(inner)


def schedule_free(model: nn.Module, inner: torch.optim.Optimizer) -> Any:
    optimizer = pytest.importorskip("pytorch_optimizer").ScheduleFreeWrapper(inner)
    optimizer.train()
    return optimizer


def local_sgd(model: nn.Module, inner: torch.optim.Optimizer) -> Any:
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer  # pyright: ignore[reportPrivateImportUsage]

    return PostLocalSGDOptimizer(inner, PeriodicModelAverager(period=2))


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    yield
    dist.destroy_process_group()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))


def backward(model: nn.Module, step: int = 0) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
    (model(x) * torch.tensor([0.1, 1.0, 8.0])).square().mean().backward()


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("around", [lookahead, trac, schedule_free, local_sgd])
def test_the_gradient_that_comes_in_is_clipped_once(around: Callable[..., Any]) -> None:
    model = network()
    optimizer = around(model, torch.optim.SGD(model.parameters(), lr=LR))
    backward(model)
    rules = oracle.unit_rules(model)
    threshold = median_threshold(model, rules)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=threshold)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        expected = reference(model, rules, threshold)
        assert_some_clipped(expected)
        optimizer.step()
        assert_clipped(model, hook.stats, expected)
    assert hook.steps == 3


@pytest.mark.filterwarnings("ignore")
def test_opacus_adds_its_noise_first() -> None:
    pytest.importorskip("opacus")
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    inside = network()
    model = GradSampleModule(inside)
    inner = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer = DPOptimizer(inner, noise_multiplier=0.3, max_grad_norm=1.0, expected_batch_size=5)
    seen, rules = list[Any](), oracle.unit_rules(inside)
    inner.register_step_pre_hook(lambda *_: seen.append(reference(inside, rules, 0.5)))
    hook = dist_agc.attach(model, optimizer, clipping_threshold=0.5)
    for step in range(2):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        assert_some_clipped(seen[-1])
        assert int(hook.stats.clipped_units) == seen[-1].clipped_units
        assert float(hook.stats.grad_norm) == pytest.approx(seen[-1].grad_norm, rel=1e-5)


def test_schedulefrees_wrapper_is_no_optimizer() -> None:
    around = pytest.importorskip("schedulefree").ScheduleFreeWrapper
    model = network()
    optimizer = around(torch.optim.SGD(model.parameters(), lr=LR), momentum=0.9)
    with pytest.raises(TypeError, match="got ScheduleFreeWrapper. Attach to .* inside of it: optimizer.base"):
        dist_agc.attach(model, optimizer)
    hook = dist_agc.attach(model, optimizer.base)
    optimizer.train()
    backward(model)
    optimizer.step()
    assert hook.steps == 1 and hook.stats


def test_sam_says_which_one_steps() -> None:
    model = network()
    optimizer = pytest.importorskip("pytorch_optimizer").SAM(model.parameters(), torch.optim.SGD, lr=LR)
    hook = dist_agc.attach(model, optimizer)
    backward(model)
    optimizer.first_step(zero_grad=True)
    backward(model)
    with pytest.warns(UserWarning, match="which keeps this one as .base_optimizer, so its gradients are not clipped"):
        optimizer.second_step()
    assert not hook.stats
    hook.remove()
    hook = dist_agc.attach(model, optimizer.base_optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.first_step(zero_grad=True)
        backward(model)
        optimizer.second_step()
    assert hook.stats.units == 9 + 1 + 3 + 1


class CPUOffloadOptimizer(torch.optim.Optimizer):
    """The shape of torchao's, which needs CUDA: what it steps by are copies that were made in backward."""

    def __init__(self, parameters: Any) -> None:
        self.copies: dict[Any, Any] = {}
        for p in parameters:
            p.register_post_accumulate_grad_hook(lambda p: self.copies.update({p: p.grad.clone()}))

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.no_grad():
            for p, grad in self.copies.items():
                p -= LR * grad


def test_gradients_that_leave_in_backward() -> None:
    model, twin, late = network(), network(), network()
    rules = oracle.unit_rules(model)
    with pytest.raises(ValueError, match=r"in backward.*attach\(model, during_backward=True\) before the optimizer is"):
        dist_agc.attach(late, CPUOffloadOptimizer(late.parameters()))
    backward(twin)
    expected = reference(twin, rules, 0.3)
    assert_some_clipped(expected)
    hook = dist_agc.attach(model, clipping_threshold=0.3, during_backward=True)
    optimizer = CPUOffloadOptimizer(model.parameters())
    backward(model)
    optimizer.step()
    assert int(hook.stats.clipped_units) == expected.clipped_units
    for (name, after), before in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(before.double() - LR * expected.grads[name], after.double(), atol=1e-6)
