"""transformers: every type that builds from a tiny configuration.

A configuration is shrunk field by field: widths, depths, head counts, vocabularies and expert counts get
small values by the field's name, in nested configurations too; ``OVERRIDES`` holds what a type needs besides.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fxfusion.testing.catalogue.entry import Entry, Inputs, select

BATCH, LENGTH, TARGET_LENGTH, VOCABULARY = 2, 16, 8, 128
IMAGE = 64

# Small values of a configuration's fields, by the field's name.
_FIELDS: dict[int, str] = {
    64: (
        "attention_hidden_size d_latents d_model decoder_embed_dim decoder_hidden_size dim emb_dim "
        "embed_dim embedding_size encoder_embed_dim encoder_hidden_size expert_ffn_hidden_size "
        "expert_intermediate_size hidden_dim hidden_size lru_width model_dim moe_ffn_hidden_size "
        "moe_intermediate_size moe_shared_expert_intermediate_size n_embd n_embed output_hidden_size "
        "projection_dim share_hidden_size shared_expert_intermediate_size shared_intermediate_size "
        "word_embed_proj_dim"
    ),
    128: (
        "context_length d_ff d_inner decoder_ffn_dim decoder_intermediate_size dense_intermediate_size "
        "encoder_ffn_dim encoder_intermediate_size ffn_dim ffn_hidden_size inner_dim intermediate_size "
        "intermediate_size_mlp max_2d_position_embeddings max_decoder_position_embeddings "
        "max_encoder_position_embeddings max_position_embeddings max_seq_len max_sequence_length "
        "max_source_positions max_target_positions mlp_hidden_size n_ctx n_inner n_positions "
        "prefix_hidden_size seq_length text_vocab_size vocab_size"
    ),
    2: (
        "decoder_layers decoder_num_hidden_layers decoder_num_key_value_heads decoder_num_layers "
        "encoder_layers encoder_num_hidden_layers encoder_num_key_value_heads encoder_num_layers "
        "experts_per_token moe_k moe_top_k moe_topk n_kv_heads n_layer n_layers num_decoder_layers "
        "num_encoder_layers num_experts_per_tok num_experts_per_token num_hidden_layers "
        "num_key_value_heads num_kv_heads num_layers num_selected_experts num_self_attends_per_block "
        "top_k_experts"
    ),
    4: (
        "decoder_attention_heads decoder_num_attention_heads encoder_attention_heads "
        "encoder_num_attention_heads ffn_num_attention_heads moe_num_experts n_experts n_head n_heads "
        "n_routed_experts num_attention_heads num_cross_attention_heads num_decoder_attention_heads "
        "num_encoder_attention_heads num_experts num_experts_total num_heads num_local_experts "
        "num_self_attention_heads"
    ),
    16: (
        "attention_head_dim attention_head_size d_head d_kv head_dim index_head_dim qk_nope_head_dim "
        "qkv_dim v_head_dim"
    ),
    32: "index_topk kv_lora_rank q_lora_rank",
    8: "qk_rope_head_dim",
}
_AT_MOST_ONE = ("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts")
_TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "mask_token_id": 4,
    "unk_token_id": 3,
}
_LISTS = {"conv_dim": [32] * 7, "tdnn_dim": [32, 32, 32, 32, 64]}
_SMALL = {name: value for value, names in _FIELDS.items() for name in names.split()}

# What a type needs besides, because its fields depend on one another.
OVERRIDES: dict[str, dict[str, Any]] = {
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 8},
    "phi3": {"pad_token_id": 0},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8, "state_size": 16},
    "vit": {"image_size": 64},
    "deit": {"image_size": 64},
    "beit": {"image_size": 64},
    "dinov2": {"image_size": 56},
    "swin": {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 7, "image_size": 56},
    "swinv2": {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 7, "image_size": 56},
    "convnext": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
    "convnextv2": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
    "segformer": {
        "hidden_sizes": [16, 16, 32, 32],
        "num_attention_heads": [1, 2, 2, 4],
        "depths": [1, 1, 1, 1],
        "decoder_hidden_size": 32,
    },
    "mobilevit": {
        "hidden_sizes": [48, 64, 80],
        "neck_hidden_sizes": [8, 8, 16, 24, 32, 40, 80],
        "image_size": 64,
    },
    "resnet": {"embedding_size": 16, "hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 2, 1]},
    "regnet": {
        "embedding_size": 16,
        "hidden_sizes": [32, 32, 64, 64],
        "depths": [1, 1, 2, 1],
        "groups_width": 16,
    },
    "efficientnet": {
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "image_size": 64,
        "hidden_dim": 1280,
    },
    "whisper": {
        "max_source_positions": 50,
        "num_mel_bins": 16,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 4},
    "data2vec-vision": {"image_size": 64},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "longformer": {"attention_window": 8},
    "big_bird": {"block_size": 4, "num_random_blocks": 1},
    "perceiver": {"num_latents": 16, "d_latents": 64, "d_model": 64, "max_position_embeddings": 16},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2, "topk_method": "greedy"},
    "deepseek_v3": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "codegen": {"rotary_dim": 8},
    "mobilebert": {"hidden_size": 64, "intra_bottleneck_size": 64, "embedding_size": 32},
    "luke": {"entity_vocab_size": 64, "entity_emb_size": 32},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8, "visual_embed": False},
    "lilt": {"hidden_size": 96, "num_attention_heads": 4},
    "led": {"attention_window": 8},
    "longt5": {"local_radius": 4, "global_block_size": 4},
    "bigbird_pegasus": {"block_size": 4, "num_random_blocks": 1},
    "jamba": {
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "bamba": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "mamba_d_state": 16,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "chunk_size": 8,
        "mamba_ngroups": 1,
        "kv_channels": 16,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 16, "num_hidden_layers": 3},
    "nemotron": {"num_key_value_heads": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "ministral": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128,
    },
    "minicpm3": {"num_key_value_heads": 4},
    "mobilevitv2": {"image_size": 64},
    "cvt": {
        "depth": [1, 2, 3],  # the rate of a stage is looked up by the stage, not by the block
        "embed_dim": [16, 32, 64],
        "num_heads": [1, 2, 4],
        "drop_path_rate": [0.0, 0.0, 0.0],
    },
    "poolformer": {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 32, 64]},
    "pvt": {"depths": [1, 1, 1, 1]},
    "pvt_v2": {"depths": [1, 1, 1, 1]},
    "focalnet": {"embed_dim": 16, "depths": [1, 1, 1, 1]},
    "dinat": {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4]},
    "hiera": {"embed_dim": 16, "depths": [1, 1, 2, 1]},
    "bit": {
        "num_groups": 8,
        "embedding_size": 32,
        "hidden_sizes": [64, 64, 128, 128],
        "depths": [1, 1, 2, 1],
    },
    "vit_msn": {"image_size": 64},
    "vit_mae": {"image_size": 64, "decoder_hidden_size": 64},
    "dinov2_with_registers": {"image_size": 56},
    "dinov3_vit": {"image_size": 64},
    "dinov3_convnext": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
    "ijepa": {"image_size": 56},
    "swiftformer": {"depths": [1, 1, 2, 1]},
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32},
    "sew-d": {
        "conv_dim": [32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32],
        "squeeze_factor": 2,
        "position_buckets": 8,
        "max_position_embeddings": 64,
    },
    "wav2vec2-conformer": {"vocab_size": 32},
    "wav2vec2-bert": {"feature_projection_input_dim": 32, "vocab_size": 32},
    "speech_to_text": {"conv_channels": 32, "input_feat_per_channel": 16},
    "align": {
        "projection_dim": 320,
        "vision_config": {
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "hidden_dim": 320,
            "image_size": 64,
        },
    },
    "sam": {
        "vision_config": {
            "image_size": IMAGE,
            "initializer_range": 0.02,
            "output_channels": 64,
            "num_pos_feats": 32,
            "global_attn_indexes": [1],
            "window_size": 3,
        },
        "prompt_encoder_config": {"image_size": IMAGE, "image_embedding_size": IMAGE // 16},
        "mask_decoder_config": {"iou_head_hidden_dim": 64, "mlp_dim": 64},
    },
    "rt_detr": {"num_queries": 20},
    "dpt": {
        "image_size": 64,
        "num_hidden_layers": 4,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [16, 16, 32, 32],
        "fusion_hidden_size": 32,
    },
    "videomae": {"image_size": 32, "num_frames": 4},
    "vivit": {"image_size": 32, "num_frames": 4},
    "timesformer": {"image_size": 32, "num_frames": 4},
    "donut-swin": {
        "embed_dim": 16,
        "depths": [1, 2],
        "num_heads": [2, 4],
        "window_size": 7,
        "image_size": 56,
    },
    "swin2sr": {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "window_size": 8},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [4, 8],
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "feed_forward_size": 128,
        "num_buckets": 4,
        "is_decoder": True,
        "hash_seed": 0,
    },
}

_NAMES = """
bert roberta distilbert albert electra deberta deberta-v2 mpnet modernbert gpt2 gpt_neo gpt_neox
gptj opt bloom llama mistral mixtral qwen2 qwen3 qwen2_moe qwen3_moe gemma gemma2 gemma3_text phi
phi3 falcon mpt stablelm olmo olmo2 cohere granite mamba mamba2 rwkv t5 mt5 bart pegasus marian vit
deit beit dinov2 swin swinv2 convnext convnextv2 clip siglip segformer mobilevit resnet regnet
efficientnet hubert wav2vec2 whisper esm layoutlm data2vec-text data2vec-vision data2vec-audio
xlm-roberta funnel longformer big_bird perceiver smollm3 deepseek_v2 deepseek_v3 gpt_oss llama4_text
starcoder2 codegen gpt_bigcode biogpt xglm openai-gpt ctrl xlnet xlm camembert ernie nomic_bert
squeezebert convbert mobilebert nystromformer yoso fnet roformer rembert ibert luke tapas splinter
canine layoutlmv3 lilt megatron-bert mra roc_bert bert-generation mbart m2m_100 blenderbot
blenderbot-small plbart led longt5 switch_transformers umt5 prophetnet fsmt bigbird_pegasus t5gemma
jamba bamba zamba2 falcon_mamba recurrent_gemma nemotron olmoe olmo3 phimoe persimmon glm glm4
cohere2 exaone4 helium diffllama granitemoe granitemoehybrid jetmoe dbrx ministral hunyuan_v1_dense
ernie4_5 ernie4_5_moe qwen3_next lfm2 minimax xlstm moonshine doge apertus arcee bitnet seed_oss
vaultgemma gemma3n_text falcon_h1 nanochat kimi_linear minicpm3 mobilenet_v1 mobilenet_v2
mobilevitv2 levit cvt poolformer pvt pvt_v2 focalnet dinat hiera bit vit_msn vit_mae
dinov2_with_registers dinov3_vit dinov3_convnext ijepa swiftformer hgnet_v2 textnet imagegpt
audio-spectrogram-transformer sew sew-d unispeech unispeech-sat wavlm wav2vec2-conformer
wav2vec2-bert speech_to_text speecht5 clip_text_model clip_vision_model siglip_vision_model clipseg
blip chinese_clip align altclip owlvit vilt flava detr yolos conditional_detr deformable_detr
rt_detr dpt glpn sam videomae vivit timesformer encodec patchtst timesfm vitdet donut-swin swin2sr
reformer
"""
TYPES = _NAMES.split()

_TRANSLATORS = """
bart pegasus mbart marian blenderbot blenderbot-small plbart prophetnet bigbird_pegasus whisper
speecht5
"""
_ENCODER_DECODERS = _TRANSLATORS.split()
_CAUSAL_FIRST = ("xlnet", "xlm", "reformer", "imagegpt")  # registered for masking too
_CLASSES = {  # where the auto classes would take a distilled twin, or a model without its head
    "clip_text_model": "CLIPTextModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "deit": "DeiTForImageClassification",
    "levit": "LevitForImageClassification",
    "patchtst": "PatchTSTForPrediction",
    "timesfm": "TimesFmModelForPrediction",
    "vit_mae": "ViTMAEForPreTraining",
}
# Encoders without any task of their own: used as they are meant to be, below a linear probe.
_PROBED = ("siglip_vision_model", "dinov3_vit", "dinov3_convnext", "vitdet")
_PROBE_CLASSES = 10
_TASKS = {  # the class of each task, and the table of types that have it
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForCTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForSemanticSegmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "AutoModelForObjectDetection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "AutoModelForVideoClassification": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForDepthEstimation": "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForImageToImage": "MODEL_FOR_IMAGE_TO_IMAGE_MAPPING_NAMES",
}
_IMAGE_TASKS = (
    "AutoModelForImageClassification",
    "AutoModelForSemanticSegmentation",
    "AutoModelForObjectDetection",
    "AutoModelForDepthEstimation",
    "AutoModelForImageToImage",
)
_VIDEOS = ("videomae", "vivit", "timesformer")
_LENGTHS = {"reformer": 32, "big_bird": 64, "bigbird_pegasus": 64}


def transformers_entries(patterns: Sequence[str] = ()) -> list[Entry]:
    """Return the types, or those whose name matches a pattern."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known = [name for name in dict.fromkeys(TYPES) if name in CONFIG_MAPPING_NAMES]
    return [
        Entry("transformers", task_of(name), name, functools.partial(_build, name), _inputs_of(name))
        for name in (select("transformers", known, patterns) if patterns else known)
    ]


