"""The table by module type against autograd: the weights that one output depends on are one unit's and no others.

Modules are the library's own where it is installed. Of a module that is costly to build, or of a library that is not
installed, a bare one of the same type holds the parameter, and an equation says what the library's forward does.
"""

import importlib
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import dist_agc
import oracle
from dist_agc.model import table

# ---- what one output depends on

_PRODUCTS = {"linear", "matmul", "__matmul__", "bmm", "mm", "einsum", "baddbmm", "_grouped_mm"}


class _Outputs(TorchFunctionMode):
    """Keeps what products give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.__name__ in _PRODUCTS and out.requires_grad:
            self.seen.append(out)
        return out


def outputs_of(parameter: Tensor, run: Callable[[], Any]) -> list[Tensor]:
    """What the products of ``parameter`` itself give: not those of what was computed from their outputs."""
    with _Outputs() as mode:
        run()
    found: list[Tensor] = []
    for out in mode.seen:
        to = torch.autograd.grad((out * 1).sum(), [parameter, *found], retain_graph=True, allow_unused=True)
        if to[0] is not None and all(grad is None for grad in to[1:]):
            found.append(out)
    return [one for out in found for one in out.flatten()]


def assert_units(row: dist_agc.observe.UnitRow, parameter: Tensor, outputs: list[Tensor]) -> None:
    """Every output depends on the weights of one unit and on all of them, and every unit has an output."""
    labels, units = oracle.unit_labels(row.view, oracle.Units(row.dims))
    labels, seen = labels.reshape(parameter.shape), set()
    assert units == row.count
    for out in outputs:
        (touched,) = torch.autograd.grad(out, parameter, retain_graph=True)
        members = {int(label) for label in labels[touched != 0]}
        if members:
            assert len(members) == 1, f"{row.name}: one output depends on {len(members)} units"
            assert int((touched != 0).sum()) == int((labels == next(iter(members))).sum()), f"{row.name}: on a part"
        seen |= members
    assert seen == set(range(units)), f"{row.name}: {len(seen)} of {units} units have an output"


# ---- bare modules: a parameter's shape and what is done with it

# "eti,eio->eto": einsum with an input, the parameter second. "vectors": each along the last dim is added or looked up.
# "each": each index of dim 0 is. "whole": all of it is.
Use = tuple[tuple[int, ...], str]


def bare(path: str, uses: dict[str, Use], **attributes: Any) -> nn.Module:
    """A module of this type with nothing but these parameters: of the library's own class, where it is there."""
    within, _, name = path.rpartition(".")
    kind: type[nn.Module]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of libraries that import others
            library = importlib.import_module(within)
        if name in GONE:
            raise ImportError(f"{path} is of an older version")
        kind = getattr(library, name)
    except ImportError:
        kind = type(name, (nn.Module,), {"__module__": within, "__qualname__": name})
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    vars(module).update(attributes)
    for parameter, (shape, _) in uses.items():
        setattr(module, parameter, nn.Parameter(torch.rand(shape) + 0.5))
    return module


def used(weight: Tensor, use: str, view: tuple[int, ...] | None = None) -> list[Tensor]:
    weight = weight if view is None else weight.view(view)
    if "->" in use:
        x, w = use.split("->")[0].split(",")
        sizes = dict(zip(w, weight.shape, strict=True))
        return list(torch.einsum(use, torch.rand([sizes.get(letter, 2) for letter in x]) + 0.5, weight).flatten())
    parts = {"vectors": lambda: weight.reshape(-1, weight.shape[-1]), "each": lambda: weight, "whole": lambda: [weight]}
    return [part.sum() for part in parts[use]()]


