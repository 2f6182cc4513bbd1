"""The AGC algorithm in the real Composer Trainer: run by tests/mosaicml/run.sh, in an environment of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("composer.core", reason="needs the environment that launch/composer-env.sh makes")

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))

import workload  # pyright: ignore[reportMissingImports]
from composer import Trainer  # pyright: ignore[reportMissingImports]
from composer.algorithms import GradientClipping  # pyright: ignore[reportMissingImports]
from composer.core import Callback  # pyright: ignore[reportMissingImports]
from composer.loggers import InMemoryLogger  # pyright: ignore[reportMissingImports]
from composer.models import ComposerModel  # pyright: ignore[reportMissingImports]
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dist_agc
from dist_agc.integrations.composer import AGC

PAGE = Path(__file__).parents[2] / "docs" / "composer.md"

pytestmark = pytest.mark.filterwarnings("default")  # Composer's own, of an older torch


class Model(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = workload.model()

    def forward(self, batch: Any) -> torch.Tensor:
        return self.net(batch[0])

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, batch[1])


def train(algorithm: Any, *, microbatches: int = 1, ranks: int = 1) -> tuple[Model, InMemoryLogger, list[Any]]:
    steps: list[Any] = []

    class Recorder(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            if isinstance(algorithm, AGC):
                steps.append(workload.record(algorithm.stats))

    model, memory = Model(), InMemoryLogger()
    size = workload.SAMPLES // ranks
    dataset = TensorDataset(*workload.data())
    sampler = DistributedSampler(dataset, ranks, int(os.environ.get("RANK", 0)), shuffle=False)
    Trainer(
        model=model,
        train_dataloader=DataLoader(dataset, batch_size=size, sampler=sampler),
        max_duration=f"{workload.STEPS}ba",
        optimizers=torch.optim.SGD(model.parameters(), lr=workload.LR, momentum=workload.MOMENTUM),
        algorithms=[algorithm],
        callbacks=[Recorder()],
        loggers=[memory],
        device="cpu",
        device_train_microbatch_size=size // microbatches,
        step_schedulers_every_batch=True,
        progress_bar=False,
    ).fit()
    return model, memory, steps


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in getattr(model, "module", model).net.named_parameters()}


def agc() -> AGC:
    return AGC(clipping_threshold=workload.THRESHOLD, exclude=("net.head.*",), per_parameter_every=2)


def assert_as_oracle(steps: list[Any], found: dict[str, torch.Tensor]) -> None:
    bare = [{**s, "clipped": {name.removeprefix("net."): n for name, n in s["clipped"].items()}} for s in steps]
    workload.assert_as_oracle({"steps": bare, "weights": found})


@pytest.mark.parametrize("microbatches", [1, 2])
def test_same_units_and_weights_as_the_oracle(microbatches: int) -> None:
    model, memory, steps = train(agc(), microbatches=microbatches)
    assert_as_oracle(steps, weights(model))
    logged = [value for _, value in memory.data["agc/clip_fraction"]]
    assert logged == [sum(s["clipped"].values()) / s["units"] for s in steps]
    assert len(memory.data["agc/clip_fraction/net.first.weight"]) == 3  # batches 0, 2 and 4


def test_eps_0_gives_the_weights_of_composers_own() -> None:
    ours = weights(train(AGC(clipping_threshold=workload.THRESHOLD, eps=0))[0])
    theirs = weights(train(GradientClipping(clipping_type="adaptive", clipping_threshold=workload.THRESHOLD))[0])
    never = weights(train(AGC(clipping_threshold=1e9))[0])
    for name, weight in theirs.items():
        assert not torch.allclose(weight, never[name], rtol=1e-2)
        torch.testing.assert_close(ours[name], weight, rtol=2e-6, atol=1e-7)


def test_the_functional_form_is_composers_too() -> None:
    from composer.algorithms.gradient_clipping import (  # pyright: ignore[reportMissingImports]
        apply_gradient_clipping,
    )

    ours, theirs = workload.model(), workload.model()
    x, labels = workload.data()
    for net in (ours, theirs):
        net(x, labels)["loss"].backward()
    stats = dist_agc.apply_agc(ours, clipping_threshold=workload.THRESHOLD, eps=0)
    assert stats is not None and 0 < stats.clipped_units < stats.units
    apply_gradient_clipping(theirs, "adaptive", workload.THRESHOLD, fsdp_enabled=False)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-6, atol=1e-9)


def test_the_code_on_the_page_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python composer\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "block.py").write_text(code)
    run = [sys.executable, "-W", "ignore", "block.py"]
    env = os.environ | {"PYTHONPATH": str(PAGE.parents[1])}
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "ClipStats(" in done.stdout


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes(how: str, tmp_path: Path) -> None:
    found = workload.run(__file__, tmp_path, how, ranks=2)
    assert_as_oracle(found["steps"], found["weights"])
    assert found["refused"] == (how == "fsdp")


def two_processes(folder: str, how: str) -> None:
    """``ddp``: Composer's Trainer. ``fsdp``: its Trainer refuses FSDP on CPU, so the algorithm is applied by hand."""
    import torch.distributed as dist

    rank, refused = int(os.environ["RANK"]), False
    if how == "ddp":
        model, _, steps = train(agc(), ranks=2)
        full = weights(model)
    else:
        from types import SimpleNamespace

        from composer.core import Event, Time, Timestamp  # pyright: ignore[reportMissingImports]
        from torch.distributed.fsdp import FullyShardedDataParallel

        dist.init_process_group("gloo")
        plain = Model()
        model = FullyShardedDataParallel(plain, use_orig_params=True, device_id=torch.device("cpu"))
        optimizer = torch.optim.SGD(model.parameters(), lr=workload.LR, momentum=workload.MOMENTUM)
        algorithm, steps = agc(), []
        try:
            from composer.algorithms.gradient_clipping import (  # pyright: ignore[reportMissingImports]
                apply_gradient_clipping,
            )

            apply_gradient_clipping(model, "adaptive", workload.THRESHOLD, fsdp_enabled=True)
        except ValueError as error:
            refused = "with FSDP" in str(error)
        state: Any = SimpleNamespace(
            model=model, optimizers=[optimizer], algorithms=[algorithm], timestamp=Timestamp(batch=Time(0, "ba"))
        )
        quiet: Any = SimpleNamespace(log_metrics=lambda _: None)
        algorithm.apply(Event.FIT_START, state, quiet)
        batch = workload.my_share(rank, 2)
        for _ in range(workload.STEPS):
            optimizer.zero_grad()
            plain.loss(model(batch), batch).backward()
            assert algorithm.match(Event.AFTER_TRAIN_BATCH, state)
            algorithm.apply(Event.AFTER_TRAIN_BATCH, state, quiet)
            optimizer.step()
            steps.append(workload.record(algorithm.stats))
        with FullyShardedDataParallel.summon_full_params(model):
            full = {name: p.detach().clone() for name, p in plain.net.named_parameters()}
            full = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in full.items()}
    if rank == 0:
        workload.save(folder, steps, full, refused=refused)
    dist.barrier()
    if how == "fsdp":
        dist.destroy_process_group()


if __name__ == "__main__":
    two_processes(sys.argv[1], sys.argv[2])
