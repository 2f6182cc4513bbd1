"""DeepSpeed: AGC from the JSON config, inside every real optimizer step.

    from dist_agc.integrations.deepspeed import initialize       # in place of deepspeed.initialize

    engine, optimizer, _, _ = initialize(model=model, model_parameters=model.parameters(), config="ds_config.json")

with ``"adaptive_gradient_clipping": {"clipping_threshold": 0.01, "exclude": ["head.*"]}`` in the JSON.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..clipper import Clipper
from ..config import AGCConfig
from ..hooks import AGCHook, check_free
from ..layouts import zero

BLOCK = "adaptive_gradient_clipping"


class EngineHook(AGCHook):
    """The handle of AGC in a DeepSpeed engine, also found as ``engine.agc``."""

    def __init__(self, engine: Any, config: AGCConfig, norm_clipping: bool | None = None) -> None:
        clipper = Clipper.of_placed(zero.place(engine), config)
        optimizers = zero.optimizers(engine)
        for optimizer in optimizers:
            check_free(optimizer)
        super().__init__(clipper, optimizers)
        self._engine, self._norm_clip, self._load = engine, zero.norm_clip(engine), engine.load_checkpoint
        self._known = {id(placed.layout.holder) for placed in clipper._placed}
        self._settle_norm_clip(norm_clipping)
        engine.load_checkpoint = self._load_checkpoint
        engine.agc = self

    def _settle_norm_clip(self, wanted: bool | None) -> None:
        """DeepSpeed's own default of 1.0 must not silently stack on AGC; what the user asked for stays."""
        keep = "gradient_clipping" in self._engine.config if wanted is None else wanted
        if not keep:
            zero.set_norm_clip(self._engine, 0.0)
        if wanted is not None or self._norm_clip <= 0:
            return
        if keep:
            _say(
                f"gradient_clipping = {self._norm_clip} is kept, and clips the norm of all gradients before AGC sees "
                'them; "gradient_clipping": 0.0 leaves the clipping to AGC.'
            )
        else:
            _say(f"gradient_clipping is 0.0 instead of DeepSpeed's default {self._norm_clip}: AGC clips.")

    def _load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """``engine.load_checkpoint``, after which the norm to clip to is what it was, not what the checkpoint says."""
        settled = zero.norm_clip(self._engine)
        try:
            return self._load(*args, **kwargs)
        finally:
            zero.set_norm_clip(self._engine, settled)

    # As the one that it overrides: a compiled step calls it between two graphs.
    @torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
    def clip(self, optimizer: Optimizer, grad_scale: Tensor | float | None = None) -> None:
        """Clip what the base optimizer holds in this call of its step.

        Raises:
            RuntimeError: it holds a gradient that the engine did not have when AGC was attached.
        """
        zero.pass_thresholds_on(self._engine)
        for holder in (p for group in optimizer.param_groups for p in group["params"]):
            if holder.grad is not None and id(holder) not in self._known:
                raise RuntimeError(
                    f"the optimizer steps on a tensor of shape {tuple(holder.shape)} that AGC does not know, so it "
                    "would not be clipped: parameters were added or made anew after AGC was attached. Call "
                    "engine.agc.remove() and dist_agc.attach(engine) after such a change."
                )
        super().clip(optimizer, grad_scale)

    def remove(self) -> None:
        """Stop clipping; ``gradient_clipping`` is again what it was."""
        if self._handles:
            zero.set_norm_clip(self._engine, self._norm_clip)
            self._engine.load_checkpoint = self._load
            self._engine.agc = None
        super().remove()


