"""What clip() costs, in counts that no other program on the machine can change: waits, kernels, collectives, bytes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dist_agc import AGCConfig, Clipper, vectors
from dist_agc.cli.shapes import build
from dist_agc.cli.timing import Operations
from dist_agc.fragments import Axis
from dist_agc.layouts import virtual

LAYOUTS = ("ddp", "fsdp2", "tp+fsdp2", "fsdp1")


class Kernels(TorchDispatchMode):
    """Kernels by name, views left out; a list operation counts once for every tensor of its list."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and not func.is_view:
            times = len(args[0]) if "_foreach" in func.__name__ else 1
            self.names += [func.__name__] * times
        return func(*args, **(kwargs or {}))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, 16)
        self.o_proj = nn.Linear(16, 24)


class Accelerator:
    """A model whose weights and gradients are fake tensors on no CPU: shapes and kernels, no values.

    Whatever reads a value back raises, because there is none. Not "cuda": a torch without CUDA cannot index fake ones.
    """

    def __init__(self, layers: int, layout: str = "ddp", **options: Any) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            shapes = nn.Sequential(*(Layer() for _ in range(layers)))
        with self.mode:
            model = build({name: tuple(p.shape) for name, p in shapes.named_parameters()}, "meta")
            for p in model.parameters():
                p.grad = torch.empty_like(p)
        sizes = {"tp+fsdp2": {"tensor": 2}}.get(layout, {})
        placed = virtual.place(model, layout, virtual.World(4, 1, **sizes))
        self.clipper = Clipper.of_placed(placed, AGCConfig(**options))
        self.clipper.part()  # the plan is arithmetic on real integers
        self.parameters = len(placed)

    def clip(self) -> list[str]:
        """The kernels of the second call; the first moves the plan to the device."""
        with self.mode:
            self.clipper.clip()
            with Kernels() as seen:
                self.clipper.clip()
        return seen.names


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the buffers that are sent. The only part that is not real: there is no group for fake tensors."""
    lengths: list[int] = []

    def all_reduce(buffer: Tensor, axis: Axis) -> Tensor:
        lengths.append(len(buffer))
        return buffer.clone()

    monkeypatch.setattr(vectors, "all_reduce", all_reduce)
    return lengths


def test_a_wait_for_the_device_would_be_seen() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(3, device="meta").sum().item()


@pytest.mark.usefixtures("sent")
@pytest.mark.parametrize("statistics", [True, False], ids=["statistics", "bare"])
@pytest.mark.parametrize("on_nonfinite", ["keep", "zero"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_clip_never_waits_for_an_accelerator(layout: str, on_nonfinite: str, statistics: bool) -> None:
    kernels = Accelerator(3, layout, on_nonfinite=on_nonfinite, statistics=statistics).clip()
    moves = [name for name in kernels if "lift_fresh" in name or "_local_scalar_dense" in name or "nonzero" in name]
    assert not moves, f"these wait for the device or copy to it: {moves}"


@pytest.mark.usefixtures("sent")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_kernels_a_parameter_and_a_constant(layout: str) -> None:
    few, many = Accelerator(4, layout), Accelerator(12, layout)
    kernels = len(many.clip()) - len(few.clip())
    # Cut anywhere, a parameter is up to three blocks: the end of a row, rows, the beginning of a row.
    blocks = len(many.clipper.part().plan.blocks) - len(few.clipper.part().plan.blocks)
    assert 0 < kernels <= 3 * max(many.parameters - few.parameters, blocks)
    stages = len(few.clipper.part().plan.stages)
    assert len(few.clip()) - 3 * few.parameters < 60 * (1 + stages)


def test_single_tensors_are_taken_together() -> None:
    """Dispatched calls, which a list operation makes only one of: two norms a matrix, none a bias."""
    accelerator = Accelerator(10)
    with accelerator.mode:
        accelerator.clipper.clip()
        with Operations() as seen:
            accelerator.clipper.clip()
    matrices = accelerator.parameters // 2
    assert 2 * matrices < seen.operations < 2 * matrices + 60


@pytest.mark.parametrize(("layout", "collectives"), [("ddp", 0), ("fsdp2", 1), ("tp+fsdp2", 2), ("fsdp1", 1)])
def test_one_collective_per_group(layout: str, collectives: int, sent: list[int]) -> None:
    accelerator = Accelerator(3, layout)
    accelerator.clip()
    stages = accelerator.clipper.part().plan.stages
    assert len(stages) == collectives
    assert sent == 2 * [stage.numel() for stage in stages]


def test_reused_weight_norms_halve_the_payload(sent: list[int]) -> None:
    accelerator = Accelerator(3, "fsdp1", weight_norm_interval=3, statistics=False)
    with accelerator.mode:
        for _ in range(7):
            accelerator.clipper.clip()
    full = sent[0]
    assert full > 0
    assert sent == [full, full // 2, full // 2, full, full // 2, full // 2, full]


def clipper(model: nn.Module) -> Callable[[], Any]:
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    return Clipper(model, clipping_threshold=0.5).clip


def test_little_memory_beyond_the_gradients() -> None:
    """Promise 5: under 1 % of the gradients, in what torch's allocator hands out."""
    from dist_agc.cli.timing import Method, count

    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
    call = clipper(model)
    call()
    seen = count(Method("", call))
    size = sum(4 * p.numel() for p in model.parameters())
    assert 0 < seen["peak_extra_bytes"] < 0.03 * size, seen  # rows of 1024: vectors of units alone are 0.1 % each


def test_weight_norms_are_measured_every_so_many_calls() -> None:
    """Exact on every first call of an interval, also after weights changed; in between the old norms count."""
    model = nn.Linear(6, 4, bias=False)
    call = Clipper(model, clipping_threshold=0.01, weight_norm_interval=2).clip
    with torch.no_grad():
        model.weight.fill_(1)
    norms = []
    for factor in (1.0, 10.0, 10.0, 1.0):  # old norms at the second and at the fourth call
        with torch.no_grad():
            model.weight.fill_(factor)
        model.weight.grad = torch.full_like(model.weight, 5.0)
        call()
        assert model.weight.grad is not None
        norms.append(float(model.weight.grad[0].norm() / (0.01 * 6**0.5)))
    assert norms == pytest.approx([1.0, 1.0, 10.0, 10.0])


def test_every_optimizer_keeps_the_weight_norms_of_its_own_parameters() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    both = Clipper(model, clipping_threshold=0.01, weight_norm_interval=2)
    for p in model.parameters():
        p.grad = torch.full_like(p, 5.0)
    first, second = (list(layer.parameters()) for layer in model)
    both.clip(first)
    both.clip(first)
    stats = both.clip(second)  # the third call, but the first for these: measured, not reused
    assert stats is not None and float(stats.max_ratio) < 1e5
    for p in second:
        assert p.grad is not None
        dims = (1,) if p.ndim > 1 else (0,)
        limit = 0.01 * torch.linalg.vector_norm(p.detach(), dim=dims).clamp(min=1e-3)
        assert torch.allclose(torch.linalg.vector_norm(p.grad, dim=dims), limit, rtol=1e-5)
