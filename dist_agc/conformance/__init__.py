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
from ..names import named_parameters, near
from ..units import UnitRule, unit_rules
from . import reference
from .cases import CASES, Case, device, odd_loss, odd_model
from .subjects import Loss, Subject

Verdict = Literal["ok", "wrong", "vacuous", "error", "skipped"]

# What one rounding to the dtype of the gradient, and the sums before it, may cost.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Row:
    """What one layout gave. ``collectives`` and ``bytes`` are those of one clipping on one rank."""

    layout: str
    verdict: Verdict
    note: str = ""
    error: float = 0.0
    units: int = 0
    clipped_units: int = 0
    split_units: int = 0
    collectives: int = 0
    bytes: int = 0

    @property
    def failed(self) -> bool:
        return self.verdict not in ("ok", "skipped")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cases(patterns: Sequence[str]) -> list[Case]:
    """The layouts that any of the globs names; all of them without a glob.

    Raises:
        ValueError: a pattern names none.
    """
    names = [case.name for case in CASES]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no layout is called {pattern!r}; {near(pattern, names)}. Also: as-is.")
    return [c for c in CASES if not patterns or any(fnmatchcase(c.name, pattern) for pattern in patterns)]


def run(
    patterns: Sequence[str] = (),
    *,
    factory: Callable[[], Any] | None = None,
    config: AGCConfig | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Check layouts one after the other. Every rank of the default process group must call it.

    Args:
        patterns: globs over the layouts' names; ``("as-is",)`` takes the factory's model as it comes, sharded already.
        factory: makes the module to check, or (module, loss), where ``loss(module)`` runs forward and returns a scalar;
            without a loss gradients are noise. Without a factory: a small model of odd shapes.
        config: exclusions and units of that model. The threshold is chosen between its units' ratios, so that some
            are clipped and some are not.

    Returns:
        One row per layout, the same on every rank.
    """
    as_is = list(patterns) == ["as-is"]
    if as_is and factory is None:
        raise ValueError("as-is checks a model of your own: give a factory.")
    chosen = [Case("as-is", lambda own: None, Subject)] if as_is else cases(patterns)
    # DTensor remarks on how it gathers, which only the reference does.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    rows = []
    for case in chosen:
        progress(case.name)
        rows.append(_agreed(_guarded(case, factory, config or AGCConfig())))
    return rows


def _guarded(case: Case, factory: Callable[[], Any] | None, config: AGCConfig) -> Row:
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


def _made(factory: Callable[[], Any] | None) -> tuple[nn.Module, Loss | None]:
    made = (odd_model(), odd_loss) if factory is None else factory()
    model, loss = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise TypeError(f"the factory must return a module or (module, loss), got {type(model).__name__}.")
    return model, loss


def _rules(model: nn.Module, config: AGCConfig) -> dict[str, UnitRule | None]:
    named = [n for n in named_parameters(model) if n.parameter.requires_grad]
    rules = unit_rules(named, [tuple(n.parameter.shape) for n in named], config)
    return {n.name: rule for n, rule in zip(named, rules, strict=True)}


def _check(case: Case, factory: Callable[[], Any] | None, config: AGCConfig) -> Row:
    model, loss = _made(factory)
    rules = _rules(model, config)
    # The layouts' own tensors make the gradient's dtype; the model before sharding already says it.
    tolerance = max(TOLERANCE.get(p.dtype, 1e-6) for p in model.parameters() if p.requires_grad)
    subject = case.build(model.to(device()), loss)
    subject.backward()
    weights, grads = subject.tensors()
    if set(weights) != set(rules):
        return Row(case.name, "error", f"gathered other parameters: {sorted(set(weights) ^ set(rules))[:5]}")
    threshold = reference.threshold_between(reference.ratios(weights, grads, rules, config.eps))
    config = replace(config, clipping_threshold=threshold, dry_run=False, statistics=True, weight_norm_interval=1)
    expected = reference.clip(weights, grads, rules, config)
    stats = subject.clip(config)
    error = reference.worst_error(subject.clipped(), expected.grads)
    stages = [stage for part in subject.parts() for stage in part.plan.stages]
    row = Row(
        case.name,
        "ok",
        error=error,
        units=stats.units,
        clipped_units=int(stats.clipped_units),
        split_units=sum(stage.slots for stage in stages),
        collectives=len(stages),
        bytes=sum(4 * stage.numel() for stage in stages),
    )
    counts = {
        "units": (stats.units, expected.units),
        "clipped units": (row.clipped_units, expected.clipped_units),
        "collectives": (subject.measured(config), row.collectives),
    }
    wrong = [f"{name}: {a}, expected {b}" for name, (a, b) in counts.items() if a is not None and a != b]
    for name, a, b in (
        ("grad_norm", float(stats.grad_norm), expected.grad_norm),
        ("max_ratio", float(stats.max_ratio), expected.max_ratio),
    ):
        if not abs(a - b) <= max(tolerance, 1e-5) * abs(b):
            wrong.append(f"{name}: {a:.7g}, expected {b:.7g}")
    if error > tolerance:
        wrong.append(f"a gradient element is off by {error:.2g} of its value, allowed {tolerance:.0e}")
    if wrong:
        return replace(row, verdict="wrong", note="; ".join(wrong))
    if not 0 < row.clipped_units < row.units:
        return replace(row, verdict="vacuous", note=f"{row.clipped_units} of {row.units} units were clipped")
    return row
