"""Plain Accelerate: prepared models and optimizers, against the oracle."""

import contextlib
import logging
import os
from typing import Any

import pytest
import torch
import workload

import turns
from helpers import quiet_deepspeed

pytest.importorskip("accelerate", reason="needs pip install 'dist-agc[accelerate]'")

trained = turns.fixture(
    (1, ["plain", "bare", "several", "accumulate"]),
    (2, ["ddp", "ddp-accumulate", "fsdp2", "fsdp"]),
    (2, ["zero0", "zero2", "zero3", "zero1-accumulate"]),  # apart: they want DeepSpeed
    read=workload.left_in,
)


def train(how: str, folder: str) -> None:
    import accelerate

    import dist_agc
    from dist_agc.integrations.accelerate import attach

    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("dist_agc").setLevel(logging.INFO)
    zero = how.startswith("zero")
    micro_batches = 2 if how.endswith("accumulate") else 1
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    more: dict[str, Any] = {"cpu": True}
    if how == "fsdp":
        more["fsdp_plugin"] = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2)
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    if zero:
        quiet_deepspeed()
        plugin = accelerate.DeepSpeedPlugin(
            hf_ds_config={
                "train_micro_batch_size_per_gpu": workload.SAMPLES // ranks // micro_batches,
                "gradient_accumulation_steps": micro_batches,
                "gradient_clipping": 0.0,
                "zero_optimization": {"stage": int(how[4])},
                "zero_allow_untested_optimizer": True,
                "adaptive_gradient_clipping": {"clipping_threshold": workload.THRESHOLD, "exclude": [workload.EXCLUDE]},
            }
        )
        more = {"deepspeed_plugin": plugin}
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=micro_batches, **more)
    net = workload.model()
    if how == "fsdp2":  # sharded by hand: Accelerate does not shard on CPU
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    parts: list[Any] = [net.parameters()]
    if how == "several":
        parts = [[*net.first.parameters(), *net.head.parameters()], [*net.second.parameters(), *net.norm.parameters()]]
    optimizers: Any = [torch.optim.SGD(part, lr=workload.LR, momentum=workload.MOMENTUM) for part in parts]
    if how == "fsdp2":
        model, *optimizers = accelerator.prepare_model(net, evaluation_mode=True), accelerator.prepare(*optimizers)
    else:
        model, *optimizers = accelerator.prepare(net, *optimizers)
    options = {} if zero else {"clipping_threshold": workload.THRESHOLD, "exclude": workload.EXCLUDE}
    if how == "bare":
        hook = dist_agc.attach(model, optimizers, **options)
    else:
        hook = attach(accelerator, model, optimizers, **options)
    x, labels = workload.my_share(rank, ranks)
    steps = []
    for _ in range(workload.STEPS):
        for part, y in zip(x.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
            with accelerator.accumulate(model) if micro_batches > 1 else contextlib.nullcontext():
                accelerator.backward(model(part, y)["loss"])
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        steps.append(workload.record(hook.stats))
    weights = workload.full_weights(net)
    if rank == 0:
        workload.save(folder, steps, weights)


@pytest.mark.parametrize(
    ("how", "layout"),
    [
        ("plain", "whole on every rank"),
        ("bare", ""),
        ("several", "whole on every rank"),
        ("accumulate", "whole on every rank"),
        ("ddp", "whole on every rank"),
        ("ddp-accumulate", "whole on every rank"),
        ("fsdp2", "DTensor"),
        ("zero0", "whole on every rank"),
        ("zero2", "DeepSpeed"),
        ("zero3", "DeepSpeed"),
        ("zero1-accumulate", "DeepSpeed"),
    ],
)
def test_same_units_and_weights_as_the_oracle(how: str, layout: str, trained: turns.Trained) -> None:
    if how.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs pip install 'dist-agc[deepspeed]'")
    found = trained(how)
    workload.assert_as_oracle(found)
    assert layout in found["log"]


def test_fallback_from_fsdp_to_ddp_is_said(trained: turns.Trained) -> None:
    found = trained("fsdp")
    workload.assert_as_oracle(found)
    assert "FSDP was asked for, but every parameter is whole on every rank" in found["log"]


def test_what_was_not_prepared_is_refused() -> None:
    import accelerate

    from dist_agc.integrations.accelerate import attach

    net = workload.model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="Accelerator first, got Net"):
        attach(net, optimizer)  # type: ignore[arg-type]
    accelerator = accelerate.Accelerator(cpu=True)
    with pytest.raises(ValueError, match="SGD was not prepared"):
        attach(accelerator, net, optimizer)
    with pytest.raises(ValueError, match="Net was not prepared.*evaluation_mode=True"):
        attach(accelerator, net, accelerator.prepare(optimizer))
    with pytest.raises(ValueError, match="Net was not prepared"):
        attach(accelerator, [accelerator.prepare(workload.model()), net], accelerator.prepare(optimizer))
    assert not attach(accelerator, *accelerator.prepare(net, optimizer)).stats


def test_two_models_in_one_optimizer() -> None:
    """diffusers #9302: the second model trained unclipped."""
    import accelerate

    import dist_agc
    from dist_agc.integrations.accelerate import attach

    first, second = workload.model(), torch.nn.Linear(4, 3)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    first, second, optimizer = accelerator.prepare(first, second, optimizer)
    with pytest.warns(UserWarning, match=r"does not clip 2 tensors of shape \(3, 4\), \(3,\)"):
        attach(accelerator, first, optimizer).remove()
    hook = attach(accelerator, [first, second], optimizer, clipping_threshold=1e-3)
    for parameter in (*first.parameters(), *second.parameters()):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    stats = dist_agc.apply_agc(first)
    assert stats is not None and hook.stats.units == stats.units + 4
    assert float(second.weight.grad.norm()) < 0.01


if __name__ == "__main__":
    turns.take(train)
