"""The suite behind ``dist-agc check``: every layout that runs here, against a float64 reference of gathered tensors."""

from __future__ import annotations

import gc
import json
import logging
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ..config import AGCConfig
from ..frameworks import deepspeed, parameters
from ..model.names import near
from ..model.units import unit_rules
from . import reference, sharding, unaware
from .cases import AS_IS, CASES, Case, odd_loss, odd_model
from .losses import Loss, described, module_and_loss, of_example
from .ranks import Failed, NotSetUp, Ranks
from .reference import Reference, Rules, Tensors
from .subjects import Subject, is_engine

# "skipped" for want of ranks or of DeepSpeed; "not set up" where torch, DeepSpeed or the model fails before AGC runs.
Verdict = Literal["ok", "wrong", "vacuous", "error", "not set up", "skipped"]
Factory = Callable[[], Any]

NOTHING = "fewer than two units have gradients that differ: nothing to compare"

# What one rounding to the dtype of the gradient, and the sums before it, may cost.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}  # 1e-6 for every other


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
    gradients: str = ""  # what they came from
    shard_unaware: str = ""  # what AGC does here that does not know of shards, where that was asked for


def cases(patterns: Sequence[str], *, own_model: bool = True) -> list[Case]:
    """The layouts that any of the globs names; all of them without a glob. ``["as-is"]`` is a model as it comes.

    Raises ValueError for a pattern that names none, or a model of the user's own that is not there.
    """
    if list(patterns) == [AS_IS.name]:
        if not own_model:
            raise ValueError("as-is checks a model of your own: give a factory.")
        return [AS_IS]
    names = [case.name for case in CASES]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no layout is called {pattern!r}; {near(pattern, names)}. Also: as-is.")
    return [case for case in CASES if any(fnmatchcase(case.name, pattern) for pattern in patterns or ["*"])]


def run(
    patterns: Sequence[str] = (),
    *,
    factory: Factory | None = None,
    config: AGCConfig | None = None,
    shard_unaware: bool = False,
    progress: Callable[[str], None] = lambda name: None,
    report: Callable[[list[Row]], None],
) -> list[Row]:
    """Check layouts one after the other, and return their rows, the same on every rank. All ranks must call it.

    Args:
        patterns: globs over the layouts' names; ``("as-is",)`` takes the factory's model as it comes, sharded already.
        factory: makes the module to check; or (module, loss), where ``loss(module)`` runs forward and returns a scalar;
            or (module, batch), of which `losses.OutputLoss` is taken. For a module alone that is the batch which it
            shows as an example, and else gradients are noise. Without a factory: a small model of odd shapes.
        config: exclusions and units of that model. The threshold is chosen so that some units are clipped and some not.
        shard_unaware: say of each layout, too, what AGC does there that is written for one process.
        progress: called on rank 0 with the name of each layout before it runs.
        report: called on rank 0 with one row per layout. Then either this returns, or, where a rank failed while others
            wait for it in a collective that nothing can end, every rank exits with code 1.
    """
    chosen = cases(patterns, own_model=factory is not None)
    # DTensor remarks on how it gathers, which only the reference does.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    config, rows = config or AGCConfig(), []

    def last_words(error: Failed) -> None:
        case, *others = chosen[len(rows) :]
        why = f"not run: {case.name} failed on rank {error.rank} while other ranks may still wait for it there"
        left = [Row(c.name, "skipped", c.needs() or why) for c in others]
        report([*rows, _failed(case, error), *left])

    ranks = Ranks(last_words)
    for case in chosen:
        if ranks.rank == 0:
            progress(case.name)
        rows.append(_row(case, ranks, factory, config, shard_unaware))
        gc.collect()
    if ranks.rank == 0:
        report(rows)
    return rows


def _row(case: Case, ranks: Ranks, factory: Factory | None, config: AGCConfig, shard_unaware: bool) -> Row:
    if missing := case.needs():
        return Row(case.name, "skipped", missing)

    def fresh(config: AGCConfig) -> _Prepared | None:
        """None where there is nothing to compare."""
        model, loss = ranks.each(lambda: _made(factory), setting_up=True, together=False)
        rules = ranks.each(lambda: _rules(model, config))
        subject, weights, grads = ranks.each(lambda: _set_up(case, model, loss, rules), setting_up=True)
        mine = reference.threshold(weights, grads, rules, config.eps)
        found: list[float | None] = [json.loads(text) for text in ranks.gather(json.dumps(mine))]
        threshold = ranks.each(lambda: agreed_threshold(found), setting_up=True)
        if threshold is None:
            return None
        config = replace(config, clipping_threshold=threshold, dry_run=False, statistics=True, weight_norm_interval=1)
        return _Prepared(subject, config, reference.clip(weights, grads, rules, config))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if (made := fresh(config)) is None:
                return Row(case.name, "vacuous", NOTHING)
            mine = ranks.each(partial(_check, case, made))
            row = _agreed([Row(**json.loads(text)) for text in ranks.gather(json.dumps(asdict(mine)))])
            if shard_unaware:
                # As that rule has it: dim 0 numbers the units of every parameter, and none is excluded.
                made = fresh(replace(config, units="leading", exclude=()))
                row = replace(row, shard_unaware=_shard_unaware(ranks, made) if made is not None else NOTHING)
            return row
    except Failed as error:  # a layout that cannot run must not hide the others
        return _failed(case, error)


