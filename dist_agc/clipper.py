"""Clipper: the parameters of one model, their unit rules, and the executions that clip them."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import frameworks
from .config import AGCConfig, check_threshold
from .engine.agreement import Once
from .engine.execution import Execution
from .engine.row_norms import load
from .frameworks import Model
from .model.kinds import registrations
from .model.names import Entry, first_of, numberless
from .model.parameter import Parameter
from .model.units import UnitRule, unit_rules
from .stats import ClipStats


class Clipper:
    """Adaptive gradient clipping for one model, wherever its shards lie. The object under `apply_agc` and `attach`.

    Make it after sharding (``fully_shard``, ``FSDP(...)``, ``parallelize_module``), on every rank. It covers whatever
    has trained at any call so far, so parameters may be frozen and thawed at any time.

    Args:
        model: a module (plain, DDP, FSDP1, FSDP2, tensor parallel), or an iterable of parameters or of
            (name, parameter) pairs.
        config: an `AGCConfig`; or give its fields as keywords: ``clipping_threshold``, ``eps``, ``exclude``, ``units``,
            ``on_nonfinite``, ``dry_run``, ``statistics``, ``weight_norm_interval``, ``compile``, ``cpu_kernel``.

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
        settings = AGCConfig.of(config, options)
        self._start(frameworks.parameters(model), settings, frameworks.modules(model))

    @classmethod
    def of(
        cls,
        parameters: Sequence[Parameter],
        config: AGCConfig,
        models: Sequence[nn.Module] = (),
        *,
        checked: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> Clipper:
        """A Clipper of parameters that a framework has made already.

        ``models``: where new ones may turn up. ``checked``: whether each pattern has to match something here.
        ``options``: settings beside ``config`` that ranks have to have alike.
        """
        clipper = cls.__new__(cls)
        clipper._start(parameters, config, models, checked=checked, options=options)
        return clipper

    def _start(
        self,
        parameters: Sequence[Parameter],
        config: AGCConfig,
        models: Sequence[nn.Module],
        *,
        checked: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if config.cpu_kernel:
            load()  # here, so that a missing compiler is told before anything is clipped
        self.config = config
        self._models = [weakref.ref(model) for model in models]
        self._listed = self._in_models()
        self._beside: list[Parameter] = []  # of no model, and covered since an optimizer has stepped them
        self.parameters: list[Parameter] = []
        self.rules: list[UnitRule | None] = []
        self._held: set[int] = set()
        # What has never trained, by place: plans cover all else, whatever is frozen in between.
        self._idle: dict[int, Parameter] = {}
        self._executions: dict[frozenset[int] | None, Execution] = {}
        self._once = Once(options=options or {})
        self._told_idle = False  # that nothing has a gradient
        self._cover(parameters, unit_rules(parameters, config, checked=checked))
        if checked and set(self.rules) == {None} and not all(p.left_alone for p in parameters):
            warnings.warn(
                f"exclude={config.exclude!r} leaves out every parameter, so AGC clips nothing.",
                UserWarning,
                stacklevel=2,
            )

    def _cover(self, parameters: Sequence[Parameter], rules: list[UnitRule | None]) -> None:
        """Plan anew, for these. What has trained before goes on being covered while it is frozen."""
        trained = {id(p.tensor) for p, _ in self._trained()}
        idle = {i: p for i, p in enumerate(parameters) if not p.trains and id(p.tensor) not in trained}
        pairs = [pair for i, pair in enumerate(zip(parameters, rules, strict=True)) if i not in idle]
        for p, rule in pairs:
            p.pieces(rule)  # here, so that what cannot be cut into its units is told at once
        _tell_guesses([(p, rule) for p, rule in pairs if id(p.tensor) not in self._held])
        self.parameters, self.rules, self._idle, self._executions = list(parameters), rules, idle, {}
        self._unreduced = {p.unreduced for p in parameters if p.unreduced is not None}
        self._held, self._lay = {id(p.tensor) for p in parameters}, [p.lies() for p in parameters]

    def _in_models(self) -> list[int]:
        """The parameters that the models have now, by ``id``; those of a model that is gone are not among them."""
        models = (model for ref in self._models if (model := ref()) is not None)
        return [id(p) for model in models for p in model.parameters()]

    def _trained(self) -> list[tuple[Parameter, UnitRule | None]]:
        pairs = zip(self.parameters, self.rules, strict=True)
        return [pair for i, pair in enumerate(pairs) if i not in self._idle]

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is one that an optimizer would hold for this model."""
        return id(tensor) in self._held

    def whole(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is a parameter that every rank holds whole."""
        return any(p.tensor is tensor and type(p) is Parameter for p in self.parameters)

    def renew(self, replaced: Mapping[int, Tensor] | None = None, added: Sequence[Entry] = ()) -> None:
        """Look at the models again: something in them is new, or has another shape. Plans are made anew.

        Args:
            replaced: tensors that have come in the place of a parameter's, by ``id`` of the old one.
            added: what optimizers hold beside the models, from now on covered too.

        Raises ValueError where a parameter cannot be clipped as it lies now; everything is as it was then.
        """
        replaced, models = replaced or {}, [model for ref in self._models if (model := ref()) is not None]
        whole = bool(models) and len(models) == len(self._models)
        stay = {*replaced, *(id(p.tensor) for p in self._beside)}  # whatever the models have now
        kept = [p for p in self.parameters if not whole or id(p.tensor) in stay]
        beside = [p.now_in(replaced.get(id(p.tensor), p.tensor)) for p in kept]
        if added:
            beside += frameworks.parameters([(entry.name, entry.tensor) for entry in added])
        names = {p.name for p in beside}
        found = frameworks.parameters(models) if whole else []
        covered = [*(p for p in found if p.name not in names), *beside]
        try:
            self._cover(covered, unit_rules(covered, self.config, checked=False))
        except ValueError as error:
            raise ValueError(
                f"{error} It has become so since AGC saw the model first: shard the model first, then make the "
                "optimizer, then attach."
            ) from None
        self._beside, self._listed = beside, self._in_models()

    def unreduced(self, holders: Collection[Tensor] | None = None) -> str | None:
        """The name of a governed parameter whose gradient is one rank's own, since its wrapper reduces none now."""
        waiting = {said for said in self._unreduced if said()}
        if not waiting:
            return None
        chosen = {id(tensor) for tensor in ([p.tensor for p in self.parameters] if holders is None else holders)}
        pairs = zip(self.parameters, self.rules, strict=True)
        found = (p for p, rule in pairs if rule is not None and p.unreduced in waiting and id(p.tensor) in chosen)
        return next((p.name for p in found if p.tensor.grad is not None), None)

    def tells_that_nothing_has_gradients(self) -> bool:
        """Whether no governed parameter has any on this rank; True once."""
        governed = [p for p, rule in zip(self.parameters, self.rules, strict=True) if rule is not None]
        if self._told_idle or any(p.gradient() is not None for p in governed):
            return False
        self._told_idle = any(p.weight().numel() for p in governed)
        return self._told_idle

    def execution(self, tensors: Iterable[Tensor] | None = None) -> Execution:
        """That of all parameters, or of these. Kept until something that it covers is new, or lies otherwise."""
        if tensors is None and self._models and self._in_models() != self._listed:
            self.renew()
        key = None if tensors is None else frozenset(map(id, tensors))
        if any(p.lies() != self._lay[i] for i, p in enumerate(self.parameters) if key is None or id(p.tensor) in key):
            self.renew()
        thawed = [i for i, p in self._idle.items() if p.trains]
        _tell_guesses([(self.parameters[place], self.rules[place]) for place in thawed])
        for place in thawed:
            new = id(self._idle.pop(place).tensor)
            self._executions = {k: e for k, e in self._executions.items() if k is not None and new not in k}
        if key not in self._executions:
            chosen = [(p, rule) for p, rule in self._trained() if key is None or id(p.tensor) in key]
            rules = [rule for _, rule in chosen]
            self._executions[key] = Execution([p for p, _ in chosen], rules, self.config, self._once)
        return self._executions[key]

    def clip(
        self,
        holders: Collection[Tensor] | None = None,
        *,
        clipping_threshold: float | None = None,
        thresholds: Mapping[int, float | None] | None = None,
        grad_scale: Tensor | float | None = None,
        apart: bool = False,
    ) -> ClipStats | None:
        """Clip every gradient in place, between backward and the optimizer's update. All ranks must call it.

        Args:
            holders: clip only the gradients of these tensors (those that one optimizer holds).
            clipping_threshold: in place of the config's, in this call.
            thresholds: by ``id`` of a holder, a threshold in place of both; None does not clip it.
            grad_scale: the loss scale that the gradients still carry; they are judged as if divided by it.
            apart: ranks train apart for now, as in local SGD: clip inside of DDP's ``no_sync`` too.

        Returns:
            The statistics of the whole model over all ranks; None with ``statistics=False``.

        Raises:
            ValueError: a gradient that does not lie as its parameter does, or that DDP was told not to reduce.
            FloatingPointError: on every rank, with ``on_nonfinite="raise"`` and a gradient that is not finite.
            RuntimeError: ranks are set up differently (checked at the first call).

        After any of these errors no gradient was changed.
        """
        if clipping_threshold is not None:
            clipping_threshold = check_threshold(clipping_threshold)
        if not apart and (name := self.unreduced(holders)):
            raise ValueError(
                f"parameter {name!r} has a gradient of this rank alone: clip() was called inside of no_sync(), and "
                "copies of the model that are clipped differently drift apart. Leave no_sync() before the last "
                "backward, so that gradients are reduced in it, and then clip; Clipper.clip(apart=True) is for ranks "
                "that are meant to train apart."
            )
        with torch.no_grad(), torch.profiler.record_function("dist_agc::clip"):
            return self.execution(holders).clip(thresholds or {}, grad_scale, clipping_threshold)

    def described(self, between: str) -> str:
        """What it covers and how, for people: phrases with ``between`` before each but the first."""
        pairs = list(zip(self.parameters, self.rules, strict=True))
        trained = [(p, rule) for p, rule in pairs if p.trains]
        governed = [(p, rule) for p, rule in trained if rule is not None]
        found = Counter(p.framework for p, _ in trained)
        units, guessed = sum(rule.count for _, rule in governed), sum(rule.guessed for _, rule in governed)
        return between.join(
            (
                "; ".join(f"{count} parameters {kind}" for kind, count in found.items()) or "nothing trains",
                f"{len(governed)} governed ({units} units, {guessed} of them guessed), {len(trained) - len(governed)} "
                f"excluded, {len(pairs) - len(trained)} frozen",
                str(self.config),
            )
        )


def _tell_guesses(pairs: Iterable[tuple[Parameter, UnitRule | None]]) -> None:
    """One warning for all units whose guess is often wrong."""
    shapes = {numberless(p.name): rule.shape for p, rule in pairs if rule is not None and rule.doubtful}
    if not shapes:
        return
    found, first = [f"{name!r} {shape}" for name, shape in shapes.items()], next(iter(shapes))
    given = " (pass the model itself in place of its parameters)" if first.isdigit() else ""
    warnings.warn(
        f"dist_agc does not know the modules of {first_of(found, 5)}{given} and guesses that dim 0 numbers "
        f"their units. Say which dims do: units={{{first!r}: 0}} keeps the guess; (0, 1) is for a stack of matrices "
        "(n, out, in), (0, 2) for (n, in, out). dist_agc.units(model) lists every parameter, and "
        "dist_agc.register_units tells dist_agc of a module of your own.",
        UserWarning,
        stacklevel=2,
    )


# The last plan of every model that `apply_agc` has seen, for as long as the model lives.
_clippers: weakref.WeakKeyDictionary[nn.Module, tuple[object, Clipper]] = weakref.WeakKeyDictionary()


def apply_agc(model: Model, clipping_threshold: float | AGCConfig = 0.01, **options: Any) -> ClipStats | None:
    """Clip the gradients of ``model`` once, between ``loss.backward()`` and ``optimizer.step()``.

    Takes the place of Composer's functional ``apply_agc``; ``eps=0`` is its exact rule. On sharded models every rank
    must call it. With a GradScaler call ``scaler.unscale_(optimizer)`` first: gradients look the same with a loss scale
    and without, so nothing can tell that one is left on, and every unit would be clipped. (`attach` runs where the
    optimizer steps, after they were unscaled. ``Clipper.clip(grad_scale=...)`` takes a scale into account.)
    For a module the plan is kept from call to call; for a list of parameters, which names no model, it is not.

    Args:
        model: a module (plain, DDP, FSDP1, FSDP2, tensor parallel), a list of several, or an iterable of parameters.
        clipping_threshold: the largest allowed ratio of gradient norm to weight norm (default 0.01), or an `AGCConfig`.
        options: the other fields of `AGCConfig`, which says what each does: ``eps``, ``exclude``, ``units``,
            ``on_nonfinite``, ``dry_run``, ``statistics``, ``weight_norm_interval``, ``compile``, ``cpu_kernel``.

    Returns:
        The statistics of this clipping; None with ``statistics=False``.

    Raises:
        TypeError, ValueError, RuntimeError: as `Clipper` and its ``clip``. No gradient was changed.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> stats = apply_agc(layer, clipping_threshold=0.01)
        >>> float(stats.clip_fraction)
        1.0
    """
    if isinstance(clipping_threshold, AGCConfig):
        config = AGCConfig.of(clipping_threshold, options)
    else:
        config = AGCConfig.of(None, {"clipping_threshold": clipping_threshold, **options})
    clipper = clipper_of(model, config)
    stats = clipper.clip(clipping_threshold=config.clipping_threshold)
    if clipper.tells_that_nothing_has_gradients():
        # To the log, since one rank alone may rightly have none: a warning that is made an error would stop it there.
        logging.getLogger("dist_agc").warning(
            "no parameter that apply_agc governs has a gradient: AGC has nothing to clip. Call it after "
            "loss.backward() and before optimizer.step(), with the model that was trained in it."
        )
    return stats


def clipper_of(model: Model, config: AGCConfig) -> Clipper:
    """The Clipper that is kept for a module, for as long as the settings stay; else a new one.

    The threshold may follow a schedule, so it counts for nothing here: give it to `Clipper.clip`.
    """
    if not isinstance(model, nn.Module):
        return Clipper(model, config)
    key = (replace(config, clipping_threshold=1.0), registrations())
    kept = _clippers.get(model)
    if kept is None or kept[0] != key:
        kept = _clippers[model] = (key, Clipper(model, config))
    return kept[1]