def tiny_config(name: str) -> Any:
    """Return a small configuration of a type, its caches off."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    config = kind(**_small_fields(kind, OVERRIDES.get(name, {})))
    for item in [config, *(getattr(config, key, None) for key in getattr(kind, "sub_configs", None) or {})]:
        if getattr(item, "use_cache", None):
            item.use_cache = False
    return config


def _small_fields(kind: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    overrides = dict(overrides)
    fields: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, default in fields.items():
        is_int = isinstance(default, int) and not isinstance(default, bool)
        if name in _AT_MOST_ONE and is_int:
            found[name] = min(1, default)
        elif name in _SMALL and (is_int or (default is None and name == "num_key_value_heads")):
            found[name] = _SMALL[name]
        elif name in _TOKENS and is_int and default >= VOCABULARY:
            found[name] = _TOKENS[name]
        elif name in _LISTS and isinstance(default, (list, tuple)):
            sizes = _LISTS[name]
            found[name] = type(default)(sizes[min(index, len(sizes) - 1)] for index in range(len(default)))
    for name, inner in (getattr(kind, "sub_configs", None) or {}).items():
        nested = isinstance(inner, type) and dataclasses.is_dataclass(inner) and name in fields
        if nested and inner.__name__ != "AutoConfig":
            found[name] = _small_fields(inner, overrides.pop(name, {}))
    return {**found, **overrides}


def task_of(name: str) -> str:
    """Return the auto class that a type is built by: encoders for masking, else the first that has it."""
    from transformers.models.auto import modeling_auto as auto

    translates = name in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    masks = name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masks and not translates and name not in (*_ENCODER_DECODERS, *_CAUSAL_FIRST):
        return "AutoModelForMaskedLM"
    if translates:
        return "AutoModelForSeq2SeqLM"
    if name == "whisper":
        return "AutoModelForSpeechSeq2Seq"
    return next((task for task, table in _TASKS.items() if name in getattr(auto, table)), "AutoModel")


def _build(name: str) -> nn.Module:
    import transformers

    config = tiny_config(name)
    if name in _CLASSES:
        model: nn.Module = getattr(transformers, _CLASSES[name])._from_config(config)
        return model
    auto = getattr(transformers, task_of(name))
    try:
        model = auto.from_config(config, attn_implementation="sdpa")
    except ValueError as error:  # a type without it says so
        if "sdpa" not in str(error) and "scaled_dot_product" not in str(error):
            raise
        model = auto.from_config(config, attn_implementation="eager")
    if name in _PROBED:
        width = getattr(config, "hidden_sizes", [getattr(config, "hidden_size", 0)])[-1]
        return Probed(model, width, _PROBE_CLASSES)
    return model


class Probed(nn.Module):
    """A linear classifier on the mean of an encoder's last hidden state.

    Parameters
    ----------
    encoder : torch.nn.Module
        Its first output is (batch, tokens, channels), or (batch, channels, height, width).
    channels, classes : int
    """

    def __init__(self, encoder: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(channels, classes)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return logits, (batch, classes)."""
        hidden = self.encoder(pixel_values=pixel_values)[0]
        pooled: torch.Tensor = hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))
        logits: torch.Tensor = self.head(pooled)
        return logits


