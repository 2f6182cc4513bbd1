"""AGCCallback in the real Lightning Trainer, and attach() under Fabric, against the oracle."""

import logging
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import workload
from torch.distributed.tensor import DTensor

import turns
from helpers import quiet_deepspeed

pytest.importorskip("lightning", reason="needs pip install 'dist-agc[lightning]'")

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

trained = turns.fixture(
    (1, ["plain", "accumulate", "manual", "manual-two", "scaler", "fused", "clip_val", "fabric-plain"]),
    (2, ["ddp", "fsdp2", "fabric-ddp"]),
    (2, ["zero2", "zero3"]),  # apart: they want DeepSpeed
    read=workload.left_in,
)


def module(how: str) -> "LightningModule":
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            net = workload.model()
            self.first, self.second, self.norm, self.head = net.first, net.second, net.norm, net.head
            self.automatic_optimization = not how.startswith("manual")

        def forward(self, *batch: torch.Tensor) -> Any:
            return workload.Net.forward(self, *batch)  # pyright: ignore[reportArgumentType]

        def configure_model(self) -> None:
            if how == "fsdp2" and not isinstance(self.first.weight, DTensor):
                from torch.distributed.fsdp import fully_shard

                assert self.device_mesh is not None
                fully_shard(self, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, _: int) -> Any:
            loss = self(*batch)["loss"]
            if how.startswith("manual"):
                found: Any = self.optimizers()
                optimizers = found if isinstance(found, list) else [found]
                for optimizer in optimizers:
                    optimizer.zero_grad()
                self.manual_backward(loss)
                for optimizer in optimizers:
                    optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            if how == "fused":
                return torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)
            parts: list[Any] = [self.parameters()]
            if how == "manual-two":
                pairs = [(self.first, self.head), (self.second, self.norm)]
                parts = [[p for layer in pair for p in layer.parameters()] for pair in pairs]
            made = [torch.optim.SGD(part, lr=workload.LR, momentum=workload.MOMENTUM) for part in parts]
            return made if len(made) > 1 else made[0]

    return Module()


def deepspeed_strategy(stage: int) -> Any:
    """Lightning's own strategy, without its questions for CUDA: DeepSpeed itself runs on CPU."""
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

    class OnCPU(DeepSpeedStrategy):
        root_device = torch.device("cpu", 0)  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

        def setup_environment(self) -> None:
            DDPStrategy.setup_environment(self)

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    quiet_deepspeed()
    block = {"clipping_threshold": workload.THRESHOLD, "exclude": [workload.EXCLUDE]}
    return OnCPU(
        process_group_backend="gloo",
        config={
            "train_micro_batch_size_per_gpu": workload.SAMPLES // 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "adaptive_gradient_clipping": block,
        },
    )


def train(how: str, folder: str) -> None:
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.plugins import MixedPrecision
    from torch.utils.data import DataLoader, TensorDataset

    from dist_agc.integrations.lightning import AGCCallback

    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("dist_agc").setLevel(logging.INFO)
    warnings.simplefilter("ignore")
    zero = how.startswith("zero")
    ranks = 2 if how in ("ddp", "fsdp2") or zero else 1
    micro_batches = 2 if how == "accumulate" else 1
    strategy: Any = "ddp" if how == "ddp" else "auto"
    if how == "fsdp2":
        from lightning.pytorch.strategies import ModelParallelStrategy

        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    if zero:
        strategy = deepspeed_strategy(int(how[4]))
    plugins: list[Any] = []
    if how in ("scaler", "fused"):
        scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)  # pyright: ignore[reportPrivateImportUsage]
        precision = MixedPrecision("16-mixed", "cpu", scaler)
        # The arithmetic stays that of the oracle; the scaler's part is what is looked at.
        precision.forward_context = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
        plugins = [precision]
    options = {} if zero else {"clipping_threshold": workload.THRESHOLD, "exclude": workload.EXCLUDE}
    callback = AGCCallback(**options, per_parameter_every=2)
    steps: list[dict[str, Any]] = []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step > len(steps):
                steps.append(workload.record(callback.stats))

    trainer = Trainer(
        max_steps=workload.STEPS * (2 if how == "manual-two" else 1),  # counts the steps of every optimizer
        max_epochs=workload.STEPS,
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        plugins=plugins or None,
        callbacks=[callback, Recorder()],
        accumulate_grad_batches=micro_batches,
        gradient_clip_val=1e6 if how == "clip_val" else None,
        log_every_n_steps=1,
        logger=CSVLogger(folder, name="csv", version=0),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        use_distributed_sampler=True,
    )
    net = module(how)
    size = workload.SAMPLES // ranks // micro_batches
    trainer.fit(net, DataLoader(TensorDataset(*workload.data()), batch_size=size))
    weights = workload.full_weights(net)
    if trainer.is_global_zero:
        workload.save(folder, steps, weights)


