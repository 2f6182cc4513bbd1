"""No unit of three dims or more is guessed in silence, whichever way AGC is turned on."""

import os
import re
import socket
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_agc
import turns
from helpers import quiet_deepspeed

TOLD = "dist_agc does not know the modules of"


class Stack(nn.Module):
    """Two matrices in one tensor, in a module that dist_agc cannot know."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(shape or (2, 4, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,noi->bno", x, self.w)


def model(*shape: int) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([Stack(*shape), Stack(*shape)]), "head": nn.Linear(4, 2)})


def with_grads(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    return module


def told(call: Callable[[], Any]) -> list[str]:
    """What a call warns of a guess; a filter of the interpreter does not hide a repetition."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in seen if TOLD in str(w.message)]


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def attached(module: nn.Module, **options: Any) -> None:
    """Attach, and two steps: the warning comes once, not once a step."""
    optimizer = sgd(module)
    hook = dist_agc.attach(module, optimizer, **options)
    for _ in range(2):
        with_grads(module)
        optimizer.step()
    hook.remove()


def applied(module: nn.Module, **options: Any) -> None:
    for _ in range(2):
        dist_agc.apply_agc(with_grads(module), **options)


ENTRANCES = {
    "attach": attached,
    "apply_agc": applied,
    "Clipper": lambda module, **options: dist_agc.Clipper(module, **options),
    "ratios": lambda module, **options: dist_agc.ratios(with_grads(module), **options),
    "during_backward": lambda module, **options: dist_agc.attach(
        module, sgd(module), during_backward=True, **options
    ).remove(),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_guess_is_told_once(entrance: str) -> None:
    (text,) = told(lambda: ENTRANCES[entrance](model()))
    # Both layers in one pattern, and the line that settles it.
    assert "'layers.*.w' (2, 4, 3)" in text and "units={'layers.*.w': 0}" in text and "register_units" in text
    assert "head" not in text


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("options", [{"units": {"layers.*.w": 0}}, {"exclude": "layers.*"}, {"units": "leading"}])
def test_what_was_said_or_left_out_is_no_guess(entrance: str, options: dict[str, Any]) -> None:
    assert told(lambda: ENTRANCES[entrance](model(), **options)) == []


def test_the_line_that_the_warning_gives_settles_it() -> None:
    (text,) = told(lambda: applied(model()))
    line = re.search(r"units=(\{.*?\})", text)
    assert line is not None
    said = eval(line[1])  # noqa: S307 - our own text
    assert told(lambda: applied(model(), units=said)) == []


@pytest.mark.parametrize("shape", [(1, 1, 6), (1, 6, 1), (4, 3), (2, 0, 3)], ids=str)
def test_two_dims_vectors_and_empty_tensors_are_no_cause_to_warn(shape: tuple[int, ...]) -> None:
    assert told(lambda: applied(model(*shape))) == []
    rows = dist_agc.units(model(*shape))
    # A vector is one unit however it is laid out, which is no guess; two dims are a guess that is listed alone.
    assert [row.guessed for row in rows if row.name.endswith(".w")] == [sum(size != 1 for size in shape) > 1] * 2


def test_a_frozen_parameter_is_told_when_it_thaws() -> None:
    module = model().requires_grad_(False)
    module.get_submodule("head").requires_grad_(True)
    clipper = dist_agc.Clipper(module)  # an error, if this warned
    with_grads(module)
    clipper.clip()
    module.requires_grad_(True)
    with_grads(module)
    assert len(told(clipper.clip)) == 1
    assert told(clipper.clip) == []


def test_parameters_without_a_model_are_told_to_be_given_with_one() -> None:
    module = with_grads(nn.Sequential(nn.Conv2d(3, 4, 2)))
    (text,) = told(lambda: dist_agc.apply_agc(module.parameters()))
    assert "pass the model itself" in text and "'0' (4, 3, 2, 2)" in text
    assert told(lambda: dist_agc.apply_agc(module)) == []


def test_many_guesses_are_counted_and_not_listed() -> None:
    module = nn.ModuleDict({name: Stack() for name in "abcdefg"})
    (text,) = told(lambda: applied(module))
    assert "'e.w'" in text and "'f.w'" not in text and "and 2 more" in text


# ------------------------------------------------------------------ integrations, in turn in one process


def transformers(net: nn.Module, data: list[dict[str, Tensor]], folder: str) -> None:
    from transformers import Trainer, TrainingArguments

    from dist_agc.integrations.transformers import AGCCallback

    args = TrainingArguments(output_dir=folder, use_cpu=True, max_steps=2, report_to="none", save_strategy="no")
    Trainer(model=net, args=args, train_dataset=data, callbacks=[AGCCallback()]).train()  # type: ignore[arg-type]


def lightning(net: nn.Module, data: list[dict[str, Tensor]], folder: str) -> None:
    from lightning.pytorch import LightningModule, Trainer

    from dist_agc.integrations.lightning import AGCCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, _: int) -> Any:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            return sgd(self)

    loader = torch.utils.data.DataLoader(data, batch_size=4)  # type: ignore[arg-type]
    trainer = Trainer(
        max_steps=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, default_root_dir=folder,
        callbacks=[AGCCallback()], enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(Module(), loader)


def accelerate(net: nn.Module, data: list[dict[str, Tensor]], folder: str) -> None:
    from accelerate import Accelerator

    from dist_agc.integrations.accelerate import attach

    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(net, sgd(net))
    attach(accelerator, prepared, optimizer)
    for batch in data[:2]:
        accelerator.backward(prepared(**{name: value[None] for name, value in batch.items()})["loss"])
        optimizer.step()


def deepspeed(net: nn.Module, data: list[dict[str, Tensor]], folder: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed as library

    from dist_agc.integrations.deepspeed import initialize

    quiet_deepspeed()
    library.init_distributed("gloo", verbose=False)
    block = {"enabled": True, "clipping_threshold": 0.01}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "adaptive_gradient_clipping": block,
    }
    engine, *_ = initialize(model=net, optimizer=sgd(net), config=config)
    for batch in data[:2]:
        engine.backward(engine(**{name: value[None] for name, value in batch.items()})["loss"])
        engine.step()


INTEGRATIONS = {one.__name__: one for one in (transformers, lightning, accelerate, deepspeed)}
trained = turns.fixture((1, [*INTEGRATIONS]), read=lambda folder, log: log)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack, self.head = Stack(2, 5, 6), nn.Linear(5, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.stack(x).sum(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_every_integration_tells(name: str, trained: turns.Trained) -> None:
    pytest.importorskip(name)
    log = trained(name)
    assert log.count(f"UserWarning: {TOLD}") == 1, log[-8000:]
    assert "stack.w' (2, 5, 6)" in log


def train(name: str, folder: str) -> None:
    warnings.simplefilter("always")
    generator = torch.Generator().manual_seed(0)
    samples = [{"x": torch.randn(6, generator=generator), "labels": torch.tensor(i % 3)} for i in range(12)]
    INTEGRATIONS[name](Net(), samples, folder)


if __name__ == "__main__":
    turns.take(train)
