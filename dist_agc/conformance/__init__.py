"""The suite behind ``dist-agc check``: every layout that runs here, against a float64 reference of gathered tensors."""

from __future__ import annotations

import gc
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from ..config import AGCConfig
from ..frameworks import deepspeed, parameters
from ..model.names import near
from ..model.units import UnitRule, unit_rules
from . import reference, sharding, unaware
from .cases import AS_IS, CASES, Case, odd_loss, odd_model
from .ranks import Failed, Ranks
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
    split_units: int = 0  # those that are cut
    collectives: int = 0
    bytes: int = 0
    shard_unaware: str = ""  # what AGC does here that does not know of shards, where that was asked for

    @property
    def failed(self) -> bool:
        return self.verdict not in ("ok", "skipped")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cases(patterns: Sequence[str], *, own_model: bool = True) -> list[Case]:
    """The layouts that any of the globs names; all of them without a glob. ``["as-is"]`` is a model as it comes.

    Raises:
        ValueError: a pattern names none, or a model of the user's own that is not there.
    """
    if list(patterns) == [AS_IS.name]:
        if not own_model:
            raise ValueError("as-is checks a model of your own: give a factory.")
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
    report: Callable[[list[Row]], None],
) -> list[Row]:
    """Check layouts one after the other. Every rank of the default process group must call it.

    Args:
        patterns: globs over the layouts' names; ``("as-is",)`` takes the factory's model as it comes, sharded already.
        factory: makes the module to check, or (module, loss), where ``loss(module)`` runs forward and returns a scalar;
            without a loss gradients are noise. Without a factory: a small model of odd shapes.
        config: exclusions and units of that model. The threshold is chosen between its units' ratios, so that some
            are clipped and some are not.
        shard_unaware: say of each layout, too, what AGC does there that is written for one process.
        progress: called with the name of each layout before it runs.
        report: called on rank 0 with one row per layout. Then either this returns, or, where a rank failed while others
            wait for it in a collective that nothing can end, every rank exits with code 1.

    Returns:
        The rows, the same on every rank.
    """
    chosen = cases(patterns, own_model=factory is not None)
    # DTensor remarks on how it gathers, which only the reference does.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    config, rows = config or AGCConfig(), []

    def last_words(error: Failed) -> None:
        case, *others = chosen[len(rows) :]
        why = f"not run: {case.name} failed on rank {error.rank} while other ranks may still wait for it there"
        left = [Row(c.name, "skipped", c.needs(factory is not None) or why) for c in others]
        report([*rows, Row(case.name, "error", str(error)), *left])

    ranks = Ranks(last_words)
    for case in chosen:
        progress(case.name)
        rows.append(_row(case, ranks, factory, config, shard_unaware))
        gc.collect()
    if ranks.rank == 0:
        report(rows)
    return rows


def _row(case: Case, ranks: Ranks, factory: Factory | None, config: AGCConfig, shard_unaware: bool) -> Row:
    missing = case.needs(factory is not None)
    if missing:
        return Row(case.name, "skipped", missing)

    def fresh(config: AGCConfig) -> _Prepared:
        model, loss = ranks.each(lambda: _made(factory), together=False)
        return ranks.each(lambda: _prepare(case, model, loss, config))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = fresh(config)
            mine = ranks.each(lambda: _check(case, made, config))
            row = _agreed([Row(**json.loads(text)) for text in ranks.gather(json.dumps(mine.as_dict()))])
            if shard_unaware:
                # As that rule has it: dim 0 numbers the units of every parameter, and none is excluded.
                leading = replace(config, units="leading", exclude=())
                made = fresh(leading)
                row = replace(row, shard_unaware=_shard_unaware(ranks, made, leading))
            return row
    except Failed as error:  # a layout that cannot run must not hide the others
        return Row(case.name, "error", str(error))


def _agreed(rows: list[Row]) -> Row:
    """The worst verdict of all ranks and the largest numbers."""
    worst = next((r for verdict in ("wrong", "vacuous") for r in rows if r.verdict == verdict), rows[0])
    numbers = ("error", "split_units", "collectives", "bytes")
    return replace(worst, **{name: max(getattr(row, name) for row in rows) for name in numbers})


