"""AGCCallback in the real Hugging Face Trainer, against the oracle."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import causal
import pytest
import torch
import workload

import dist_agc
import turns
from helpers import quiet_deepspeed, worst_distance

pytest.importorskip("transformers", reason="needs pip install 'dist-agc[transformers]'")

trained = turns.fixture(
    (1, ["plain", "accumulate", "reused", "norm", "refused"]),
    (2, ["ddp", "fsdp2", "fsdp", "tp"]),
    # Apart, since they want DeepSpeed.
    (2, ["zero0", "zero1", "zero2", "zero3", "zero1-number", "zero1-launched", "zero1-kept"]),
    read=workload.left_in,
)
NORM_OFF = "switched off max_grad_norm"


def train(how: str, folder: str) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from dist_agc.integrations.transformers import AGCCallback

    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("dist_agc").setLevel(logging.INFO)
    zero = how.startswith("zero")
    ranks = 2 if zero or how in ("ddp", "fsdp", "fsdp2") else 1
    micro_batches = 2 if how == "accumulate" else 1
    more: dict[str, Any] = {}
    callback = AGCCallback(clipping_threshold=workload.THRESHOLD, exclude=workload.EXCLUDE, per_parameter_every=2)
    if how == "norm":
        more["max_grad_norm"] = 0.4
    if how == "fsdp":
        more |= {"fsdp": True, "fsdp_config": {"reshard_after_forward": True}}
    if zero:
        quiet_deepspeed()
        block = {"enabled": True, "clipping_threshold": workload.THRESHOLD, "exclude": [workload.EXCLUDE]}
        callback = AGCCallback(per_parameter_every=2, norm_clipping=True if how == "zero1-kept" else None)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": {"zero1-number": 0.4, "zero1-launched": 1.0}.get(how, "auto"),
            "zero_optimization": {"stage": int(how[4]), "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "SGD", "params": {"lr": workload.LR, "momentum": workload.MOMENTUM}},
            "zero_allow_untested_optimizer": True,
            "adaptive_gradient_clipping": block,
        }
        if how == "zero1-launched":  # what `accelerate launch` says to the processes
            path = Path(folder, f"ds{os.environ['RANK']}.json")
            path.write_text(json.dumps(config))
            os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
        else:
            more["deepspeed"] = config
        if how == "zero1-number":
            more["max_grad_norm"] = 0.4  # the Trainer insists that the two are equal
    net = workload.model()

    def optimizer() -> Any:
        return None if zero else torch.optim.SGD(net.parameters(), lr=workload.LR, momentum=workload.MOMENTUM)

    arguments: dict[str, Any] = dict(
        output_dir=folder,
        per_device_train_batch_size=workload.SAMPLES // ranks // micro_batches,
        gradient_accumulation_steps=micro_batches,
        max_steps=workload.STEPS,
        learning_rate=workload.LR,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="tensorboard" if how == "plain" else "none",
        use_cpu=True,  # without it, DeepSpeed's Trainer counts one process and deals every rank the same samples
        seed=3,
        ddp_backend="gloo" if ranks > 1 and not zero else None,
        **more,
    )
    if how == "fsdp2":  # sharded by hand: Accelerate does not shard on CPU
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    steps: list[dict[str, Any]] = []

    class Recorder(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert callback.stats is not None
            steps.append(workload.record(callback.stats))

    def trainer_of(*callbacks: Any) -> Any:
        return Trainer(
            model=net,
            args=TrainingArguments(**arguments),
            train_dataset=workload.dataset(),  # pyright: ignore[reportArgumentType]
            callbacks=list(callbacks),
            optimizers=(optimizer(), None),  # pyright: ignore[reportArgumentType]
        )

    if how == "reused":  # the callback has clipped for another Trainer, which is still there
        before = trainer_of(callback)
        before.train()
        net.load_state_dict(workload.model().state_dict())
    trainer = trainer_of(callback, Recorder())
    if how == "fsdp2":  # and so DDP must be kept away from it
        trainer.accelerator.prepare_model = lambda model, *_, **__: model
    trainer.train()
    weights = workload.full_weights(net)
    if trainer.is_world_process_zero() and os.environ.get("RANK", "0") == "0":
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        norm = trainer.model_wrapped.gradient_clipping() if zero else None
        workload.save(folder, steps, weights, logs=logs, max_grad_norm=trainer.args.max_grad_norm, engine_norm=norm)


def tensor_parallel(_: str, folder: str) -> None:
    """transformers' own: the model says so, and the Trainer deals all ranks the same samples."""
    from accelerate.parallelism_config import ParallelismConfig
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from dist_agc.integrations.transformers import AGCCallback

    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("dist_agc").setLevel(logging.INFO)
    # Accelerate refuses CPUs there, and nothing else of it minds them.
    ParallelismConfig._validate_accelerator = lambda *_: None  # type: ignore[method-assign]
    net = causal.cut(folder)
    callback = AGCCallback(clipping_threshold=causal.THRESHOLD, exclude=causal.EXCLUDE)
    steps: list[dict[str, Any]] = []

    class Recorder(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert callback.stats is not None
            steps.append(workload.record(callback.stats))

    arguments: dict[str, Any] = dict(
        output_dir=folder,
        per_device_train_batch_size=len(causal.dataset()),
        max_steps=causal.STEPS,
        learning_rate=causal.LR,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo",
    )
    # foreach would mix plain tensors and DTensors.
    optimizer = torch.optim.SGD(net.parameters(), lr=causal.LR, momentum=0.9, foreach=False)
    trainer = Trainer(
        model=net,
        args=TrainingArguments(**arguments),
        train_dataset=causal.dataset(),  # pyright: ignore[reportArgumentType]
        callbacks=[callback, Recorder()],
        optimizers=(optimizer, None),  # pyright: ignore[reportArgumentType]
    )
    trainer.train()
    weights = workload.full_weights(net)
    path = Path(folder, f"{os.environ['RANK']}.json")
    path.write_text(json.dumps(steps))
    if os.environ["RANK"] == "0":
        workload.save(folder, steps, weights, layout=str(type(trainer.model_wrapped).__name__))


def refused(_: str, folder: str) -> None:
    from transformers import Trainer, TrainingArguments

    from dist_agc.integrations.transformers import AGCCallback

    os.environ["ACCELERATE_USE_CPU"] = "true"  # as `accelerate launch --cpu` does
    config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 1}}
    args = TrainingArguments(output_dir=folder, deepspeed=config, use_cpu=True, max_steps=1, report_to="none")
    data: Any = workload.dataset()
    try:
        Trainer(model=workload.model(), args=args, train_dataset=data, callbacks=[AGCCallback()]).train()
    except ValueError as error:
        workload.save(folder, [], {}, said=str(error))


