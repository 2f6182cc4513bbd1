"""DeepSpeed's AutoEP under ZeRO 3: an expert is cut over the ranks that hold it, and statistics cover those of all."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("deepspeed.module_inject.auto_ep_layer")
import deepspeed_runs as runs  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import oracle  # noqa: E402
from dist_agc.integrations.deepspeed import initialize  # noqa: E402
from helpers import (  # noqa: E402
    assert_equal_everywhere,
    assert_some_clipped,
    assert_stats,
    passing_groups,
    worst_relative_error,
)

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.filterwarnings("ignore")]
THRESHOLD = 0.02


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    with passing_groups():
        yield
        runs.forget_groups()


class Experts(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 10, 6) * 0.4)
        self.down_proj = nn.Parameter(torch.randn(experts, 6, 5) * 0.4)


class Block(nn.Module):
    """As transformers' Mixtral has it; AutoEP puts its own layer in the place."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate, self.experts, self.top_k = nn.Linear(6, experts, bias=False), Experts(experts), 2


class Mixture(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type="mixtral", num_local_experts=experts, num_experts_per_tok=2, hidden_size=6, intermediate_size=5
        )
        self.model, layer = nn.Module(), nn.Module()
        layer.inner, layer.mlp = nn.Linear(6, 6), Block(experts)
        self.model.layers = nn.ModuleList([layer])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.model.get_submodule("layers.0")
        x = torch.tanh(layer.inner(x))
        return self.head(x + layer.mlp(x))


def is_expert(name: str) -> bool:
    return ".experts.w" in name


def together(world: Any, flats: list[Tensor], groups: Any, ep_size: int) -> dict[str, Tensor]:
    """Whole parameters by name; what an expert-parallel rank holds of the experts as one parameter."""
    every = [[torch.as_tensor(f) for f in held] for held in world.gather([f.float().numpy() for f in flats])]
    found = {}
    for i, group in enumerate(groups):
        at = 0
        for name, shape in group:
            numel = torch.Size(shape).numel()
            for ep in range(ep_size) if is_expert(name) else [None]:
                ranks = range(world.size) if ep is None else range(ep, world.size, ep_size)
                piece = -(-numel // len(ranks))
                flat = torch.cat([every[rank][i][at : at + piece] for rank in ranks])[:numel]
                found[name if ep is None else f"{name}@{ep}"] = flat.view(shape).double()
            at += piece
    return found


def test_experts_are_the_oracles(world: Any) -> None:
    for ep_size in (n for n in range(2, world.size + 1) if world.size % n == 0):
        runs.forget_groups()
        runs.prepare()
        torch.manual_seed(0)
        model = Mixture(2 * ep_size)
        ways = {"enabled": True, "autoep_size": ep_size, "preset_model": "mixtral", "use_grouped_mm": False}
        agc = {"clipping_threshold": THRESHOLD, "exclude": ["*.experts.w2*"]}
        settings = runs.config(world, 3, expert_parallel=ways, adaptive_gradient_clipping=agc)
        settings["optimizer"] = {"type": "SGD", "params": {"lr": runs.LR}}
        engine = initialize(model=model, config=settings)[0]
        names = {id(p): name for name, p in engine.module.named_parameters()}
        groups = [[(names[id(p)], tuple(p.ds_shape)) for p in group] for group in engine.optimizer.fp16_groups]
        watch = runs.Watch(runs.inner(engine))
        for step in range(3):
            x = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(10 * step + world.rank))
            engine.backward(engine(x).square().mean())
            engine.step()
            calls = watch.take()
            weights, raw, clipped = (
                together(world, [t for call in calls for t in getattr(call, what)], groups, ep_size)
                for what in ("weights", "raw", "clipped")
            )
            units = {3: (0, 1), 2: (0,), 1: ()}
            rules = {name: oracle.Units(units[w.ndim]) for name, w in weights.items()}
            expected = oracle.clip(weights, raw, rules, THRESHOLD, exclude={n for n in rules if ".w2@" in n})
            assert sum(map(is_expert, rules)) == 3 * ep_size
            assert_some_clipped(expected)
            assert worst_relative_error(clipped, expected.grads) <= 1e-5
            assert_stats(engine.agc.stats, expected, tolerance=1e-6)
            assert_equal_everywhere(world, engine.agc.stats)
        watch.remove()
        engine.destroy()
    runs.forget_groups()
