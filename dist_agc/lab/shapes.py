"""Models by their shapes alone, for `bench` and `plan`, and models of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

Shapes = dict[str, tuple[int, ...]]


def build(shapes: Shapes, device: str = "meta") -> nn.Module:
    """A module with parameters of these names and shapes, and no forward."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, attribute = name.split(".")
        module = root
        for step in path:
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        module.register_parameter(attribute, nn.Parameter(torch.empty(shape, device=device)))
    return root


def gpt2_small() -> Shapes:
    width, shapes = 768, {"wte.weight": (50257, 768), "wpe.weight": (1024, 768)}
    for i in range(12):
        layer = {"ln_1": (width,), "attn": (3 * width, width), "proj": (width, width), "ln_2": (width,)}
        layer |= {"fc": (4 * width, width), "out": (width, 4 * width)}
        for name, shape in layer.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[:1]}
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def _bottlenecks() -> list[tuple[str, tuple[int, ...]]]:
    convolutions, inputs = [("conv1", (64, 3, 7, 7))], 64
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            convolutions += [
                (f"{name}.conv1", (width, inputs, 1, 1)),
                (f"{name}.conv2", (width, width, 3, 3)),
                (f"{name}.conv3", (4 * width, width, 1, 1)),
            ]
            if block == 0:
                convolutions.append((f"{name}.downsample", (4 * width, inputs, 1, 1)))
            inputs = 4 * width
    return convolutions


def resnet50() -> Shapes:
    shapes: Shapes = {}
    for name, shape in _bottlenecks():
        norm = name.replace("conv", "bn").replace("downsample", "downsample_bn")
        shapes |= {f"{name}.weight": shape, f"{norm}.weight": shape[:1], f"{norm}.bias": shape[:1]}
    return shapes | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


def nf_resnet50() -> Shapes:
    """ResNet-50 without normalisation: scaled weight standardisation has a gain and a bias per channel."""
    shapes: Shapes = {}
    for name, shape in _bottlenecks():
        shapes |= {f"{name}.weight": shape, f"{name}.gain": (shape[0], 1, 1, 1), f"{name}.bias": shape[:1]}
    return shapes | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


def _llama(layers: int, width: int, hidden: int, key_value: int, vocabulary: int = 128256) -> Shapes:
    shapes: Shapes = {"embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        layer = {"input_norm": (width,), "q_proj": (width, width), "k_proj": (key_value, width)}
        layer |= {"v_proj": (key_value, width), "o_proj": (width, width), "post_norm": (width,)}
        layer |= {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def moe_8x7b() -> Shapes:
    """A mixture of 8 experts in every layer, stacked into tensors of (experts, out, in)."""
    shapes: Shapes = {}
    for name, shape in _llama(32, 4096, 14336, 1024, 32000).items():
        if any(part in name for part in ("gate_proj", "up_proj", "down_proj")):
            name, shape = name.removesuffix("_proj.weight"), (8, *shape)
            layer, _, which = name.rpartition(".")
            name = f"{layer}.experts.{which}"
        shapes[name] = shape
    return shapes | {f"layers.{i}.router.weight": (8, 4096) for i in range(32)}


PRESETS: dict[str, Callable[[], Shapes]] = {
    "resnet50": resnet50,
    "nf-resnet50": nf_resnet50,
    "gpt2-small": gpt2_small,
    "llama3-8b": partial(_llama, 32, 4096, 14336, 1024),
    "llama3-70b": partial(_llama, 80, 8192, 28672, 1024),
    "llama3-405b": partial(_llama, 126, 16384, 53248, 1024),
    "moe-8x7b": moe_8x7b,
}
# The overrides that a preset's units need.
UNITS: dict[str, dict[str, tuple[int, ...]]] = {"moe-8x7b": {"*.experts.*": (0, 1)}}


def named(spec: str) -> Callable[[], Any]:
    """What ``package.module:factory`` names, found from the current folder too.

    Raises:
        ValueError: nothing that can be called.
    """
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{spec!r} is not of the form package.module:factory.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{spec!r} cannot be loaded: {error}.") from error
    if not callable(found):
        raise ValueError(f"{spec!r} cannot be called.")
    return found


def load(model: str, device: str = "meta") -> nn.Module:
    """A preset, or what ``package.module:factory`` returns when it is called on ``device``.

    Raises:
        ValueError: neither of them.
    """
    if model in PRESETS:
        return build(PRESETS[model](), device)
    if ":" not in model:
        raise ValueError(f"{model!r} is no preset ({', '.join(PRESETS)}) and not of the form package.module:factory.")
    with torch.device(device):
        made = named(model)()
    if not isinstance(made, nn.Module):
        raise ValueError(f"{model!r} returned a {type(made).__name__}; expected a torch.nn.Module.")
    return made
