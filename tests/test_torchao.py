"""torchao's training weights: the norm is that of the numbers that are stepped. FSDP2: mpi/test_torchao_ranks.py."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import dist_agc
import oracle
from dist_agc.engine import measure
from helpers import assert_some_clipped, assert_stats, full, worst_relative_error

pytest.importorskip("torchao", reason="needs torchao")

THRESHOLD = 0.05


def network() -> nn.Sequential:
    """Sizes that the kernels take: blocks of 32, four numbers a byte."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(32, 96, bias=False), nn.LayerNorm(96), nn.Tanh(), nn.Linear(96, 32, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def int8(model: nn.Module) -> nn.Module:
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training as config
    from torchao.quantization import quantize_

    quantize_(model, config())
    return model


def int8_mixed(model: nn.Module) -> nn.Module:
    from torchao.prototype.quantized_training import int8_mixed_precision_training as config
    from torchao.quantization import quantize_

    quantize_(model, config())
    return model


def bitnet(model: nn.Module) -> nn.Module:
    from torchao.prototype.quantized_training import bitnet_training as config
    from torchao.quantization import quantize_

    quantize_(model, config())
    return model


def float8(model: nn.Module, *, gather: bool = True) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(enable_fsdp_float8_all_gather=gather, emulate=True)
    return convert_to_float8_training(model, config=config)


def mxfp8(model: nn.Module) -> nn.Module:
    from torchao.prototype.moe_training.config import MXFP8TrainingOpConfig, MXFP8TrainingRecipe
    from torchao.quantization import quantize_

    quantize_(model, MXFP8TrainingOpConfig.from_recipe(MXFP8TrainingRecipe.MXFP8_EMULATED_RCEIL))
    return model


# What makes a model's weights torchao's, their class, and what the numbers are.
KINDS: dict[str, tuple[Callable[[nn.Module], nn.Module], str, Callable[[Any], Tensor]]] = {
    "int8": (
        int8,
        "Int8QuantizedTrainingLinearWeight",
        lambda w: w.int_data.double() * w.scale.double()[:, None],
    ),
    "int8_mixed": (int8_mixed, "Int8MixedPrecisionTrainingLinearWeight", lambda w: w._data),
    "bitnet": (bitnet, "BitNetTrainingLinearWeight", lambda w: w._data),
    "float8": (float8, "WeightWithDynamicFloat8CastTensor", lambda w: w._tensor),
    "float8_alone": (partial(float8, gather=False), "Parameter", lambda w: w),
    "mxfp8": (mxfp8, "MXFP8TrainingWeightWrapperTensor", lambda w: w._data),
}
each = pytest.mark.parametrize("kind", KINDS)


def numbers(kind: str, parameter: Any) -> Tensor:
    local = parameter.detach()
    local = local.to_local() if isinstance(local, DTensor) else local
    read = KINDS[kind][2] if type(local).__name__ == KINDS[kind][1] else lambda w: w
    return read(local).double()


def step(model: nn.Module, number: int, share: tuple[int, int] = (0, 1)) -> None:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(96 * share[1], 32, generator=generator).chunk(share[1])[share[0]]
    # Columns of different sizes, so that some rows of the last weight are clipped and some not.
    (model(x) * torch.logspace(-2, 1, 32)).square().mean().backward()


def check(
    model: nn.Module, kind: str, gathered: Callable[[Tensor], Tensor], backward: Callable[[nn.Module, int], None] = step
) -> list[Any]:
    """Three steps; each clipping next to the oracle's, on the numbers that `numbers` reads by hand."""
    rules, done = oracle.unit_rules(network()), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=False)
    with dist_agc.attach(model, optimizer, clipping_threshold=THRESHOLD) as hook:
        for number in range(3):
            optimizer.zero_grad()
            backward(model, number)
            named: dict[str, Any] = dict(model.named_parameters())
            weights = {name: gathered(numbers(kind, p)) for name, p in named.items()}
            expected = oracle.clip(weights, {name: full(p.grad) for name, p in named.items()}, rules, THRESHOLD)
            assert_some_clipped(expected)
            optimizer.step()
            assert_stats(hook.stats, expected, tolerance=2e-6)
            error = worst_relative_error({name: full(p.grad) for name, p in named.items()}, expected.grads)
            assert error <= 1e-6, f"step {number}: {error:.3g}"
            after = {name: gathered(numbers(kind, p)) for name, p in named.items()}
            assert all(not torch.equal(after[name], weights[name]) for name in weights)
            done.append(hook.stats)
    return done


