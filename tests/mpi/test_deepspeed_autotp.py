"""DeepSpeed's AutoTP under ZeRO 0 to 3: tensor-parallel slices, even and uneven, fused weights, against the oracle."""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("deepspeed.checkpoint.affine")  # 0.19.8
import deepspeed_runs as runs  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import models  # noqa: E402
import oracle  # noqa: E402
from dist_agc.integrations.deepspeed import initialize  # noqa: E402
from helpers import (  # noqa: E402
    assert_equal_everywhere,
    assert_some_clipped,
    assert_stats,
    passing_groups,
    worst_distance,
    worst_relative_error,  # noqa: E402
)

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.filterwarnings("ignore")]
STEPS, THRESHOLD = 3, 0.1
META = "ds_autotp_universal_checkpoint_meta"


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    with passing_groups():
        yield
        runs.forget_groups()


# By the name of a module, how AutoTP cuts it.
SPECS = [
    {"patterns": [r"qkv\.weight$"], "partition_type": "column", "shape": [3, -1], "partition_dim": 0},
    {"patterns": [r"up\.weight$"], "partition_type": "column"},
    {"patterns": [r"(out|down)\.weight$"], "partition_type": "row"},
    {"patterns": [r"gathered\.weight$"], "partition_type": "column", "gather_output": True},
]


