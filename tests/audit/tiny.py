"""Tiny models of transformers: a configuration with its sizes made small, and inputs for one forward pass."""

import copy
import importlib
import inspect
import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto as auto

LARGEST = 20_000_000  # parameters; a model with more is no tiny one: some size of its has a name that is not below
VOCABULARY = 64
SIDE, PATCH, MELS = 32, 8, 16

# Sizes by the names that configurations give them (regular expressions). Different where layers are to be told apart.
SIZES = {
    r"hidden_size|d_model|n_embd|(embed|hidden|emb|model|encoder|expert_hidden|attention)_dim|dim|embedding_size": 32,
    r"projection_dim|out_hidden_size|word_embed_proj_dim|(cross_)?attention_hidden_size|d_embed|attn_hidden_size": 32,
    r"n_heads?|num_heads|num_q_heads|attention_heads|(\w+_)?(num_)?attention_heads|index_n_heads": 4,
    r"linear_num(_value)?_heads|num_linear_(value|key)_heads|mamba_n_heads|n_mamba_heads|(mamba_)?num_heads": 4,
    r"(\w+_)?num_key_value_heads|num_kv_heads|n_head_kv|kv_n_heads|linear_num_key_heads": 2,
    r"head_dim|(attention|global|index|swa|linear|linear_key|linear_value|attn|v|qk|qk_nope|qk_rope)_head_dim": 8,
    r"d_kv|kv_channels|d_head|attention_head_size|head_size|mamba_head_dim|mamba_d_head|swa_v_head_dim": 8,
    r"(mlp_)?intermediate_size|(encoder_|decoder_)?ffn_dim|ffn_hidden_size|d_ff|n_inner|mlp_dim|dim_feedforward": 48,
    r"intermediate_size_mlp|dense_intermediate_size|intermediate_dim|feed_forward_size|ffn_hidden_size|dff": 48,
    r"(\w+_)?(moe|expert|shared)(_shared)?(_expert)?_(intermediate_size|ffn_hidden_size)|expert_dim": 24,
    r"(moe_)?num_(local_|moe_|routed_)?experts|n_(routed_)?experts": 4,
    r"num_experts_per_tok(en)?|(moe_|router_)?top_?k|moe_k|top_k_experts|num_selected_experts|experts_per_token": 2,
    r"(moe_)?(n|num)_shared_experts?|n_group|topk_group|num_expert_groups?|moe_num_shared_experts": 1,
    r"(\w+_)?num_(hidden_)?layers|n_layers?|(encoder|decoder)_layers|num_(encoder|decoder)_layers|num_blocks": 2,
    r"(q|kv|o)_lora_rank": 12,
    r"(\w+_)?vocab_size|vocab_size_per_layer_input": VOCABULARY,
    r"max_position_embeddings|n_positions|max_(source|target)_positions|n_ctx|max_seq_len|max_sequence_length": 64,
    r"image_size|img_size": SIDE,
    r"patch_size": PATCH,
    r"num_mel_bins|input_feat_per_channel": MELS,
    r"first_k_dense_replace|num_dense_layers|moe_layer_start_index": 1,
}
# Where a size must fit another one in its own way: set after all others, in the configuration and those inside of it.
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_WINDOWS = {
    "embed_dim": 24,
    "hidden_size": 48,
    "depths": [1, 1],
    "num_heads": [3, 6],
    "patch_size": 4,
    "window_size": 4,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_d_state": 8}
_MAMBA2 = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8}
_DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
OWN: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 128},
    "bamba": _MAMBA,
    "bit": _STAGES | {"embedding_size": 8, "num_groups": 4},
    "codegen": {"rotary_dim": 4},
    "convnext": _STAGES | {"image_size": 64},
    "convnextv2": _STAGES | {"image_size": 64},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2_text": _DENSE_THEN_SPARSE,
    "diffusion_gemma_text": {"enable_moe_block": True},
    "dots1": {"first_k_dense_replace": 1},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.3, "hidden_dim": 128},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"mrope_section": [1, 1, 2]}},
    "esm": {"vocab_size": VOCABULARY},
    "falcon_h1": _MAMBA,
    "flint": {"mlp_only_layers": []},
    "gemma4_text": {"enable_moe_block": True},
    "glm4v_moe_text": {"rope_parameters": {"mrope_section": [1, 1, 0]}},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": _MAMBA | {"layer_types": ["linear_attention", "full_attention"]},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6},
    "levit": {"image_size": 224, "patch_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 16, "head_dim": 8, "zero_expert_num": 1},
    "mamba2": _MAMBA2,
    "mistral4": {"head_dim": 16, "qk_head_dim": 16},
    "mobilevitv2": {"patch_size": 2, "image_size": 128},
    "nemotron_h": {
        "n_groups": 1,
        "mamba_num_heads": 8,
        "layers_block_type": ["linear_attention", "full_attention", "moe"],
    },
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "resnet": _STAGES | {"embedding_size": 8},
    "segformer": {
        "num_encoder_blocks": 2,
        "num_attention_heads": [1, 2],
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "patch_sizes": [7, 3],
        "sr_ratios": [4, 1],
        "strides": [4, 2],
        "mlp_ratios": [2, 2],
    },
    "siglip": {"projection_size": 32},
    "speech_to_text": {"input_feat_per_channel": 16, "conv_channels": 32},
    "step3p5": {"sliding_window": 16} | _DENSE_THEN_SPARSE,
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "switch_transformers": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "wav2vec2-bert": {"feature_projection_input_dim": 16},
}
# Set where the default is None, too: it stands for something large, or for what must be given.
NONE_TOO = {
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "n_routed_experts",
    "n_shared_experts",
    "moe_intermediate_size",
    "top_k_experts",
    "num_key_value_heads",
    "vocab_size",
}
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def size(name: str) -> int | None:
    return next((value for pattern, value in SIZES.items() if re.fullmatch(pattern, name)), None)


