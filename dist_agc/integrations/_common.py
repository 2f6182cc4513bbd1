"""What the integrations share."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

import torch.distributed as dist

from ..clipper import Clipper
from ..stats import ClipStats

logger = logging.getLogger("dist_agc")

# By the module that defines the layout.
_LAYOUTS = {
    "replicated": "whole on every rank (plain or DDP)",
    "dtensor": "DTensor (FSDP2, tensor parallel)",
    "fsdp1": "FSDP1",
}


def layouts(clipper: Clipper) -> Counter[str]:
    """How many parameters lie in which way, in words."""
    modules = (type(p.layout).__module__.rpartition(".")[2] for p in clipper._placed)
    return Counter(_LAYOUTS.get(name, f"DeepSpeed ({name})") for name in modules)


def announce(clipper: Clipper, *, sharding_asked: bool = False) -> None:
    """Log which layout was found, so that a fallback of the framework does not pass unnoticed.

    Args:
        sharding_asked: the user asked the framework to shard parameters; warns where none is sharded.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    found = layouts(clipper)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    listed = "; ".join(f"{count} parameters {kind}" for kind, count in found.items())
    logger.info("AGC on %d process%s: %s. %s", ranks, "" if ranks == 1 else "es", listed, clipper.config)
    if sharding_asked and set(found) == {_LAYOUTS["replicated"]}:
        logger.warning(
            "FSDP was asked for, but every parameter is whole on every rank: the framework fell back to DDP "
            "(Accelerate does so on CPU). AGC clips all the same."
        )


def warn_norm_clipping(setting: str, value: object, advice: str, *, first: str = "norm") -> None:
    """Warn that another clipping runs before AGC, or after it with ``first="AGC"``."""
    order = "by AGC first and by their global norm" if first == "AGC" else "by their global norm first and by AGC"
    logger.warning(
        "%s=%s: gradients are clipped %s after that. AGC takes the place of norm clipping: %s.",
        setting,
        value,
        order,
        advice,
    )


def metrics(stats: ClipStats | None, step: int, per_parameter_every: int) -> Mapping[str, float]:
    """What goes to a logger at this step; per parameter only every so many steps, 0 for never."""
    if stats is None:
        return {}
    return stats.as_dict(per_parameter=per_parameter_every > 0 and step % per_parameter_every == 0)


def missing(package: str, extra: str, error: ImportError) -> ImportError:
    """The error for a package that is not installed."""
    return ImportError(f"{package} is needed here: pip install 'dist-agc[{extra}]' ({error})")
