"""Optimizers of the Hugging Face Trainer that step inside of backward, and hooks that transformers registers late.

LOMO and GaLore are not installed here: SGD in their shape takes their place. Around it everything is the library's own:
the hooks and the empty optimizer of layer-wise GaLore, LOMO's ways through the Trainer and Accelerate.
"""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import workload
from torch import nn
from torch.optim import SGD

import dist_agc
from lomo import Lomo

pytest.importorskip("transformers", reason="needs pip install 'dist-agc[transformers]'")

SGD_OF_RUN: dict[str, Any] = {"lr": workload.LR, "momentum": workload.MOMENTUM}
pytestmark = pytest.mark.filterwarnings("ignore:The `use_cpu` argument:FutureWarning")


class AdaLomo(Lomo):
    """With the momentum of all runs of these tests."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, workload.LR)
        self.each = {p: SGD([p], **SGD_OF_RUN) for p in model.parameters()}

    def update(self, p: nn.Parameter) -> None:
        self.each[p].step()


@pytest.fixture
def lomo(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], Any]:
    """Makes one, and has Accelerate take it for LOMO."""
    package: Any = types.ModuleType("lomo_optim")
    package.Lomo, package.AdaLomo = Lomo, AdaLomo
    monkeypatch.setitem(sys.modules, "lomo_optim", package)
    for module in ("accelerate.accelerator", "accelerate.optimizer"):
        monkeypatch.setattr(f"{module}.is_lomo_available", lambda: True)
    return lambda net: AdaLomo(net)


def galore(net: nn.Module, args: Any) -> Any:
    """What the Trainer makes of ``optim="galore_adamw_layerwise"``, with SGD in the place of GaLore's Adam."""
    from transformers import trainer_optimizer

    args.optim_target_modules = ["second"]
    kind, options = trainer_optimizer._setup_low_rank_optimizer(
        args,
        net,  # type: ignore[arg-type]
        "galore_adamw_layerwise",
        {"galore_adamw_layerwise": SGD},
        {},
        dict(SGD_OF_RUN),
    )
    return kind(**options)


def trainer_of(
    net: nn.Module, folder: Path, optimizer: Callable[[nn.Module, Any], Any], callbacks: list[Any], **more: Any
) -> Any:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=workload.SAMPLES,
        max_steps=workload.STEPS,
        learning_rate=workload.LR,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        max_grad_norm=0,
        **more,
    )
    data: Any = workload.dataset()
    optimizers: Any = (optimizer(net, args), None)
    return Trainer(model=net, args=args, train_dataset=data, callbacks=callbacks, optimizers=optimizers)


@pytest.mark.parametrize("kind", ["lomo", "galore", "ordinary"])
def test_same_units_and_weights_as_the_oracle(kind: str, lomo: Any, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    from dist_agc.integrations.transformers import AGCCallback

    callback = AGCCallback(clipping_threshold=workload.THRESHOLD, exclude=workload.EXCLUDE, during_backward=True)
    steps: list[dict[str, Any]] = []

    class Recorder(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert callback.stats
            steps.append(workload.record(callback.stats))

    ways: dict[str, Callable[[nn.Module, Any], Any]] = {
        "lomo": lambda net, args: lomo(net),
        "galore": galore,
        "ordinary": lambda net, args: SGD(net.parameters(), **SGD_OF_RUN),
    }
    net, more = workload.model(), {"optim": "lomo"} if kind == "lomo" else {}
    trainer = trainer_of(net, tmp_path, ways[kind], [callback, Recorder()], **more)
    trainer.train()
    workload.assert_as_oracle({"steps": steps, "weights": {name: p.detach() for name, p in net.named_parameters()}})
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == workload.STEPS and all("agc/clip_fraction" in entry for entry in logs)


@pytest.mark.parametrize("kind", ["lomo", "galore"])
def test_clipping_in_the_step_is_refused_for_them(kind: str, lomo: Any, tmp_path: Path) -> None:
    from dist_agc.integrations.transformers import AGCCallback

    make: Any = (lambda net, args: lomo(net)) if kind == "lomo" else galore
    trainer = trainer_of(workload.model(), tmp_path, make, [AGCCallback()])
    whose = "LOMO or AdaLomo" if kind == "lomo" else "transformers' layer-wise GaLore or Apollo"
    with pytest.raises(ValueError, match=rf"inside of backward, by {whose}.*AGCCallback\(during_backward=True\)"):
        trainer.train()


@pytest.mark.parametrize(
    ("more", "said"),
    [({"gradient_accumulation_steps": 2}, "each micro-batch would be clipped by itself"), ({}, "carry the loss scale")],
)
def test_gradients_that_are_not_those_of_a_step_are_refused(more: Any, said: str, tmp_path: Path) -> None:
    from dist_agc.integrations.transformers import AGCCallback

    make: Any = lambda net, args: SGD(net.parameters(), **SGD_OF_RUN)  # noqa: E731
    trainer = trainer_of(workload.model(), tmp_path, make, [AGCCallback(during_backward=True)], **more)
    if not more:  # as fp16=True makes it, which wants an accelerator
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match=said):
        trainer.train()


def test_tensor_parallelism_of_transformers_is_refused() -> None:
    """Its hook that adds up the gradients of such a norm comes with the first forward pass."""
    from transformers.distributed.tensor_parallel import ReplicatedWithGradAllReduce

    net = workload.model()
    mesh: Any = None  # asked in backward only
    ReplicatedWithGradAllReduce().install_forward(net.norm, mesh)
    with pytest.raises(ValueError, match="transformers' tensor parallelism adds gradients up over ranks in a hook"):
        dist_agc.attach(net, during_backward=True)
    dist_agc.attach(net, SGD(net.parameters(), lr=0.1)).remove()
    net(*workload.data())
    with pytest.raises(ValueError, match="'norm.weight' has a post-accumulate-grad hook already"):
        dist_agc.attach(list(net.named_parameters()), during_backward=True)
