"""The ways to clip that `bench` times."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..clipper import Clipper
from ..config import AGCConfig
from .synthetic import Engine
from .timing import Method

FLOOR, NORM = "W and G read once", "clip_grad_norm_"
AGC, REUSED = "dist_agc", "dist_agc, every 10"
KERNEL, KERNEL_REUSED = "dist_agc, kernel", "dist_agc, kernel, every 10"  # cpu_kernel=True
DEEPSPEED, NOTHING = "gradient_clipping 1.0", "no clipping"
INTERVAL = 10


def on_gradients(model: nn.Module, layout: str, config: AGCConfig, *, cpu_kernel: bool = False) -> list[Method]:
    """What works on gradients where they lie; each starts from those that ``model`` has now."""
    parameters = list(model.parameters())
    pairs = [(local(p.detach()), local(p.grad)) for p in parameters if p.grad is not None]
    grads = [grad for _, grad in pairs]
    kept = [grad.clone() for grad in grads]

    def fresh() -> None:
        # In the order in which a backward pass ends with them: the first layers' are the last in the cache.
        for grad, whole in zip(reversed(grads), reversed(kept), strict=True):
            grad.copy_(whole)

    def floor() -> None:
        # Sums, because the norm of a whole tensor is found by a single thread.
        for weight, grad in pairs:
            weight.sum()
            grad.sum()

    def norm() -> None:
        # An infinite norm clips nothing and does all of the work: the gradients are multiplied by 1.
        if layout == "fsdp1":
            model.clip_grad_norm_(math.inf)  # pyright: ignore[reportCallIssue]
        else:
            torch.nn.utils.clip_grad_norm_(parameters, math.inf)

    return [
        Method(FLOOR, floor, fresh),
        Method(f"FSDP1 {NORM}" if layout == "fsdp1" else NORM, norm, fresh, baseline=True),
        *_of_ours(config, cpu_kernel, lambda config: {"call": Clipper(model, config).clip, "before": fresh}),
        _of_others("timm", _timm, lambda clip: clip(parameters, config.clipping_threshold, config.eps), fresh, layout),
        _of_others("Composer", _composer, lambda clip: clip(model, config.clipping_threshold), fresh, layout),
    ]


def in_steps(engine: Engine, config: AGCConfig, *, cpu_kernel: bool = False) -> list[Method]:
    """``engine.step()`` of DeepSpeed with one clipping or another inside."""

    def calls(clipper: Clipper | None, norm: float = 0.0) -> dict[str, Any]:
        return {"call": engine.step, "before": partial(engine.ready, clipper, norm)}

    return [
        Method(NOTHING, **calls(None)),
        Method(DEEPSPEED, **calls(None, 1.0), baseline=True),
        *_of_ours(config, cpu_kernel, lambda config: calls(Clipper.of(engine.parameters, config))),
    ]


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def _of_ours(config: AGCConfig, cpu_kernel: bool, calls: Callable[[AGCConfig], dict[str, Any]]) -> list[Method]:
    """Measuring weights always and every few calls; with ``cpu_kernel`` both once more."""
    kinds = [(AGC, False, 1), (REUSED, False, INTERVAL), (KERNEL, True, 1), (KERNEL_REUSED, True, INTERVAL)]
    return [
        Method(name, **calls(replace(config, cpu_kernel=own, weight_norm_interval=interval)), period=interval)
        for name, own, interval in kinds
        if cpu_kernel or not own
    ]


def _of_others(
    name: str, load: Callable[[], Any], call: Callable[[Any], Any], fresh: Callable[[], None], layout: str
) -> Method:
    if layout not in ("plain", "ddp"):
        return Method(name, reason="knows no shards")
    try:
        clip = load()
    except ImportError as error:
        return Method(name, reason=f"not installed ({error})")
    return Method(name, lambda: call(clip), fresh)


def _timm() -> Callable[[Sequence[Tensor], float, float], None]:
    # The one file: the package around it imports torchvision.
    package = importlib.util.find_spec("timm")
    if package is None or not package.submodule_search_locations:
        raise ImportError("No module named 'timm'")
    path = Path(package.submodule_search_locations[0], "utils", "agc.py")
    spec = importlib.util.spec_from_file_location("timm_utils_agc", path)
    if spec is None or spec.loader is None or not path.exists():
        raise ImportError(f"timm has no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.adaptive_clip_grad


def _composer() -> Callable[[nn.Module, float], None]:
    clip = import_module("composer.algorithms.gradient_clipping").apply_gradient_clipping
    return lambda model, threshold: clip(model, "adaptive", threshold, False)
