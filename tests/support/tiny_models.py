"""A tiny random model of every causal and multimodal language model class of transformers, and a batch to call it with.

    for name in names():
        model, inputs = build(name)
        loss = model(**inputs).loss

Float32 on the CPU, in train() mode without dropout. Sizes come from one `TABLE` of configuration fields, applied to
every configuration and the ones inside it; `OVERRIDES` names what single classes need on top; tiny_inputs.py has what
they are called with. Classes that take images come twice: with text alone, and as "LlavaForConditionalGeneration +
image". Multipliers are not 1, biases not 0 and soft-caps low, so that leaving one out shows.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
import transformers
from tiny_inputs import HIDDEN, IMAGES, INPUTS, VOCABULARY, WITH_IMAGE, batch, with_image
from transformers.models.auto import modeling_auto

MOST_PARAMETERS = 2_000_000
SPECIAL = range(92, VOCABULARY)  # ids that stand for images and sounds


class CannotBuild(Exception):
    """This class of model cannot be built or called here; the message says why."""


# value: the configuration fields that get it. Fields that a class lacks, or has as None, are left out.
TABLE: list[tuple[Any, str]] = [
    # widths
    (HIDDEN, "hidden_size d_model n_embd emb_dim embedding_dim dim_model lru_width"),
    (24, "embedding_size word_embed_proj_dim input_embedding_size moe_intermediate_size expert_ffn_hidden_size"),
    (24, "shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size"),
    (40, "output_embedding_size"),
    (48, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner n_inner dff dim_ff feed_forward_size"),
    (48, "ffn_hidden_size intermediate_size_mlp dense_intermediate_size"),
    # depths
    (2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers"),
    (2, "num_decoder_layers num_blocks"),
    # attention
    (4, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads"),
    (4, "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"),
    (2, "num_key_value_heads num_kv_heads num_query_groups swa_num_key_value_heads index_n_heads"),
    (8, "head_dim dim_head d_head attention_head_size v_head_dim qk_nope_head_dim swa_head_dim index_head_dim"),
    (8, "kv_channels hidden_size_per_layer_input router_hidden_size kv_lora_rank q_lora_rank o_lora_rank"),
    (8, "adapter_rank laurel_rank hc_lowrank"),
    (6, "index_topk"),
    (4, "qk_rope_head_dim rotary_dim"),
    # experts: the first layer dense where there is a choice, the second sparse
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts"),
    (1, "n_group num_expert_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    (1, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    ([0], "mlp_only_layers"),
    # state-space and linear-attention layers
    (8, "mamba_d_state state_size ssm_state_size mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim"),
    (64, "mamba_d_ssm"),
    (2, "linear_num_key_heads linear_num_heads"),
    (4, "linear_num_value_heads"),
    (8, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
    (8, "chunk_size mamba_chunk_size attention_chunk_size"),
    # images and sounds: towers, and what connects them with the text model
    (HIDDEN, "embed_dim out_hidden_size output_dim text_hidden_size text_dim language_dim projection_dim hidden_dim"),
    (HIDDEN, "projector_hidden_size projector_output_dim image_token_embed_dim encoder_hidden_size"),
    (
        HIDDEN,
        "qformer_hidden_size decoder_hidden_size patch_embed_hidden_size vision_output_dim adapter_in_dim",
    ),
    (HIDDEN, "adapter_out_dim adapter_input_size audio_hidden_size latent_channels base_channels"),
    (2, "depth spatial_merge_size"),
    (16, "image_size crop_size output_channels post_conv_in_channels post_conv_mid_channels post_conv_out_channels"),
    (16, "downsample_hidden_size num_embeddings num_position_embeddings"),
    (8, "patch_size num_mel_bins"),
    (48, "mlp_dim alignment_intermediate_size"),
    # lengths
    (64, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions model_max_length"),
    (64, "max_source_positions context_length"),
    (8, "sliding_window attention_window_size sliding_window_size local_attention"),
    # ids
    (VOCABULARY, "vocab_size decoder_vocab_size vocab_size_per_layer_input"),
    (91, "unpadded_vocab_size"),
    (0, "pad_token_id"),
    (1, "bos_token_id decoder_start_token_id cls_token_id"),
    (2, "eos_token_id forced_eos_token_id sep_token_id"),
    (96, "image_token_id image_token_index"),
    (95, "video_token_id video_token_index"),
    (94, "audio_token_id audio_token_index"),
    (93, "vision_start_token_id image_start_token_id video_start_token_id boi_token_id boi_token_index"),
    (92, "vision_end_token_id image_end_token_id video_end_token_id eoi_token_id eoi_token_index"),
    # values: initial weights so large that every layer matters; on the way to the logits and the loss no 1 and no 0
    (0.2, "initializer_range init_std embed_init_std embedding_initializer_range"),
    (True, "is_decoder output_router_logits lm_head_bias decoder_bias"),
    (False, "use_cache"),
    (0.1, "router_aux_loss_coef aux_loss_coef"),
    (0.25, "logit_scale"),
    (4.0, "logits_scaling"),
    (0.3, "lm_head_multiplier"),
    (3.0, "logits_mup_width_multiplier"),
    (5.0, "final_logit_softcapping logits_soft_cap output_logit_soft_cap"),
    (16, "dim_model_base"),
    (1.5, "embedding_multiplier"),
    (0.7, "residual_multiplier"),
]
SMALL = {name: value for value, fields in TABLE for name in fields.split()}

# Also where the default is None: elsewhere None means that the class works without.
ALWAYS = {
    *("pad_token_id", "bos_token_id", "eos_token_id", "unpadded_vocab_size"),
    *("logit_scale", "final_logit_softcapping", "logits_soft_cap", "head_dim", "num_key_value_heads"),
    *("num_experts_per_tok", "n_routed_experts", "n_shared_experts"),
}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
BLT_PART = dict(vocab_size=260, num_key_value_heads=4, hidden_size_global=64, num_hidden_layers=1)
GEMMA3N = dict(
    num_hidden_layers=4,
    layer_types=["sliding_attention", "full_attention"] * 2,
    num_kv_shared_layers=2,
    activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
    intermediate_size=[48] * 4,
)
GEMMA4 = dict(layer_types=["sliding_attention", "full_attention"], global_head_dim=8)
MOE_GEMMA4 = dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=24)
COHERE_COMPASS = dict(
    layer_types=["sliding_attention", "full_attention"],
    rope_parameters={"sliding_attention": ROPE, "full_attention": ROPE},
)
DOTS3_NOTE = dict(
    layer_types=["indexed_attention", "sliding_attention"],
    mlp_layer_types=["dense", "sparse"],
    num_key_value_heads=4,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=4,
    swa_q_lora_rank=8,
    swa_kv_lora_rank=8,
    swa_head_dim=12,
    swa_qk_nope_head_dim=8,
    swa_v_head_dim=8,
    shared_experts_intermediate_size=24,
    head_dim=12,
)
QWEN4_EXP = dict(
    indexer_n_heads=2,
    indexer_kv_heads=1,
    indexer_head_dim=8,
    indexer_budget=8,
    indexer_compress_ratio=2,
)
# Images as words: of 16 codes each, from id 40 on.
IMAGE_VOCABULARY = {"<image>": 96, **{f"IMGIMGA{chr(ord('A') + k)}Z": 40 + k for k in range(16)}}
VQ = dict(num_res_blocks=1, channel_multiplier=(1, 1))
OVERRIDES: dict[str, dict[str, Any]] = {
    "Apertus1p5ForConditionalGeneration": dict(
        image_token_offset=60,
        audio_token_offset=76,
        vision_config=dict(codebook_size=16, num_res_blocks=1, channel_multiplier=(1, 1)),
        audio_config=dict(codebook_dim=HIDDEN, codebook_size=16, num_filters=4),
    ),
    "BambaForCausalLM": dict(attn_layer_indices=[1]),
    "BigBirdForCausalLM": dict(attention_type="original_full"),
    "BigBirdPegasusForCausalLM": dict(attention_type="original_full"),
    "Blip2ForConditionalGeneration": dict(image_token_index=96),
    "BltForCausalLM": dict(
        vocab_size=260,
        encoder_hash_byte_group_vocab=50,
        encoder_hash_byte_group_size=[3, 4],
        patcher_config=BLT_PART,
        encoder_config=BLT_PART,
        decoder_config=BLT_PART,
        global_config=dict(hidden_size=64, num_key_value_heads=4, head_dim=16),
    ),
    "ChameleonForConditionalGeneration": dict(vocabulary_map=IMAGE_VOCABULARY, vq_config=VQ),
    "CohereCompassForCausalLM": COHERE_COMPASS,
    "CohereCompassForConditionalGeneration": dict(text_config=COHERE_COMPASS),
    "DbrxForCausalLM": dict(
        attn_config=dict(rope_theta=10000.0, kv_n_heads=2, clip_qkv=3.0), ffn_config=dict(moe_top_k=2)
    ),
    "DeepseekOcr2ForConditionalGeneration": dict(
        text_config=dict(mlp_layer_types=["dense", "sparse"]),
        vision_config=dict(sam_config=dict(downsample_channels=[16, 32])),
    ),
    "DogeForCausalLM": dict(is_moe=True),
    "Dots3NoteForCausalLM": DOTS3_NOTE,
    "Dots3NoteForConditionalGeneration": dict(text_config=DOTS3_NOTE),
    "Emu3ForConditionalGeneration": dict(vocabulary_map=IMAGE_VOCABULARY, vq_config=VQ),
    "Ernie4_5_VLMoeForConditionalGeneration": dict(text_config=dict(moe_intermediate_size=[24, 24])),
    "Florence2ForConditionalGeneration": dict(
        vision_config=dict(
            depths=(1,),
            patch_size=(7,),
            patch_stride=(4,),
            patch_padding=(3,),
            patch_prenorm=(False,),
            embed_dim=(32,),
            num_heads=(4,),
            num_groups=(4,),
        )
    ),
    "FunAsrNanoForConditionalGeneration": dict(adaptor_config=dict(intermediate_size=8)),
    "GPTNeoForCausalLM": dict(attention_types=[[["global", "local"], 1]], window_size=8),
    "Gemma3ForConditionalGeneration": dict(mm_tokens_per_image=1),
    "Gemma3nForCausalLM": GEMMA3N,
    "Gemma3nForConditionalGeneration": dict(
        text_config=GEMMA3N | dict(vocab_size_per_layer_input=VOCABULARY),
        vision_config=dict(vocab_size=8, vocab_offset=VOCABULARY),
        audio_config=dict(vocab_size=8, vocab_offset=VOCABULARY + 8),
    ),
    "Gemma4ForCausalLM": GEMMA4 | MOE_GEMMA4,
    "Gemma4ForConditionalGeneration": dict(text_config=GEMMA4, vision_config=dict(pooling_kernel_size=2)),
    "Gemma4UnifiedForCausalLM": GEMMA4,
    "Gemma4UnifiedForConditionalGeneration": dict(text_config=GEMMA4),
    "Glm5NextForConditionalGeneration": dict(text_config=dict(index_kpool=2, qk_rope_head_dim=0)),
    # Larger images: torch's gradient of a bfloat16 convolution over one pixel reads memory that nobody wrote.
    "GotOcr2ForConditionalGeneration": dict(vision_config=dict(image_size=32)),
    "HYV4VLForConditionalGeneration": dict(text_config=dict(qk_rope_head_dim=8), vision_config=dict(max_image_size=32)),
    "HunYuanVLForConditionalGeneration": dict(vision_config=dict(max_image_size=32, min_image_size=16)),
    "HyperCLOVAXForCausalLM": dict(logits_scaling=0.25),
    "HyperCLOVAXVisionV2ForConditionalGeneration": dict(text_config=dict(logits_scaling=0.25)),
    "InstructBlipForConditionalGeneration": dict(image_token_index=96),
    "JambaForCausalLM": dict(attn_layer_period=2, attn_layer_offset=1),
    "JanusForConditionalGeneration": dict(vq_config=VQ),
    "Kosmos2ForConditionalGeneration": dict(latent_query_num=4),
    "Lfm2MoeForCausalLM": dict(layer_types=["conv", "full_attention"]),
    "Llama4ForConditionalGeneration": dict(
        vision_config=dict(intermediate_size=128, projector_input_dim=32, projector_output_dim=32)
    ),
    "LlavaNextForConditionalGeneration": dict(image_grid_pinpoints=[[16, 32]]),
    "LlavaNextVideoForConditionalGeneration": dict(image_grid_pinpoints=[[16, 32]]),
    "LlavaOnevisionForConditionalGeneration": dict(image_grid_pinpoints=[[16, 32]]),
    "LongcatFlashForCausalLM": dict(head_dim=4, zero_expert_num=2),
    "Mamba2ForCausalLM": dict(num_heads=8),
    "MllamaForConditionalGeneration": dict(
        text_config=dict(cross_attention_layers=[1]),
        vision_config=dict(intermediate_layers_indices=[0, 1], vision_output_dim=96),
    ),
    "Molmo2ForConditionalGeneration": dict(
        vision_config=dict(image_size=[16, 16]), adapter_config=dict(vision_feature_layer=[1, 0])
    ),
    "MusicgenForCausalLM": dict(initializer_factor=0.2),
    "MusicgenMelodyForCausalLM": dict(initializer_factor=0.2),
    "NemotronH_Omni_Reasoning_V3": dict(
        vision_config=dict(video_temporal_patch_size=2, max_img_size=32), vision_hidden_size=32
    ),
    "OmniASRForConditionalGeneration": dict(
        audio_config=dict(conv_dim=(8,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4)
    ),
    "PaddleOCRVLForConditionalGeneration": dict(text_config=dict(rope_parameters=ROPE | dict(mrope_section=[1, 1, 2]))),
    "PerceptionLMForConditionalGeneration": dict(vision_config=dict(model_args={"embed_dim": HIDDEN})),
    "Phi4MultimodalForCausalLM": dict(
        audio_config=dict(
            ext_pw_out_channel=32, depthwise_separable_out_channel=32, nemo_conv_channels=32, input_size=16
        )
    ),
    "Qwen2_5OmniThinkerForConditionalGeneration": dict(vision_start_token_id=93),
    "Qwen3OmniMoeThinkerForConditionalGeneration": dict(vision_start_token_id=93),
    "Qwen4ExpForCausalLM": QWEN4_EXP,
    "Qwen4ExpForConditionalGeneration": dict(text_config=QWEN4_EXP),
    "RecurrentGemmaForCausalLM": dict(block_types=["recurrent", "attention"]),
    "ReformerModelWithLMHead": dict(
        axial_pos_shape=(3, 4),
        axial_pos_embds_dim=(8, 24),
        attn_layers=("local", "lsh"),
        local_attn_chunk_length=4,
        lsh_attn_chunk_length=4,
        num_buckets=2,
        hash_seed=0,
    ),
    "RoCBertForCausalLM": dict(
        pronunciation_embed_dim=8, pronunciation_vocab_size=31, shape_embed_dim=8, shape_vocab_size=37
    ),
    "Step3p7ForConditionalGeneration": dict(text_config=dict(sliding_window=8), vision_config=dict(image_size=32)),
    "UdopForConditionalGeneration": dict(decoder_start_token_id=0),
    "UnlimitedOcrForConditionalGeneration": dict(vision_config=dict(sam_config=dict(downsample_channels=(16, 32)))),
    "VipLlavaForConditionalGeneration": dict(vision_feature_layer=[-1, -2]),
    "XLMWithLMHeadModel": dict(causal=True),
    "XmodForCausalLM": dict(default_language="en_XX"),
    "ZambaForCausalLM": dict(num_hidden_layers=3, layers_block_type=["linear_attention", "hybrid", "hybrid"]),
    "ZayaForCausalLM": dict(num_experts_per_tok=1),
}

NOT_TRIED = dict.fromkeys(
    (
        "Granite4VisionForConditionalGeneration",
        "KyutaiSpeechToTextForConditionalGeneration",
        "Nemotron3_5TranscribeForConditionalGeneration",
    ),
    "not tried: parts of it need sizes of their own",
) | dict.fromkeys(
    (
        "InstructBlipVideoForConditionalGeneration",
        "PPFormulaNetForConditionalGeneration",
        "Pix2StructForConditionalGeneration",
        "VisionEncoderDecoderModel",
        "VoxtralRealtimeForConditionalGeneration",
    ),
    "not tried: it takes no text without inputs of its own",
)
# Towers that come from the timm package: this one instead, which text does not pass.
TIMM = (
    "FastVlmForConditionalGeneration",
    "Gemma3nForConditionalGeneration",
    "PerceptionLMForConditionalGeneration",
)


def fields_of(config_class: type) -> set[str]:
    return set(inspect.signature(config_class.__init__).parameters) - {"self", "kwargs", "args"}


def value_of(config: Any, name: str) -> Any:
    """Also under a name that the class maps to another one."""
    return vars(config)[name] if name in vars(config) else getattr(config, name, None)


def few_layers(config: Any) -> dict[str, Any]:
    """One layer of each kind, at least two: lists with an entry a layer, cut to their different entries in order."""
    now = vars(config)
    depth_name = next((n for n in ("num_hidden_layers", "num_layers", "n_layer", "n_layers") if n in now), None)
    if depth_name is None:
        return {}
    kinds = {}
    for name in fields_of(type(config)):
        values = now.get(name)
        if isinstance(values, (list, tuple)) and len(values) == now[depth_name] and len(set(map(str, values))) <= 4:
            kinds[name] = list(dict.fromkeys(values))
    depth = max([2, *map(len, kinds.values())])
    cut = {name: values + values[-1:] * (depth - len(values)) for name, values in kinds.items()}
    return {**cut, **({depth_name: depth} if depth > 2 else {})}


def _rope_keys(config_class: type) -> Any:
    return getattr(config_class, "ignore_keys_at_rope_validation", None) or ()


def tiny_config(config_class: type, overrides: dict[str, Any] | None = None) -> Any:
    """A configuration of this class with the sizes of `SMALL`, the same for those inside it, then `overrides`."""
    overrides = dict(overrides or {})
    base = config_class()
    values: dict[str, Any] = {}
    for name in fields_of(config_class):
        old = value_of(base, name)
        if name in SMALL and (old is not None or name in ALWAYS):
            values[name] = SMALL[name]
        elif isinstance(old, float) and any(part in name for part in ("drop", "jitter")):
            values[name] = 0.0
        elif old == 1.0 and isinstance(old, float) and name.endswith("_multiplier"):
            values[name] = 0.7
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = SMALL["num_attention_heads"]  # latent attention expands to all heads
    values |= few_layers(base)
    rope = getattr(base, "rope_parameters", None)
    if isinstance(rope, dict) and ("mrope_section" in rope or "mrope_section" in _rope_keys(config_class)):
        # In three sections, for time, height and width: half of the rotated part of a head.
        half = int(SMALL["head_dim"] * rope.get("partial_rotary_factor", 1)) // 2
        values["rope_parameters"] = rope | {"mrope_section": [half // 3, half // 3, half - 2 * (half // 3)]}
    for name, inside_class in config_class.sub_configs.items():
        inside = getattr(base, name, None)
        if isinstance(inside, transformers.PretrainedConfig):
            inside_class = type(inside)
        elif name not in overrides:
            continue
        values[name] = tiny_config(inside_class, overrides.pop(name, {}))
    return config_class(**{**values, **overrides})


def _classes(*mappings: str) -> set[str]:
    values = (value for mapping in mappings for value in getattr(modeling_auto, mapping).values())
    return {name for value in values for name in (value if isinstance(value, tuple) else (value,))}


def causal_names() -> list[str]:
    return sorted(_classes("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"))


def multimodal_names() -> list[str]:
    """The classes that are not among the causal ones, and those that are called with an image too."""
    classes = _classes("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")
    known = classes & set(IMAGES)
    return sorted(classes - set(causal_names()) | {name + WITH_IMAGE for name in known})


def names() -> list[str]:
    return causal_names() + multimodal_names()


def quick_names() -> list[str]:
    """Each class once, with an image where it takes one."""
    every = names()
    return [name for name in every if name + WITH_IMAGE not in every]


def check_size(cls: type, config: Any) -> None:
    """Before memory is touched: a width that the table does not know can make a model of many gigabytes."""
    size = 0
    # What fails here fails again, with its message, in earnest.
    with contextlib.suppress(Exception), torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > MOST_PARAMETERS:
        raise CannotBuild(f"{size:,} parameters, more than {MOST_PARAMETERS:,}: a size that the table does not know")


def replace_tower(config: Any) -> None:
    """In place, past the check of the field's type."""
    tower = tiny_config(transformers.SiglipVisionConfig)
    for field, value in vars(config.vision_config).items():
        if field not in vars(tower):
            setattr(tower, field, value)
    vars(config)["vision_config"] = tower