def attach_engine(
    engine: Any,
    optimizer: Any = None,
    config: AGCConfig | None = None,
    *,
    norm_clipping: bool | None = None,
    **options: Any,
) -> EngineHook:
    """Clip inside every real step of a DeepSpeed engine; `dist_agc.attach` calls this.

    Settings are the block ``"adaptive_gradient_clipping"`` of the engine's config, and keyword options beside it.

    Args:
        engine: the engine.
        optimizer: None, or the engine's own.
        config, options: as for `dist_agc.attach`.
        norm_clipping: None switches off a ``gradient_clipping`` that the config does not mention and keeps one that it
            does, either with a warning. True keeps it, False switches it off, both silently.

    Raises:
        TypeError: an optimizer that is not the engine's, an unknown option, a value of the wrong type.
        ValueError: an option that contradicts the block, a pattern that matches nothing, a mode in which AGC would
            not reach every gradient.
    """
    if not any(optimizer is known for known in (None, engine.optimizer, engine.basic_optimizer)):
        raise TypeError("attach(engine) takes no optimizer: it clips in the step of the engine's own.")
    block = read_block(engine.config)
    if block is not None and not block.pop("enabled"):
        raise ValueError(
            f'the config says "{BLOCK}": {{"enabled": false}}: say true, or do not call attach. '
            "dist_agc.integrations.deepspeed.initialize obeys either."
        )
    return EngineHook(engine, _settings(block or {}, config, options), norm_clipping)


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
    """
    deepspeed = _deepspeed()
    given = inspect.signature(deepspeed.initialize).bind(*args, **kwargs).arguments
    config = given.get("config") or given.get("config_params") or getattr(given.get("args"), "deepspeed_config", None)
    if isinstance(config, str | os.PathLike) and os.path.exists(config):
        import hjson  # what DeepSpeed reads its config with

        with open(config) as file:
            config = hjson.load(file)
    if isinstance(config, Mapping):
        read_block(config)
    made = deepspeed.initialize(*args, **kwargs)
    engine = made[0]
    engine.agc = None
    block = read_block(engine.config)
    if block is not None and block.pop("enabled"):
        EngineHook(engine, AGCConfig(**block))
    return made


def check(engine: Any) -> AGCHook | None:
    """The handle of AGC in ``engine``; None where its config does not ask for AGC.

    Raises:
        RuntimeError: the config has a block that nothing reads, as after the plain ``deepspeed.initialize``.
    """
    hook = getattr(engine, "agc", None)
    block = read_block(engine.config)
    if hook is None and block is not None and block["enabled"]:
        raise RuntimeError(
            f'the DeepSpeed config has "{BLOCK}", and nothing reads it: make the engine with '
            "dist_agc.integrations.deepspeed.initialize, or call dist_agc.attach(engine)."
        )
    return hook


def read_block(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The block of a DeepSpeed config, checked, with ``"enabled"``; None where there is none.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: an unknown key, a value out of range, or a block whose name is nearly right.
    """
    if BLOCK not in config:
        if near := difflib.get_close_matches(BLOCK, [str(key) for key in config], n=1, cutoff=0.8):
            raise ValueError(f'the DeepSpeed config has "{near[0]}"; did you mean "{BLOCK}"?')
        return None
    given = config[BLOCK]
    if not isinstance(given, Mapping):
        raise TypeError(f'"{BLOCK}" must be a block such as {{"clipping_threshold": 0.01}}, got {given!r}.')
    block = {"enabled": True, **given}
    known = ["enabled", *(field.name for field in fields(AGCConfig))]
    if unknown := [key for key in block if key not in known]:
        raise ValueError(f'unknown key "{unknown[0]}" in "{BLOCK}"; the keys are {", ".join(known)}.')
    if not isinstance(block["enabled"], bool):
        raise TypeError(f'"{BLOCK}": "enabled" must be true or false, got {block["enabled"]!r}.')
    try:
        AGCConfig(**{key: value for key, value in block.items() if key != "enabled"})
    except (TypeError, ValueError) as error:
        raise type(error)(f'"{BLOCK}": {error}') from None
    return block


def _settings(block: Mapping[str, Any], config: AGCConfig | None, options: Mapping[str, Any]) -> AGCConfig:
    """The block with options beside it: each may add to the other, none may contradict it."""
    asked = AGCConfig.of(config, options)
    said = AGCConfig(**block)
    merged = dict(options) if config is None else {f.name: getattr(config, f.name) for f in fields(config)}
    for name in block:
        if name in merged and getattr(asked, name) != getattr(said, name):
            raise ValueError(
                f"{name} is {getattr(asked, name)!r} here and {getattr(said, name)!r} in the DeepSpeed config's "
                f'"{BLOCK}": say it once.'
            )
    return AGCConfig(**{**block, **merged})


def _say(text: str) -> None:
    # DeepSpeed's logger shows nothing below a warning unless it is told to.
    _deepspeed().utils.log_dist(f"dist_agc: {text}", ranks=[0], level=logging.WARNING)


def _deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError:
        raise ImportError("this needs DeepSpeed: pip install 'dist-agc[deepspeed]'") from None
    return deepspeed
