"""Adaptive gradient clipping as an algorithm of MosaicML Composer.

    from dist_agc.integrations.composer import AGC
    Trainer(..., algorithms=[AGC(clipping_threshold=0.01)])

The functional form is `dist_agc.apply_agc(model, clipping_threshold=0.01)`.
"""

from __future__ import annotations

from typing import Any

from ..clipper import Clipper
from ..config import AGCConfig
from ..hook import AGCHook
from ._common import CallbackBase, needed
from ._common import logger as log

with needed("MosaicML Composer", "composer"):  # other packages are called composer too
    from composer.core import Algorithm, Event, State  # pyright: ignore[reportMissingImports]
    from composer.loggers import Logger  # pyright: ignore[reportMissingImports]


class AGC(CallbackBase, Algorithm):
    """Clips after each batch's gradients are complete, reduced and unscaled, and before the optimizers' step.

    Takes the place of ``GradientClipping(clipping_type="adaptive")``, which does not know of shards; with ``eps=0`` it
    gives the same weights on a model that is not sharded. Statistics go to Composer's loggers as ``agc/...``.

    Args:
        config: an `AGCConfig`; or give its fields as keywords.
        log_every: log statistics every so many batches; making numbers of them waits for the device.
        per_parameter_every: log those per parameter every so many batches too; 0 for never.
        options: the fields of `AGCConfig`, such as ``clipping_threshold`` and ``exclude``; it says what each does.

    Raises:
        TypeError, ValueError: as `dist_agc.attach`; those that need the model when training starts.
        ImportError: Composer is not installed.
    """

    def __init__(
        self, config: AGCConfig | None = None, *, log_every: int = 1, per_parameter_every: int = 0, **options: Any
    ) -> None:
        super().__init__(config, options, per_parameter_every)
        self.config = self.config or AGCConfig()  # there is no other config that may have the settings
        self.log_every = log_every

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.FIT_START, Event.AFTER_TRAIN_BATCH)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            self.hook = AGCHook(Clipper(state.model, self.config))
            if any(type(other).__name__ == "GradientClipping" for other in state.algorithms):
                log.warning("GradientClipping runs beside AGC: AGC takes its place, leave one of them out.")
            return
        assert self.hook is not None, "Event.FIT_START comes first"
        for optimizer in state.optimizers:
            self.hook.clip(optimizer)
        batch = int(state.timestamp.batch)
        if self.stats and self.log_every and batch % self.log_every == 0:
            logger.log_metrics(self.stats.as_dict(per_parameter=self._per_parameter(batch)))