def _failed(case: Case, error: Failed) -> Row:
    if not error.setting_up:
        return Row(case.name, "error", str(error))
    # What torch and the model say may be long, with whole modules in it.
    return Row(case.name, "not set up", textwrap.shorten(str(error).partition("\n")[0], 160, placeholder=" ..."))


def _agreed(rows: list[Row]) -> Row:
    """The worst verdict of all ranks and the largest numbers."""
    worst = next((row for row in rows if row.verdict == "wrong"), rows[0])
    numbers = ("error", "split_units", "collectives", "bytes")
    return replace(worst, **{name: max(getattr(row, name) for row in rows) for name in numbers})


def _made(factory: Factory | None) -> tuple[nn.Module, Loss | None]:
    return (odd_model(), odd_loss) if factory is None else module_and_loss(factory())


@dataclass(frozen=True)
class _Prepared:
    """A model under one layout with gradients, and what clipping must make of them."""

    subject: Subject
    config: AGCConfig
    expected: Reference

    @property
    def tolerance(self) -> float:
        """Once it was clipped: DeepSpeed shows only then what its optimizer holds."""
        return max(TOLERANCE.get(tensor.dtype, 1e-6) for tensor, _ in self.subject.held())


def _rules(model: nn.Module, config: AGCConfig) -> Rules:
    """Of the trainable parameters."""
    found = deepspeed.parameters(model) if is_engine(model) else parameters(model)
    pairs = zip(found, unit_rules(found, config), strict=True)
    return {parameter.name: rule for parameter, rule in pairs if parameter.tensor.requires_grad}


def _set_up(case: Case, model: nn.Module, loss: Loss | None, rules: Rules) -> tuple[Subject, Tensors, Tensors]:
    """The model under this layout after a backward pass, and its full weights and gradients."""
    model = model.to(sharding.device())
    subject = case.build(model, loss or of_example(model))
    subject.rehearse()
    subject.backward()
    weights, grads = subject.tensors()
    if set(weights) != set(rules):
        raise NotSetUp(f"gathered other parameters: {sorted(set(weights) ^ set(rules))[:5]}")
    if strange := [name for name, grad in grads.items() if not grad.isfinite().all()]:
        raise NotSetUp(f"the gradient of {strange[0]} is not finite")
    return subject, weights, grads


def agreed_threshold(found: Sequence[float | None]) -> float | None:
    """One for all ranks, whose gradients are equal once they are gathered, but for the last digits of a sum."""
    given = [threshold for threshold in found if threshold is not None]
    if given and (len(given) < len(found) or max(given) > 1.000001 * min(given)):
        raise NotSetUp("ranks have different gradients: average them in loss(module), or shard the model with DDP")
    return found[0]


def _check(case: Case, made: _Prepared) -> Row:
    subject, config, expected = made.subject, made.config, made.expected
    more = subject.sends_more()
    stats = subject.clip(config)
    error = reference.worst_error(subject.clipped(), expected.grads)
    sent, axes = subject.sent(config)
    clipped, tolerance = int(stats.clipped_units), made.tolerance
    near = max(tolerance, 1e-5)
    found: list[tuple[str, float, float, float]] = [  # (what, found, expected, how much of it this may be off)
        ("units", stats.units, expected.units, 0),
        ("clipped units", clipped, expected.clipped_units, 0),
        ("grad_norm", float(stats.grad_norm), expected.grad_norm, near),
        ("max_ratio", float(stats.max_ratio), expected.max_ratio, near),
    ]
    if not more:
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
        gradients=described(subject.loss),
    )


def _shard_unaware(ranks: Ranks, made: _Prepared) -> str:
    """What the rule of one process gives, beside the same rule on the whole tensors."""
    subject, config, expected = made.subject, made.config, made.expected

    def clip() -> str:
        try:
            subject.hand_over(lambda tensors: unaware.clip(tensors, config.clipping_threshold, config.eps))
        except RuntimeError as error:
            return str(error)
        return ""

    def error() -> float:
        return reference.worst_error(subject.clipped(), expected.grads)

    if said := next(filter(None, ranks.gather(ranks.each(clip))), ""):
        return said
    worst = max(float(text) for text in ranks.gather(str(ranks.each(error))))
    return f"error {worst:.3g}" if worst > made.tolerance else "right"
