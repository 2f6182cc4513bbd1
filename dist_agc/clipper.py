"""Clipper: collect gradients, measure, reduce, scale."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .config import AGCConfig, check_threshold
from .fragments import Fragment
from .layouts import Placed, make_fragments, place
from .part import Part
from .row_norms import load
from .stats import ClipStats


class Clipper:
    """Adaptive gradient clipping for one model, wherever its shards lie. The object under `apply_agc` and `attach`.

    The plan is made here, from structure alone, so every rank must make its Clipper at the same point of the program
    (after ``fully_shard``, ``FSDP(...)``, ``parallelize_module``). Freezing and unfreezing parameters later is noticed.

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

    def __init__(
        self,
        model: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        config: AGCConfig | None = None,
        **options: Any,
    ) -> None:
        self._start(place(model), AGCConfig.of(config, options))

    @classmethod
    def of_placed(cls, placed: Sequence[Placed], config: AGCConfig) -> Clipper:
        """A Clipper of parameters whose layouts are known already, as integrations make them."""
        clipper = cls.__new__(cls)
        clipper._start(placed, config)
        return clipper

    def _start(self, placed: Sequence[Placed], config: AGCConfig) -> None:
        if config.cpu_kernel:
            load()  # here, so that a missing compiler is told before anything is clipped
        self.config = config
        self._placed = list(placed)
        self._plan()

    def _plan(self) -> None:
        self._trainable = [p.layout.holder.requires_grad for p in self._placed]
        self.fragments: list[Fragment] = make_fragments(self._placed, self.config)
        self._parts: dict[frozenset[int] | None, Part] = {}

    def holds(self, parameter: Tensor) -> bool:
        """Whether ``parameter`` is one that an optimizer would hold for this model."""
        return any(p.layout.holder is parameter for p in self._placed)

    def frozen(self) -> list[tuple[str, Tensor]]:
        """Parameters that are not trained, by name."""
        return [(p.named.name, p.layout.holder) for p in self._placed if not p.layout.holder.requires_grad]

    def part(self, holders: Iterable[Tensor] | None = None) -> Part:
        """The plan for all parameters, or for those that one optimizer holds; made once."""
        if self._trainable != [p.layout.holder.requires_grad for p in self._placed]:
            self._plan()
        key = None if holders is None else frozenset(map(id, holders))
        if key not in self._parts:
            chosen = [f for f in self.fragments if key is None or id(f.holder) in key]
            self._parts[key] = Part(chosen, self.config)
        return self._parts[key]

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
            ValueError: a gradient that does not lie as its parameter does. No gradient was changed.
            FloatingPointError: on every rank, with ``on_nonfinite="raise"`` and a gradient that is not finite. No
                gradient was changed.
            RuntimeError: ranks are set up differently (checked at the first call).
        """
        holders = None if holders is None else list(holders)
        if clipping_threshold is not None:
            clipping_threshold = check_threshold(clipping_threshold)
        with torch.no_grad(), torch.profiler.record_function("dist_agc::clip"):
            return self.part(holders).clip(thresholds or {}, grad_scale, clipping_threshold)


# The last plan of every model that `apply_agc` has seen, for as long as the model lives.
_clippers: weakref.WeakKeyDictionary[nn.Module, tuple[object, Clipper]] = weakref.WeakKeyDictionary()


def apply_agc(
    model: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
    clipping_threshold: float | AGCConfig | None = None,
    **options: Any,
) -> ClipStats | None:
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
        TypeError: an unknown option, or something that is no parameter.
        ValueError: a setting out of range, a pattern that matches nothing, a layout that is not known. No gradient was
            changed.

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
        given = {} if clipping_threshold is None else {"clipping_threshold": clipping_threshold}
        config = AGCConfig.of(None, {**given, **options})
    if not isinstance(model, nn.Module):
        return Clipper(model, config).clip()
    # Planned anew only where parameters or settings change; the threshold may follow a schedule.
    key = (replace(config, clipping_threshold=1.0), [id(p) for p in model.parameters()])
    kept = _clippers.get(model)
    if kept is None or kept[0] != key:
        kept = _clippers[model] = (key, Clipper(model, config))
    return kept[1].clip(clipping_threshold=config.clipping_threshold)


def group_thresholds(
    groups: Iterable[Mapping[str, Any]], check: Callable[[object, str], float]
) -> dict[int, float | None]:
    """The thresholds that parameter groups ask for, by ``id`` of the parameter."""
    found: dict[int, float | None] = {}
    for i, group in enumerate(groups):
        if "clipping_threshold" in group:
            asked = group["clipping_threshold"]
            value = None if asked is None else check(asked, f"param_groups[{i}]['clipping_threshold']")
            found.update((id(p), value) for p in group["params"])
    return found
