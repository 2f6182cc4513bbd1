"""Real DeepSpeed engines, and what their base optimizers saw: weights, raw gradients, clipped gradients.

Flat partitions of all ranks are put together here from the order of the parameters alone, without DeepSpeed's own
bookkeeping and without dist_agc's.
"""

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

import models
import oracle
from helpers import assert_some_clipped, assert_stats, quiet_deepspeed, worst_distance, worst_relative_error

LR = 0.1
_state: dict[str, Any] = {"group": None}
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def prepare() -> None:
    """DeepSpeed keeps handles of the process group it met first; the harness makes a new one after a failure."""
    quiet_deepspeed()
    if _state["group"] is not dist.group.WORLD:
        deepspeed.comm.comm.cdb = None
        for name, value in vars(deepspeed_groups).items():
            if name.isupper() and name.startswith("_"):
                setattr(deepspeed_groups, name, {} if isinstance(value, dict) else None)
        deepspeed_groups.mesh_device = deepspeed_groups.mpu = None
        _state["group"] = dist.group.WORLD
    deepspeed.init_distributed("gloo", verbose=False)


def forget_groups() -> None:
    """Before and after an engine whose ranks share parameters otherwise than those of others do."""
    _state["group"] = None


def config(world: Any, stage: int, *, accumulation: int = 1, **extra: Any) -> dict[str, Any]:
    zero = {"stage": stage, **extra.pop("zero", {})}
    return {
        "train_micro_batch_size_per_gpu": models.FULL_BATCH // world.size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **extra,
    }


@dataclass
class Call:
    """What one call of the base optimizer's step saw, by holder."""

    weights: list[Tensor]
    raw: list[Tensor]
    clipped: list[Tensor] = field(default_factory=list)


class Watch:
    """Records before and after AGC's own hook, at every call of the base optimizer."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.calls: list[Call] = []
        watched = list(optimizers)
        self._handles = [register_optimizer_step_pre_hook(self._before)]
        self._handles += [optimizer.register_step_pre_hook(self._after) for optimizer in watched]
        self._watched = watched

    def _before(self, optimizer: Any, *_: Any) -> None:
        if any(optimizer is one for one in self._watched):
            held = _held(optimizer)
            self.calls.append(Call([p.detach().clone() for p in held], [_grad(p) for p in held]))

    def _after(self, optimizer: Any, *_: Any) -> None:
        self.calls[-1].clipped = [_grad(p) for p in _held(optimizer)]

    def take(self) -> list[Call]:
        calls, self.calls = self.calls, []
        return calls

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _held(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


Order = Sequence[Sequence[tuple[str, tuple[int, ...]]]]  # by parameter group, in the order of the flat tensors


def order_of(model: nn.Module, groups: Sequence[dict[str, Any]]) -> Order:
    names = {id(p): name for name, p in model.named_parameters()}
    return [[(names[id(p)], tuple(p.shape)) for p in group["params"] if p.requires_grad] for group in groups]


def round_robin(order: Order, size: int) -> Order:
    return [[entry for rank in range(size) for entry in group[rank::size]] for group in order]


def together(world: Any, flats: Sequence[Tensor], order: Order, kind: str) -> dict[str, Tensor]:
    """The flat tensors of all ranks as full parameters, by name, float64.

    kind: "laid" end to end and cut (ZeRO 1, 2, BF16), "each" cut by itself (ZeRO 3), "whole" on every rank.
    """
    if kind == "whole":
        return split(torch.cat([f.flatten() for f in flats]), list(itertools.chain(*order)))
    every = [[torch.as_tensor(f) for f in held] for held in world.gather([f.float().numpy() for f in flats])]
    if kind == "laid":
        found: dict[str, Tensor] = {}
        for i, group in enumerate(order):
            found |= split(torch.cat([held[i] for held in every]), group)
        return found
    mine = [torch.cat(held) for held in every]
    found, at = {}, 0
    for name, shape in itertools.chain(*order):
        piece = -(-math.prod(shape) // world.size)
        flat = torch.cat([flat[at : at + piece] for flat in mine])[: math.prod(shape)]
        found[name] = flat.view(shape).double()
        at += piece
    return found


def split(flat: Tensor, group: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    ends = list(itertools.accumulate(math.prod(shape) for _, shape in group))
    return {
        name: flat[end - math.prod(shape) : end].view(shape).double()
        for (name, shape), end in zip(group, ends, strict=True)
    }


def inner(engine: Any) -> list[torch.optim.Optimizer]:
    outer = engine.optimizer
    return [outer if isinstance(outer, torch.optim.Optimizer) else outer.optimizer]


@dataclass(frozen=True)
class Task:
    """What is trained. ``known``: the oracle's units of parameters whose modules the package has to know."""

    make: Callable[..., nn.Module] = models.awkward
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = models.loss
    known: Mapping[str, oracle.Units] = field(default_factory=dict)


