"""Faults that a review of the whole code found, each as the user meets it: by the public names alone."""

import contextlib
import copy
import gc
import io
import logging
import math
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import dist_agc
import oracle
from helpers import (
    agc,
    assert_clipped,
    assert_some_clipped,
    assert_stats,
    full_grads,
    full_weights,
    median_threshold,
    noisy_grads,
    reference,
    worst_relative_error,
)

# ------------------------------------------------------------------ two optimizers, halves that are frozen in turn


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.critic = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
        with torch.no_grad():  # rows of many sizes, so that some are clipped
            for parameter in self.parameters():
                parameter.mul_(torch.logspace(-0.7, 0.7, len(parameter)).view(-1, *[1] * (parameter.ndim - 1)))

    def losses(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        noise, real = torch.randn(8, 4, generator=generator), torch.randn(8, 5, generator=generator)
        made = self.generator(noise)
        judged = self.critic(made).mean()
        return {"critic": (judged - self.critic(real).mean()).square(), "generator": (judged - 2).square()}

    def train_only(self, *halves: str) -> None:
        for name in ("generator", "critic"):
            getattr(self, name).requires_grad_(name in halves)


@pytest.mark.parametrize("frozen_at_first", [(), ("critic",), ("generator", "critic")], ids=str)
@pytest.mark.parametrize("interval", [1, 3])
def test_halves_that_are_frozen_in_turn(interval: int, frozen_at_first: tuple[str, ...]) -> None:
    """Lightning's toggle_optimizer: weight norms are measured every so many steps of an optimizer, and are its own."""
    model, threshold = Gan(), 0.12
    rules = oracle.unit_rules(model)
    optimizers = {name: torch.optim.SGD(getattr(model, name).parameters(), lr=0.2) for name in ("critic", "generator")}
    model.train_only(*{"critic", "generator"} - set(frozen_at_first))
    hook: Any = dist_agc.attach(
        model, list(optimizers.values()), clipping_threshold=threshold, weight_norm_interval=interval
    )
    measured: dict[str, dict[str, Tensor]] = {}
    clipped = 0
    for step in range(8):
        for name, optimizer in optimizers.items():
            model.train_only(name)
            model.zero_grad()
            model.losses(step)[name].backward()
            if step % interval == 0 or step == 1:
                measured[name] = full_weights(model)  # of the half that trains
            expected = oracle.clip(measured[name], full_grads(model), rules, threshold)
            optimizer.step()
            assert set(full_grads(model)) == set(expected.grads)
            error = worst_relative_error(full_grads(model), expected.grads)
            assert error <= 1e-6, f"{name}, step {step}: worst relative error {error:.3g}"
            clipped += expected.clipped_units
            for parameter, of in expected.per_parameter.items():
                found = hook.stats.per_parameter[parameter]
                assert (found.units, int(found.clipped_units)) == (of.units, of.clipped_units)
                assert float(found.grad_norm) == pytest.approx(of.grad_norm, rel=1e-6)
    assert 0 < clipped < 8 * expected.units


def test_halves_of_one_optimizer_that_are_frozen_in_turn() -> None:
    model, threshold = Gan(), 0.12
    rules = oracle.unit_rules(model)
    model.train_only("generator")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    hook: Any = dist_agc.attach(model, optimizer, clipping_threshold=threshold)
    for step in range(4):
        for name in ("generator", "critic"):
            model.train_only(name)
            model.zero_grad()
            model.losses(step)[name].backward()
            expected = reference(model, rules, threshold)
            optimizer.step()
            assert_clipped(model, hook.stats, expected)


def test_a_parameter_that_is_frozen_between_backward_and_step() -> None:
    """torch steps it, because it has a gradient, so it is clipped."""
    model, threshold = Gan(), 0.12
    rules = oracle.unit_rules(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    dist_agc.attach(model, optimizer, clipping_threshold=threshold)
    model.losses(0)["critic"].backward()
    expected = reference(model, rules, threshold)
    assert_some_clipped(expected)
    model.train_only("generator")
    optimizer.step()
    model.train_only("generator", "critic")
    assert worst_relative_error(full_grads(model), expected.grads) <= 1e-6


@pytest.mark.parametrize("rhythm", ["aab", "abab", "abbab", "aabbba"])
def test_stats_never_mix_steps(rhythm: str) -> None:
    """What was clipped since anything of it was clipped again: with optimizers of different rhythms, never two steps
    of one of them, nor one of a step that is over."""
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(3, 5)})
    rules, threshold = oracle.unit_rules(model), 0.3
    optimizers = {name: torch.optim.SGD(model[name].parameters(), lr=0.1) for name in "ab"}
    hook: Any = dist_agc.attach(model, list(optimizers.values()), clipping_threshold=threshold)
    record: dict[str, oracle.Reference] = {}
    for step, name in enumerate(rhythm * 2):
        model.zero_grad()
        torch.manual_seed(step)
        for parameter in model[name].parameters():
            parameter.grad = torch.randn_like(parameter) * torch.rand(len(parameter)).view(
                -1, *[1] * (parameter.ndim - 1)
            )
        weights = {n: w for n, w in full_weights(model).items() if n.startswith(name)}
        if name in record:
            record = {}
        record[name] = oracle.clip(weights, full_grads(model), rules, threshold)
        optimizers[name].step()
        assert_stats(hook.stats, together(list(record.values())), tolerance=2e-6)