def perturb(model: torch.nn.Module) -> None:
    """Biases start at 0, norms at 1 and some matrices at 0, where leaving them out would go unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter.ndim == 1 or not parameter.any()):
                parameter.add_(0.2 * torch.randn(parameter.shape))


def build(name: str, seed: int = 0) -> tuple[torch.nn.Module, dict[str, Any]]:
    """(model, inputs) for `model(**inputs)`, the same ones for the same seed; raises CannotBuild.

    The state of the generators stays as it is.
    """
    name, image, _ = name.partition(WITH_IMAGE)
    if name in NOT_TRIED:
        raise CannotBuild(NOT_TRIED[name])
    cls = getattr(transformers, name)
    if "labels" not in inspect.signature(cls.forward).parameters:
        raise CannotBuild("its forward takes no labels and returns no loss")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config = tiny_config(cls.config_class, OVERRIDES.get(name))
            if name in TIMM:
                replace_tower(config)
            check_size(cls, config)
            model = cls(config).train()
        except ImportError as error:
            raise CannotBuild(" ".join(str(error).split())) from error
        perturb(model)
        text = config.get_text_config()
        special = [value for value in vars(config).values() if isinstance(value, int) and value in SPECIAL]
        special += (getattr(config, "vocabulary_map", None) or {}).values()
        inputs = batch(getattr(text, "unpadded_vocab_size", text.vocab_size), special)
        if image:
            inputs = with_image(model, inputs, IMAGES[name](config))
        if name in INPUTS:
            inputs = INPUTS[name](model, inputs)
    return model, inputs
