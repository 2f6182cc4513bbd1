"""DeepSpeed's PipelineEngine, ZeRO 0 and 1 and BF16_Optimizer, against an oracle of the whole model.

Two stages whatever the number of ranks, the rest is data-parallel; an embedding is tied across both stages.
"""

from collections.abc import Iterator
from typing import Any

import pytest

deepspeed = pytest.importorskip("deepspeed")
import deepspeed_runs as runs  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import dist_agc  # noqa: E402
import oracle  # noqa: E402
from dist_agc.integrations.deepspeed import initialize  # noqa: E402
from helpers import assert_equal_everywhere, assert_some_clipped, assert_stats, passing_groups, worst_relative_error  # noqa: E402

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.filterwarnings("ignore")]

WORDS, WIDTH, LENGTH, BATCH, STEPS = 7, 6, 4, 12, 3
THRESHOLD = 0.05
BLOCK = {"adaptive_gradient_clipping": {"clipping_threshold": THRESHOLD, "exclude": ["3.norm.*"]}}


class Embedding(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(WORDS, WIDTH)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(torch.tanh(self.norm(x)))


def head(embedding: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, embedding.weight)  # type: ignore[arg-type]


def loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    """An engine takes its groups from the one before it, whatever that was."""
    with passing_groups():
        yield
        runs.forget_groups()


def batches(world: Any, step: int) -> Any:
    """The micro-batches of this rank's pipeline in one step: tokens are their own labels."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(WORDS, (BATCH, LENGTH), generator=generator)
    pipelines = world.size // 2
    mine = tokens.chunk(pipelines)[world.rank % pipelines]
    return iter([(rows, rows) for rows in mine.chunk(2)])


def engine_of(world: Any, **extra: Any) -> Any:
    if world.size % 2:
        pytest.skip("two stages")
    runs.forget_groups()
    runs.prepare()
    torch.manual_seed(0)
    specs = [
        TiedLayerSpec("embedding", Embedding),
        *(LayerSpec(Layer) for _ in range(3)),
        TiedLayerSpec("embedding", Embedding, forward_fn=head),
    ]
    module = PipelineModule(specs, num_stages=2, loss_fn=loss, partition_method="uniform", seed_layers=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    micro = BATCH // (world.size // 2) // 2
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 2,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **extra,
    }
    return initialize(model=module, optimizer=optimizer, config=config)[0]


class Seen:
    """What the base optimizer saw, as full tensors by name, before AGC and after it."""

    def __init__(self, world: Any, engine: Any, zero: bool) -> None:
        self._world, self._engine, self._zero = world, engine, zero
        named = {name: p for name, p in engine.module.named_parameters()}
        self.shapes = {name: tuple(p.shape) for name, p in named.items()}
        self.watch = runs.Watch([engine.agc._attachment.optimizers[0]])

    def take(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        (call,) = self.watch.take()
        return tuple(self._full(tensors) for tensors in (call.weights, call.raw, call.clipped))  # type: ignore[return-value]

    def _full(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        held = [tensor.double().numpy() for tensor in tensors]
        every = self._world.gather((self.shapes, held, self._engine.stage_id))
        for stage in (0, 1):
            ranks = [(shapes, held) for shapes, held, of in every if of == stage]
            shapes, held = ranks[0]
            if self._zero:  # one group, laid end to end and cut
                flat = torch.cat([torch.as_tensor(part).flatten() for _, parts in ranks for part in parts])
                parts = runs.split(flat, list(shapes.items()))
            else:
                parts = {name: torch.as_tensor(part) for name, part in zip(shapes, held, strict=True)}
            found |= {name: part for name, part in parts.items() if name not in found}
        return found


CASES = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero1": {"zero_optimization": {"stage": 1}},
    # BF16_Optimizer.
    "bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_the_oracles(world, case):
    engine = engine_of(world, **CASES[case], **BLOCK)
    seen = Seen(world, engine, zero=case != "zero0")
    for step in range(STEPS):
        engine.train_batch(batches(world, step))
        weights, raw, clipped = seen.take()
        rules = {name: oracle.Units((0,) if weight.ndim > 1 else ()) for name, weight in weights.items()}
        excluded = [name for name in weights if name.startswith("3.norm")]
        assert len(weights) == 13 and len(excluded) == 2  # the tied embedding once
        expected = oracle.clip(weights, raw, rules, THRESHOLD, exclude=excluded)
        assert_some_clipped(expected)
        assert worst_relative_error(clipped, expected.grads) <= 1e-6
        assert_stats(engine.agc.stats, expected, tolerance=2e-6)
        assert_equal_everywhere(world, engine.agc.stats)
    assert engine.agc.steps == STEPS
    engine.agc.remove()
    assert engine.agc is None


def test_a_pattern_that_no_stage_has(world):
    block = {"clipping_threshold": THRESHOLD, "exclude": ["9.*"]}
    with pytest.raises(ValueError, match="exclude: '9.*' matches no parameter of any stage"):
        engine_of(world, adaptive_gradient_clipping=block)


def test_attach_takes_the_pipeline_from_the_engine(world):
    engine = engine_of(world)
    with pytest.raises(ValueError, match="pipeline= is not for DeepSpeed, which knows the stages of its engine"):
        dist_agc.attach(engine, clipping_threshold=THRESHOLD, pipeline=torch.distributed.group.WORLD)
    with dist_agc.attach(engine, clipping_threshold=THRESHOLD) as hook:
        engine.train_batch(batches(world, 0))
        assert len(hook.stats.per_parameter) == 13 and hook.stats.clipped_units > 0


def test_a_scaler_for_each_stage_is_refused(world):
    engine = engine_of(world)
    engine.torch_autocast_z0_gradscaler = object()  # what DeepSpeed makes for torch_autocast in float16
    with pytest.raises(ValueError, match=r"stages of a pipeline\) would not skip a step together"):
        dist_agc.attach(engine, clipping_threshold=THRESHOLD)