def together(references: list[oracle.Reference]) -> oracle.Reference:
    norm = math.sqrt(sum(of.grad_norm**2 for of in references))
    return oracle.Reference({}, norm, {name: p for of in references for name, p in of.per_parameter.items()})


# ------------------------------------------------------------------ clipping during backward


class Stack(nn.Module):
    """Three segments of nine units each, recomputed in backward in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.segments = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, used: int = 3) -> Tensor:
        x = x.requires_grad_()
        if self.how == "nested":
            first = lambda y: checkpoint(self.segments[0], y, use_reentrant=True)  # noqa: E731
            both = lambda y: checkpoint(self.segments[1], first(y), use_reentrant=True)  # noqa: E731
            x = checkpoint(both, x, use_reentrant=True) if used > 1 else first(x)
            return checkpoint(self.segments[2], x, use_reentrant=True) if used > 2 else x
        for i, segment in enumerate(self.segments[:used]):
            plain = self.how == "plain" or self.how == f"{i} is plain"
            x = segment(x) if plain else checkpoint(segment, x, use_reentrant=self.how != "without reentering")
            assert isinstance(x, Tensor)
        return x


STACKS = ("plain", "without reentering", "reentrant", "nested", "0 is plain", "1 is plain", "2 is plain")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # the first pass of nested checkpoints
@pytest.mark.parametrize("how", STACKS)
def test_statistics_of_backwards_within_backward(how: str) -> None:
    """The record of a backward ends with the outermost one, and the next one begins anew."""
    torch.manual_seed(1)
    model, plain = Stack(how), Stack("plain")
    plain.load_state_dict(model.state_dict())
    inputs = [torch.randn(4, 8) for _ in range(5)]
    rules = oracle.unit_rules(model)
    plain(inputs[0].clone()).square().mean().backward()
    threshold = median_threshold(plain, rules)
    hook: Any = dist_agc.attach(model, during_backward=True, clipping_threshold=threshold)
    clipped = 0
    for x, used in zip(inputs, (3, 3, 1, 2, 3), strict=True):
        plain.zero_grad()
        plain(x.clone(), used).square().mean().backward()
        expected = reference(plain, rules, threshold)
        clipped += expected.clipped_units
        model.zero_grad()
        model(x, used).square().mean().backward()
        assert worst_relative_error(full_grads(model), expected.grads) <= 1e-5
        assert hook.stats.units == 27
        assert_stats(hook.stats, expected, tolerance=1e-5)
    assert 0 < clipped < 5 * 27


@pytest.mark.parametrize("first", [(0,), (0, 2), (1,)], ids=str)
def test_a_backward_over_other_parameters_begins_a_new_record(first: tuple[int, ...]) -> None:
    """Also where no parameter is seen a second time, and every parameter is clipped in an inner backward."""
    torch.manual_seed(1)
    model = Stack("reentrant")
    rules, threshold = oracle.unit_rules(model), 0.04
    hook: Any = dist_agc.attach(model, during_backward=True, clipping_threshold=threshold)
    for used in (first, tuple({0, 1, 2} - set(first))):
        model.zero_grad()
        plain = copy.deepcopy(model.segments)
        x = torch.randn(4, 8, requires_grad=True)
        run(list(plain), used, x, nn.Module.__call__).square().mean().backward()
        grads = {f"segments.{name}": p.grad for name, p in plain.named_parameters()}
        expected = oracle.clip(full_weights(model), grads, rules, threshold)
        again = lambda segment, y: checkpoint(segment, y, use_reentrant=True)  # noqa: E731
        run(list(model.segments), used, x, again).square().mean().backward()
        assert_stats(hook.stats, expected, tolerance=1e-5)


def run(segments: list[nn.Module], used: tuple[int, ...], x: Tensor, call: Callable[..., Any]) -> Tensor:
    for i in used:
        x = call(segments[i], x)
    return x


@pytest.mark.parametrize("during_backward", [True, False])
def test_a_step_holds_nothing_that_its_callers_let_go(during_backward: bool) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dist_agc.attach(model, optimizer, during_backward=during_backward)

    def inner(freed: list[bool]) -> None:
        large = torch.ones(1000)
        seen = weakref.ref(large)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        del large
        freed.append(seen() is None)

    def outer() -> list[bool]:
        freed: list[bool] = []
        large = torch.ones(1000)
        seen = weakref.ref(large)
        inner(freed)
        del large
        return [*freed, seen() is None]

    assert outer() == [True, True]


@contextlib.contextmanager
def frozen_objects() -> Iterator[None]:
    """What servers and forking data loaders do: objects that there are by now are no longer looked at."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("given", ["module", "child", "parameters"])
