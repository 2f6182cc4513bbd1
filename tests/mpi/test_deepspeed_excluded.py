"""``exclude`` is a way out under DeepSpeed too: what AGC cannot clip does not keep it from the rest."""

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("deepspeed")
import deepspeed_runs as runs  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import helpers  # noqa: E402
import oracle  # noqa: E402
from dist_agc.integrations import deepspeed as integration  # noqa: E402

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.filterwarnings("ignore")]
THRESHOLD = 5.0


def small() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5))
    return model.apply(lambda m: None if not hasattr(m, "bias") else nn.init.normal_(m.bias))  # type: ignore[arg-type]


def engine_of(world: Any, stage: int, *, groups: bool = False, **extra: Any) -> Any:
    """``groups``: matrices and vectors apart."""
    runs.prepare()
    model = small()
    settings = runs.config(world, stage, gradient_clipping=0.0, **extra)
    apart = [{"params": [p for p in model.parameters() if (p.ndim > 1) == matrices]} for matrices in (True, False)]
    optimizer = torch.optim.SGD(apart if groups else model.parameters(), lr=1e-3)
    return integration.initialize(model=model, optimizer=optimizer, config=settings)[0]


def step(engine: Any) -> None:
    torch.manual_seed(1)
    engine.backward(engine(torch.randn(8, 6)).square().sum())
    engine.step()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """DeepSpeed compiles Muon's update, and an Adam in C++ for what Muon does not train."""
    monkeypatch.delattr("deepspeed.ops.adam.FusedAdam")
    with torch.compiler.set_stance("force_eager"):
        yield


def muon_engine(world: Any, stage: int, **extra: Any) -> Any:
    runs.prepare()
    zero = {"reduce_scatter": False} if stage == 3 else {}  # Muon asks for it
    optimizer = {"type": "Muon", "params": {"lr": 0.02, "weight_decay": 0.0}}
    settings = runs.config(world, stage, zero=zero, optimizer=optimizer, **extra)
    return integration.initialize(model=small(), config=settings)[0]


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    return dict(zip((n for n, _ in small().named_parameters()), runs.full_weights(engine), strict=True))


def of_adam(world: Any, stage: int, calls: list[runs.Call], what: str) -> dict[str, torch.Tensor]:
    order = [[(name, tuple(p.shape)) for name, p in small().named_parameters() if p.ndim == 1]]
    flats = getattr(calls[-1], what)  # ZeRO: one call a group
    return runs.together(world, flats[2:] if stage == 0 else flats, order, runs.kind_of(stage))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_muons_steps_are_as_long_as_without_clipping_and_adams_gradients_are_clipped(
    world: Any, stage: int, eager: None, caplog: pytest.LogCaptureFixture
) -> None:
    """DeepSpeed #8439: the default gradient_clipping of 1.0 divides each of Muon's steps by the norm of its update."""
    before = {name: p.detach() for name, p in small().named_parameters()}
    moved: dict[str, dict[str, torch.Tensor]] = {}  # weights after one step
    matrices = ["0.weight", "2.weight"]
    logger = logging.getLogger("DeepSpeed")
    ways: dict[str, dict[str, Any]] = {
        "off": {"gradient_clipping": 0.0},
        "default": {},
        "agc": {integration.BLOCK: {"clipping_threshold": THRESHOLD}},
    }
    if stage != 1:
        del ways["default"]
    for said, extra in ways.items():
        logger.addHandler(caplog.handler)
        logger.setLevel(logging.WARNING)
        try:
            engine = muon_engine(world, stage, **extra)
        finally:
            logger.removeHandler(caplog.handler)
            logger.setLevel(logging.ERROR)
        if engine.agc is None:
            step(engine)
        else:
            watch = runs.Watch(runs.inner(engine))
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                for i in range(3):
                    step(engine)
                    calls = watch.take()
                    if i == 0:
                        first = weights_of(engine)
                    raw, clipped = (of_adam(world, stage, calls, what) for what in ("raw", "clipped"))
                    held = of_adam(world, stage, calls, "weights")
                    expected = oracle.clip(held, raw, oracle.unit_rules(small()), THRESHOLD)
                    helpers.assert_some_clipped(expected)
                    assert helpers.worst_relative_error(clipped, expected.grads) < 1e-5
                    helpers.assert_stats(engine.agc.stats, expected, tolerance=1e-5)
                    helpers.assert_equal_everywhere(world, engine.agc.stats)
            watch.remove()
            assert not [w for w in warned if "grad_norm" in str(w.message)]
        moved[said] = first if engine.agc is not None else weights_of(engine)
        engine.destroy()
    for name in matrices:
        world.check(torch.equal(moved["agc"][name], moved["off"][name]), f"{name} is not where Muon alone brings it")
        assert not torch.equal(moved["agc"][name], before[name])
    told = [r.getMessage() for r in caplog.records if "parameters of Muon" in r.getMessage()]
    world.check(len(told) == (world.rank == 0), f"told: {told}")
    assert not told or "the 2 parameters of Muon are left alone (0.weight, 2.weight)" in told[0]
    if "default" in moved:
        lengths = {said: [float((w[name] - before[name]).norm()) for name in matrices] for said, w in moved.items()}
        shorter = [off / default for off, default in zip(lengths["off"], lengths["default"], strict=True)]
        assert min(shorter) > 2 and max(shorter) < 1.001 * min(shorter)


def test_a_config_without_the_block_says_in_one_line_that_agc_is_off(
    world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for block, off in (({}, True), ({"enabled": False}, True), ({"clipping_threshold": THRESHOLD}, False)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="dist_agc"):
            extra: dict[str, Any] = {integration.BLOCK: block} if block else {}
            engine = engine_of(world, 0, **extra)
        said = [r for r in caplog.records if r.name == "dist_agc" and r.getMessage().startswith("AGC is off")]
        assert len(said) == off and all(r.levelno == logging.INFO for r in said), block
        assert all('"adaptive_gradient_clipping"' in r.getMessage() for r in said)
        assert (engine.agc is None) == off
        engine.destroy()
