"""Adaptive gradient clipping in the Lightning Trainer.

    from dist_agc.integrations.lightning import AGCCallback
    Trainer(..., callbacks=[AGCCallback(clipping_threshold=0.01, exclude=("head.*",))])

With Fabric no callback is needed: ``dist_agc.attach(model, optimizer)`` takes what ``fabric.setup`` returns.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from ..clipper import Clipper
from ..config import AGCConfig
from ..hooks import AGCHook, attach, unwrapped
from ..stats import ClipStats
from ._common import announce, missing, warn_norm_clipping

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        Callback = importlib.import_module("lightning.pytorch").Callback
    except ImportError as error:
        raise missing("lightning", "lightning", error) from error

_TOTALS = ("clip_fraction", "clipped_units", "nonfinite_units", "grad_norm", "max_ratio")


class AGCCallback(Callback):
    """Clips before every optimizer step of a `Trainer`, in automatic and in manual optimization.

    Lightning hands each optimizer a closure that computes the gradients, so AGC runs in ``on_before_optimizer_step``:
    gradients are reduced and unscaled there. ``gradient_clip_val`` clips after that, what AGC left over.
    Statistics go through ``log_dict`` as ``agc/...``. Says in the log which layout it found.

    Args:
        config: an `AGCConfig`; or give its fields as keywords. Under a DeepSpeed strategy, give neither to use the
            block ``"adaptive_gradient_clipping"`` of its config.
        per_parameter_every: log statistics per parameter every so many optimizer steps; 0 for never.

    Raises:
        TypeError, ValueError: as `dist_agc.attach`, when training starts.
        ImportError: lightning is not installed.
    """

    def __init__(self, config: AGCConfig | None = None, *, per_parameter_every: int = 0, **options: Any) -> None:
        # Checked now and not only when training starts.
        self.config = AGCConfig.of(config, options) if config is not None or options else None
        self.per_parameter_every = per_parameter_every
        self.hook: AGCHook | None = None
        self._in_engine = False

    @property
    def stats(self) -> ClipStats | None:
        """The statistics of the last step; None before the first."""
        return None if self.hook is None else self.hook.stats

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = trainer.strategy.model
        self._in_engine = hasattr(trainer.strategy, "deepspeed_engine")
        if self._in_engine:  # its gradients exist only inside engine.step()
            self.hook = attach(model, config=self.config)
        else:
            self.hook = AGCHook(Clipper(model, self.config or AGCConfig()), [])
        announce(self.hook.clipper, sharding_asked="FSDP" in type(trainer.strategy).__name__)
        if trainer.gradient_clip_val and not self._in_engine:
            warn_norm_clipping("gradient_clip_val", trainer.gradient_clip_val, "leave it out", first="AGC")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert self.hook is not None
        if not self._in_engine:
            self.hook.clip(unwrapped(optimizer), _left_over_scale(trainer, optimizer))
        # Under DeepSpeed this comes before engine.step(), so what is logged there is the step before.
        if self.stats is not None:
            every = self.per_parameter_every
            pl_module.log_dict(_tensors(self.stats, every > 0 and (trainer.global_step + 1) % every == 0))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.hook is not None:
            self.hook.remove()


def _left_over_scale(trainer: Trainer, optimizer: Optimizer) -> float | None:
    """The loss scale that gradients still carry here: optimizers that unscale them inside step() (fused Adam)."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        return scaler.get_scale()
    return None


def _tensors(stats: ClipStats, per_parameter: bool) -> dict[str, Tensor]:
    """Tensors and not floats: Lightning decides itself when to wait for the device."""
    values = {f"agc/{name}": getattr(stats, name) for name in _TOTALS}
    if per_parameter:
        for name, of in stats.per_parameter.items():
            values[f"agc/clip_fraction/{name}"] = of.clip_fraction
            values[f"agc/grad_norm/{name}"] = of.grad_norm
    return values