def test_ddp_is_refused_during_backward_after_gc_freeze(given: str) -> None:
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    inner: Any = {"module": model.module, "child": model.module[0], "parameters": list(model.parameters())}[given]
    with frozen_objects():
        frozen = gc.get_freeze_count()
        with pytest.raises(ValueError, match="DistributedDataParallel reduces gradients after"):
            dist_agc.attach(inner, during_backward=True)
        assert gc.get_freeze_count() >= 0.9 * frozen > 0, "frozen again"
    with frozen_objects():
        dist_agc.attach(nn.Linear(3, 2), during_backward=True).remove()


# ------------------------------------------------------------------ the Hugging Face Trainer


def trainer(model: nn.Module, folder: Path, *callbacks: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs pip install 'dist-agc[transformers]'")

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.inner(x).square().mean()}

    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        max_grad_norm=0.0,
        disable_tqdm=True,
    )
    data = [{"x": torch.ones(3)} for _ in range(4)]
    net = Loss()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    return transformers.Trainer(
        model=net, args=args, train_dataset=data, callbacks=list(callbacks), optimizers=(optimizer, None)
    )


@pytest.mark.filterwarnings("default")
def test_the_trainer_is_found_after_gc_freeze(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs pip install 'dist-agc[transformers]'")
    from dist_agc.integrations.transformers import AGCCallback

    callback = AGCCallback(clipping_threshold=1e-6)
    other = trainer(nn.Linear(3, 2), tmp_path, callback)  # has the same callback, and trains later
    first = trainer(nn.Linear(3, 2), tmp_path, callback)
    with frozen_objects():
        for one in (first, other):
            one.train()
            losses = [entry for entry in one.state.log_history if "loss" in entry]
            assert [entry["agc/clip_fraction"] for entry in losses] == [1.0, 1.0]
            assert callback.hook is not None
            assert set(callback.hook.clipper.clip().per_parameter) == {"inner.weight", "inner.bias"}  # type: ignore
            assert callback.hook.clipper.holds(one.model.inner.weight)


@pytest.mark.filterwarnings("default")
def test_a_frozen_quantised_weight_is_not_logged_as_deepspeed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Any tensor that is made of others: its layout is not known, and that it is DeepSpeed's nobody has said."""
    pytest.importorskip("transformers", reason="needs pip install 'dist-agc[transformers]'")
    from dist_agc.integrations.transformers import AGCCallback

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Parameter(TwoTensor(torch.ones(2, 3), torch.ones(2, 3)), requires_grad=False)
            self.adapter = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.adapter(x)

    with caplog.at_level(logging.INFO, logger="dist_agc"):
        trainer(Quantised(), tmp_path, AGCCallback(clipping_threshold=0.01)).train()
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("AGC on")]
    assert "2 parameters whole on every rank (plain or DDP)" in said
    assert "DeepSpeed" not in said and "FSDP" not in said


# ------------------------------------------------------------------ ratios()


class Operations(TorchDispatchMode):
    """What reaches the dispatcher, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Values that the host reads, for which it would wait for an accelerator."""

    READS = (Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__)

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func in self.READS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("given", ["attached", "model"])
def test_ratios_cost_about_one_dry_clip(given: str) -> None:
    model = nn.Sequential(*(nn.Linear(6, 5 + i) if i % 2 else nn.Conv2d(3, 4 + i, 3) for i in range(30)))
    noisy_grads(model)
    rules = oracle.unit_rules(model)
    hook: Any = dist_agc.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    about: Any = hook.clipper if given == "attached" else model
    dry = dist_agc.Clipper(model, dry_run=True)
    dry.clip()
    with Operations() as once:
        dry.clip()
    with Operations() as seen, Reads() as host:
        found = dist_agc.ratios(about)
    assert len(found.thresholds) == 27
    assert seen.operations <= 1.3 * once.operations + 60, f"{seen.operations}, a dry clip has {once.operations}"
    assert host.reads <= 1
    for k in (0, 9, 26):
        expected = reference(model, rules, found.thresholds[k])
        assert {n: (found.units[n], above[k]) for n, above in found.above.items()} == {
            name: (of.units, of.clipped_units) for name, of in expected.per_parameter.items()
        }


