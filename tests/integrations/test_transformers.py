"""AGCCallback in the real Hugging Face Trainer, against the oracle."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import workload

import dist_agc

pytest.importorskip("transformers", reason="needs pip install 'dist-agc[transformers]'")

NORM_OFF = "switched off max_grad_norm"


def train(how: str, folder: str) -> None:
    from torch.distributed.tensor import DTensor
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from dist_agc.integrations.transformers import AGCCallback

    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("dist_agc").setLevel(logging.INFO)
    ranks = 2 if how in ("ddp", "fsdp", "fsdp2", "zero0", "zero1", "zero2", "zero3") else 1
    micro_batches = 2 if how == "accumulate" else 1
    more: dict[str, Any] = {}
    callback = AGCCallback(clipping_threshold=workload.THRESHOLD, exclude=workload.EXCLUDE, per_parameter_every=2)
    if how == "norm":
        more["max_grad_norm"] = 0.4
    if how == "fsdp":
        more |= {"fsdp": True, "fsdp_config": {"reshard_after_forward": True}}
    if how.startswith("zero"):
        workload.quiet_deepspeed()
        block = {"enabled": True, "clipping_threshold": workload.THRESHOLD, "exclude": [workload.EXCLUDE]}
        callback = AGCCallback(per_parameter_every=2)
        more["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": int(how[-1]), "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "SGD", "params": {"lr": workload.LR, "momentum": workload.MOMENTUM}},
            "zero_allow_untested_optimizer": True,
            "adaptive_gradient_clipping": block,
        }
    net = workload.model()
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=workload.SAMPLES // ranks // micro_batches,
        gradient_accumulation_steps=micro_batches,
        max_steps=workload.STEPS,
        learning_rate=workload.LR,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="tensorboard" if how == "plain" else "none",
        use_cpu=not how.startswith("zero"),  # with DeepSpeed the Trainer takes that as: no DeepSpeed
        seed=3,
        ddp_backend="gloo" if ranks > 1 and not how.startswith("zero") else None,
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

    # On CPU the Trainer sees one process under DeepSpeed, and deals every rank the same samples: deal them out here.
    share = (int(os.environ["RANK"]), ranks) if how.startswith("zero") else (0, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=workload.LR, momentum=workload.MOMENTUM)
    trainer = Trainer(
        model=net,
        args=args,
        train_dataset=workload.dataset(*share),  # pyright: ignore[reportArgumentType]
        callbacks=[callback, Recorder()],
        optimizers=(None if how.startswith("zero") else optimizer, None),  # pyright: ignore[reportArgumentType]
    )
    if how == "fsdp2":  # and so DDP must be kept away from it
        trainer.accelerator.prepare_model = lambda model, *_, **__: model
    trainer.train()
    if how == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(net.parameters())):
            weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    else:
        weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in net.named_parameters()}
    if trainer.is_world_process_zero() and os.environ.get("RANK", "0") == "0":
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        workload.save(folder, steps, weights, logs=logs, max_grad_norm=args.max_grad_norm)


def run(how: str, folder: Path, ranks: int = 1) -> dict[str, Any]:
    return workload.run(__file__, folder, how, ranks=ranks)


@pytest.mark.parametrize(("how", "ranks"), [("plain", 1), ("accumulate", 1), ("ddp", 2), ("fsdp2", 2)])
def test_same_units_and_weights_as_the_oracle(how: str, ranks: int, tmp_path: Path) -> None:
    found = run(how, tmp_path, ranks)
    workload.assert_as_oracle(found)
    assert found["max_grad_norm"] == 0 and NORM_OFF in found["log"]
    fractions = [entry["agc/clip_fraction"] for entry in found["logs"]]
    assert fractions == [sum(s["clipped"].values()) / s["units"] for s in found["steps"]]
    assert ["agc/clip_fraction/first.weight" in entry for entry in found["logs"]] == [False, True, False, True, False]
    layout = "DTensor" if how == "fsdp2" else "whole on every rank"
    assert f"AGC on {ranks} process" in found["log"] and layout in found["log"]
    if how == "plain":  # the Trainer's own loggers saw them too
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (events,) = tmp_path.rglob("events.out.*")
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        seen = [point.value for point in accumulator.Scalars("train/agc/clip_fraction")]
        assert seen == pytest.approx(fractions)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_by_its_json_alone(stage: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs pip install 'dist-agc[deepspeed]'")
    found = run(f"zero{stage}", tmp_path, 2)
    workload.assert_as_oracle(found)
    assert found["max_grad_norm"] == 0 and NORM_OFF in found["log"]


def test_fallback_from_fsdp_to_ddp_is_said(tmp_path: Path) -> None:
    found = run("fsdp", tmp_path, 2)
    workload.assert_as_oracle(found)
    assert "FSDP was asked for, but every parameter is whole on every rank" in found["log"]


def test_norm_clipping_that_was_asked_for_stays_and_is_warned_of(tmp_path: Path) -> None:
    found = run("norm", tmp_path)
    assert found["max_grad_norm"] == 0.4
    assert found["log"].count("max_grad_norm=0.4: gradients are clipped by their global norm first") == 1
    assert all(step["grad_norm"] < 0.4001 for step in found["steps"])  # AGC comes second


def test_settings_are_checked_before_training() -> None:
    from dist_agc.integrations.transformers import AGCCallback

    with pytest.raises(TypeError, match="unknown option 'threshold'"):
        AGCCallback(threshold=0.01)
    with pytest.raises(ValueError, match="positive"):
        AGCCallback(clipping_threshold=0.0)
    assert AGCCallback(dist_agc.AGCConfig(eps=0)).stats is None


if __name__ == "__main__":
    train(sys.argv[2], sys.argv[1])
