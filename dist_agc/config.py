"""Every setting of adaptive gradient clipping, checked once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal

OnNonfinite = Literal["keep", "raise", "zero"]
UnitDims = int | tuple[int, ...]

ON_NONFINITE = ("keep", "raise", "zero")


def check_threshold(value: object, name: str = "clipping_threshold") -> float:
    """Return ``value`` as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not positive and finite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}); try 0.01.")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}; try 0.01.")
    return number


def _check_patterns(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise TypeError(f"exclude must be glob patterns such as ('head.*',), got {value!r}.")
    patterns = tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"exclude must hold non-empty strings such as 'head.*', got {pattern!r}.")
    return patterns


def _check_units(value: object) -> Literal["leading"] | dict[str, tuple[int, ...]] | None:
    if value is None or value == "leading":
        return value  # type: ignore[return-value]
    if not isinstance(value, Mapping):
        raise TypeError(
            f"units must be None, 'leading' or a mapping from glob patterns to the dims that number the units, "
            f"such as {{'*.experts.*': (0, 1)}}; got {value!r}."
        )
    checked = {}
    for pattern, dims in value.items():
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"the keys of units must be non-empty glob patterns, got {pattern!r}.")
        dims = (dims,) if isinstance(dims, int) else dims
        if (
            not isinstance(dims, tuple | list)
            or any(isinstance(d, bool) or not isinstance(d, int) for d in dims)
            or len(set(dims)) != len(dims)
        ):
            raise TypeError(
                f"units[{pattern!r}] must be a dim or a tuple of distinct dims, such as 0 or (0, 1), or () for the "
                f"whole tensor; got {dims!r}."
            )
        checked[pattern] = tuple(dims)
    return checked


@dataclass(frozen=True, kw_only=True)
class AGCConfig:
    """The settings of adaptive gradient clipping (Brock et al. 2021, arXiv 2102.06171, section 4).

    A unit is the fan-in of one output. Its gradient G is scaled down wherever
    ``norm(G) / max(norm(W), eps) > clipping_threshold``, L2 norms.

    Args:
        clipping_threshold: the largest allowed ratio of gradient norm to weight norm, positive and finite. 0.01 suits
            batches of 1024 to 4096 with SGD on norm-free ResNets; smaller batches want more, up to 0.16.
            ``param_group["clipping_threshold"]`` overrides it for one group of an attached optimizer.
        eps: the least weight norm that counts, so that units with zero weights can train. 1e-3 is the paper's;
            0 is MosaicML Composer's rule, which zeroes the gradient of a unit with zero weights.
        exclude: globs over fully qualified parameter names that AGC leaves alone, such as ``("head.*",)``.
            The last linear layer usually belongs here (Brock et al., section 4.1).
        units: which dims number the units. None: by the kind of module (rows; output channels of ``ConvTranspose``;
            columns of transformers' ``Conv1D``; the whole tensor for 0-d and 1-d). ``"leading"``: dim 0 always.
            A mapping from globs to dims overrides the rule for single parameters, ``{"*.experts.*": (0, 1)}``.
        on_nonfinite: what happens to a unit whose gradient norm is inf or nan. ``"keep"`` leaves it exactly as it is,
            so that GradScaler and DeepSpeed still see the overflow; ``"zero"`` zeroes it; ``"raise"`` raises
            FloatingPointError on every rank alike, before any gradient changes (it waits for the device). Squares are
            added up in fp32, so a norm above 1.8e19 counts as inf.
        dry_run: measure and report as always, clip nothing.
        statistics: make statistics, global in the same collective. False saves that payload, and the collective too
            where no unit is split; ``clip()`` then returns None.
        weight_norm_interval: measure the weight norms every so many calls and reuse them in between. 1 is exact.
        compile: fuse what is computed between the norms and the scaling with ``torch.compile``. Meant for
            accelerators, where it saves launches; on a CPU it gains nothing (docs/performance.md).
        cpu_kernel: measure fp32 rows on a CPU by a kernel in C++, compiled in 0.25 s when the settings are first
            used; needs a C++ compiler. Faster (docs/performance.md), and the same but for rounding.

    Raises:
        TypeError: a value of the wrong type, an unknown name.
        ValueError: a value out of range.

    Example:
        >>> AGCConfig(clipping_threshold=0.02, exclude=("head.*",)).eps
        0.001
        >>> AGCConfig(clipping_threshold=-1)
        Traceback (most recent call last):
        ...
        ValueError: clipping_threshold must be a positive finite number, got -1; try 0.01.
    """

    clipping_threshold: float = 0.01
    eps: float = 1e-3
    exclude: tuple[str, ...] | str = ()
    units: Mapping[str, UnitDims] | Literal["leading"] | None = None
    on_nonfinite: OnNonfinite = "keep"
    dry_run: bool = False
    statistics: bool = True
    weight_norm_interval: int = 1
    compile: bool = False
    cpu_kernel: bool = False

    def __post_init__(self) -> None:
        # A frozen dataclass stores its normalised values this way.
        store = object.__setattr__
        store(self, "clipping_threshold", check_threshold(self.clipping_threshold))
        if isinstance(self.eps, bool) or not isinstance(self.eps, float | int):
            raise TypeError(f"eps must be a number, got {self.eps!r} ({type(self.eps).__name__}); try 1e-3.")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps must be finite and not negative, got {self.eps!r}; try 1e-3.")
        store(self, "eps", float(self.eps))
        store(self, "exclude", _check_patterns(self.exclude))
        store(self, "units", _check_units(self.units))
        if self.on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"on_nonfinite must be one of {', '.join(ON_NONFINITE)}; got {self.on_nonfinite!r}.")
        for name in ("dry_run", "statistics", "compile", "cpu_kernel"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        interval = self.weight_norm_interval
        if isinstance(interval, bool) or not isinstance(interval, int):
            raise TypeError(f"weight_norm_interval must be a whole number of calls, got {interval!r}.")
        if interval < 1:
            raise ValueError(f"weight_norm_interval must be at least 1, got {interval}.")
        if self.on_nonfinite == "raise" and not self.statistics:
            raise ValueError("on_nonfinite='raise' counts over all ranks and needs statistics=True.")

    @classmethod
    def of(cls, config: AGCConfig | None, options: Mapping[str, Any]) -> AGCConfig:
        """The config itself, or one made of keyword options; not both.

        Raises:
            TypeError: both were given, or an option is not known.
        """
        known = [field.name for field in fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(f"unknown option {unknown[0]!r}; the options are {', '.join(known)}.")
        if config is None:
            return cls(**options)
        if not isinstance(config, cls):
            raise TypeError(f"config must be an AGCConfig, got {type(config).__name__}.")
        if options:
            raise TypeError(f"give an AGCConfig or keyword options, not both (got config and {', '.join(options)}).")
        return config