AWKWARD = Task()


def micro_batches(world: Any, step: int, accumulation: int) -> list[tuple[Tensor, Tensor]]:
    tokens, classes = models.batch(step, rank=world.rank, size=world.size)
    return list(zip(tokens.chunk(accumulation), classes.chunk(accumulation), strict=True))


def one_step(world: Any, engine: Any, step: int, accumulation: int = 1, task: Task = AWKWARD) -> None:
    for tokens, classes in micro_batches(world, step, accumulation):
        engine.backward(task.loss(engine, tokens, classes))
        engine.step()


class Twin:
    """The same model, whole, in float64, trained with the oracle."""

    def __init__(
        self,
        groups: Callable[[nn.Module], Sequence[dict[str, Any]]],
        threshold: float,
        exclude: set[str],
        task: Task = AWKWARD,
    ) -> None:
        self.task, self.model = task, task.make(dtype=torch.float64)
        names = {id(p): name for name, p in self.model.named_parameters()}
        self.rules = oracle.unit_rules(self.model) | dict(task.known)
        self.exclude = exclude
        self.thresholds: dict[str, float | None] = {}
        for group in groups(self.model):
            for p in group["params"]:
                if p.requires_grad:
                    self.thresholds[names[id(p)]] = group.get("clipping_threshold", threshold)

    def expect(self, weights: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> oracle.Reference:
        return oracle.clip(weights, grads, self.rules, self.thresholds, exclude=self.exclude)

    def step(self, step: int) -> oracle.Reference:
        """One step of the whole batch; what clipping made of its gradients."""
        self.model.zero_grad(set_to_none=True)
        self.task.loss(self.model, *models.batch(step)).backward()
        held = {n: p for n, p in self.model.named_parameters() if n in self.thresholds}
        reference = self.expect(held, {n: p.grad for n, p in held.items() if p.grad is not None})
        with torch.no_grad():
            for name, grad in reference.grads.items():
                held[name].sub_(grad, alpha=LR)
        return reference

    def weights(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if n in self.thresholds}


def one_group(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices with a threshold of their own; biases, gains and what is small with the common one."""
    wide = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": wide, "clipping_threshold": 0.3}, {"params": rest}]


@dataclass
class Outcome:
    engine: Any
    model: nn.Module
    expected: oracle.Reference  # of the last step
    reference: oracle.Reference  # of the twin's last step
    worst: float  # relative error of any element of a clipped gradient, over all steps
    distance: float  # of the final weights from the float64 twin's
    calls: int  # of the base optimizer in the last step


def kind_of(stage: int, *, fused: bool = False) -> str:
    return "whole" if stage == 0 or fused else "each" if stage == 3 else "laid"


def parity(
    world: Any,
    settings: dict[str, Any],
    *,
    task: Task = AWKWARD,
    groups: Callable[[nn.Module], list[dict[str, Any]]] = one_group,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    checkpointed: bool = False,
    order: Callable[[Order], Order] = lambda order: order,
    kind: str | None = None,
    dtype: torch.dtype = torch.float32,
    exclude: tuple[str, ...] = ("uneven.*",),
    threshold: float = models.THRESHOLD,
    steps: int = 3,
    tolerance: float = 1e-5,
    twin_tolerance: float | None = 1e-5,
    **block: Any,
) -> Outcome:
    """Train with AGC, and hold every step against the oracle: gradients, counts, norms; in the end the weights.

    ZeRO 3's padding holds NaN, of which nothing may come.

    ``block``: more keys of the JSON's block.
    """
    prepare()
    stage = settings["zero_optimization"]["stage"]
    kind = kind or kind_of(stage)
    model = task.make()
    if dtype is not torch.float32:
        model.to(dtype)
    by_group = order(order_of(model, groups(model)))
    excluded = {name for group in by_group for name, _ in group if name.startswith("uneven.")} if exclude else set()
    twin = Twin(groups, threshold, excluded, task)
    made = optimizer or (lambda given: torch.optim.SGD(given, lr=LR))
    agc = {"clipping_threshold": threshold, "exclude": list(exclude), **block}
    settings = {**settings, "adaptive_gradient_clipping": agc}
    from dist_agc.integrations.deepspeed import initialize

    if checkpointed:
        model.forward = functools.partial(checkpoint, model.forward, use_reentrant=False)
    engine, *_ = initialize(model=model, optimizer=made(groups(model)), config=settings)
    spoil_padding(world, engine)
    watch = Watch(inner(engine))
    worst, calls, expected, reference = 0.0, [], None, None
    for step in range(steps):
        one_step(world, engine, step, settings["gradient_accumulation_steps"], task)
        calls = watch.take()
        seen = {
            what: together(world, [t for call in calls for t in getattr(call, what)], by_group, kind)
            for what in ("weights", "raw", "clipped")
        }
        expected = twin.expect(seen["weights"], seen["raw"])
        worst = max(worst, worst_relative_error(seen["clipped"], expected.grads))
        assert_some_clipped(expected)
        assert_stats(engine.agc.stats, expected, tolerance=1e-6)
        reference = twin.step(step)
        if twin_tolerance is not None:
            assert int(engine.agc.stats.clipped_units) == reference.clipped_units
    watch.remove()
    assert expected is not None and reference is not None
    assert worst <= tolerance, f"worst relative error of a clipped gradient element: {worst:.3g}"
    distance = float("nan")
    if twin_tolerance is not None:
        distance = worst_distance(final_weights(model, twin, stage), twin.weights())
        assert distance <= twin_tolerance, f"weights are {distance:.3g} away from the float64 run"
    return Outcome(engine, model, expected, reference, worst, distance, len(calls))


def final_weights(model: nn.Module, twin: Twin, stage: int) -> dict[str, Tensor]:
    # Not safe_get_full_fp32_param below stage 3: with round-robin gradients it takes parameters in the wrong order.
    named = {name: p for name, p in model.named_parameters() if name in twin.thresholds}
    full = {name: safe_get_full_fp32_param(p) if stage == 3 else p for name, p in named.items()}
    return {name: value.detach().double() for name, value in full.items() if value is not None}


def full_weights(engine: Any) -> list[Tensor]:
    """Every fp32 weight, whole, on every rank; where DeepSpeed keeps none beside the parameter, the parameter.

    Not for round-robin gradients, see `final_weights`.
    """
    found = [(p, safe_get_full_fp32_param(p)) for p in engine.module.parameters()]
    return [(p if full is None else full).detach().clone() for p, full in found]


def spoil_padding(world: Any, engine: Any) -> None:
    """NaN behind the last elements of ZeRO 3's parameters, where anything may lie.

    DeepSpeed takes the partitions as ``torch.empty`` and never writes their padding.
    """
    outer = engine.optimizer
    if not hasattr(outer, "fp32_partitioned_groups_flat"):
        return
    for group, flat in zip(outer.fp16_groups, outer.fp32_partitioned_groups_flat, strict=True):
        lengths = [-(-p.ds_numel // world.size) for p in group]
        if flat.numel():  # else it lies on NVMe
            for parameter, piece in zip(group, flat.detach().split(lengths), strict=True):
                piece[max(parameter.ds_numel - world.rank * len(piece), 0) :] = float("nan")


def keys_of(state: Any, path: str = "") -> list[str]:
    """Every key of a nested state."""
    if isinstance(state, dict):
        return [k for key, value in state.items() for k in [f"{path}/{key}", *keys_of(value, f"{path}/{key}")]]
    if isinstance(state, list | tuple):
        return [k for value in state for k in keys_of(value, path)]
    return []
