"""Adaptive gradient clipping with Accelerate, in one call for every backend.

    from dist_agc.integrations.accelerate import attach
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    hook = attach(accelerator, model, optimizer, clipping_threshold=0.01, exclude=("head.*",))

``dist_agc.attach(model, optimizer)`` does too. This one also checks what it is given.
"""

from __future__ import annotations

import os
from typing import Any

from ..attach import attach as _attach
from ..config import AGCConfig
from ..frameworks import Model, modules
from ..hook import AGCHook
from ._common import needed, warn_unsharded

with needed("accelerate", "accelerate"):
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer


def attach(
    accelerator: Accelerator, model: Model, optimizer: Any = None, config: AGCConfig | None = None, **options: Any
) -> AGCHook:
    """Clip inside every real optimizer step, under whatever Accelerate was configured for.

    Accumulated gradients are clipped once, whole. Under DeepSpeed ``accelerator.backward()`` itself steps, so this
    attaches to the engine, and the block ``"adaptive_gradient_clipping"`` of its config counts. Leave out
    ``accelerator.clip_grad_norm_``: AGC takes its place.

    Args:
        accelerator: the one that prepared the model.
        model, optimizer: what ``accelerator.prepare`` returned; lists of models and of optimizers are allowed. A model
            that you have sharded yourself: what ``accelerator.prepare_model(model, evaluation_mode=True)`` returned.
        config, options: an `AGCConfig`, or its fields as keywords; as for `dist_agc.attach`.

    Raises:
        TypeError, ValueError: as `dist_agc.attach`; a model or an optimizer that was not prepared.
        ImportError: accelerate is not installed.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"expected an accelerate.Accelerator first, got {type(accelerator).__name__}.")
    optimizers = optimizer if isinstance(optimizer, list | tuple) else [] if optimizer is None else [optimizer]
    for one in optimizers:
        if not isinstance(one, AcceleratedOptimizer):
            raise ValueError(f"the {type(one).__name__} was not prepared: give what accelerator.prepare returned.")
    for one in modules(model) or [model]:
        if getattr(one, "_is_accelerate_prepared", False):
            continue
        raise ValueError(
            f"the {type(one).__name__} was not prepared: give what accelerator.prepare returned, or, for a model "
            "that you have sharded yourself, accelerator.prepare_model(model, evaluation_mode=True)."
        )
    # A DeepSpeed engine has one optimizer, which attach takes as it is.
    hook = _attach(model, optimizers[0] if len(optimizers) == 1 else optimizer, config, **options)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        warn_unsharded(hook.clipper)
    return hook