def fabric(how: str, folder: str) -> None:
    from lightning.fabric import Fabric

    import dist_agc

    ranks = 2 if how == "fabric-ddp" else 1
    runner = Fabric(accelerator="cpu", devices=ranks, strategy="ddp" if ranks == 2 else "auto")
    runner.launch()
    net = workload.model()
    optimizer = torch.optim.SGD(net.parameters(), lr=workload.LR, momentum=workload.MOMENTUM)
    model, optimizer = runner.setup(net, optimizer)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=workload.THRESHOLD, exclude=workload.EXCLUDE)
    steps = []
    for _ in range(workload.STEPS):
        optimizer.zero_grad()
        runner.backward(model(*workload.my_share(runner.global_rank, ranks))["loss"])
        optimizer.step()
        steps.append(workload.record(hook.stats))
    if runner.is_global_zero:
        workload.save(folder, steps, dict(net.named_parameters()))


@pytest.mark.parametrize(
    ("how", "ranks"),
    [
        ("plain", 1),
        ("accumulate", 1),
        ("manual", 1),
        ("manual-two", 1),
        ("scaler", 1),
        ("ddp", 2),
        ("fsdp2", 2),
        ("zero2", 2),
        ("zero3", 2),
    ],
)
def test_same_units_and_weights_as_the_oracle(how: str, ranks: int, trained: turns.Trained) -> None:
    found = trained(how)
    workload.assert_as_oracle(found)
    assert f"AGC on {ranks} process" in found["log"]
    layout = "DTensor" if how == "fsdp2" else "DeepSpeed" if how.startswith("zero") else "whole on every rank"
    assert layout in found["log"]
    rows = (found["folder"] / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    column = [row.split(",")[names.index("agc/clip_fraction")] for row in rows[1:]]
    fractions = [sum(step["clipped"].values()) / step["units"] for step in found["steps"]]
    if how.startswith("zero"):  # Lightning logs before engine.step(), so each line is of the step before
        fractions.pop()
    assert [float(value) for value in column if value] == pytest.approx(fractions)
    per_parameter = [row.split(",")[names.index("agc/clip_fraction/first.weight")] != "" for row in rows[1:]]
    assert per_parameter.count(True) == (5 if how == "manual-two" else 2)  # every second step of an optimizer


def test_a_scale_that_the_optimizer_removes_itself_is_seen_through(trained: turns.Trained) -> None:
    found = trained("fused")
    first = workload.reference()[0][0]  # Adam goes another way from the second step on
    assert found["steps"][0]["clipped"] == {name: of.clipped_units for name, of in first.per_parameter.items()}
    assert found["steps"][0]["grad_norm"] == pytest.approx(first.grad_norm, rel=1e-5)


def test_clip_val_is_warned_of(trained: turns.Trained) -> None:
    found = trained("clip_val")
    workload.assert_as_oracle(found)
    assert found["log"].count("gradient_clip_val=1000000.0: gradients are clipped by AGC first") == 1


@pytest.mark.parametrize("how", ["fabric-plain", "fabric-ddp"])
def test_fabric_needs_no_callback(how: str, trained: turns.Trained) -> None:
    workload.assert_as_oracle(trained(how))


@pytest.mark.filterwarnings("ignore:The `srun` command")  # where SLURM is installed
def test_lightnings_fsdp_strategy_cannot_run_here() -> None:
    """The day it runs on CPU, this fails and it gets a row above."""
    from lightning.pytorch import Trainer

    with pytest.raises(Exception, match="GPU|CUDA|cuda"):
        Trainer(accelerator="cpu", devices=2, strategy="fsdp", logger=False, enable_checkpointing=False)


if __name__ == "__main__":
    turns.take(lambda how, folder: (fabric if how.startswith("fabric") else train)(how, folder))