HF = "transformers.models"
# Classes that later versions of an installed library no longer have.
GONE = ("GraniteMoeParallelExperts", "AriaGroupedExpertsGemm")
T, N = "eti,eio->eto", "eti,eoi->eto"  # x[e] @ w[e] and x[e] @ w[e].T
PARTS = "torchtitan.models.common.moe.GroupedExperts"
OLD = {"gate_up_proj": ((3, 4, 6), T), "down_proj": ((3, 5, 4), T)}
W = {"w1": ((3, 4, 5), N), "w2": ((3, 5, 4), N), "w3": ((3, 4, 5), N)}
TITAN_OLD = {name: (shape, T) for name, (shape, _) in W.items()}
MATRIX = ((4, 6), "ti,io->to")
ROWS = ((4, 6), "ti,oi->to")
LOOKED_UP = ((3, 4, 5), "vectors")
BARE: list[tuple[str, dict[str, Use]]] = [
    # before version 5 these classes said nothing of themselves
    (f"{HF}.gpt_oss.modeling_gpt_oss.GptOssExperts", OLD | {"gate_up_proj_bias": ((3, 6), "vectors")}),
    (f"{HF}.qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeTextExperts", OLD),
    (f"{HF}.mixtral.modeling_mixtral.MixtralTopKRouter", {"weight": ROWS}),
    (f"{HF}.granitemoe.modeling_granitemoe.GraniteMoeParallelExperts", {"weight": ((3, 4, 5), N)}),
    (f"{HF}.aria.modeling_aria.AriaGroupedExpertsGemm", {"weight": ((3, 4, 5), T)}),
    (
        f"{HF}.esmfold2.modeling_esmfold2.EsmFold2ConfidenceHead",
        {"plddt_weight": ((3, 4, 5), T), "resolved_weight": ((3, 4, 2), T)},
    ),
    (
        f"{HF}.zamba.modeling_zamba.ZambaMambaMixer",
        {"x_proj_weight": ((2, 5, 3), "hit,hoi->hot"), "dt_proj_weight": ((2, 3, 4), "hit,hoi->hot")}
        | {"A_log": ((2, 3, 4), "hdst,hds->hdt"), "dt_proj_bias": ((2, 3), "vectors"), "D": ((2, 3), "vectors")},
    ),
    (
        f"{HF}.vits.modeling_vits.VitsAttention",
        {"emb_rel_k": ((1, 5, 4), "btd,hpd->bhtp"), "emb_rel_v": ((1, 5, 4), "btp,hpd->bhtd")},
    ),
    (f"{HF}.gemma3.modeling_gemma3.Gemma3MultiModalProjector", {"mm_input_projection_weight": MATRIX}),
    (f"{HF}.t5gemma2.modeling_t5gemma2.T5Gemma2MultiModalProjector", {"mm_input_projection_weight": MATRIX}),
    (f"{HF}.omdet_turbo.modeling_omdet_turbo.OmDetTurboLanguageBackbone", {"text_projection": MATRIX}),
    (f"{HF}.x_clip.modeling_x_clip.XCLIPModel", {"prompts_visual_projection": MATRIX}),
    (f"{HF}.wav2vec2.modeling_wav2vec2.AMSoftmaxLoss", {"weight": MATRIX}),
    (f"{HF}.sam.modeling_sam.SamPositionalEmbedding", {"positional_embedding": MATRIX}),
    (f"{HF}.edgetam.modeling_edgetam.EdgeTamPositionalEmbedding", {"positional_embedding": MATRIX}),
    (f"{HF}.inkling.modeling_inkling.InklingRelativeLogits", {"proj": MATRIX}),
    (f"{HF}.swiftformer.modeling_swiftformer.SwiftFormerEfficientAdditiveAttention", {"w_g": ((4, 1), "ti,io->to")}),
    (
        f"{HF}.inkling2.modeling_inkling2.Inkling2DynamicShortConvolution",
        {"static_weight": ((3, 4), "tkc,kc->tc")},
    ),
    (f"{HF}.wav2vec2.modeling_wav2vec2.Wav2Vec2GumbelVectorQuantizer", {"codevectors": ((1, 6, 4), "vectors")}),
    (f"{HF}.kimi_k25.modeling_kimi_k25.Kimi_K25VisionPositionEmbeddings", {"position_embeddings": LOOKED_UP}),
    (f"{HF}.gemma4.modeling_gemma4.Gemma4VisionPatchEmbedder", {"position_embedding_table": LOOKED_UP}),
    (f"{HF}.gemma4_unified.modeling_gemma4_unified.Gemma4UnifiedVisionEmbedder", {"pos_embedding": LOOKED_UP}),
    (
        f"{HF}.sam2_video.modeling_sam2_video.Sam2VideoModel",
        {"memory_temporal_positional_encoding": ((3, 1, 1, 4), "vectors")},
    ),
    (
        f"{HF}.edgetam_video.modeling_edgetam_video.EdgeTamVideoModel",
        {"memory_temporal_positional_encoding": ((3, 1, 1, 4), "vectors")},
    ),
    (f"{HF}.vjepa2.modeling_vjepa2.VJEPA2PredictorEmbeddings", {"mask_tokens": ((3, 1, 1, 4), "vectors")}),
    (
        f"{HF}.yolos.modeling_yolos.InterpolateMidPositionEmbeddings",
        {"mid_position_embeddings": ((3, 1, 4, 5), "each")},
    ),
    (f"{HF}.dinat.modeling_dinat.NeighborhoodAttention", {"rpb": ((2, 5, 5), "each")}),
    (f"{HF}.tvp.modeling_tvp.TvpFramePadPrompter", {"pad_up": ((1, 2, 3, 4, 5), "whole")}),
    ("torchtitan.experiments.llama4.model.moe.GroupedExperts", TITAN_OLD),
    ("torchtitan.models.deepseek_v3.model.moe.GroupedExperts", TITAN_OLD),
    ("torchtitan.models.moe.moe.GroupedExperts", W),
    (
        "torchtitan.models.gpt_oss.model.moe.GptOssGroupedExperts",
        {"mlp1_weight": ((3, 6, 4), N), "mlp1_bias": ((3, 6), "vectors")},
    ),
    ("torchtitan.overrides.fused_swiglu.FusedSwiGLU", {"w13": ((4, 2, 5), "ti,ogi->tog")}),
    ("torchtitan.overrides.fused_swiglu.FusedGroupedExperts", {"w13": ((3, 4, 2, 5), "eti,eogi->etog")}),
    ("torchtitan.models.kimi_k2_7.vision_encoder.KimiK25VisionEncoder", {"pos_embed": LOOKED_UP}),
    ("megatron.core.tensor_parallel.layers.ColumnParallelLinear", {"weight": ROWS}),
    ("transformer_engine.pytorch.module.grouped_linear.GroupedLinear", {"weight0": ROWS, "weight11": ROWS}),
    ("transformer_engine.pytorch.module.layernorm_mlp.LayerNormMLP", {"fc1_weight": ROWS}),
    ("torchtune.modules.moe.experts.GroupedExperts", {"gate_proj": ((3, 4, 5), T), "down_proj": ((3, 5, 4), T)}),
    ("torchtune.modules.moe.experts.LoRAGroupedExperts", {"lora_up_a": ((3, 4, 2), T)}),
    ("torchtune.modules.vision_transformer.CLSProjection", {"weight": MATRIX}),
    (
        "torchtune.models.clip._position_embeddings.TiledTokenPositionalEmbedding",
        {"global_token_positional_embedding": ((2, 2, 3, 4), "vectors")},
    ),
    ("open_clip.transformer.VisionTransformer", {"proj": MATRIX}),
    ("open_clip.transformer.TextTransformer", {"text_projection": MATRIX}),
    ("open_clip.transformer.MultimodalTransformer", {"text_projection": MATRIX}),
    ("open_clip.model.CLIP", {"text_projection": MATRIX}),
    ("clip.model.VisionTransformer", {"proj": MATRIX}),
    ("clip.model.CLIP", {"text_projection": MATRIX}),
    ("eva_clip.transformer.VisionTransformer", {"proj": MATRIX}),
    ("eva_clip.transformer.TextTransformer", {"text_projection": MATRIX}),
    ("diffusers.models.transformers.transformer_nucleusmoe_image.SwiGLUExperts", OLD),
    ("diffusers.models.transformers.consisid_transformer_3d.LocalFacialExtractor", {"proj_out": MATRIX}),
    (
        "diffusers.models.transformers.transformer_wan.WanTransformerBlock",
        {"scale_shift_table": ((1, 6, 4), "vectors")},
    ),
    ("diffusers.models.transformers.transformer_wan_animate_2.Head", {"modulation": ((1, 2, 4), "vectors")}),
    (
        "diffusers.models.transformers.transformer_wan_animate.MotionConv2d",
        {"weight": ((4, 3, 1, 1), "ticd,oicd->to")},
    ),
    (
        "x_transformers.x_transformers.Attention",
        {"mem_k": ((2, 3, 4), "thd,hnd->thn"), "mem_v": ((2, 3, 4), "thn,hnd->thd")}
        | {"qk_norm_q_scale": ((2, 1, 4), "vectors")},
    ),
    ("x_transformers.x_transformers.MultiheadRMSNorm", {"gamma": ((2, 1, 4), "vectors")}),
    ("x_transformers.x_transformers.PolarEmbedding", {"learned_bias": ((2, 1, 4), "vectors")}),
    ("x_transformers.x_transformers.HyperConnection", {"dynamic_alpha_fn": MATRIX}),
    ("x_transformers.x_transformers.RelativeProjPositionalBias", {"distance_bank": MATRIX}),
    ("x_transformers.x_transformers.TransformerWrapper", {"ff_deep_embed": LOOKED_UP}),
    ("fairseq.modules.gumbel_vector_quantizer.GumbelVectorQuantizer", {"vars": ((1, 6, 4), "vectors")}),
    ("a.library.of.SomebodysModel", {f"{name}_1": ((1, 3, 4), "whole") for name in ("pos_emb", "position", "latents")}),
    ("a.library.of.SomebodysModel", {"lookup_pos": ((1, 3, 4), "whole")}),
    ("a.library.of.SomebodysModel", {f"a_{name}": ((1, 3, 4), "whole") for name in ("token", "query", "queries")}),
    ("a.library.of.SomebodysModel", {f"a_{name}": ((1, 3, 4), "whole") for name in ("prompt", "type_embedding")}),
]


