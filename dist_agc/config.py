"""Every setting of adaptive gradient clipping, checked once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal

ON_NONFINITE = ("keep", "raise", "zero")


def check_threshold(value: object, name: str = "clipping_threshold") -> float:
    """``value`` as a float. TypeError: it is no number. ValueError: it is not positive and finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}); try 0.01.")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}; try 0.01.")
    return number


def _check_patterns(value: object) -> tuple[str, ...]:
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise TypeError(f"exclude must be glob patterns such as ('head.*',), got {value!r}.")
    if isinstance(value, set | frozenset):  # whose order is another in each process, and ranks compare settings
        value = sorted(value, key=str)
    patterns = (value,) if isinstance(value, str) else tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"exclude must hold non-empty strings such as 'head.*', got {pattern!r}.")
    return patterns


def _check_units(value: object) -> Literal["leading"] | dict[str, tuple[int, ...]] | None:
    if value is None or value == "leading":
        return value  # type: ignore[return-value]
    if not isinstance(value, Mapping):
        raise TypeError(
            "units must be None, 'leading' or a mapping from glob patterns to the dims that number the units, "
            f"such as {{'*.experts.*': (0, 1)}}; got {value!r}."
        )
    checked = {}
    for pattern, dims in value.items():
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"the keys of units must be non-empty glob patterns, got {pattern!r}.")
        checked[pattern] = check_dims(dims, f"units[{pattern!r}]")
    return checked


def check_dims(value: object, name: str) -> tuple[int, ...]:
    """``value`` as a tuple of dims. TypeError: it is neither a dim nor distinct dims."""
    dims = (value,) if isinstance(value, int) else value
    if not isinstance(dims, tuple | list) or any(type(dim) is not int for dim in dims) or len(set(dims)) != len(dims):
        raise TypeError(
            f"{name} must be a dim or a tuple of distinct dims, such as 0 or (0, 1), or () for the whole tensor; got "
            f"{value!r}."
        )
    return tuple(dims)


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
            0 is MosaicML Composer's rule, which zeroes the gradient of a unit with zero weights. Until its weight norm
            is above ``eps``, a unit has a gradient of at most ``clipping_threshold * eps``, by which SGD trains next to
            nothing: exclude what begins at zero (LoRA's B, a zero-initialised head), or raise ``eps``. Optimizers that
            divide by the size of gradients, such as Adam, make up for most of it.
        exclude: globs over fully qualified names of parameters that AGC leaves alone, such as ``("head.*",)``.
            The last linear layer usually belongs here (Brock et al., section 4.1).
        units: which dims number the units. None: by the kind of module (rows; output channels of ``ConvTranspose``;
            columns of transformers' ``Conv1D``; the whole tensor for 0-d and 1-d). ``"leading"``: dim 0 always.
            A mapping from globs to dims overrides the rule for single parameters, ``{"*.experts.*": (0, 1)}``.
        on_nonfinite: what happens to a unit whose gradient norm is inf or nan (in fp32, also above 1.8e19).
            ``"keep"`` leaves it, so that GradScaler and DeepSpeed still see the overflow; ``"zero"`` zeroes it;
            ``"raise"`` waits for the device and raises FloatingPointError on every rank before any gradient changes.
        dry_run: measure and report as always, clip nothing.
        statistics: make statistics, global in the same collective. False saves that payload, and the collective too
            where no unit is cut; ``clip()`` then returns None.
        weight_norm_interval: measure the weight norms every so many calls and reuse them in between. 1 is exact.
            Weights that someone beside the optimizer has written are measured anew (``load_state_dict``).
        compile: fuse what is computed between the norms and the scaling with ``torch.compile``. It saves launches on
            an accelerator and gains nothing on a CPU (docs/performance.md).
        cpu_kernel: measure fp32 rows on a CPU by a C++ kernel, which gives the same but for rounding and is faster
            (docs/performance.md). Needs a C++ compiler; compiled in 0.25 s when the settings are first used.

    Raises:
        TypeError: a value of the wrong type, an unknown name.
        ValueError: a value out of range.

    Example:
        >>> AGCConfig(clipping_threshold=0.02, exclude=("head.*",)).eps
        0.001
    """

    clipping_threshold: float = 0.01
    eps: float = 1e-3
    exclude: tuple[str, ...] | str = ()
    units: Mapping[str, int | tuple[int, ...]] | Literal["leading"] | None = None
    on_nonfinite: Literal["keep", "raise", "zero"] = "keep"
    dry_run: bool = False
    statistics: bool = True
    weight_norm_interval: int = 1
    compile: bool = False
    cpu_kernel: bool = False

    def __post_init__(self) -> None:
        store = object.__setattr__  # how a frozen dataclass stores its normalised values
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
        if type(interval := self.weight_norm_interval) is not int:
            raise TypeError(f"weight_norm_interval must be a whole number of calls, got {interval!r}.")
        if interval < 1:
            raise ValueError(f"weight_norm_interval must be at least 1, got {interval}.")
        if self.on_nonfinite == "raise" and not self.statistics:
            raise ValueError("on_nonfinite='raise' counts over all ranks and needs statistics=True.")

    @classmethod
    def of(cls, config: AGCConfig | None, options: Mapping[str, Any]) -> AGCConfig:
        """``config`` itself, or one made of ``options``. TypeError: both were given, or an option is not known."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise TypeError(f"unknown option {unknown[0]!r}; the options are {', '.join(known)}.")
        if config is None:
            return cls(**options)
        if not isinstance(config, cls):
            number = isinstance(config, Real)
            got = f"{config!r}: write clipping_threshold={config!r}" if number else type(config).__name__
            raise TypeError(f"config must be an AGCConfig, got {got}.")
        if options:
            raise TypeError(f"give an AGCConfig or keyword options, not both (got config and {', '.join(options)}).")
        return config


def block_of(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any] | None:
    """The block ``name`` of another library's config, checked, with ``"enabled"``; None where there is none.

    ``where`` is what errors call that config. A block whose name is nearly right is an error too.
    """
    if name not in config:
        if near := difflib.get_close_matches(name, map(str, config), n=1, cutoff=0.8):
            raise ValueError(f'{where} has "{near[0]}"; did you mean "{name}"?')
        return None
    given = config[name]
    if not isinstance(given, Mapping):
        raise TypeError(f'"{name}" must be a block such as {{"clipping_threshold": 0.01}}, got {given!r}.')
    known = ["enabled", *(field.name for field in fields(AGCConfig))]
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f'unknown key "{unknown[0]}" in "{name}"; the keys are {", ".join(known)}.')
    settings = dict(given)
    enabled = settings.pop("enabled", True)
    if not isinstance(enabled, bool):
        raise TypeError(f'"{name}": "enabled" must be true or false, got {enabled!r}.')
    try:
        AGCConfig(**settings)
    except (TypeError, ValueError) as error:
        raise type(error)(f'"{name}": {error}') from None
    return {"enabled": enabled, **settings}


def merged(block: Mapping[str, Any], config: AGCConfig | None, options: Mapping[str, Any], where: str) -> AGCConfig:
    """The settings of a block with ``config`` or ``options`` beside it: each may add to the other, not contradict it.

    ``where`` is what errors call the block.
    """
    asked, said = AGCConfig.of(config, options), AGCConfig(**block)
    given = options if config is None else vars(config)
    for name in block:
        if name in given and getattr(asked, name) != getattr(said, name):
            raise ValueError(
                f"{name} is {getattr(asked, name)!r} here and {getattr(said, name)!r} in {where}: say it once."
            )
    return AGCConfig(**{**block, **given})
