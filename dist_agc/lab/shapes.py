"""Models by their shapes alone, for `bench` and `plan`, and models of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .. import conformance

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


def _llama(layers: int, width: int, hidden: int, key_value: int) -> Shapes:
    vocabulary = 128256
    shapes: Shapes = {"embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        layer = {"input_norm": (width,), "q_proj": (width, width), "k_proj": (key_value, width)}
        layer |= {"v_proj": (key_value, width), "o_proj": (width, width), "post_norm": (width,)}
        layer |= {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


# Mixtures of experts as transformers 5.23 builds them, with the experts of a layer stacked. Sizes are those that were
# published, which the config classes of transformers have for defaults: MixtralConfig, DeepseekV3Config, GptOssConfig.
# Qwen3MoeConfig's are those of a smaller model; Qwen3-30B-A3B is 48 layers deep and has heads of 128.


def _decoder(layers: int, width: int, vocabulary: int, layer: Callable[[int], Shapes]) -> Shapes:
    """``layer``: what is in a layer beside its two norms, by number."""
    norms = {f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes: Shapes = {"embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in (norms | layer(i)).items()}
    return shapes | {"norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def _attention(width: int, queries: int, key_values: int) -> Shapes:
    shapes = {"q_proj": (queries, width), "k_proj": (key_values, width), "v_proj": (key_values, width)}
    return {f"self_attn.{name}.weight": shape for name, shape in {**shapes, "o_proj": (width, queries)}.items()}


def _gated(path: str, width: int, hidden: int) -> Shapes:
    shapes = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
    return {f"{path}.{name}.weight": shape for name, shape in shapes.items()}


def _experts(experts: int, width: int, hidden: int) -> Shapes:
    """Stacks of (experts, out, in), and what chooses among them."""
    stacks = {"gate_up_proj": (experts, 2 * hidden, width), "down_proj": (experts, width, hidden)}
    return {f"mlp.experts.{name}": shape for name, shape in stacks.items()} | {"mlp.gate.weight": (experts, width)}


def mixtral_8x7b() -> Shapes:
    return _decoder(32, 4096, 32000, lambda i: _attention(4096, 4096, 1024) | _experts(8, 4096, 14336))


def qwen3_30b_a3b() -> Shapes:
    heads = {f"self_attn.{name}_norm.weight": (128,) for name in "qk"}
    return _decoder(48, 2048, 151936, lambda i: _attention(2048, 4096, 512) | heads | _experts(128, 2048, 768))


def deepseek_v3() -> Shapes:
    """Without the layer that predicts a second token, which transformers leaves out."""
    width, compressed = 7168, {"q_a": 1536, "kv_a": 512}
    latent = {"q_a_proj": (1536, width), "q_b_proj": (128 * 192, 1536), "kv_a_proj_with_mqa": (512 + 64, width)}
    latent |= {"kv_b_proj": (128 * 256, 512), "o_proj": (width, 128 * 128)}
    latent |= {f"{name}_layernorm": (size,) for name, size in compressed.items()}
    attention = {f"self_attn.{name}.weight": shape for name, shape in latent.items()}
    experts = _experts(256, width, 2048) | _gated("mlp.shared_experts", width, 2048)
    return _decoder(61, width, 129280, lambda i: attention | (_gated("mlp", width, 18432) if i < 3 else experts))


def gpt_oss_120b() -> Shapes:
    """Stacks of (experts, in, out)."""
    width, hidden, experts = 2880, 2880, 128
    attention = _attention(width, 4096, 512)
    biases = {name.replace(".weight", ".bias"): shape[:1] for name, shape in attention.items()}
    layer: Shapes = attention | biases | {"self_attn.sinks": (64,)}
    layer |= {
        "mlp.experts.gate_up_proj": (experts, width, 2 * hidden),
        "mlp.experts.down_proj": (experts, hidden, width),
    }
    layer |= {"mlp.experts.gate_up_proj_bias": (experts, 2 * hidden), "mlp.experts.down_proj_bias": (experts, width)}
    layer |= {"mlp.router.weight": (experts, width), "mlp.router.bias": (experts,)}
    return _decoder(36, width, 201088, lambda i: layer)


PRESETS: dict[str, Callable[[], Shapes]] = {
    "resnet50": resnet50,
    "nf-resnet50": nf_resnet50,
    "gpt2-small": gpt2_small,
    "llama3-8b": partial(_llama, 32, 4096, 14336, 1024),
    "llama3-70b": partial(_llama, 80, 8192, 28672, 1024),
    "llama3-405b": partial(_llama, 126, 16384, 53248, 1024),
    "mixtral-8x7b": mixtral_8x7b,
    "qwen3-30b-a3b": qwen3_30b_a3b,
    "deepseek-v3": deepseek_v3,
    "gpt-oss-120b": gpt_oss_120b,
    "moe-8x7b": mixtral_8x7b,  # its first name
}
_STACKED: dict[str, tuple[int, ...]] = {"*.experts.*": (0, 1)}
# The modules of a preset have no types, so it says what the table of `dist_agc.model.kinds` says of the model.
UNITS: dict[str, dict[str, tuple[int, ...]]] = {
    **dict.fromkeys(("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "moe-8x7b"), _STACKED),
    "gpt-oss-120b": {"*.experts.*_proj": (0, 2)},
}


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
    """A preset, or what ``package.module:factory`` makes when it is called on ``device``.

    Raises:
        ValueError: neither of them; it makes something else.
    """
    if model in PRESETS:
        return build(PRESETS[model](), device)
    if ":" not in model:
        raise ValueError(f"{model!r} is no preset ({', '.join(PRESETS)}) and not of the form package.module:factory.")
    with torch.device(device):
        made = named(model)()
    try:
        return conformance.module_and_loss(made)[0]
    except TypeError as error:
        raise ValueError(f"{model!r}: {error}") from error
