"""What clip() costs, in counts that no other program on the machine can change: waits, kernels, collectives, bytes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from accelerator import Accelerator, Kernels, Uploads
from dist_agc import AGCConfig, Clipper
from dist_agc.conformance.counting import Operations
from dist_agc.engine import counts, execution, kernels
from dist_agc.frameworks import virtual
from dist_agc.frameworks._flat import FlatInterval
from dist_agc.lab.shapes import build
from dist_agc.lab.timing import Method, count
from dist_agc.model.blocks import Axis

LAYOUTS = ("ddp", "fsdp2", "hsdp", "tp+fsdp2", "fsdp1", "zero1", "zero3")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the buffers that are sent. The only part that is not real: there is no group for fake tensors."""
    lengths: list[int] = []

    def all_reduce(buffer: Tensor, axis: Axis) -> Tensor:
        lengths.append(len(buffer))
        return buffer.clone()

    monkeypatch.setattr(execution, "all_reduce", all_reduce)
    return lengths


def test_a_wait_for_the_device_would_be_seen() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(3, device="meta").sum().item()
    with FakeTensorMode(), Kernels() as seen, Uploads(seen.waits):
        host = torch.tensor([1.0, 2.0])
        host.to("meta", non_blocking=True)
        torch.empty(2, device="meta").copy_(host, non_blocking=True)
    assert seen.waits == []
    for wait in (
        lambda host: host.to("meta"),
        lambda host: torch.empty(2, device="meta").copy_(host),
        lambda host: torch.tensor([1.0, 2.0], device="meta"),
    ):
        with FakeTensorMode(), Kernels() as seen, Uploads(seen.waits):
            wait(torch.tensor([1.0, 2.0]))
        assert len(seen.waits) == 1, seen.names


