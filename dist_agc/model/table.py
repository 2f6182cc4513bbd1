"""The table by module type: which dims of a parameter the forward pass of its module does not contract.

No library is imported: a module is known by the names of its class and of those that it derives from. To add a line,
read the forward pass: the dims that it contracts are those that a norm sums over, all others number the units. An
expert is a matrix of its own, and so is each layer of a stack.

It is as long as what is known, and it names modules of training frameworks too: what a forward pass contracts is one
question, who spreads the parameters another, and only that one belongs to frameworks/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from torch import nn

from .names import Owners
from .units import UnitRule

Dims = tuple[int, ...]
# Of a module, the name of a parameter in it and its shape. None: this line does not know such a parameter.
Look = Callable[[Any, str, tuple[int, ...]], "Dims | UnitRule | None"]


@dataclass(frozen=True)
class Kind:
    """One line of the table.

    ``types``: globs over ``module.Class``. ``dims``: by glob over a parameter's name in such a module, which dims
    number its units, or a function that looks at the module. A glob with a dot is over the parameters of modules
    inside of this one, and one without a dot never is. ``why``: a phrase, to go on after the class's name.
    """

    types: tuple[str, ...]
    dims: Mapping[str, Dims | Look]
    why: str

    def look(self, module: nn.Module, name: str, shape: tuple[int, ...]) -> Dims | UnitRule | None:
        for pattern, dims in self.dims.items():
            if pattern.count(".") == name.count(".") and fnmatchcase(name, pattern):
                found = dims(module, name, shape) if callable(dims) else dims
                # A tensor of too few dims is something else that is called alike.
                if isinstance(found, UnitRule) or found == ():
                    return found
                if found is not None and found[-1] < len(shape) > len(found):
                    return found
        return None


def _transposed(module: Any, name: str, shape: tuple[int, ...]) -> Dims | UnitRule | None:
    """A ConvTranspose: (in, out / groups, ...). The magnitudes of a weight norm are told from it by their shape."""
    groups, inputs, outputs = module.groups, module.in_channels, module.out_channels
    if shape == (inputs, outputs // groups, *module.kernel_size):
        return UnitRule((groups, inputs // groups, *shape[1:]), (0, 2), split=0) if groups > 1 else (1,)
    return (0,) if name in ("weight", "weight_g") else None


def _conv1d(module: Any, _: str, shape: tuple[int, ...]) -> Dims | None:
    return (1,) if shape[1:] == (getattr(module, "nf", None),) else None


def _experts(module: Any, name: str, shape: tuple[int, ...]) -> Dims | None:
    """What `use_experts_implementation` of transformers 5 has a module say of itself."""
    transposed = getattr(module, "is_transposed", None)
    if not isinstance(transposed, bool) or not hasattr(module, "has_bias"):
        return None
    if len(shape) == 3:
        return (0, 2) if transposed else (0, 1)
    return (0,) if name.endswith("_bias") else None


def _dbrx(module: Any, _: str, shape: tuple[int, ...]) -> UnitRule | None:
    """(experts * ffn, hidden), of each expert (ffn, hidden), used as x @ w2."""
    experts = module.moe_num_experts
    if len(shape) != 2 or shape[0] % experts:
        return None
    return UnitRule((experts, shape[0] // experts, shape[1]), (0, 2), split=0)


def _funnel(module: Any, _: str, shape: tuple[int, ...]) -> Dims:
    """(d_model, heads, head): contracted with the query over head, or with the positions over d_model."""
    return (0, 1) if module.config.attention_type == "factorized" else (1, 2)


def _megatron(module: Any, name: str, shape: tuple[int, ...]) -> UnitRule | None:
    """``weight2``: (experts * ffn, hidden), of each expert (ffn, hidden), used as x @ w.

    ``weight1`` is (hidden, experts * ffn) and looked at, not transposed, as (experts, hidden, ffn): an expert is a run
    of rows, in which its outputs lie across both dims. No rule can say that, so each expert is one unit.
    """
    experts = module.num_local_experts
    if len(shape) != 2 or shape[0] % experts:
        return None
    return UnitRule((experts, shape[0] // experts, shape[1]), (0, 2) if name == "weight2" else (0,), split=0)


def _adapter(module: Any, name: str, shape: tuple[int, ...]) -> Dims | UnitRule | None:
    """peft's adapters on stacked experts: for each expert, delta = B @ A.

    A is (experts * r, in) and B is (out, r * experts): its columns go over the experts first. Which side of the experts
    is meant by in and out is peft's guess: it takes them for (experts, out, in) unless they say ``is_transposed``, and
    in old versions always for (experts, in, out). Where the table knows better, A and B have changed places.
    """
    experts, swapped = module.num_experts, getattr(module, "_did_swap_in_out_features", False)
    if experts == 1 or len(shape) != 2:
        return None  # as the linear layers that they are
    inputs, outputs = module.in_features, module.out_features
    stack = (experts, outputs, inputs) if swapped else (experts, inputs, outputs)
    base = known(stack, ((module.get_base_layer(), module.parameter_name),))
    # The dim of the experts that A spans must be the one that is contracted.
    straight = base is None or (2 if swapped else 1) not in base.kept
    if name.startswith("lora_A"):
        # a = A x, one for each row; or y = A^T b
        return (0,) if straight else UnitRule((experts, shape[0] // experts, shape[1]), (0, 2), split=0)
    view = (shape[0], shape[1] // experts, experts)
    # y = B a; or b = B^T x, one for each column
    return UnitRule(view, (0, 2), split=1) if straight else (1,)


def _once(_: Any, __: str, shape: tuple[int, ...]) -> Dims | None:
    """Of (1, ...): one of its kind, such as the positions of all patches."""
    return () if len(shape) > 2 and shape[0] == 1 else None


def _vectors(_: Any, __: str, shape: tuple[int, ...]) -> Dims:
    """Each vector along the last dim, as `Embedding` has them."""
    return tuple(range(len(shape) - 1))


ROWS, COLUMNS, STACKED, STACKED_TRANSPOSED = (0,), (1,), (0, 1), (0, 2)
_EACH = "one for each expert and output"
_STACK = "one for each output of each matrix of the stack"
_HF = "transformers.models"

# The first line that knows a parameter counts. Each says how such a module uses its parameters, which is the reason.
TABLE: tuple[Kind, ...] = (
    # ---- torch
    # y = x @ weight.T
    Kind(("torch.nn.modules.linear.Linear",), {"weight*": ROWS}, "rows"),
    # y_o = x1 @ weight[o] @ x2
    Kind(("torch.nn.modules.linear.Bilinear",), {"weight": ROWS}, "one for each output"),
    # An entry is looked up, not contracted; a row is what one entry is made of.
    Kind(("torch.nn.modules.sparse.Embedding*",), {"weight": ROWS}, "rows"),
    Kind(("torch.nn.modules.conv._ConvTransposeNd",), {"weight*": _transposed}, "one for each output channel"),
    # (out, in / groups, ...); gain: that of weight standardisation, (out, 1, ...)
    Kind(("torch.nn.modules.conv._ConvNd",), {"weight*": ROWS, "gain": ROWS}, "one for each output channel"),
    # Linear layers, several below one another
    Kind(("torch.nn.modules.activation.MultiheadAttention",), {"*_proj_weight": ROWS}, "rows"),
    Kind(("torch.nn.modules.rnn.RNN*", "torch.nn.modules.rnn.*Cell*"), {"weight_*": ROWS}, "rows"),
    # ---- transformers
    # y = x @ weight
    Kind(("transformers.pytorch_utils.Conv1D",), {"weight*": _conv1d}, "columns"),
    # Whatever its class is called, and before all that is known of a class by its name in older versions.
    Kind(("*",), {"*_proj": _experts, "*_proj_bias": _experts}, _EACH),
    # Which experts a token goes to: scores = x @ weight.T
    Kind((f"{_HF}.*Router",), {"weight": ROWS}, "rows"),
    # Not decorated: y = x @ w[e].T, w (experts, out, in)
    Kind(
        (f"{_HF}.*.LongcatFlashExperts", f"{_HF}.*.Step3p7Experts", f"{_HF}.*.InklingSharedExperts"),
        {"*_proj": STACKED},
        _EACH,
    ),
    # Before version 5, and Llama 4 in all: y = x @ w[e] + b[e], w (experts, in, out); a bias is a vector an expert
    Kind(
        (f"{_HF}.*.Llama4TextExperts", f"{_HF}.*.GptOssExperts", f"{_HF}.*.Qwen3VLMoeTextExperts"),
        {"*_proj": STACKED_TRANSPOSED, "*_proj_bias": ROWS},
        _EACH,
    ),
    # JetMoe and GraniteMoe: y = x @ weight[e].T; Aria before version 5: y = x @ weight[e]
    Kind((f"{_HF}.*ParallelExperts",), {"weight": STACKED}, _EACH),
    Kind((f"{_HF}.*GroupedExpertsGemm",), {"weight": STACKED_TRANSPOSED}, _EACH),
    # The rows of all experts below one another: x @ w1[e].T, x @ v1[e].T, h @ w2[e]
    Kind((f"{_HF}.*.DbrxExpertGLU",), {"[wv]1": ROWS, "w2": _dbrx}, _EACH),
    # A linear layer for each codebook: y = x @ weight[n].T (Moshi, Kyutai), y = x @ weight[n] (CSM)
    Kind((f"{_HF}.*FlexibleLinear",), {"weight": STACKED}, _STACK),
    Kind((f"{_HF}.*.CsmCodebooksHead",), {"weight": STACKED_TRANSPOSED}, _STACK),
    # A linear layer for each group, block, head, atom: y = x @ weight[g]
    Kind((f"{_HF}.convbert.*.GroupedLinearLayer",), {"weight": STACKED_TRANSPOSED}, _STACK),
    Kind((f"{_HF}.*.RecurrentGemmaRglru",), {"*_gate_weight": STACKED_TRANSPOSED, "*_gate_bias": ROWS}, _STACK),
    Kind((f"{_HF}.*.EsmFold2ConfidenceHead",), {"*_weight": STACKED_TRANSPOSED}, _STACK),
    # y = weight[head] @ x; A_log: (heads, head, state), a channel's decays, with which its states are summed
    Kind(
        (f"{_HF}.*.ZambaMambaMixer",),
        {"*_proj_weight": STACKED, "A_log": STACKED, "dt_proj_bias": ROWS, "D": ROWS},
        "one for each output of each head",
    ),
    # (d_model, heads, head): q, k, v, r are contracted over d_model, o over heads and head. What is added to a query,
    # and a segment's embedding, (2, heads, head), meet a key over head: each head has its own.
    Kind(
        (f"{_HF}.*.XLNetRelativeAttention",),
        {"[qkvr]": (1, 2), "o": ROWS, "r_?_bias": ROWS, "seg_embed": (0, 1)},
        "one for each output",
    ),
    Kind(
        (f"{_HF}.*.FunnelRelMultiheadAttention",),
        {"r_kernel": _funnel, "r_?_bias": ROWS, "seg_embed": (0, 1)},
        "one for each output",
    ),
    # (1, positions, head): query @ k.T, weights @ v
    Kind((f"{_HF}.vits.*.VitsAttention",), {"emb_rel_k": (0, 1), "emb_rel_v": (0, 2)}, "one for each output"),
    # y = x @ weight
    Kind(
        (f"{_HF}.*.Gemma3MultiModalProjector", f"{_HF}.*.T5Gemma2MultiModalProjector"),
        {"mm_input_projection_weight": COLUMNS},
        "columns",
    ),
    Kind((f"{_HF}.*.OmDetTurboLanguageBackbone",), {"text_projection": COLUMNS}, "columns"),
    Kind((f"{_HF}.*.XCLIPModel",), {"prompts_visual_projection": COLUMNS}, "columns"),
    Kind((f"{_HF}.*.AMSoftmaxLoss",), {"weight": COLUMNS}, "columns"),
    Kind((f"{_HF}.sam*PositionalEmbedding", f"{_HF}.edgetam*PositionalEmbedding"), {"pos*": COLUMNS}, "columns"),
    Kind((f"{_HF}.inkling*RelativeLogits",), {"proj": COLUMNS}, "columns"),
    Kind(
        (f"{_HF}.*.SwiftFormerEfficientAdditiveAttention", "timm.models.swiftformer.EfficientAdditiveAttention"),
        {"w_g": COLUMNS},
        "columns",
    ),
    # (taps, channels): a channel is summed over its taps
    Kind((f"{_HF}.*.Inkling2DynamicShortConvolution",), {"static_weight": COLUMNS}, "one for each channel"),
    # Looked up: a code, (1, groups * codes, size)
    Kind((f"{_HF}.*GumbelVectorQuantizer",), {"codevectors": _vectors}, "one for each entry"),
    # Looked up by row and column, by axis and position, by frame, by tile
    Kind(
        (f"{_HF}.*.Kimi_K25VisionPositionEmbeddings", f"{_HF}.gemma4*.*Vision*Embedder"),
        {"pos*_embedding*": _vectors},
        "one for each entry",
    ),
    Kind((f"{_HF}.sam*VideoModel", f"{_HF}.edgetam*VideoModel"), {"memory_temporal_*": _vectors}, "one for each entry"),
    Kind((f"{_HF}.*.VJEPA2PredictorEmbeddings",), {"mask_tokens": _vectors}, "one for each entry"),
    # (layers, 1, positions, size): each layer adds its own
    Kind((f"{_HF}.yolos.*",), {"mid_position_embeddings": ROWS}, "one for each layer"),
    # (heads, rows, columns): a bias on the scores of one head
    Kind((f"{_HF}.*NeighborhoodAttention",), {"rpb": ROWS}, "one for each head"),
    # (1, frames, channels, rows, columns): put around the picture
    Kind((f"{_HF}.*.TvpFrame*Prompter",), {"pad_*": _once}, "one unit"),
    # ---- torchtitan; its names end with the dims: E experts, F and D widths
    # July 2025 and before: y = x @ w[e]
    Kind(
        ("torchtitan.experiments.llama4.*.GroupedExperts", "torchtitan.models.deepseek_v3.model.moe.GroupedExperts"),
        {"w[123]": STACKED_TRANSPOSED},
        _EACH,
    ),
    # y = x @ w[e].T; w13: both in one, (E, F, 2, D)
    Kind(
        ("torchtitan.*GroupedExperts",),
        {"w13": (0, 1, 2), "w[123]*": STACKED, "mlp?_weight*": STACKED, "mlp?_bias*": ROWS},
        _EACH,
    ),
    # x @ w13.T, (F, 2, D)
    Kind(("torchtitan.*.FusedSwiGLU",), {"w13": (0, 1)}, "rows"),
    # (rows, columns, size), interpolated
    Kind(("torchtitan.*.KimiK25VisionEncoder",), {"pos_embed": _vectors}, "one for each entry"),
    # ---- DeepSpeed's AutoEP: y = x @ w[e].T
    Kind(("deepspeed.moe.ep_experts.GroupedExperts",), {"w[123]": STACKED}, _EACH),
    # ---- Megatron-core and Transformer Engine, (out, in); the experts of a GroupedLinear are weight0, weight1, ...
    Kind(("megatron.core.transformer.moe.experts.GroupedMLP",), {"weight2": _megatron}, _EACH),
    Kind(("megatron.core.transformer.moe.experts.GroupedMLP",), {"weight1": _megatron}, "one for each expert"),
    Kind(("megatron.core.tensor_parallel.layers.*",), {"weight": ROWS}, "rows"),
    Kind(("transformer_engine.pytorch.module.*",), {"*weight": ROWS, "weight[0-9]*": ROWS}, "rows"),
    # ---- torchtune: x @ w[e]; x @ weight; what is added to a token of a tile
    Kind(("torchtune.*GroupedExperts",), {"*_proj": STACKED_TRANSPOSED, "lora_*": STACKED_TRANSPOSED}, _EACH),
    Kind(("torchtune.*.CLSProjection",), {"weight": COLUMNS}, "columns"),
    Kind(("torchtune.*Tile*PositionalEmbedding",), {"*embedding": _vectors}, "one for each entry"),
    # ---- peft. Inside of a wrapper around experts the linear layers are no linear layers.
    Kind(
        ("peft.tuners.lora.layer.ParamWrapper",),
        {"lora_A.*.weight": _adapter, "lora_B.*.weight": _adapter},
        "one for each expert and output",
    ),
    # (r, entries), looked up, then (size, r)
    Kind(("peft.tuners.lora.layer.Embedding",), {"lora_embedding_A.*": COLUMNS, "lora_embedding_B.*": ROWS}, "vectors"),
    # ---- CLIP, open_clip, EVA-CLIP: x @ proj
    Kind(
        ("open_clip.transformer.VisionTransformer", "clip.model.VisionTransformer", "eva_clip.*.VisionTransformer"),
        {"proj": COLUMNS},
        "columns",
    ),
    Kind(
        ("open_clip.*.CLIP", "open_clip.*.*Transformer", "clip.model.CLIP", "eva_clip.*.CLIP", "eva_clip.*.Text*"),
        {"text_projection": COLUMNS},
        "columns",
    ),
    # ---- diffusers: x @ w[e]; x @ w; what is added to a step's embedding: shift, scale and gate are vectors each
    Kind(("diffusers.models.*.SwiGLUExperts",), {"*_proj": STACKED_TRANSPOSED}, _EACH),
    Kind(("diffusers.models.*.LocalFacialExtractor",), {"proj_out": COLUMNS}, "columns"),
    Kind(("diffusers.models.*",), {"*scale_shift_table": _vectors, "modul*": _vectors}, "one for each vector"),
    # (out, in, ...), scaled before it is used
    Kind(("diffusers.models.*.MotionConv2d",), {"weight": ROWS}, "one for each output channel"),
    # ---- x-transformers: (heads, n, head), keys that a query meets over head, values that its weights sum over n
    Kind(
        ("x_transformers.*.Attention",),
        {"mem_k": (0, 1), "mem_v": (0, 2), "qk_norm_?_scale": _vectors},
        "one for each output",
    ),
    Kind(("x_transformers.*.MultiheadRMSNorm",), {"gamma": _vectors}, "one for each head"),
    Kind(("x_transformers.*.PolarEmbedding",), {"learned_bias": _vectors}, "one for each head"),
    Kind(("x_transformers.*.HyperConnection",), {"dynamic_alpha_fn": COLUMNS}, "columns"),
    Kind(("x_transformers.*.RelativeProjPositionalBias",), {"distance_bank": COLUMNS}, "columns"),
    Kind(("x_transformers.*.TransformerWrapper",), {"ff_deep_embed": _vectors}, "one for each entry"),
    # ---- fairseq: codes, as above
    Kind(("fairseq.modules.*GumbelVectorQuantizer",), {"vars": _vectors}, "one for each entry"),
    # ---- whatever its class is called: positions and tokens of (1, n, size) are added to the input, or are one, as a
    # whole. Nothing of them is contracted, as little as of a bias.
    Kind(
        ("*",),
        {
            "*pos_emb*": _once,
            "*_pos": _once,
            "*position*": _once,
            "*_embedding*": _once,
            "*token*": _once,
            "*query*": _once,
            "*queries*": _once,
            "*latents*": _once,
            "*prompt*": _once,
        },
        "one unit",
    ),
)


@lru_cache(maxsize=4096)
def _lines(kind: type) -> tuple[Kind, ...]:
    """The lines of the table for modules of this type."""
    names = [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__ if base not in (nn.Module, object)]
    return tuple(line for line in TABLE if any(fnmatchcase(name, glob) for glob in line.types for name in names))


def known(shape: tuple[int, ...], owners: Owners) -> UnitRule | None:
    """What the table knows of a parameter. The outermost module goes first: it decides how those inside are used."""
    for module, name in reversed(owners):
        for line in _lines(type(module)):
            if (found := line.look(module, name, shape)) is not None:
                rule = found if isinstance(found, UnitRule) else UnitRule(shape, found)
                return rule.because(f"{type(module).__name__}: {line.why}")
    return None