# ------------------------------------------------------------------ a model that is gone


@pytest.mark.parametrize("way", ["clipper", "attach"])
def test_units_stay_when_the_module_is_gone(way: str) -> None:
    """What a module says of its units is asked once; later its parameters may be all that is left of it."""

    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ConvTranspose1d(5, 7, 3), nn.Linear(3, 2))
    noisy_grads(model)
    rules = oracle.unit_rules(model)
    threshold = median_threshold(model, rules)
    expected = reference(model, rules, threshold)
    named = dict(model.named_parameters())
    named["0.weight"].requires_grad_(False)
    optimizer = torch.optim.SGD(named.values(), lr=0.0)
    hook: Any = None
    if way == "clipper":
        clipper = dist_agc.Clipper(model, clipping_threshold=threshold)
    else:
        hook: Any = dist_agc.attach(model, optimizer, clipping_threshold=threshold)
        clipper = hook.clipper
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None, "a Clipper does not keep the model alive"
    named["0.weight"].requires_grad_(True)
    if way == "clipper":
        stats: Any = clipper.clip()
    else:
        optimizer.step()
        stats = hook.stats
    assert_some_clipped(expected)
    assert_stats(stats, expected)
    grads = {name: p.grad.double() for name, p in named.items() if p.grad is not None}
    assert worst_relative_error(grads, expected.grads) <= 1e-6


# ------------------------------------------------------------------ optimizers that lost their hooks


def pair() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.ones(1, 3)).sum().backward()


def deep_copied(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    return copy.deepcopy((model, optimizer))


def unpickled(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    return pickle.loads(pickle.dumps((model, optimizer)))


def saved(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    file = io.BytesIO()
    torch.save({"model": model, "optimizer": optimizer}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    return loaded["model"], loaded["optimizer"]


def made_again(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


def made_again_for_some(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    return model, torch.optim.SGD(list(model.parameters())[2:], lr=0.1)


COPIES = [deep_copied, unpickled, saved, made_again, made_again_for_some]


@pytest.mark.parametrize("again", COPIES)
@pytest.mark.parametrize("stepped", [True, False])
def test_an_optimizer_that_lost_its_hook_says_so_once(again: Callable[..., Any], stepped: bool) -> None:
    """torch copies and pickles optimizers without their hooks, so they do not clip."""
    model, optimizer = pair()
    hook: Any = dist_agc.attach(model, optimizer, clipping_threshold=1e-3)
    if stepped:
        backward(model)
        optimizer.step()
    other, lost = again(model, optimizer)
    backward(other)
    with pytest.warns(UserWarning, match="not clipped") as said:
        lost.step()
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            backward(other)
            lost.step()
        backward(model)
        optimizer.step()  # the first one clips as ever
    assert hook.stats.units == 8 and int(hook.stats.clipped_units) > 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("again", COPIES)
def test_a_copy_that_is_attached_clips_and_says_nothing(again: Callable[..., Any]) -> None:
    model, optimizer = pair()
    dist_agc.attach(model, optimizer, clipping_threshold=1e-3)
    other, lost = again(model, optimizer)
    hook: Any = dist_agc.attach(other, lost, clipping_threshold=1e-3)
    held = [p for group in lost.param_groups for p in group["params"]]
    for _ in range(2):
        backward(other)
        before = [p.grad.clone() for p in held]
        lost.step()
        assert all(float(p.grad.norm()) < 0.1 * float(b.norm()) for p, b in zip(held, before, strict=True))
    assert hook.stats.units == (8 if len(held) == 4 else 3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("again", COPIES)
def test_after_remove_nobody_says_anything(again: Callable[..., Any]) -> None:
    model, optimizer = pair()
    dist_agc.attach(model, optimizer, clipping_threshold=1e-3).remove()
    other, lost = again(model, optimizer)
    for each in (lost, optimizer):
        backward(other)
        each.step()


@pytest.mark.filterwarnings("error")
def test_an_optimizer_made_again_before_remove_says_nothing_after_it() -> None:
    model, optimizer = pair()
    hook: Any = dist_agc.attach(model, optimizer, clipping_threshold=1e-3)
    again = torch.optim.SGD(model.parameters(), lr=0.1)
    hook.remove()
    backward(model)
    again.step()


@pytest.mark.filterwarnings("error")
def test_optimizers_of_other_parameters_say_nothing() -> None:
    model, optimizer = pair()
    hook: Any = dist_agc.attach(model, optimizer, clipping_threshold=1e-3)
    other, free = pair()
    backward(other)
    free.step()
    averaged = copy.deepcopy(model)
    backward(averaged)
    torch.optim.SGD(averaged.parameters(), lr=0.1).step()
    assert agc(other, 1e-3).units == 8
    del hook