class Net(nn.Module):
    """A fused weight, columns, rows, a gathered layer; biases of each; what AutoTP leaves alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(models.VOCABULARY, 6)
        self.qkv, self.out = nn.Linear(6, 3 * width), nn.Linear(width, 6)
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, width + 4), nn.Linear(width + 4, 6)
        self.gathered = nn.Linear(6, 8)
        self.head = nn.Linear(8, models.VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).mean(1)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.norm(x + self.out(q * torch.sigmoid(k) + v))
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(torch.tanh(self.gathered(x)))


def net(width: int, dtype: torch.dtype = torch.float32) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net(width)
        for p in model.parameters():
            if p.ndim == 1:
                nn.init.normal_(p, std=0.5)
    return model.to(dtype)


def engine_of(world: Any, stage: int, tp: int, model: nn.Module, *, settings: Any = None, **extra: Any) -> Any:
    runs.forget_groups()
    runs.prepare()
    plan = {"use_default_specs": False, "layer_specs": SPECS}
    config = runs.config(world, stage, tensor_parallel={"autotp_size": tp, "partition_config": plan}, **extra)
    config["train_micro_batch_size_per_gpu"] = models.FULL_BATCH * tp // world.size
    if settings is not None:
        config["adaptive_gradient_clipping"] = settings
    optimizer = torch.optim.SGD(model.parameters(), lr=runs.LR)
    return initialize(model=model, optimizer=optimizer, config=config)[0]


def rebuilt(name: str, parts: list[Tensor]) -> Tensor:
    """A whole parameter out of the slices of all tensor-parallel ranks, by what the specs say."""
    if name.startswith("qkv."):
        return torch.cat([part.chunk(3)[i] for i in range(3) for part in parts])
    if name.startswith(("up.", "gathered.")):
        return torch.cat(parts)
    if name in ("out.weight", "down.weight"):
        return torch.cat(parts, 1)
    for part in parts:
        assert torch.allclose(part, parts[0], rtol=1e-5, atol=1e-7), f"copies of {name} differ"
    return parts[0]


class Together:
    """What the base optimizers of all ranks hold, put together; and, by the way, what DeepSpeed's maps say."""

    def __init__(self, world: Any, model: nn.Module, tp: int, kind: str) -> None:
        self.world, self.tp, self.kind = world, tp, kind
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.shapes = world.gather([(n, tuple(getattr(p, "ds_shape", p.shape))) for n, p in trained])
        self.maps = {n: getattr(p, META)["conversion"]["affine_map"] for n, p in trained if hasattr(p, META)}

    def __call__(self, flats: list[Tensor]) -> dict[str, Tensor]:
        every = [
            [torch.as_tensor(f) for f in held]
            for held in self.world.gather([f.detach().float().numpy() for f in flats])
        ]
        slices = []
        for t in range(self.tp):
            ranks = range(t, self.world.size, self.tp)
            shapes = self.shapes[t]
            if self.kind == "whole":
                found = runs.split(torch.cat([f.flatten() for f in every[t]]), shapes)
            elif self.kind == "laid":
                found = runs.split(torch.cat([every[rank][0] for rank in ranks]), shapes)
            else:
                found, at = {}, 0
                for name, shape in shapes:
                    numel = torch.Size(shape).numel()
                    piece = -(-numel // len(ranks))
                    flat = torch.cat([every[rank][0][at : at + piece] for rank in ranks])[:numel]
                    found[name], at = flat.view(shape).double(), at + piece
            slices.append(found)
        whole = {name: rebuilt(name, [found[name] for found in slices]) for name in slices[0]}
        if self.maps:
            self.check_maps(whole, slices)
            self.maps = {}
        return whole

    def check_maps(self, whole: dict[str, Tensor], slices: list[dict[str, Tensor]]) -> None:
        from deepspeed.checkpoint.affine import ParamAffineMap

        for name, described in self.maps.items():
            told = ParamAffineMap.from_dict(described)
            told.validate_coverage()
            if len(next(iter(told.pieces_by_rank.values()))[0].locations) == 1:
                again = told.rebuild({t: found[name] for t, found in enumerate(slices)})
                assert torch.equal(again.view(whole[name].shape), whole[name]), name


def check(world: Any, stage: int, tp: int, width: int, **extra: Any) -> None:
    model, twin = net(width), net(width, torch.float64)
    names = [name for name, _ in model.named_parameters()]
    rules, exclude = oracle.unit_rules(twin), {"down.weight", "embedding.weight"}
    settings = {"clipping_threshold": THRESHOLD, "exclude": sorted(exclude)}
    engine = engine_of(world, stage, tp, model, settings=settings, **extra)
    together = Together(world, model, tp, runs.kind_of(stage))
    watch = runs.Watch(runs.inner(engine))
    for step in range(STEPS):
        share = world.rank // tp, world.size // tp
        tokens, classes = models.batch(step, rank=share[0], size=share[1])
        engine.backward(models.loss(engine, tokens, classes))
        engine.step()
        (call,) = watch.take()
        weights, raw, clipped = (together(list(getattr(call, what))) for what in ("weights", "raw", "clipped"))
        expected = oracle.clip(weights, raw, rules, THRESHOLD, exclude=exclude)
        assert_some_clipped(expected)
        error = worst_relative_error(clipped, expected.grads)
        assert error < 1e-5, f"worst relative error of a clipped gradient element: {error:.3g}"
        stats = engine.agc.stats
        assert_stats(stats, expected, tolerance=2e-6)
        if width % tp == 0:
            assert_equal_everywhere(world, stats)
        models.loss(twin, *models.batch(step)).backward()
        held = dict(twin.named_parameters())
        wanted = oracle.clip(held, {n: held[n].grad for n in names}, rules, THRESHOLD, exclude=exclude)
        assert (int(stats.clipped_units), stats.units) == (wanted.clipped_units, wanted.units)
        with torch.no_grad():
            for name, grad in wanted.grads.items():
                held[name].sub_(grad, alpha=runs.LR)
                held[name].grad = None
    distance = worst_distance(weights_after(engine, together, watch), {n: p.detach() for n, p in held.items()})
    assert distance < 1e-5, f"weights are {distance:.3g} away from the float64 run"
    watch.remove()
    engine.destroy()


def weights_after(engine: Any, together: Together, watch: runs.Watch) -> dict[str, Tensor]:
    outer = engine.optimizer
    if hasattr(outer, "fp32_partitioned_groups_flat"):
        return together(list(outer.fp32_partitioned_groups_flat))
    return together(runs._held(runs.inner(engine)[0]))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_slices_are_the_oracles(world: Any, stage: int) -> None:
    """Of each width: what divides among the ranks, and what does not."""
    for tp in (n for n in (2, 3, 4) if world.size % n == 0):
        for width in (2 * tp, 2 * tp + 1):
            check(world, stage, tp, width)
    runs.forget_groups()
