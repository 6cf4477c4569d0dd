"""config.json of whole models, as they were published, and their reading."""

import dataclasses

from gaze_jax.families import CONVERSIONS, MODELS, conversion_of, written_as
from gaze_jax.models.config import DecoderConfig, VisionConfig

QWEN_7B = {
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "use_sliding_window": False,
}
PINPOINTS = [[height * 384, width * 384] for height in range(1, 7) for width in range(1, 7)]

HUB = {
    "model_type": "llava_onevision",
    "architectures": ["LlavaOnevisionForConditionalGeneration"],
    "image_grid_pinpoints": PINPOINTS,
    "image_token_index": 151646,
    "projector_hidden_act": "gelu",
    "text_config": QWEN_7B | {"model_type": "qwen2", "vocab_size": 152128},
    "tie_word_embeddings": False,
    "vision_aspect_ratio": "anyres_max_9",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 26,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
"""llava-hf/llava-onevision-qwen2-7b-ov-hf, as transformers 4 wrote it."""

NEXT = QWEN_7B | {
    "model_type": "llava",
    "architectures": ["LlavaQwenForCausalLM"],
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": PINPOINTS,
    "mm_hidden_size": 1152,
    "mm_newline_position": "one_token",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
"""lmms-lab/llava-onevision-qwen2-7b-ov."""

CAMBRIAN = QWEN_7B | {
    "model_type": "cambrian_qwen",
    "architectures": ["CambrianQwenForCausalLM"],
    "anyres_max_subimages": 9,
    "connector_only": True,
    "image_aspect_ratio": "anyres",
    "miv_token_len": 64,
    "mm_hidden_size": 1152,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_newline_token": True,
    "mm_use_im_start_end": False,
    "mm_vision_select_layer": -2,
    "mm_vision_tower_aux_list": ["google/siglip2-so400m-patch14-384"],
    "mm_vision_tower_aux_token_len_list": [729],
    "nfp_head": True,
    "si_token_len": 729,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}

SMALL = VisionConfig(24, 4, 48, depth=2, num_heads=4, mlp_dim=80)


def read(config, *tower):
    return conversion_of(config, "config.json").read_config(config, *tower)


def computing(name):
    """A published model in the dtype that a config.json alone stands for."""
    return dataclasses.replace(MODELS[name], dtype="float32", param_dtype="float32")


QWEN = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
}
"""A small Qwen3, what is default left out."""


def written_and_read(kind: str) -> tuple[DecoderConfig, DecoderConfig]:
    """A config of this ``model_type``, and what its family reads of what it writes."""
    config = DecoderConfig(
        320,
        64,
        3,
        4,
        2,
        16,
        96,
        rope_theta=5e5,
        norm_eps=1e-5,
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2",
    )
    assert written_as(config) == kind
    conversion = CONVERSIONS[kind]
    return config, conversion.read_config(conversion.write_config(config))
