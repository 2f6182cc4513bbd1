"""What the integrations share."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..clipper import Clipper
from ..config import AGCConfig
from ..hook import AGCHook
from ..model.parameter import Parameter
from ..stats import ClipStats

logger = logging.getLogger("dist_agc")


@contextmanager
def needed(package: str, extra: str) -> Iterator[None]:
    """Around the import of a package: where it is not installed, the error says how to."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{package} is needed here: pip install 'dist-agc[{extra}]' ({error})") from error


class CallbackBase:
    """What the callbacks of all trainers have: settings, the handle once training has begun, and statistics.

    ``config`` is None where no settings were given: a DeepSpeed config may have them.
    """

    def __init__(self, config: AGCConfig | None, options: Mapping[str, Any], per_parameter_every: int) -> None:
        # Checked now and not only when training begins, hours later perhaps.
        self.config = AGCConfig.of(config, options) if config is not None or options else None
        self.per_parameter_every = per_parameter_every
        self.hook: AGCHook | None = None

    @property
    def stats(self) -> ClipStats | None:
        """The statistics of the last step, empty and false before the first; None before training begins."""
        return None if self.hook is None else self.hook.stats

    def _per_parameter(self, step: int) -> bool:
        """Whether this step's logs are to have statistics per parameter."""
        return self.per_parameter_every > 0 and step % self.per_parameter_every == 0

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.hook is not None:
            self.hook.remove()


def warn_unsharded(clipper: Clipper) -> None:
    """Warn where the user asked the framework to shard parameters and none is sharded."""
    if {p.framework for p in clipper.parameters} == {Parameter.framework}:
        logger.warning(
            "FSDP was asked for, but every parameter is whole on every rank: the framework fell back to DDP "
            "(Accelerate does so on CPU). AGC clips all the same."
        )


def warn_norm_clipping(setting: str, value: object, advice: str, *, agc_first: bool = False) -> None:
    """Warn that another clipping runs beside AGC."""
    order = "by AGC first and by their global norm" if agc_first else "by their global norm first and by AGC"
    text = "%s=%s: gradients are clipped %s after that. AGC takes the place of norm clipping: %s."
    logger.warning(text, setting, value, order, advice)
