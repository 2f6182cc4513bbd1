"""The suite behind ``dist-agc check``: every layout that runs here, against a float64 reference of gathered tensors."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from ..config import AGCConfig
from ..layouts import place, zero
from ..names import near
from ..units import UnitRule, unit_rules
from . import reference, unaware
from .cases import AS_IS, CASES, Case, device, odd_loss, odd_model
from .subjects import Loss, Subject, Tensors, is_engine

Verdict = Literal["ok", "wrong", "vacuous", "error", "skipped"]
Rules = dict[str, UnitRule | None]
Factory = Callable[[], Any]

# What one rounding to the dtype of the gradient, and the sums before it, may cost.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Row:
    """What one layout gave. ``collectives`` and ``bytes`` are what one rank gave to collectives in one clipping."""

    layout: str
    verdict: Verdict
    note: str = ""
    error: float = 0.0
    units: int = 0
    clipped_units: int = 0
    split_units: int = 0
    collectives: int = 0
    bytes: int = 0
    shard_unaware: str = ""  # what AGC does here that does not know of shards, where that was asked for

    @property
    def failed(self) -> bool:
        return self.verdict not in ("ok", "skipped")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cases(patterns: Sequence[str]) -> list[Case]:
    """The layouts that any of the globs names; all of them without a glob. ``["as-is"]`` is a model as it comes.

    Raises:
        ValueError: a pattern names none.
    """
    if list(patterns) == [AS_IS.name]:
        return [AS_IS]
    names = [case.name for case in CASES]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no layout is called {pattern!r}; {near(pattern, names)}. Also: as-is.")
    return [c for c in CASES if not patterns or any(fnmatchcase(c.name, pattern) for pattern in patterns)]


def run(
    patterns: Sequence[str] = (),
    *,
    factory: Factory | None = None,
    config: AGCConfig | None = None,
    shard_unaware: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Check layouts one after the other. Every rank of the default process group must call it.

    Args:
        patterns: globs over the layouts' names; ``("as-is",)`` takes the factory's model as it comes, sharded already.
        factory: makes the module to check, or (module, loss), where ``loss(module)`` runs forward and returns a scalar;
            without a loss gradients are noise. Without a factory: a small model of odd shapes.
        config: exclusions and units of that model. The threshold is chosen between its units' ratios, so that some
            are clipped and some are not.
        shard_unaware: say of each layout, too, what AGC does there that is written for one process.

    Returns:
        One row per layout, the same on every rank.
    """
    chosen = cases(patterns)
    if chosen == [AS_IS] and factory is None:
        raise ValueError("as-is checks a model of your own: give a factory.")
    # DTensor remarks on how it gathers, which only the reference does.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    config, rows = config or AGCConfig(), []
    for case in chosen:
        progress(case.name)
        row = _agreed(_guarded(case, factory, config))
        if shard_unaware and row.verdict not in ("skipped", "error"):
            row = replace(row, shard_unaware=_shard_unaware(case, factory, config))
        rows.append(row)
    return rows


def _guarded(case: Case, factory: Factory | None, config: AGCConfig) -> Row:
    missing = case.needs(factory is not None)
    if missing:
        return Row(case.name, "skipped", missing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _check(case, factory, config)
    except Exception as error:  # a layout that cannot run must not hide the others
        return Row(case.name, "error", f"{type(error).__name__}: {error}")
    finally:
        gc.collect()


def _agreed(row: Row) -> Row:
    """The worst verdict of all ranks and the largest numbers."""
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, row)
    worst = next(
        (r for verdict in ("error", "wrong", "vacuous") for r in rows if r.verdict == verdict),
        rows[0],
    )
    return replace(
        worst,
        error=max(r.error for r in rows),
        split_units=max(r.split_units for r in rows),
        collectives=max(r.collectives for r in rows),
        bytes=max(r.bytes for r in rows),
    )


def _made(factory: Factory | None) -> tuple[nn.Module, Loss | None]:
    made = (odd_model(), odd_loss) if factory is None else factory()
    model, loss = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise TypeError(f"the factory must return a module or (module, loss), got {type(model).__name__}.")
    return model, loss


