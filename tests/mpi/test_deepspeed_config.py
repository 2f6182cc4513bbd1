"""What a user of DeepSpeed writes: the block in the JSON, ``gradient_clipping``, ``attach(engine)``, checkpoints."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")
import deepspeed  # noqa: E402
import deepspeed_runs as runs  # noqa: E402
import torch  # noqa: E402

import dist_agc  # noqa: E402
import models  # noqa: E402
from dist_agc.integrations import deepspeed as integration  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
mpi = pytest.mark.mpi(min_size=2)
BLOCK = integration.BLOCK


@pytest.mark.parametrize(
    ("block", "error", "says"),
    [
        ({"clip_threshold": 0.01}, ValueError, 'unknown key "clip_threshold".*clipping_threshold'),
        ({"clipping_threshold": "0.01"}, TypeError, "clipping_threshold must be a number"),
        ({"clipping_threshold": -1}, ValueError, "positive"),
        ({"enabled": "yes"}, TypeError, "true or false"),
        ({"exclude": [1]}, TypeError, "non-empty strings"),
        (0.01, TypeError, "must be a block"),
    ],
)
def test_a_wrong_block_is_an_error(block, error, says):
    with pytest.raises(error, match=says):
        integration.read_block({BLOCK: block})


def test_a_block_with_nearly_the_right_name_is_an_error():
    with pytest.raises(ValueError, match=f'"adaptive_grad_clipping".*"{BLOCK}"'):
        integration.read_block({"adaptive_grad_clipping": {}})
    assert integration.read_block({"gradient_clipping": 1.0, "zero_optimization": {}}) is None


def test_a_wrong_block_in_a_file_is_an_error_before_the_engine_is_made(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({BLOCK: {"threshold": 0.01}}))
    with pytest.raises(ValueError, match='unknown key "threshold"'):
        integration.initialize(model=torch.nn.Linear(2, 2), config=str(path))


def engine_of(world, stage=1, *, block=None, plain=False, **extra):
    runs.prepare()
    settings = runs.config(world, stage, **extra)
    if block is not None:
        settings[BLOCK] = block
    model = models.awkward()
    make: Any = deepspeed.initialize if plain else integration.initialize
    engine, *_ = make(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=runs.LR, momentum=0.9), config=settings
    )
    return engine


@mpi
def test_attach_reads_the_block_and_takes_options_beside_it(world):
    engine = engine_of(world, block={"clipping_threshold": 0.3}, plain=True)
    with pytest.raises(RuntimeError, match="nothing reads it"):  # plain deepspeed.initialize knows no such block
        integration.check(engine)
    with pytest.raises(ValueError, match="clipping_threshold is 0.1 here and 0.3"):
        dist_agc.attach(engine, clipping_threshold=0.1)
    with pytest.raises(ValueError, match="matches no parameter; near names: head"):
        dist_agc.attach(engine, exclude=("heads.*",))
    with pytest.raises(TypeError, match="takes no optimizer"):
        dist_agc.attach(engine, torch.optim.SGD(engine.module.parameters(), lr=1.0))
    with pytest.raises(TypeError, match="unknown option"):
        dist_agc.attach(engine, threshold=1.0)
    assert engine.gradient_clipping() == 1.0  # nothing of this changed anything
    hook = dist_agc.attach(engine, exclude=("head.*", "frozen.*"))
    assert hook.clipper.config == dist_agc.AGCConfig(clipping_threshold=0.3, exclude=("head.*", "frozen.*"))
    assert integration.check(engine) is hook
    with pytest.raises(ValueError, match="attached to this SGD already"):
        dist_agc.attach(engine)
    assert engine.gradient_clipping() == 0.0 and engine.optimizer.clip_grad == 0.0
    hook.remove()
    assert engine.gradient_clipping() == 1.0 and engine.optimizer.clip_grad == 1.0
    with pytest.raises(RuntimeError, match="nothing reads it"):
        integration.check(engine)
    engine.destroy()


@mpi
def test_a_block_can_be_switched_off(world):
    engine = engine_of(world, block={"enabled": False})
    assert engine.agc is None and integration.check(engine) is None and engine.gradient_clipping() == 1.0
    with pytest.raises(ValueError, match='"enabled": false'):
        dist_agc.attach(engine)
    engine.destroy()


@mpi
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_norm_that_the_user_asked_for_is_kept_and_runs_first(world, stage, caplog):
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.WARNING)
    try:
        engine = engine_of(world, stage, block={"clipping_threshold": models.THRESHOLD}, gradient_clipping=0.5)
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(logging.ERROR)
    said = [record for record in caplog.records if "before AGC" in record.getMessage()]
    world.check(len(said) == (world.rank == 0), f"warnings: {said}")
    watch = runs.Watch(runs.inner(engine))
    runs.one_step(world, engine, 0)
    watch.remove()
    (call,) = watch.take()
    raw = sum(float(g.square().sum()) for g in call.raw)
    total = sum(world.gather(raw)) if stage else raw
    assert total**0.5 == pytest.approx(0.5, rel=1e-4)  # what AGC saw: padding is zero
    assert float(engine.agc.stats.grad_norm) == pytest.approx(0.5, rel=1e-4)
    if stage:
        assert float(engine.get_global_grad_norm()) > 1.0  # the norm before either
    engine.destroy()


@mpi
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(world, stage, tmp_path):
    block = {"clipping_threshold": models.THRESHOLD}
    path = world.gather(str(tmp_path))[0]
    runs.prepare()
    whole = engine_of(world, stage, block=block)
    runs.spoil_padding(world, whole)
    for step in range(2):
        runs.one_step(world, whole, step)
    whole.save_checkpoint(path, tag="two")
    for step in range(2, 4):
        runs.one_step(world, whole, step)
    expected = runs.full_weights(whole)
    whole.destroy()
    resumed = engine_of(world, stage, block=block)
    resumed.load_checkpoint(path, tag="two")
    for step in range(2, 4):
        runs.one_step(world, resumed, step)
    got = runs.full_weights(resumed)
    world.check(all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), "weights differ")
    resumed.destroy()


@mpi
def test_a_checkpoint_from_before_agc_does_not_bring_the_norm_clip_back(world, tmp_path):
    path = world.gather(str(tmp_path))[0]
    plain = engine_of(world, 1, plain=True)
    runs.one_step(world, plain, 0)
    plain.save_checkpoint(path, tag="plain")
    keys = runs.keys_of(plain.optimizer.state_dict())
    plain.destroy()
    engine = engine_of(world, 1, block={"clipping_threshold": models.THRESHOLD})
    engine.load_checkpoint(path, tag="plain")
    assert engine.optimizer.clip_grad == 0.0
    runs.one_step(world, engine, 1)
    assert int(engine.agc.stats.clipped_units) > 0
    assert runs.keys_of(engine.optimizer.state_dict()) == keys  # AGC adds nothing
    engine.destroy()


@mpi
def test_statistics_reach_deepspeeds_monitor(world, tmp_path):
    path = world.gather(str(tmp_path))[0]
    monitor = {"enabled": True, "output_path": path, "job_name": "agc"}
    engine = engine_of(world, 1, block={"clipping_threshold": models.THRESHOLD}, csv_monitor=monitor)
    runs.one_step(world, engine, 0)
    values = engine.agc.stats.as_dict()
    engine.monitor.write_events([(name, value, engine.global_samples) for name, value in values.items()])
    world.gather(None)  # until rank 0 has written
    if world.rank == 0:
        for name, value in values.items():
            (file,) = Path(path).rglob(f"{name.replace('/', '_')}.csv")
            assert float(file.read_text().splitlines()[-1].split(",")[1]) == pytest.approx(value)
    engine.destroy()