def _inputs_of(name: str) -> functools.partial[Inputs]:
    return functools.partial(_inputs, name)


def _inputs(name: str, model: Any) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    takes = set(inspect.signature(model.forward).parameters)
    model = model.encoder if name in _PROBED else model
    drawn = _main_inputs(name, model, takes, generator)
    if task_of(name) == "AutoModelForSpeechSeq2Seq" and "decoder_input_ids" in takes:
        drawn["decoder_input_ids"] = _tokens(TARGET_LENGTH, generator)
    if "use_cache" in takes and name != "rwkv":
        drawn["use_cache"] = False
    return (), drawn


def _main_inputs(name: str, model: Any, takes: set[str], generator: torch.Generator) -> dict[str, Any]:
    config, task = model.config, task_of(name)
    main = getattr(model, "main_input_name", "input_ids")

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    channels = _first(config, "num_channels") or 3
    image = (channels, *_image_size(config))
    if main == "input_features" in takes:
        return {"input_features": numbers(*_speech_shape(name, config))}
    if main == "input_values" in takes:
        spectrogram = (config.max_length, config.num_mel_bins) if name.startswith("audio-") else (4000,)
        return {"input_values": numbers(*((1, 4000) if name == "encodec" else spectrogram))}
    if name == "imagegpt":
        return {"input_ids": _tokens(LENGTH, generator)}
    if name in _VIDEOS or task == "AutoModelForVideoClassification":
        return {"pixel_values": numbers(_first(config, "num_frames") or 8, *image)}
    if name == "vit_mae":  # which patches are hidden is drawn, or given as noise
        patches = math.prod(_image_size(config)) // config.patch_size**2
        return {"pixel_values": numbers(*image), "noise": torch.rand(BATCH, patches, generator=generator)}
    if task in _IMAGE_TASKS or (main == "pixel_values" and "input_ids" not in takes):
        return {"pixel_values": numbers(*image)}
    if name == "perceiver":
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        return {"inputs": _tokens(LENGTH, generator), "attention_mask": mask}
    if name == "patchtst":
        return {"past_values": numbers(config.context_length, config.num_input_channels)}
    if name == "timesfm":
        return {"past_values": list(numbers(config.context_length)), "freq": [0] * BATCH}
    return _text_inputs(name, takes, generator, lambda: numbers(*image))