@each
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_alone(kind: str) -> None:
    model = KINDS[kind][0](network())
    assert type(model[0].weight).__name__ == KINDS[kind][1]  # type: ignore[index]
    check(model, kind, lambda weight: weight)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("units", [None, (), (1,)], ids=["rows", "whole", "columns"])
def test_packed_weights_are_read_a_few_rows_at_a_time(
    units: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = int8(nn.Sequential(nn.Linear(32, 96, bias=False)))
    weight: Any = model.get_parameter("0.weight")
    unpacked: list[int] = []
    whole = type(weight).dequantize

    def counted(self: Any) -> Tensor:
        unpacked.append(len(self))
        return whole(self)

    monkeypatch.setattr(type(weight), "dequantize", counted)
    monkeypatch.setattr(measure, "_UNPACKED", 32 * 40)
    options: dict[str, Any] = {"units": {"0.weight": units}} if units is not None else {}
    clipper = dist_agc.Clipper(model, clipping_threshold=0.05, weight_norm_interval=2, **options)
    unpacked.clear()
    for call in range(4):
        torch.manual_seed(call)
        weight.grad = torch.randn(96, 32) * torch.logspace(-4, 0, 32)
        numbers, rule = KINDS["int8"][2](weight), oracle.Units((0,) if units is None else units)
        expected = oracle.clip({"0.weight": numbers}, {"0.weight": weight.grad}, {"0.weight": rule}, 0.05)
        stats = clipper.clip()
        assert stats is not None and float(stats.max_ratio) == pytest.approx(expected.max_ratio, rel=1e-5)
        assert worst_relative_error({"w": weight.grad.double()}, {"w": expected.grads["0.weight"]}) <= 1e-6
    assert unpacked == ([40, 40, 16] if units is None else [96]) * 3, "not in the fourth call"


@pytest.mark.parametrize("kind", ["int8", "bitnet"])
@pytest.mark.parametrize("at", [2, 5])
def test_written_weights_are_measured_anew(kind: str, at: int) -> None:
    """What goes through a tensor around another is counted on that one alone."""
    model, other = (KINDS[kind][0](nn.Sequential(network()[0])) for _ in range(2))
    with torch.no_grad():
        other[0].weight.copy_(10 * network()[0].weight)  # type: ignore[index]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=1.0, weight_norm_interval=1000, dry_run=True)
    ratios = []
    for step in range(8):
        if step == at:
            model.load_state_dict(other.state_dict())
        for parameter in model.parameters():
            parameter.grad = torch.ones(parameter.shape)
        optimizer.step()
        ratios.append(float(hook.stats.max_ratio))
    assert ratios == pytest.approx([ratios[0]] * at + [ratios[0] / 10] * (8 - at), rel=0.02)
    hook.remove()


def test_a_wrapper_around_a_sharded_weight_is_told() -> None:
    """Nothing would say that it is a part."""

    class Around(torch.Tensor):
        def __tensor_flatten__(self) -> Any: ...

    model = bitnet(network())
    weight: Any = model[0].weight  # type: ignore[index]
    weight._data = torch.zeros(96, 32).as_subclass(Around)
    weight.grad = torch.ones(96, 32)
    with pytest.raises(ValueError, match="'0.weight' is a BitNetTrainingLinearWeight around a Around"):
        dist_agc.apply_agc(model)
