"""Adaptive gradient clipping in the Lightning Trainer.

    from dist_agc.integrations.lightning import AGCCallback
    Trainer(..., callbacks=[AGCCallback(clipping_threshold=0.01, exclude=("head.*",))])

With Fabric no callback is needed: ``dist_agc.attach(model, optimizer)`` takes what ``fabric.setup`` returns.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..attach import attach
from ..clipper import Clipper
from ..config import AGCConfig
from ..frameworks import unwrapped
from ..hook import AGCHook
from ._common import CallbackBase, needed, warn_norm_clipping, warn_unsharded

with needed("lightning", "lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer


class AGCCallback(CallbackBase, Callback):
    """Clips before every optimizer step of a `Trainer`, in automatic and in manual optimization.

    Lightning hands each optimizer a closure that computes the gradients, so AGC runs in ``on_before_optimizer_step``:
    gradients are reduced and unscaled there. ``gradient_clip_val`` clips after that, what AGC left over.
    Statistics go through ``log_dict`` as ``agc/...``. Says in the log which layout it found.

    Args:
        config: an `AGCConfig`; or give its fields as keywords. Under a DeepSpeed strategy, give neither to use the
            block ``"adaptive_gradient_clipping"`` of its config.
        per_parameter_every: log statistics per parameter every so many optimizer steps; 0 for never.
        options: the fields of `AGCConfig`, such as ``clipping_threshold`` and ``exclude``; it says what each does.

    Raises:
        TypeError, ValueError: as `dist_agc.attach`, when training starts.
        ImportError: lightning is not installed.
    """

    def __init__(self, config: AGCConfig | None = None, *, per_parameter_every: int = 0, **options: Any) -> None:
        super().__init__(config, options, per_parameter_every)
        self._in_engine = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = trainer.strategy.model
        self._in_engine = hasattr(trainer.strategy, "deepspeed_engine")
        if self._in_engine:  # its gradients exist only inside engine.step()
            self.hook = attach(model, config=self.config)
        else:
            self.hook = AGCHook(Clipper(model, self.config))
        if "FSDP" in type(trainer.strategy).__name__:
            warn_unsharded(self.hook.clipper)
        if trainer.gradient_clip_val and not self._in_engine:
            warn_norm_clipping("gradient_clip_val", trainer.gradient_clip_val, "leave it out", agc_first=True)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert self.hook is not None
        if not self._in_engine:
            # Gradients still carry their scale here for optimizers that unscale them inside step() (fused Adam).
            unscales = getattr(optimizer, "_step_supports_amp_scaling", False)
            scaler = getattr(trainer.precision_plugin, "scaler", None) if unscales else None
            self.hook.clip(unwrapped(optimizer), None if scaler is None else scaler.get_scale())
        # Under DeepSpeed this comes before engine.step(), so what is logged there is the step before.
        if self.stats:
            # Tensors and not floats: Lightning decides itself when to wait for the device.
            per_parameter = self._per_parameter(trainer.global_step + 1)
            pl_module.log_dict(self.stats._as_tensors(per_parameter=per_parameter))