def _made(factory: Factory | None) -> tuple[nn.Module, Loss | None]:
    made = (odd_model(), odd_loss) if factory is None else factory()
    model, loss = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise TypeError(f"the factory must return a module or (module, loss), got {type(model).__name__}.")
    return model, loss


def _rules(model: nn.Module, config: AGCConfig) -> Rules:
    found = deepspeed.parameters(model) if is_engine(model) else parameters(model)
    rules = unit_rules(found, config)
    return {p.name: rule for p, rule in zip(found, rules, strict=True) if p.tensor.requires_grad}


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


def _prepare(case: Case, model: nn.Module, loss: Loss | None, config: AGCConfig) -> _Prepared:
    rules = _rules(model, config)
    subject = case.build(model.to(sharding.device()), loss)
    subject.backward()
    weights, grads = subject.tensors()
    if set(weights) != set(rules):
        raise RuntimeError(f"gathered other parameters: {sorted(set(weights) ^ set(rules))[:5]}")
    threshold = reference.threshold_between(reference.ratios(weights, grads, rules, config.eps))
    return _Prepared(subject, rules, weights, grads, threshold)


def _tolerance(subject: Subject) -> float:
    return max(TOLERANCE.get(dtype, 1e-6) for dtype in subject.dtypes())


def _check(case: Case, made: _Prepared, config: AGCConfig) -> Row:
    if made.threshold is None:
        return Row(case.name, "vacuous", "fewer than two units have gradients that differ: nothing to compare")
    config = replace(config, clipping_threshold=made.threshold, dry_run=False, statistics=True, weight_norm_interval=1)
    subject = made.subject
    expected, shares = reference.clip(made.weights, made.grads, made.rules, config), subject.has_shares()
    stats = subject.clip(config)
    error = reference.worst_error(subject.clipped(), expected.grads)
    tolerance = _tolerance(subject)
    sent = subject.sent(config)
    axes = [axis for plan in subject.plans() for axis in plan.axes]
    clipped, near = int(stats.clipped_units), max(tolerance, 1e-5)
    found: list[tuple[str, float, float, float]] = [  # (what, found, expected, how much of it this may be off)
        ("units", stats.units, expected.units, 0),
        ("clipped units", clipped, expected.clipped_units, 0),
        ("grad_norm", float(stats.grad_norm), expected.grad_norm, near),
        ("max_ratio", float(stats.max_ratio), expected.max_ratio, near),
    ]
    if not shares:
        found.append(("collectives", sent.collectives, len(axes), 0))
        found.append(("numbers sent", sent.elements, sum(axis.numel() for axis in axes), 0))
    wrong = [f"{what}: {a:.10g}, expected {b:.10g}" for what, a, b, off in found if not abs(a - b) <= off * abs(b)]
    if error > tolerance:
        wrong.append(f"a gradient element is off by {error:.2g} of its value, allowed {tolerance:.0e}")
    return Row(
        case.name,
        "wrong" if wrong else "ok",
        "; ".join(wrong),
        error=error,
        units=stats.units,
        clipped_units=clipped,
        split_units=sum(axis.slots for axis in axes),
        collectives=sent.collectives,
        bytes=sent.bytes,
    )


def _shard_unaware(ranks: Ranks, made: _Prepared, config: AGCConfig) -> str:
    """What the rule of one process gives, beside the same rule on the whole tensors."""
    at = made.threshold
    threshold = 1.0 if at is None else at

    def clip() -> str:
        if at is None:
            return "nothing to compare"
        try:
            made.subject.hand_over(lambda tensors: unaware.clip(tensors, threshold, config.eps))
        except RuntimeError as error:
            return str(error)
        return ""

    def error() -> float:
        expected = reference.clip(made.weights, made.grads, made.rules, replace(config, clipping_threshold=threshold))
        return reference.worst_error(made.subject.clipped(), expected.grads)

    said = next(filter(None, ranks.gather(ranks.each(clip))), "")
    if said:
        return said
    worst = max(float(text) for text in ranks.gather(str(ranks.each(error))))
    return f"error {worst:.3g}" if worst > _tolerance(made.subject) else "right"