def _rules(model: nn.Module, config: AGCConfig) -> Rules:
    placed = zero.place(model) if is_engine(model) else place(model)
    rules = unit_rules([p.named for p in placed], [p.layout.shape for p in placed], config)
    return {p.named.name: rule for p, rule in zip(placed, rules, strict=True) if p.named.parameter.requires_grad}


@dataclass(frozen=True)
class _Prepared:
    """A model under one layout with gradients; its rules, and its full tensors before clipping.

    ``threshold`` lies between the ratios of its units; None where no threshold does.
    """

    subject: Subject
    rules: Rules
    weights: Tensors
    grads: Tensors
    threshold: float | None


def _prepare(case: Case, factory: Factory | None, config: AGCConfig) -> _Prepared:
    model, loss = _made(factory)
    rules = _rules(model, config)
    subject = case.build(model.to(device()), loss)
    subject.backward()
    weights, grads = subject.tensors()
    if set(weights) != set(rules):
        raise RuntimeError(f"gathered other parameters: {sorted(set(weights) ^ set(rules))[:5]}")
    threshold = reference.threshold_between(reference.ratios(weights, grads, rules, config.eps))
    return _Prepared(subject, rules, weights, grads, threshold)


def _tolerance(subject: Subject) -> float:
    return max(TOLERANCE.get(dtype, 1e-6) for dtype in subject.dtypes())


def _check(case: Case, factory: Factory | None, config: AGCConfig) -> Row:
    made = _prepare(case, factory, config)
    subject = made.subject
    if made.threshold is None:
        return Row(case.name, "vacuous", "fewer than two units have gradients that differ: nothing to compare")
    config = replace(config, clipping_threshold=made.threshold, dry_run=False, statistics=True, weight_norm_interval=1)
    expected, shares = reference.clip(made.weights, made.grads, made.rules, config), subject.has_shares()
    stats = subject.clip(config)
    error = reference.worst_error(subject.clipped(), expected.grads)
    tolerance = _tolerance(subject)
    sent = subject.sent(config)
    stages = [stage for part in subject.parts() for stage in part.plan.stages]
    row = Row(
        case.name,
        "ok",
        error=error,
        units=stats.units,
        clipped_units=int(stats.clipped_units),
        split_units=sum(stage.slots for stage in stages),
        collectives=sent.collectives,
        bytes=sent.bytes,
    )
    counts = {
        "units": (stats.units, expected.units),
        "clipped units": (row.clipped_units, expected.clipped_units),
    }
    if not shares:
        counts["collectives"] = sent.collectives, len(stages)
        counts["numbers sent"] = sent.elements, sum(stage.numel() for stage in stages)
    wrong = [f"{name}: {a}, expected {b}" for name, (a, b) in counts.items() if a != b]
    for name, a, b in (
        ("grad_norm", float(stats.grad_norm), expected.grad_norm),
        ("max_ratio", float(stats.max_ratio), expected.max_ratio),
    ):
        if not abs(a - b) <= max(tolerance, 1e-5) * abs(b):
            wrong.append(f"{name}: {a:.7g}, expected {b:.7g}")
    if error > tolerance:
        wrong.append(f"a gradient element is off by {error:.2g} of its value, allowed {tolerance:.0e}")
    return replace(row, verdict="wrong", note="; ".join(wrong)) if wrong else row


def _shard_unaware(case: Case, factory: Factory | None, config: AGCConfig) -> str:
    """What the rule of one process gives on a fresh copy of the case, beside the same rule on the whole tensors.

    That rule takes dim 0 for the units of every parameter and excludes none.
    """
    config = replace(config, units="leading", exclude=())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = _prepare(case, factory, config)
        if made.threshold is None:
            return "nothing to compare"
        config = replace(config, clipping_threshold=made.threshold)
        raised = ""
        try:
            made.subject.hand_over(lambda tensors: unaware.clip(tensors, config.clipping_threshold, config.eps))
        except RuntimeError as error:
            raised = str(error)
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, raised)
        if any(said):
            return next(text for text in said if text)
        expected = reference.clip(made.weights, made.grads, made.rules, config)
        error = reference.worst_error(made.subject.clipped(), expected.grads)
        dist.all_gather_object(said, error if error > _tolerance(made.subject) else 0.0)
    return f"error {max(said):.3g}" if any(said) else "right"
