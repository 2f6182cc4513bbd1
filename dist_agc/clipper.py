"""Clipper: the parameters of one model, their unit rules, and the executions that clip them."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import frameworks
from .config import AGCConfig, check_threshold
from .engine.execution import Execution
from .engine.row_norms import load
from .model.kinds import registrations
from .model.names import numberless
from .model.parameter import Parameter
from .model.units import UnitRule, unit_rules
from .stats import ClipStats

Model = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


class Clipper:
    """Adaptive gradient clipping for one model, wherever its shards lie. The object under `apply_agc` and `attach`.

    Make it after sharding (``fully_shard``, ``FSDP(...)``, ``parallelize_module``), on every rank. It covers whatever
    has trained at any call so far, so parameters may be frozen and thawed at any time.

    Args:
        model: a module (plain, DDP, FSDP1, FSDP2, tensor parallel), or an iterable of parameters or of
            (name, parameter) pairs.
        config: an `AGCConfig`; or give its fields as keywords.

    Raises:
        TypeError: an unknown option, or something that is no parameter.
        ValueError: a setting out of range, a pattern that matches nothing, a layout that is not known.
        RuntimeError: ``cpu_kernel=True`` without a C++ compiler that works.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> clipper = Clipper(layer, clipping_threshold=0.01)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> clipper.clip().units
        3
    """

    def __init__(self, model: Model, config: AGCConfig | None = None, **options: Any) -> None:
        self._start(frameworks.parameters(model), AGCConfig.of(config, options))

    @classmethod
    def of(cls, parameters: Sequence[Parameter], config: AGCConfig) -> Clipper:
        """A Clipper of parameters that a framework has made already."""
        clipper = cls.__new__(cls)
        clipper._start(parameters, config)
        return clipper

    def _start(self, parameters: Sequence[Parameter], config: AGCConfig) -> None:
        if config.cpu_kernel:
            load()  # here, so that a missing compiler is told before anything is clipped
        self.config = config
        self.parameters = list(parameters)
        self.rules = unit_rules(self.parameters, config)
        # What has never trained, by place: plans cover all else, whatever is frozen in between.
        self._idle = {i: p for i, p in enumerate(self.parameters) if not p.trains}
        self._executions: dict[frozenset[int] | None, Execution] = {}
        for p, rule in self._trained():
            p.pieces(rule)  # here, so that what cannot be cut into its units is told at once
        _tell_guesses(self._trained())

    def _trained(self) -> list[tuple[Parameter, UnitRule | None]]:
        pairs = zip(self.parameters, self.rules, strict=True)
        return [pair for i, pair in enumerate(pairs) if i not in self._idle]

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is one that an optimizer would hold for this model."""
        return any(p.tensor is tensor for p in self.parameters)

    def execution(self, tensors: Iterable[Tensor] | None = None) -> Execution:
        """That of all parameters, or of these. Kept until something that it covers trains for the first time."""
        thawed = [i for i, p in self._idle.items() if p.trains]
        _tell_guesses([(self.parameters[place], self.rules[place]) for place in thawed])
        for place in thawed:
            new = id(self._idle.pop(place).tensor)
            self._executions = {k: e for k, e in self._executions.items() if k is not None and new not in k}
        key = None if tensors is None else frozenset(map(id, tensors))
        if key not in self._executions:
            chosen = [(p, rule) for p, rule in self._trained() if key is None or id(p.tensor) in key]
            self._executions[key] = Execution([p for p, _ in chosen], [rule for _, rule in chosen], self.config)
        return self._executions[key]

    def clip(
        self,
        holders: Iterable[Tensor] | None = None,
        *,
        clipping_threshold: float | None = None,
        thresholds: Mapping[int, float | None] | None = None,
        grad_scale: Tensor | float | None = None,
    ) -> ClipStats | None:
        """Clip every gradient in place, between backward and the optimizer's update. All ranks must call it.

        Args:
            holders: clip only the gradients of these tensors (those that one optimizer holds).
            clipping_threshold: in place of the config's, in this call.
            thresholds: by ``id`` of a holder, a threshold in place of both; None does not clip it.
            grad_scale: the loss scale that the gradients still carry; they are judged as if divided by it.

        Returns:
            The statistics of the whole model over all ranks; None with ``statistics=False``.

        Raises:
            ValueError: a gradient that does not lie as its parameter does.
            FloatingPointError: on every rank, with ``on_nonfinite="raise"`` and a gradient that is not finite.
            RuntimeError: ranks are set up differently (checked at the first call).

        After any of these errors no gradient was changed.
        """
        if clipping_threshold is not None:
            clipping_threshold = check_threshold(clipping_threshold)
        with torch.no_grad(), torch.profiler.record_function("dist_agc::clip"):
            return self.execution(holders).clip(thresholds or {}, grad_scale, clipping_threshold)