@pytest.mark.usefixtures("sent")
@pytest.mark.parametrize("statistics", [True, False], ids=["statistics", "bare"])
@pytest.mark.parametrize("on_nonfinite", ["keep", "zero"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_clip_never_waits_for_an_accelerator(layout: str, on_nonfinite: str, statistics: bool) -> None:
    accelerator = Accelerator(3, layout, on_nonfinite=on_nonfinite, statistics=statistics)
    assert accelerator.clip().waits == []


@pytest.mark.usefixtures("sent")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nor_with_a_loss_scale_or_thresholds_that_change(layout: str) -> None:
    """A scale on the device; one threshold for all, another; one for each parameter group, others in the next step."""
    accelerator = Accelerator(3, layout)
    with accelerator.mode:
        scale = torch.empty((), device="meta")
    assert accelerator.clip(grad_scale=scale).waits == []
    assert accelerator.clip(grad_scale=1024.0).waits == []
    assert accelerator.clip(clipping_threshold=0.02).waits == []
    for value in (0.1, 0.2, None):
        some = {id(p.tensor): value for p in accelerator.clipper.parameters[::2]}
        assert accelerator.clip(thresholds=some).waits == []


@pytest.mark.usefixtures("sent")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_kernels_a_block_and_a_constant(layout: str) -> None:
    """Two norms and a multiplication, with "zero" one more. A block is a whole parameter or shard; only what is cut
    anywhere (FSDP1, ZeRO) may be up to three: the end of a row, rows, the beginning of a row."""
    for on_nonfinite, each in (("keep", 3), ("zero", 4)):
        few, many = (Accelerator(layers, layout, on_nonfinite=on_nonfinite) for layers in (4, 12))
        blocks = many.blocks() - few.blocks()
        assert len(many.clip().names) - len(few.clip().names) == each * blocks
        assert blocks <= (3 if layout in ("fsdp1", "zero1", "zero3") else 1) * (many.parameters - few.parameters)
        if layout == "zero3":
            assert blocks > many.parameters - few.parameters, "a layout that shows the bound"
        axes = len(few.clipper.execution().plan.axes)
        assert len(few.clip().names) - each * few.blocks() < 60 * (1 + axes)


def test_sums_in_any_order_would_be_seen() -> None:
    slots = torch.zeros(3, device="meta")
    at = torch.zeros(5, dtype=torch.int64, device="meta")
    for add in (
        lambda: slots.index_add_(0, at, torch.ones(5, device="meta")),
        lambda: slots.scatter_add(0, at, torch.ones(5, device="meta")),
        lambda: slots.index_put_((at,), torch.ones(5, device="meta"), accumulate=True),
        lambda: slots.cumsum(0),
    ):
        with FakeTensorMode(allow_non_fake_inputs=True), Kernels() as seen:
            add()
        assert len(seen.in_any_order) == 1, seen.names
    with FakeTensorMode(allow_non_fake_inputs=True), Kernels() as seen:
        slots.to(torch.int32).index_add_(0, at, torch.ones(5, dtype=torch.int32, device="meta"))
    assert seen.names and not seen.in_any_order


@pytest.mark.usefixtures("sent")
@pytest.mark.parametrize("on_nonfinite", ["keep", "zero"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_added_in_one_order(layout: str, on_nonfinite: str) -> None:
    """No atomics in the first call or later: copies of a model that are clipped apart stay equal to the last bit."""
    accelerator = Accelerator(3, layout, on_nonfinite=on_nonfinite, units={"*o_proj.weight": (1,)})
    with accelerator.mode, Kernels() as seen:
        accelerator.clipper.clip()
        accelerator.clipper.clip()
    assert "linalg_vector_norm" in seen.names and seen.in_any_order == []


def on_two_devices(layers: int, **options: Any) -> Kernels:
    """The second call for a model whose every other parameter is on the CPU, the first one too."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = []
        for i in range(2 * layers):
            shape = (7, 5) if i % 4 < 2 else (7,)
            parameter = nn.Parameter(torch.empty(shape, device=("cpu", "meta")[i % 2]))
            parameter.grad = torch.empty_like(parameter)
            given.append((f"p{i}", parameter))
        clipper = Clipper(given, AGCConfig(**options))
        clipper.clip()
        with Kernels() as seen, Uploads(seen.waits):
            clipper.clip()
    return seen


@pytest.mark.parametrize("on_nonfinite", ["keep", "zero"])
def test_weights_on_two_devices_are_copied_together(on_nonfinite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms there, coefficients back: one copy each, however many tensors there are, and no wait but for those."""
    # What it would read from the CPU: how many units of each block were clipped. Fake tensors have no values.
    monkeypatch.setattr(kernels.Scaling, "_counts", lambda self, mask: [1] * len(self.blocks))
    few, many = (on_two_devices(layers, on_nonfinite=on_nonfinite) for layers in (3, 12))
    assert len(many.names) > len(few.names) + 18
    assert few.copies == many.copies and few.waits == many.waits
    # Norms of weights and of gradients, coefficients, and with "zero" which units are to be zeroed.
    assert len(many.copies) == (3 if on_nonfinite == "keep" else 4), many.copies


@pytest.mark.usefixtures("sent")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_float32_where_the_device_has_no_float64(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = counts.sums_dtype
    assert real(torch.device("mps")) == torch.float32
    assert real(torch.device("cpu")) == real(torch.device("cuda")) == torch.float64

    def dtypes() -> set[torch.dtype]:
        accelerator = Accelerator(3, layout, exclude="*q_proj.bias")
        with accelerator.mode, Kernels() as seen, Uploads(seen.waits):
            accelerator.clipper.clip()
            stats = accelerator.clipper.clip()
            assert stats is not None
            first = next(iter(stats.per_parameter.values()))
            assert stats.grad_norm.shape == stats.clip_fraction.shape == first.grad_norm.shape == ()
            with torch.no_grad():
                accelerator.clipper.execution().ratios(counts.Above([0.01, 0.1], execution.AT_LIMIT))
        return seen.dtypes

    assert torch.float64 in dtypes(), "else the case shows nothing"
    monkeypatch.setattr(counts, "sums_dtype", lambda device: real(torch.device("mps")))
    found = dtypes()
    assert torch.float32 in found and torch.float64 not in found


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
    axes = accelerator.clipper.execution().plan.axes
    assert len(axes) == collectives
    assert sent == 2 * [axis.numel() for axis in axes]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_reused_weight_norms_are_sent_all_the_same(sent: list[int]) -> None:
    """What a rank measures anew is its own affair, and the buffers of all ranks have one length."""
    accelerator = Accelerator(3, "fsdp1", weight_norm_interval=3, statistics=False)
    with accelerator.mode:
        for _ in range(4):
            accelerator.clipper.clip()
    assert sent[0] > 0 and sent == 4 * sent[:1]


class Multiplied(TorchDispatchMode):
    """How many elements were multiplied in place."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.partition(".")[0] == "mul_":
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "hsdp", "fsdp1", "zero1", "zero3"])
def test_only_clipped_rows_are_written_on_cpu(layout: str, sent: list[int]) -> None:
    """However the tensor is cut, flat shards that begin in the middle of a row included."""
    rows, width, large = 2402, 512, [3, 700, 704, 1500]
    sizes = {"shard": 2} if layout == "hsdp" else {}
    model = build({"layers.0.q_proj.weight": (rows, width)}, "cpu")
    (parameter,) = virtual.parameters(model, layout, virtual.World(4, 1, **sizes))
    weight, grad = torch.ones(rows, width), torch.full((rows, width), 1e-6)
    grad[large] = 1.0
    if isinstance(parameter, FlatInterval):
        span = parameter.span
        assert span.start % width, "begins in the middle of a row"
        weight, grad = (x.flatten()[span.start - span.offset : span.stop] for x in (weight, grad))
    parameter = replace(parameter, tensor=nn.Parameter(weight.clone()))
    parameter.tensor.grad = grad.clone()
    clipper = Clipper.of([parameter], AGCConfig(clipping_threshold=0.01))
    with Multiplied() as seen:
        clipper.clip()
    clipped = int((parameter.tensor.grad != grad).sum())
    assert clipped in (width * n for n in (1, 2, 4))
    assert seen.elements == clipped


def peak(dtype: torch.dtype, width: int, clipped: float) -> tuple[int, int, int]:
    """Bytes that one clipping of fresh gradients allocates at most beyond what there was; bytes of the gradients;
    units. The first call, which makes the plan, is not counted."""
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(12))).to(dtype)
    with torch.no_grad():
        fresh = [torch.full_like(p, 10.0) for p in model.parameters()]
        for gradient in fresh:
            rows = gradient if gradient.ndim > 1 else gradient[None]
            rows[round(clipped * len(rows)) :] *= 1e-9
    clip = Clipper(model, clipping_threshold=0.01).clip

    def before() -> None:
        for p, gradient in zip(model.parameters(), fresh, strict=True):
            p.grad = gradient.clone()

    before()
    stats = clip()
    assert stats is not None and float(stats.clip_fraction) == pytest.approx(clipped, abs=0.01)
    return (
        int(count(Method("", clip, before))["peak_extra_bytes"]),
        sum(p.element_size() * p.numel() for p in model.parameters()),
        stats.units,
    )


@pytest.mark.parametrize("clipped", [0.0, 0.1, 1.0])
def test_little_memory_beyond_the_gradients(clipped: float) -> None:
    """Promise 5: under 1 % of the gradients, in what torch's allocator hands out, for rows of 1024 in fp32."""
    most, gradients, units = peak(torch.float32, 1024, clipped)
    assert 0 < most < 0.01 * gradients, f"{most} bytes, {most / gradients:.2%}, {most / units:.0f} a unit"


@pytest.mark.parametrize("clipped", [0.0, 0.1, 1.0])
def test_little_memory_beyond_16_bit_gradients(clipped: float) -> None:
    """CPU kernels work on fp32 copies of 128 Ki elements, two at a time, whatever the model's size; a unit has as many
    numbers as in fp32. Of a small model or of short rows that is more than 1 %."""
    most, _, units = peak(torch.bfloat16, 512, clipped)
    assert 0 < most < 2 * 4 * (1 << 17) + 40 * units, f"{most} bytes, {units} units"


def test_weight_norms_are_measured_every_so_many_calls() -> None:
    """Exact on every first call of an interval, and in the second of all, which shows how often an optimizer writes."""
    model = nn.Linear(6, 4, bias=False)
    call = Clipper(model, clipping_threshold=0.01, weight_norm_interval=3).clip
    with torch.no_grad():
        model.weight.fill_(1)
    norms = []
    for factor in (1.0, 3.0, 10.0, 10.0, 1.0, 2.0):  # old norms at the third, the fifth and the sixth
        with torch.no_grad():
            model.weight.fill_(factor)
        model.weight.grad = torch.full_like(model.weight, 5.0)
        call()
        assert model.weight.grad is not None
        norms.append(float(model.weight.grad[0].norm() / (0.01 * 6**0.5)))
    assert norms == pytest.approx([1.0, 3.0, 3.0, 10.0, 10.0, 10.0])


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
