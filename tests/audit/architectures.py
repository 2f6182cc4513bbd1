"""What the audit looks at, by name: a model that is left out in silence would be a hole in it.

All families with experts, and models that are well known. docs/units-audit.md says what was found of all others.
"""

# Every directory of transformers' models with a class of experts; by its type, the part of it that holds them.
WITH_EXPERTS = """
afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_ocr2_text deepseek_v2 deepseek_v3 deepseek_v32
deepseek_v4 diffusion_gemma_text dots1 dots3_note_text ernie4_5_moe ernie4_5_vl_moe_text exaone_moe flex_olmo flint
gemma4_text glm4_moe glm4_moe_lite glm4v_moe_text glm5_next_text glm_moe_dsa gpt_oss granitemoe granitemoe_swa
granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling2_text inkling_text jamba jetmoe kimi_linear
kolibri1 laguna lfm2_moe llama4_text longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mistral4
mistral_large4_text mixtral muse_spark_text nemotron_h nllb-moe olmoe openai_privacy_filter phimoe qwen2_moe
qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe_text qwen3_vl_moe_text qwen4_exp_text solar_open step3p5
switch_transformers unlimited_ocr_text zaya
""".split()

LANGUAGE = """
arcee bamba biogpt bloom codegen cohere cohere2 ctrl diffllama exaone4 falcon falcon_h1 falcon_mamba gemma gemma2
gemma3_text glm glm4 gpt2 gpt_neo gpt_neox gptj granite helium hunyuan_v1_dense lfm2 llama mamba mamba2 ministral
mistral mpt nemotron olmo olmo2 openai-gpt opt persimmon phi phi3 qwen2 qwen3 recurrent_gemma reformer rwkv seed_oss
smollm3 stablelm starcoder2 xglm xlnet
albert bert big_bird camembert canine convbert deberta deberta-v2 distilbert electra esm fnet funnel layoutlm longformer
mobilebert modernbert mpnet nystromformer roberta roformer squeezebert xlm xlm-roberta yoso
bart bigbird_pegasus blenderbot fsmt led longt5 m2m_100 marian mbart mt5 pegasus plbart prophetnet t5 t5gemma umt5
""".split()

VISION = """
beit bit convnext convnextv2 cvt deit dinov2 dinov3_vit dpt efficientnet focalnet hiera ijepa levit mobilenet_v2
mobilevit mobilevitv2 poolformer pvt regnet resnet segformer swiftformer swin swinv2 videomae vit vit_mae vit_msn vivit
""".split()

SOUND_AND_MORE = """
audio-spectrogram-transformer data2vec-audio hubert sew speech_to_text unispeech wav2vec2 wav2vec2-bert
wav2vec2-conformer wavlm whisper altclip blip chinese_clip clip clip_text_model clip_vision_model flava git groupvit
layoutlmv3 lxmert owlvit siglip siglip_vision_model
""".split()

TRANSFORMERS = sorted({*WITH_EXPERTS, *LANGUAGE, *VISION, *SOUND_AND_MORE})

# What was tried and was not built or run, and why.
NOT_BUILT = {
    "blip-2": "the widths of its three models must fit each other, and were not made to",
    "dinat": "needs natten, which is no dependency of the tests",
    "encodec": "the widths of its codec must fit each other, and were not made to",
    "gemma3n_text": "shares keys over layers at distances that two layers do not have",
    "layoutlmv2": "needs detectron2, which is no dependency of the tests",
    "perceiver": "has no small configuration: its sizes depend on what it reads",
    "timesfm": "wants time series, and was given none",
    "xclip": "the widths of its text and video models must fit each other, and were not made to",
    "zamba": "ties its layers at distances that two layers do not have",
    "zamba2": "ties its layers at distances that two layers do not have",
}

# The share of the weights (two dims or more, no embeddings) that products must have seen; where it is less, and why.
LEAST_SEEN = 0.9
LESS_SEEN = {
    "bit": (0.0, "weight standardisation: the product takes a computed weight"),
    "blip": (0.2, "its text model meets no picture in a cross attention"),
    "ernie4_5_vl_moe_text": (0.7, "the experts of its pictures see no picture"),
    "layoutlmv3": (0.3, "it is given a text without its picture"),
    "nllb-moe": (0.3, "an expert is a module of its own, and not every one is routed to"),
}
# Stacked experts that no product has seen, by the name of the module in them, and why.
UNROUTED = {"ernie4_5_vl_moe_text": ("vision_moe", "there are no pictures")}

# Their experts are no stacks: a linear layer each, or parts of one matrix.
EXPERTS_ARE_MODULES = {"dbrx", "nllb-moe", "switch_transformers"}

TIMM = """
beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_tiny coatnet_pico_rw_224 convit_tiny
convmixer_768_32 convnext_atto convnextv2_atto crossvit_tiny_240 cspresnet50 davit_tiny deit_tiny_distilled_patch16_224
densenet121 dla34 dm_nfnet_f0 dpn68 eca_nfnet_l0 edgenext_xx_small efficientformer_l1 efficientformerv2_s0
efficientnet_b0 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf
gcvit_xxtiny ghostnet_050 gmlp_ti16_224 halonet26t hgnetv2_b0 hiera_tiny_224 hrnet_w18_small inception_next_atto
lambda_resnet26t levit_128s levit_conv_128s mambaout_femto maxvit_pico_rw_256 mixer_s32_224 mobilenetv3_small_050
mobilenetv4_conv_small mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_gap nest_tiny
nextvit_small nf_regnet_b0 nf_resnet50 nfnet_f0 pit_ti_224 poolformer_s12 pvt_v2_b0 regnety_002 repvit_m0_9
resmlp_12_224 resnet18 resnetv2_50 resnext50_32x4d sequencer2d_s seresnet18 shvit_s1 starnet_s1 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256 tiny_vit_5m_224 tnt_s_patch16_224
twins_svt_small vit_relpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224
xception41 xcit_nano_12_p16_224
""".split()
_COMPUTED = "scaled weight standardisation: the product takes a computed weight"
LESS_SEEN_OF_TIMM = {
    "dm_nfnet_f0": (0.3, _COMPUTED),
    "eca_nfnet_l0": (0.0, _COMPUTED),
    "nf_regnet_b0": (0.4, _COMPUTED),
    "nf_resnet50": (0.0, _COMPUTED),
    "nfnet_f0": (0.3, _COMPUTED),
}

TORCHVISION = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
mobilenet_v2 mobilenet_v3_small regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_0 swin_t
swin_v2_t vit_b_32
""".split()