def _tell_guesses(pairs: Iterable[tuple[Parameter, UnitRule | None]]) -> None:
    """One warning for all units whose guess is often wrong."""
    shapes = {numberless(p.name): rule.shape for p, rule in pairs if rule is not None and rule.doubtful}
    if not shapes:
        return
    found, first = [f"{name!r} {shape}" for name, shape in shapes.items()], next(iter(shapes))
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    given = " (pass the model itself in place of its parameters)" if first.isdigit() else ""
    warnings.warn(
        f"dist_agc does not know the modules of {', '.join(found[:5])}{more}{given} and guesses that dim 0 numbers "
        f"their units. Say which dims do: units={{{first!r}: 0}} keeps the guess; (0, 1) is for a stack of matrices "
        "(n, out, in), (0, 2) for (n, in, out). dist_agc.units(model) lists every parameter, and "
        "dist_agc.register_units tells dist_agc of a module of your own.",
        UserWarning,
        stacklevel=2,
    )


# The last plan of every model that `apply_agc` has seen, for as long as the model lives.
_clippers: weakref.WeakKeyDictionary[nn.Module, tuple[object, Clipper]] = weakref.WeakKeyDictionary()


def apply_agc(model: Model, clipping_threshold: float | AGCConfig | None = None, **options: Any) -> ClipStats | None:
    """Clip the gradients of ``model`` once, between ``loss.backward()`` and ``optimizer.step()``.

    Takes the place of Composer's functional ``apply_agc``; ``eps=0`` is its exact rule. On sharded models every rank
    must call it. Gradients that carry a loss scale must be unscaled first (``scaler.unscale_(optimizer)``).
    For a module the plan is kept from call to call; for a list of parameters, which names no model, it is not.

    Args:
        model: a module (plain, DDP, FSDP1, FSDP2, tensor parallel), or an iterable of parameters.
        clipping_threshold: the largest allowed ratio of gradient norm to weight norm (default 0.01), or an `AGCConfig`.
        options: any other field of `AGCConfig`: ``eps``, ``exclude``, ``units``, ``on_nonfinite``.

    Returns:
        The statistics of this clipping.

    Raises:
        TypeError, ValueError, RuntimeError: as `Clipper` and its ``clip``. No gradient was changed.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> stats = apply_agc(layer, clipping_threshold=0.01)
        >>> float(stats.clip_fraction)
        1.0
    """
    config = clipping_threshold if isinstance(clipping_threshold, AGCConfig) else None
    if config is None and clipping_threshold is not None:
        options["clipping_threshold"] = clipping_threshold
    config = AGCConfig.of(config, options)
    return clipper_of(model, config).clip(clipping_threshold=config.clipping_threshold)


def clipper_of(model: Model, config: AGCConfig) -> Clipper:
    """The Clipper that is kept for a module, for as long as its parameters and the settings stay; else a new one.

    The threshold may follow a schedule, so it counts for nothing here: give it to `Clipper.clip`.
    """
    if not isinstance(model, nn.Module):
        return Clipper(model, config)
    key = (replace(config, clipping_threshold=1.0), [id(p) for p in model.parameters()], registrations())
    kept = _clippers.get(model)
    if kept is None or kept[0] != key:
        kept = _clippers[model] = (key, Clipper(model, config))
    return kept[1]


def held(*optimizers: Optimizer) -> list[Tensor]:
    """What optimizers step on."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def group_thresholds(*optimizers: Optimizer) -> dict[int, float | None]:
    """The thresholds that their parameter groups ask for, by ``id`` of the parameter."""
    found: dict[int, float | None] = {}
    for i, group in (numbered for optimizer in optimizers for numbered in enumerate(optimizer.param_groups)):
        if "clipping_threshold" in group:
            value = group["clipping_threshold"]
            if value is not None:
                value = check_threshold(value, f"param_groups[{i}]['clipping_threshold']")
            found.update((id(p), value) for p in group["params"])
    return found
