"""Adaptive gradient clipping in the Hugging Face Trainer.

    from dist_agc.integrations.transformers import AGCCallback
    Trainer(..., callbacks=[AGCCallback(clipping_threshold=0.01, exclude=("lm_head.*",))])

A DeepSpeed config may hold the settings instead.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from ..attach import attach
from ..config import AGCConfig
from ..frameworks import unwrapped
from ._common import CallbackBase, logger, needed, warn_norm_clipping, warn_unsharded

with needed("transformers", "transformers"):
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

_DEFAULT = 1.0  # of TrainingArguments.max_grad_norm; nothing tells it from a 1.0 that was asked for


class AGCCallback(CallbackBase, TrainerCallback):
    """Clips inside every real optimizer step of a `Trainer`: plain, DDP, FSDP and DeepSpeed alike.

    At the beginning of training it attaches to the optimizer, or to the DeepSpeed engine, logs which layout it found,
    and from then on adds ``agc/...`` to the Trainer's logs, for every logger that the Trainer reports to.

    ``max_grad_norm`` clips by the global norm, before AGC, and is 1.0 unless said otherwise. AGC takes its place.

    Args:
        config: an `AGCConfig`; or give its fields as keywords. Under DeepSpeed, give neither to use the block
            ``"adaptive_gradient_clipping"`` of the DeepSpeed config.
        norm_clipping: None switches off a ``max_grad_norm`` at its default of 1.0 and warns of any other. True keeps
            it, False switches it off, both without a warning.
        per_parameter_every: log statistics per parameter every so many steps; 0 for never.
        during_backward: as in `dist_agc.attach`. LOMO, AdaLomo and layer-wise GaLore or Apollo want it, because they
            step inside of backward.
        options: the fields of `AGCConfig`, such as ``clipping_threshold`` and ``exclude``; it says what each does.

    Raises:
        TypeError, ValueError: as `dist_agc.attach`, when training begins. With ``during_backward=True`` also where
            gradients are accumulated over several batches, or carry a loss scale (fp16).
        ImportError: transformers is not installed.
    """

    def __init__(
        self,
        config: AGCConfig | None = None,
        *,
        norm_clipping: bool | None = None,
        per_parameter_every: int = 0,
        during_backward: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(config, options, per_parameter_every)
        self.norm_clipping = norm_clipping
        self.during_backward = during_backward
        self._settled: Any = None  # the TrainingArguments whose max_grad_norm was looked at

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._settle_norm_clipping(args, state)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self._trainer(state)
        self._settle_norm_clipping(args, state)
        # Loggers are callbacks too and come first by default: agc/... must be in the logs before they see them.
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)
        self.on_train_end()  # of a training before that ended in an error
        model: Any = trainer.model_wrapped
        if trainer.is_deepspeed_enabled:
            settings: dict[str, Any] = {"config": self.config, "norm_clipping": self.norm_clipping}
            self.hook = attach(model, **settings, during_backward=self.during_backward)  # which it refuses
        elif args.deepspeed:
            raise ValueError(
                "TrainingArguments has a DeepSpeed config, but the Trainer runs without DeepSpeed (`accelerate launch "
                "--cpu` makes it do so), and nothing would read the config's settings: mend that, or leave out "
                "deepspeed=..."
            )
        else:
            if self.during_backward:
                _refuse_backward(args, trainer)
            optimizer: Any = unwrapped(trainer.optimizer)
            if self.during_backward and isinstance(optimizer, LayerWiseDummyOptimizer):
                optimizer = list((optimizer.optimizer_dict or {}).values())
            self.hook = attach(model, optimizer, self.config, during_backward=self.during_backward)
        if trainer.is_fsdp_enabled or args.fsdp:
            warn_unsharded(self.hook.clipper)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        # Without a loss: the logs of an evaluation, the summary at the end.
        if self.stats and logs is not None and "loss" in logs:
            values = self.stats.as_dict(per_parameter=self._per_parameter(state.global_step))
            logs.update(values)
            state.log_history[-1].update(values)

    def _trainer(self, state: Any) -> Trainer:
        """The Trainer that runs this callback: callbacks are not told, and only it has the engine and the wrapped
        model. So it is among the callers; its ``state`` tells it from one that runs another inside of it."""
        frame = sys._getframe(1)
        while frame is not None:
            found = frame.f_locals.get("self")
            if isinstance(found, Trainer) and found.state is state:
                return found
            frame = frame.f_back
        raise RuntimeError("AGCCallback runs under transformers.Trainer alone: Trainer(callbacks=[AGCCallback(...)]).")

    def _settle_norm_clipping(self, args: Any, state: Any) -> None:
        if self._settled is args:
            return
        self._settled = args
        asked, plugin = args.max_grad_norm, getattr(args, "deepspeed_plugin", None)
        if self.norm_clipping or asked <= 0:
            return
        speak = self.norm_clipping is None and state.is_world_process_zero
        if self.norm_clipping is None and (asked != _DEFAULT or (plugin is not None and _said(args.deepspeed))):
            if speak and plugin is None:  # a DeepSpeed engine says it itself
                advice = "set it to 0, or give AGCCallback(norm_clipping=True)"
                warn_norm_clipping("max_grad_norm", asked, advice, agc_first=self.during_backward)
            return
        # The Trainer insists that the two are equal, so both change. The engine is made later.
        args.max_grad_norm = 0.0
        if plugin is not None:
            plugin.hf_ds_config.config["gradient_clipping"] = 0.0
        if speak:
            logger.warning(
                "AGCCallback switched off max_grad_norm, which was at its default of 1.0: AGC takes the place of norm "
                "clipping. AGCCallback(norm_clipping=True) keeps it; max_grad_norm=0 says the same without this line."
            )


def _refuse_backward(args: Any, trainer: Trainer) -> None:
    """Where the gradients of one backward are not what a step takes."""
    if args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"AGCCallback(during_backward=True) cannot be right with gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}: the gradient of each micro-batch would be clipped by itself, and AGC "
            "judges that of the whole batch. Set it to 1, or leave during_backward out."
        )
    if trainer.accelerator.scaler is not None:
        raise ValueError(
            "AGCCallback(during_backward=True) cannot be right with fp16=True: gradients carry the loss scale in "
            "backward. Train in bf16, or leave during_backward out."
        )


def _said(config: Any) -> bool:
    """Whether the user has given DeepSpeed a number for gradient_clipping: in the config, a dict or a file, or in the
    questions of ``accelerate config``. In the plugin's own config it stands beside those that took the place of
    "auto"."""
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    config = config or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    said = "auto" if config == "none" else HfDeepSpeedConfig(config).get_value("gradient_clipping")
    return isinstance(said, float | int) or os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto") != "auto"