def _text_inputs(name: str, takes: set[str], generator: torch.Generator, image: Any) -> dict[str, Any]:
    length, task = _LENGTHS.get(name, LENGTH), task_of(name)
    drawn: dict[str, Any] = {"input_ids": _tokens(length, generator)}
    if "attention_mask" in takes:
        drawn["attention_mask"] = torch.ones(BATCH, length, dtype=torch.long)
        if task in ("AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"):
            drawn["attention_mask"][1, -3:] = 0
    if task == "AutoModelForSeq2SeqLM" and "decoder_input_ids" in takes:
        drawn["decoder_input_ids"] = _tokens(TARGET_LENGTH, generator)
    if "pixel_values" in takes and name != "layoutlmv3":
        drawn["pixel_values"] = image()
    if "bbox" in takes:
        drawn["bbox"] = torch.zeros(BATCH, length, 4, dtype=torch.long)
    return drawn


def _tokens(length: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(5, 100, (BATCH, length), generator=generator)


def _speech_shape(name: str, config: Any) -> tuple[int, int]:
    if name == "whisper":
        return config.num_mel_bins, 2 * config.max_source_positions
    fields = ("input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins")
    return 64, next((getattr(config, field) for field in fields if hasattr(config, field)), 80)


def _image_size(config: Any) -> tuple[int, int]:
    size = _first(config, "image_size") or IMAGE
    return (size, size) if isinstance(size, int) else tuple(size)[-2:]


def _first(config: Any, field: str) -> Any:
    """Return a field of a configuration, else of its vision or image configuration."""
    for item in (config, *(getattr(config, name, None) for name in ("vision_config", "image_config"))):
        value = getattr(item, field, None)
        if value is not None:
            return value
    return None