def inner(config: Any) -> list[Any]:
    return [value for value in vars(config).values() if hasattr(value, "model_type")]


def shrink(config: Any) -> None:
    """Make a configuration small in place, with those inside of it."""
    depth = next((getattr(config, name) for name in DEPTHS if isinstance(getattr(config, name, None), int)), 0)
    names = getattr(type(config), "attribute_map", {})
    for name, value in list(vars(config).items()):
        wanted = size(names.get(name, name)) or size(name)
        if wanted is not None and type(value) in (int, type(None)) and (value is not None or name in NONE_TOO):
            setattr(config, name, wanted)
        elif isinstance(value, (list, tuple)) and len(value) == depth > 2:
            # One thing for each layer: keep both kinds of layers, where there are two.
            kinds = [value[i] for i in range(depth) if value[i] not in value[:i]]
            setattr(config, name, type(value)([*kinds, *value][:2] if len(kinds) > 1 else value[:2]))
        elif isinstance(value, dict) and "mrope_section" in value:
            value["mrope_section"] = [2, 1, 1]
    if vars(config).get("kv_lora_rank"):  # latent attention: as many heads for keys as for queries
        config.num_key_value_heads = vars(config)["num_attention_heads"]
    for token, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")):
        setattr(config, name, token)
    config.use_cache = False
    # One expert at a time, so that what a product takes still lies in the parameter's memory.
    config._experts_implementation = "eager"
    for part in inner(config):
        shrink(part)


def configuration(name: str) -> Any:
    config = CONFIG_MAPPING[name]()
    shrink(config)
    for part in (config, *inner(config)):
        for key, value in OWN.get(name, {}).items():
            if "." in key:
                setattr(getattr(config, key.split(".")[0]), key.split(".")[1], value)
            elif isinstance(value, dict):
                setattr(part, key, (getattr(part, key, None) or {}) | value)
            elif part is config or hasattr(part, key):
                setattr(part, key, value)
                if key in ("layer_types", "layers_block_type"):
                    part.num_hidden_layers = len(value)
    return config


def model_class(config: Any) -> Any:
    """The language model of this configuration, else its plain model, else any model in its file that takes it."""
    speaks = auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if getattr(config, "is_encoder_decoder", False):
        speaks = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    for mapping in (speaks, auto.MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    file = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    return next(
        kind
        for name, kind in vars(file).items()
        if name.endswith("Model")
        and not name.endswith("PreTrainedModel")
        and getattr(kind, "config_class", None) is type(config)
    )


def build(name: str) -> nn.Module:
    config = configuration(name)
    kind = model_class(config)
    with torch.device("meta"):
        large = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    if large > LARGEST:
        raise MemoryError(f"{large} parameters")
    return kind._from_config(config).eval()


# What other models take beside or in place of the usual, by architecture.
INPUTS: dict[str, Any] = {
    "audio-spectrogram-transformer": lambda side: {"input_values": torch.randn(2, 128, MELS)},
    "flava": lambda side: {"pixel_values": torch.randn(2, 3, side, side)},
    "git": lambda side: {"pixel_values": torch.randn(2, 3, side, side)},
    "led": lambda side: {"global_attention_mask": torch.ones(2, 24, dtype=torch.int64)},
    "longformer": lambda side: {"global_attention_mask": torch.ones(2, 24, dtype=torch.int64)},
    "lxmert": lambda side: {"visual_feats": torch.randn(2, 4, 2048), "visual_pos": torch.rand(2, 4, 4)},
    "speech_to_text": lambda side: {"input_features": torch.randn(2, 128, MELS)},
    "videomae": lambda side: {"pixel_values": torch.randn(2, 16, 3, side, side)},
    "vivit": lambda side: {"pixel_values": torch.randn(2, 32, 3, side, side)},
    "wav2vec2-bert": lambda side: {"input_features": torch.randn(2, 128, MELS)},
    "xclip": lambda side: {"pixel_values": torch.randn(2, 8, 3, side, side)},
}


def tokens(length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, length))


def inputs(model: Any) -> dict[str, Any]:
    """For one forward pass: what the model takes first, and what its decoder does."""
    known, config, main = inspect.signature(model.forward).parameters, model.config, model.main_input_name
    given: dict[str, Any] = {}
    side = getattr(config, "image_size", SIDE)
    side = side if isinstance(side, int) else side[0] if isinstance(side, (list, tuple)) else SIDE
    both = getattr(config, "text_config", None) is not None and "return_loss" in known  # CLIP and the like
    if "input_ids" in known:
        given["input_ids"] = tokens(24)
    if main == "pixel_values" or both:
        given["pixel_values"] = torch.randn(2, getattr(config, "num_channels", 3), side, side)
    elif main == "input_features":
        given["input_features"] = torch.randn(2, getattr(config, "num_mel_bins", MELS), 128)
    elif main == "input_values":
        given["input_values"] = torch.randn(2, 4000)
    if "decoder_input_ids" in known:
        given["decoder_input_ids"] = tokens(8)
    if "use_cache" in known:
        given["use_cache"] = False
    return given | INPUTS.get(config.model_type, lambda side: {})(side)