BARE_IDS = [f"{path.rpartition('.')[2]}-{i}" for i, (path, _) in enumerate(BARE)]


@pytest.mark.parametrize(("path", "uses"), BARE, ids=BARE_IDS)
def test_a_unit_of_a_bare_module_is_the_fan_in_of_one_output(path: str, uses: dict[str, Use]) -> None:
    module = bare(path, uses)
    parameters = dict(module.named_parameters())
    rows = dist_agc.units(module, lambda: [used(p, uses[name][1]) for name, p in parameters.items()])
    for row in rows:
        parameter, use = parameters[row.name], uses[row.name][1]
        assert not row.guessed
        seen = agrees(row) if "->" in use else row.observed is None
        assert seen, f"{row.name}: {row.observed}, not {row.dims}"
        assert_units(row, parameter, used(parameter, use))


def agrees(row: dist_agc.observe.UnitRow) -> bool:
    return row.observed is not None and not row.disagrees


# ---- the libraries' own modules, built and run

X = torch.rand(6, 4) + 0.5
CHOSEN = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1], [1, 2], [2, 0]])
ONES = torch.ones(6, 2)
SIZES: dict[str, Any] = {
    **{name: 3 for name in ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts")},
    **{name: 5 for name in ("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size")},
    **{"moe_num_experts": 3, "ffn_hidden_size": 5, "zero_expert_num": 1, "num_experts_per_tok": 1},
    **{"hidden_size": 4, "hidden_act": "gelu", "mlp_hidden_act": "gelu", "ffn_act_fn": {"name": "gelu"}},
    **{"_experts_implementation": "eager", "moe_num_shared_experts": 1, "swiglu_limit": 7.0},
    **{"d_model": 4, "n_head": 2, "d_head": 3, "layer_norm_eps": 1e-5, "dropout": 0.0, "hidden_dropout": 0.0},
    **{
        "attention_dropout": 0.0,
        "lru_width": 4,
        "num_attention_heads": 2,
        "moe_latent_size": None,
        "swiglu_alpha": 1.7,
    },
}


def config(**changed: Any) -> SimpleNamespace:
    return SimpleNamespace(**SIZES | changed)


def hf(model: str, kind: str, *args: Any, **kwargs: Any) -> nn.Module:
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    return filled(getattr(modeling, kind)(*args, **kwargs))


def filled(module: nn.Module) -> nn.Module:
    """Positive weights: nothing cancels, and no activation is flat."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.1, 0.5)
    return module


def chosen(model: str, kind: str, **changed: Any) -> Any:
    return lambda: hf(model, kind, config(**changed)), lambda m: m(X, CHOSEN, ONES)


def titan(path: str, kind: str) -> nn.Module:
    module = pytest.importorskip(path)
    made = getattr(module, kind)
    return filled(made(made.Config(dim=8, hidden_dim=16, num_experts=3))).bfloat16()


def grouped(module: nn.Module) -> Any:
    return module(torch.rand(6, 8, dtype=torch.bfloat16) + 0.5, torch.tensor([2, 2, 2]))


def xlnet(module: Any) -> Any:
    return module(torch.rand(2, 1, 4), None, None, None, torch.rand(4, 1, 4), torch.rand(2, 2, 1, 2))


def funnel(module: Any) -> Any:
    module.block_index = 0
    positions = torch.rand(2, 4) if module.config.attention_type == "factorized" else torch.rand(4, 4)
    query = torch.rand(1, 2, 2, 3)
    places = [positions] * 4 if module.config.attention_type == "factorized" else [[positions] * 2]
    module.relative_positional_attention(places, query, 2)
    module.relative_token_type_attention(torch.ones(1, 2, 2, dtype=torch.bool), query)


REAL: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "mixtral": chosen("mixtral", "MixtralExperts"),
    "gpt-oss": chosen("gpt_oss", "GptOssExperts"),
    "nemotron-h": chosen("nemotron_h", "NemotronHExperts"),
    "aria": chosen("aria", "AriaExperts"),
    "qwen3-vl-moe": chosen("qwen3_vl_moe", "Qwen3VLMoeTextExperts"),
    "longcat": chosen("longcat_flash", "LongcatFlashExperts", zero_expert_num=0),
    "step3p7": chosen("step3p7", "Step3p7Experts"),
    "dbrx": chosen("dbrx", "DbrxExperts"),
    "inkling-shared": (lambda: hf("inkling", "InklingSharedExperts", config()), lambda m: m(X, torch.ones(6, 3))),
    "llama4": (lambda: hf("llama4", "Llama4TextExperts", config()), lambda m: m(X)),
    "jetmoe": (lambda: hf("jetmoe", "JetMoeParallelExperts", 3, 4, 5), lambda m: m(X, [2, 2, 2])),
    "moshi": (lambda: hf("moshi", "MoshiFlexibleLinear", 4, 5, 3), lambda m: m(torch.rand(2, 3, 4))),
    "kyutai": (
        lambda: hf("kyutai_speech_to_text", "KyutaiSpeechToTextFlexibleLinear", 4, 5, 3),
        lambda m: m(torch.rand(2, 3, 4)),
    ),
    "csm": (lambda: hf("csm", "CsmCodebooksHead", 4, 4, 5), lambda m: m(torch.rand(2, 3, 4), torch.tensor([1, 2, 3]))),
    "convbert": (lambda: hf("convbert", "GroupedLinearLayer", 4, 6, 2), lambda m: m(torch.rand(2, 3, 4))),
    "recurrent-gemma": (
        lambda: hf("recurrent_gemma", "RecurrentGemmaRglru", config()),
        lambda m: m(torch.rand(1, 3, 4), torch.arange(3)[None]),
    ),
    "xlnet": (lambda: hf("xlnet", "XLNetRelativeAttention", config()), xlnet),
    "funnel": (lambda: hf("funnel", "FunnelRelMultiheadAttention", config(attention_type="relative_shift"), 0), funnel),
    "funnel-factorized": (
        lambda: hf("funnel", "FunnelRelMultiheadAttention", config(attention_type="factorized"), 0),
        funnel,
    ),
    "torchtitan": (lambda: titan("torchtitan.models.common.moe", "GroupedExperts"), grouped),
    "torchtitan-gpt-oss": (lambda: titan("torchtitan.models.gpt_oss.moe", "GptOssGroupedExperts"), grouped),
    "autoep": (
        lambda: filled(pytest.importorskip("deepspeed.moe.ep_experts").GroupedExperts(4, 5, 3, use_grouped_mm=False)),
        lambda m: m(X, torch.tensor([2, 2, 2])),
    ),
}
# What no product takes as it is: a bias is added, first or last; a stack is copied, or summed without a product.
BIAS = re.compile(r".*bias(_EG|_ED)?$")
UNSEEN = ("moshi", "kyutai", "csm")


@pytest.mark.parametrize("case", REAL)
def test_a_unit_of_a_real_module_is_the_fan_in_of_one_output(case: str) -> None:
    make, run = REAL[case]
    module = make()
    own = {
        name for name, p in module.named_parameters() if p.ndim > 1 and not isinstance(_holder(module, name), LAYERS)
    }
    assert own
    for row in [row for row in dist_agc.units(module, lambda: run(module)) if row.name in own]:
        assert not row.guessed, row
        if BIAS.match(row.name):
            assert row.dims == (0,) and row.observed is None, row
            continue
        assert not row.disagrees and (agrees(row) or case in UNSEEN or row.name == "o"), row
        parameter = module.get_parameter(row.name)
        assert_units(row, parameter, outputs_of(parameter, lambda: run(module)) or [*run(module).flatten()])


LAYERS = (nn.Linear, nn.Embedding)


def _holder(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def test_megatrons_grouped_experts() -> None:
    """``weight2`` is (experts * ffn, hidden). ``weight1`` is a view that no rule can say: each expert is one unit."""
    path = "megatron.core.transformer.moe.experts.GroupedMLP"
    # 3 experts, hidden 6, ffn 4
    module: Any = bare(path, {"weight1": ((6, 12), ""), "weight2": ((12, 6), "")}, num_local_experts=3)
    rows = {row.name: row for row in dist_agc.units(module, lambda: used(module.weight2, T, (3, 4, 6)))}
    assert agrees(rows["weight2"]) and not rows["weight2"].guessed
    assert_units(rows["weight2"], module.weight2, used(module.weight2, T, (3, 4, 6)))
    of_experts = torch.rand(3, 2, 6) @ module.weight1.view(3, 6, 4)
    assert_units(rows["weight1"], module.weight1, [one.sum() for one in of_experts])


@pytest.mark.parametrize(
    ("kind", "swapped"),
    [
        (f"{HF}.mixtral.modeling_mixtral.MixtralExperts", True),
        (f"{HF}.gpt_oss.modeling_gpt_oss.GptOssExperts", False),
        # These do not say that they are transposed, so peft takes inputs for outputs.
        (f"{HF}.llama4.modeling_llama4.Llama4TextExperts", True),
        # An old peft takes all for transposed.
        (f"{HF}.mixtral.modeling_mixtral.MixtralExperts", False),
    ],
)
def test_adapters_of_peft_on_stacked_experts(kind: str, swapped: bool) -> None:
    """For each expert delta[e] = B[:, :, e] @ A[e], added to weights that are used as x @ w or as x @ w.T."""
    experts, rank, first, second = 3, 2, 4, 5
    transposed = "mixtral" not in kind
    said = {} if "llama4" in kind else {"is_transposed": transposed, "has_bias": False}
    base = bare(kind, {"down_proj": ((experts, first, second), "")}, **said)
    wrapper: Any = bare("peft.tuners.lora.layer.ParamWrapper", {}, num_experts=experts, parameter_name="down_proj")
    inputs, outputs = (second, first) if swapped else (first, second)
    wrapper.in_features, wrapper.out_features, wrapper._did_swap_in_out_features = inputs, outputs, swapped
    wrapper.get_base_layer = lambda: base
    wrapper.base_layer = base
    wrapper.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, rank * experts, bias=False)})
    wrapper.lora_B = nn.ModuleDict({"default": nn.Linear(rank * experts, outputs, bias=False)})
    filled(wrapper)
    a, b = (wrapper.get_parameter(f"lora_{side}.default.weight") for side in "AB")

    rows = {row.name: row for row in dist_agc.units(nn.Sequential(wrapper))}
    of_a, of_b = rows["0.lora_A.default.weight"], rows["0.lora_B.default.weight"]
    assert of_a.why == of_b.why == "ParamWrapper: one for each expert and output"
    each_a, each_b = a.view(experts, rank, inputs), b.view(outputs, rank, experts)
    x, mixed = torch.rand(2, second if not transposed else first) + 0.5, torch.rand(2, experts, rank) + 0.5
    if swapped != transposed:  # x meets A first
        assert_units(of_a, a, [*torch.einsum("ti,eri->ter", x, each_a).flatten()])
        assert_units(of_b, b, [*torch.einsum("ter,ore->teo", mixed, each_b).flatten()])
    else:
        assert_units(of_b, b, [*torch.einsum("to,ore->ter", x, each_b).flatten()])
        assert_units(of_a, a, [*torch.einsum("ter,eri->tei", mixed, each_a).flatten()])


def test_adapters_of_peft_on_one_matrix_and_on_embeddings() -> None:
    wrapper = bare("peft.tuners.lora.layer.ParamWrapper", {}, num_experts=1, parameter_name="weight")
    wrapper.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
    assert dist_agc.units(wrapper)[0].why == "Linear: rows"
    embedding: Any = bare("peft.tuners.lora.layer.Embedding", {})
    embedding.lora_embedding_A = nn.ParameterDict({"default": torch.rand(2, 7)})  # (r, entries)
    embedding.lora_embedding_B = nn.ParameterDict({"default": torch.rand(4, 2)})
    a, b = embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"]
    rows = dist_agc.units(embedding)
    assert_units(rows[0], a, [row.sum() for row in nn.functional.embedding(torch.arange(7), a.T)])
    assert_units(rows[1], b, [*(torch.rand(3, 2) @ b.T).flatten()])


def test_a_product_of_two_parameters_is_not_observed() -> None:
    """It makes a weight: which dims it leaves says nothing of the outputs of the layer."""
    module: Any = bare("a.library.of.Pairs", {"a": ((2, 4), ""), "b": ((5, 2), ""), "c": ((5, 4), "")})
    rows = dist_agc.units(module, lambda: (module.b @ module.a, torch.rand(3, 4) @ module.c.T))
    assert [row.observed for row in rows] == [None, None, (0,)]


def test_gains_are_no_guess() -> None:
    module = bare("a.library.of.Gains", {"gain": ((3, 1, 1), ""), "vector": ((1, 3, 1), "")})
    rows = {row.name: row for row in dist_agc.units(module)}
    assert (rows["gain"].dims, rows["gain"].guessed, rows["vector"].dims) == ((0,), False, ())


def test_what_no_line_knows_is_guessed() -> None:
    module = bare("a.library.of.Stacks", {"w": ((3, 4, 5), ""), "tokens": ((3, 4, 5), ""), "m": ((3, 4), "")})
    assert all(row.guessed and row.dims == (0,) for row in dist_agc.units(module))
    # A tensor of too few dims is not what a line means, and neither is a parameter of a module inside.
    inner = bare("a.library.of.Inner", {"w1": ((3, 4, 5), "")})
    module = bare(PARTS, {"w1_EFD": ((4, 5), "")})
    module.w1 = inner  # its parameter is called w1.w1 in the module around it
    assert all(row.guessed for row in dist_agc.units(module))


def test_every_line_of_the_table_is_tested() -> None:
    """Here or, for torch's own modules, in test_units."""
    modules = [bare(path, uses) for path, uses in BARE]
    modules += [make() for case, (make, _) in REAL.items() if "titan" not in case]
    found = {
        (id(line), pattern)
        for module in modules
        for inner in module.modules()
        for name in inner._parameters
        for line in table._lines(type(inner))
        for pattern in line.dims
        if fnmatchcase(name, pattern)
    }
    elsewhere = ("torch.", "transformers.pytorch_utils", "megatron.core.transformer", "peft.")
    lines = [line for line in table.TABLE if not line.types[0].startswith(elsewhere)]
    missing = [(line.types, pattern) for line in lines for pattern in line.dims if (id(line), pattern) not in found]
    assert not missing


def test_no_library_is_imported() -> None:
    """The table knows modules by name: looking at a model imports none of their libraries."""
    libraries = ("transformers", "torchtitan", "peft", "deepspeed", "diffusers", "timm", "open_clip", "megatron")
    script = (
        "import sys, torch, dist_agc\n"
        "kind = type('Experts', (torch.nn.Linear,), {'__module__': 'transformers.models.x.modeling_x'})\n"
        "assert dist_agc.units(kind(3, 2))[0].why == 'Experts: rows'\n"
        f"print([name for name in {libraries} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
