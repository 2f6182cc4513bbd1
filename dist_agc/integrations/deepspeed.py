"""DeepSpeed: AGC from the JSON config, inside every real optimizer step.

    from dist_agc.integrations.deepspeed import initialize       # in place of deepspeed.initialize

    engine, optimizer, _, _ = initialize(model=model, model_parameters=model.parameters(), config="ds_config.json")

with ``"adaptive_gradient_clipping": {"clipping_threshold": 0.01, "exclude": ["head.*"]}`` in the JSON.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from ..attach import attach
from ..frameworks.deepspeed import BLOCK, read_block
from ..hook import AGCHook
from ._common import logger, needed


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize``, with AGC where the config has a block ``"adaptive_gradient_clipping"``.

    The block holds the fields of `AGCConfig` and ``"enabled"`` (default true). ``engine.agc`` is the handle, None
    where the config has no block or switches it off.

    Args:
        args, kwargs: those of ``deepspeed.initialize``, whatever the version.

    Returns:
        ``(engine, optimizer, training_dataloader, lr_scheduler)``, as ``deepspeed.initialize`` does.

    Raises:
        TypeError, ValueError: the block is wrong; said before the engine is built where the config can be read.
        ImportError: DeepSpeed is not installed.
    """
    with needed("deepspeed", "deepspeed"):
        import deepspeed
    given = inspect.signature(deepspeed.initialize).bind(*args, **kwargs).arguments
    config = given.get("config") or given.get("config_params") or getattr(given.get("args"), "deepspeed_config", None)
    if isinstance(config, str | os.PathLike) and os.path.exists(config):
        import hjson  # what DeepSpeed reads its config with

        with open(config) as file:
            config = hjson.load(file)
    if isinstance(config, Mapping):
        read_block(config)
    made: Any = deepspeed.initialize(*args, **kwargs)
    engine = made[0]
    engine.agc = None
    if _asked(engine):
        attach(engine)
    else:
        logger.info('AGC is off: the DeepSpeed config has no block "%s", or switches it off.', BLOCK)
    return made


def check(engine: Any) -> AGCHook | None:
    """The handle of AGC in ``engine``; None where its config does not ask for AGC.

    Raises:
        RuntimeError: the config has a block that nothing reads, as after the plain ``deepspeed.initialize``.
    """
    hook = getattr(engine, "agc", None)
    if hook is None and _asked(engine):
        raise RuntimeError(
            f'the DeepSpeed config has "{BLOCK}", and nothing reads it: make the engine with '
            "dist_agc.integrations.deepspeed.initialize, or call dist_agc.attach(engine)."
        )
    return hook


def _asked(engine: Any) -> bool:
    """Whether the engine's config asks for AGC."""
    block = read_block(engine.config)
    return block is not None and block["enabled"]
