"""``exclude`` is a way out under DeepSpeed too: what AGC cannot clip does not keep it from the rest."""

import logging
import warnings
from typing import Any

import pytest

pytest.importorskip("deepspeed")
import deepspeed_runs as runs  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import dist_agc  # noqa: E402
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


@pytest.mark.parametrize("stage", [2, 3])
def test_muon_keeps_its_updates_and_the_parameters_of_adam_are_clipped(world: Any, stage: int) -> None:
    """By the marks that DeepSpeed's Muon makes: its own optimizer compiles for seconds."""
    engine = engine_of(world, stage, groups=True)
    runs.inner(engine)[0].param_groups[0]["use_muon"] = True
    for p in engine.module.parameters():
        p.use_muon = len(getattr(p, "ds_shape", p.shape)) > 1
    with pytest.raises(ValueError, match="'0.weight' is in a group of Muon.*Exclude all parameters of Muon"):
        dist_agc.attach(engine, clipping_threshold=THRESHOLD)
    hook = dist_agc.attach(engine, clipping_threshold=THRESHOLD, exclude=("0.weight", "2.weight"))
    watch = runs.Watch(runs.inner(engine))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step(engine)
        step(engine)
    watch.remove()
    texts = [str(w.message) for w in said if "grad_norm is without" in str(w.message)]
    assert len(texts) == 1 and "'0.weight', '2.weight'" in texts[0]
    *_, of_muon, of_adam = watch.take()  # one call a group
    assert float(of_muon.raw[0].norm()) > 0 and torch.equal(of_muon.raw[0], of_muon.clipped[0])
    order = [[(name, tuple(p.shape)) for name, p in small().named_parameters() if p.ndim == 1]]
    adam = of_adam.weights, of_adam.raw, of_adam.clipped
    weights, raw, clipped = (runs.together(world, flats, order, "each" if stage == 3 else "laid") for flats in adam)
    expected = oracle.clip(weights, raw, oracle.unit_rules(small()), THRESHOLD)
    helpers.assert_some_clipped(expected)
    assert helpers.worst_relative_error(clipped, expected.grads) < 1e-5
    helpers.assert_stats(hook.stats, expected, tolerance=1e-5)
    engine.destroy()


def test_experts_of_autoep_under_zero_3(world: Any) -> None:
    engine = engine_of(world, 3)
    engine.module[0].weight.ds_zero_placement_family = "autoep_expert"
    with pytest.raises(ValueError, match="'0.weight' is an AutoEP expert under ZeRO 3.*exclude it"):
        dist_agc.attach(engine, clipping_threshold=THRESHOLD)
    hook = dist_agc.attach(engine, clipping_threshold=THRESHOLD, exclude="0.weight")
    step(engine)
    assert 0 < int(hook.stats.clipped_units) and set(hook.stats.per_parameter) == {
        name for name, _ in small().named_parameters() if name != "0.weight"
    }
    engine.destroy()


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