@pytest.mark.parametrize(("how", "ranks"), [("plain", 1), ("accumulate", 1), ("reused", 1), ("ddp", 2), ("fsdp2", 2)])
def test_same_units_and_weights_as_the_oracle(how: str, ranks: int, trained: turns.Trained) -> None:
    found = trained(how)
    workload.assert_as_oracle(found)
    assert found["max_grad_norm"] == 0 and NORM_OFF in found["log"]
    fractions = [entry["agc/clip_fraction"] for entry in found["logs"]]
    assert fractions == [sum(s["clipped"].values()) / s["units"] for s in found["steps"]]
    assert ["agc/clip_fraction/first.weight" in entry for entry in found["logs"]] == [False, True, False, True, False]
    layout = "DTensor" if how == "fsdp2" else "whole on every rank"
    assert f"AGC on {ranks} process" in found["log"] and layout in found["log"]
    if how == "plain":  # the Trainer's own loggers saw them too
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (events,) = found["folder"].rglob("events.out.*")
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        seen = [point.value for point in accumulator.Scalars("train/agc/clip_fraction")]
        assert seen == pytest.approx(fractions)


def test_its_own_tensor_parallelism(trained: turns.Trained) -> None:
    pytest.importorskip("transformers.distributed.configuration_utils", reason="needs a newer transformers")
    found, (references, weights) = trained("tp"), causal.reference()
    assert "DTensor" in found["log"]
    for rank in range(2):
        steps = json.loads((found["folder"] / f"{rank}.json").read_text())
        for step, expected in zip(steps, references, strict=True):
            assert 0 < expected.clipped_units < expected.units == step["units"]
            assert step["clipped"] == {name: of.clipped_units for name, of in expected.per_parameter.items()}
            assert step["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-5)
    assert worst_distance({name: w.double() for name, w in found["weights"].items()}, weights) < 1e-5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_by_its_json_alone(stage: int, trained: turns.Trained) -> None:
    pytest.importorskip("deepspeed", reason="needs pip install 'dist-agc[deepspeed]'")
    found = trained(f"zero{stage}")
    workload.assert_as_oracle(found)
    assert found["max_grad_norm"] == 0 and NORM_OFF in found["log"]


def test_fallback_from_fsdp_to_ddp_is_said(trained: turns.Trained) -> None:
    found = trained("fsdp")
    workload.assert_as_oracle(found)
    assert "FSDP was asked for, but every parameter is whole on every rank" in found["log"]


def test_norm_clipping_that_was_asked_for_stays_and_is_warned_of(trained: turns.Trained) -> None:
    found = trained("norm")
    assert found["max_grad_norm"] == 0.4
    assert found["log"].count("max_grad_norm=0.4: gradients are clipped by their global norm first") == 1
    assert all(step["grad_norm"] < 0.4001 for step in found["steps"])  # AGC comes second


@pytest.mark.parametrize(("how", "norm"), [("zero1-number", 0.4), ("zero1-launched", 1.0), ("zero1-kept", 1.0)])
def test_norm_clipping_of_a_deepspeed_config(how: str, norm: float, trained: turns.Trained) -> None:
    """A number in the JSON stays, whoever hands the JSON over, with one warning; norm_clipping=True says nothing."""
    found = trained(how)
    assert (found["max_grad_norm"], found["engine_norm"]) == (norm, norm)
    assert all(step["grad_norm"] < norm * 1.0001 for step in found["steps"])  # AGC comes second
    warnings = [line for line in found["log"].splitlines() if "clip" in line and "before AGC sees" in line]
    assert len(warnings) == (0 if how == "zero1-kept" else 1), found["log"]
    assert "by their global norm first" not in found["log"] and NORM_OFF not in found["log"]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("norm_clipping", "asked", "left", "said"),
    [
        (None, 1.0, 0.0, NORM_OFF),
        (None, 0.4, 0.4, "max_grad_norm=0.4"),
        (None, 0.0, 0.0, ""),
        (True, 1.0, 1.0, ""),
        (True, 0.4, 0.4, ""),
        (False, 1.0, 0.0, ""),
        (False, 0.4, 0.0, ""),
    ],
)
def test_what_norm_clipping_makes_of_max_grad_norm(
    norm_clipping: bool | None, asked: float, left: float, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import Trainer, TrainingArguments

    from dist_agc.integrations.transformers import AGCCallback

    args = TrainingArguments(output_dir=str(tmp_path), max_grad_norm=asked, use_cpu=True, report_to="none")
    callback = AGCCallback(norm_clipping=norm_clipping)
    for _ in range(2):  # said once
        Trainer(model=workload.model(), args=args, callbacks=[callback])
    assert args.max_grad_norm == left
    records = [record.getMessage() for record in caplog.records if record.name == "dist_agc"]
    assert len(records) == bool(said) and all(said in record for record in records)


def test_a_deepspeed_config_that_nothing_reads_is_refused(trained: turns.Trained) -> None:
    pytest.importorskip("deepspeed", reason="needs pip install 'dist-agc[deepspeed]'")
    assert "the Trainer runs without DeepSpeed" in trained("refused")["said"]


def test_settings_are_checked_before_training() -> None:
    from dist_agc.integrations.transformers import AGCCallback

    with pytest.raises(TypeError, match="unknown option 'threshold'"):
        AGCCallback(threshold=0.01)
    with pytest.raises(ValueError, match="positive"):
        AGCCallback(clipping_threshold=0.0)
    assert AGCCallback(dist_agc.AGCConfig(eps=0)).stats is None


if __name__ == "__main__":
    apart = {"refused": refused, "tp": tensor_parallel}
    turns.take(lambda how, folder: apart.get(how, train)(how, folder))
