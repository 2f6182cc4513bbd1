"""torch.compile: a compiled model, and a compiled optimizer step, in which the clipping stays eager."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import dist_agc
import oracle
from helpers import agc, assert_clipped, median_threshold, noisy_grads, reference, trainable
from models import awkward
from parity import check_training

# Traces, differentiates and runs as the real thing does, but leaves out the C++ compiler.
BACKEND = "aot_eager"

pytestmark = [  # torch's own, while it traces
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`?torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("layers", [1, 3])
def test_compiled_arithmetic(layers: int) -> None:
    """With the real compiler: the oracle's gradients, and one graph for all thresholds."""
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(layers)))
    graphs = 0
    for step, factor in enumerate((1.0, 0.7, 1.3)):
        noisy_grads(model)
        rules = oracle.unit_rules(model)
        limit = factor * median_threshold(model, rules)
        expected = reference(model, rules, limit)
        assert_clipped(model, agc(model, limit, compile=True), expected)
        graphs = graphs or counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == graphs > 0, f"compiled again in step {step}"


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend=BACKEND)
    return model


def layer_by_layer(model: nn.Module) -> nn.Module:
    for name in ("up", "down"):
        setattr(model, name, torch.compile(getattr(model, name), backend=BACKEND))
    return model


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def perceptron() -> Perceptron:
    torch.manual_seed(1)
    return Perceptron()


@pytest.mark.parametrize(
    "compiled", [lambda model: torch.compile(model, backend=BACKEND), in_place, layer_by_layer], ids=[0, 1, 2]
)
def test_compiled_model(compiled: Callable[[nn.Module], nn.Module]) -> None:
    model, rules = compiled(perceptron()), oracle.unit_rules(perceptron())
    x = torch.randn(8, 6)
    model(x).square().mean().backward()
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert set(trainable(model)) == set(rules)
    expected = reference(model, rules, 0.15, exclude=("down.bias",))
    assert_clipped(model, agc(model, clipping_threshold=0.15, exclude=("down.bias",)), expected)


def train(compiled: Callable[[Callable[[], Any]], Callable[[], Any]], steps: int = 3) -> tuple[Any, ...]:
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=0.1)
    step, generator = compiled(optimizer.step), torch.Generator().manual_seed(2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        step()
    assert hook.stats is not None and 0 < hook.stats.clip_fraction < 1
    return [p.detach().clone() for p in model.parameters()], hook.stats.as_dict()


@pytest.mark.parametrize("wrapped", [False, True], ids=["step", "a function around it"])
def test_compiled_step(wrapped: bool) -> None:
    """Hooks run there: the clipping is called between the graphs, not traced, and does the same to the last bit."""
    (weights, stats), graphs = train(lambda step: step), counters["stats"]["unique_graphs"]
    assert graphs == 0

    def compiled(step: Callable[[], Any]) -> Callable[[], Any]:
        return torch.compile((lambda: step()) if wrapped else step, backend=BACKEND)

    got, got_stats = train(compiled)
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert all(torch.equal(a, b) for a, b in zip(got, weights, strict=True))
    assert got_stats == stats


def test_one_graph_for_all_of_a_step_is_refused_by_torch() -> None:
    with pytest.raises(Unsupported, match="AGCHook.clip"):
        train(lambda step: torch.compile(lambda: step(), backend=BACKEND, fullgraph=True))


def test_steps_of_other_optimizers_compile_as_before() -> None:
    """AGC looks at every optimizer's steps, to notice some that it does not clip; a compiled step leaves that out."""
    train(lambda step: step)
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(torch.ones(1, 3)).sum().backward()
    before = layer.bias.detach().clone()
    torch.compile(optimizer.step, backend=BACKEND)()
    assert torch.equal(layer.bias.detach(), before - 0.5)
    assert counters["graph_break"] and not any("_Steps" in reason for reason in counters["graph_break"])


@pytest.mark.mpi(min_size=2)
def test_fsdp2_with_compiled_layers(world: Any) -> None:
    model = awkward()
    model.experts.compile(backend=BACKEND)  # in place does nothing for classes of torch.nn itself
    for layer in (model.conv, model.experts):
        fully_shard(layer, mesh=world.mesh())
    fully_shard(model, mesh=world.mesh())
    check_training(world, model, awkward(dtype=torch.float64), all_reduces=1)
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("outside", [False, True])
def test_ddp_and_a_compiled_model(world: Any, outside: bool) -> None:
    inner = perceptron()
    model: Any = torch.compile(DDP(inner), backend="eager") if outside else DDP(torch.compile(inner, backend="eager"))
    model(torch.full((2, 6), world.rank + 1.0)).square().mean().backward()
    expected = reference(model, oracle.unit_rules(perceptron()), 0.3, exclude=("down.bias",))
    assert_clipped(model, agc(model, clipping_threshold=0.3, exclude=("down.b*",)), expected)
