"""Small checkpoints of Hugging Face's layout, made without torch."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gaze_jax.convert.source import expected_tensors
from gaze_jax.families import conversion_of, feature_tower
from gaze_jax.families.siglip import read_siglip

QWEN = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 32,
    "rope_theta": 1e6,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "image_size": 12,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
CAMBRIAN = QWEN | {
    "model_type": "cambrian_qwen",
    "connector_only": True,
    "image_aspect_ratio": "pad",
    "miv_token_len": 4,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_tower_aux_list": ["tiny/siglip"],
    "si_token_len": 9,
}
"""A whole model whose tower is that of :data:`SIGLIP`, less its last layer."""


def tensors_of(config) -> dict[str, np.ndarray]:
    conversion = conversion_of(config, "config.json")
    tower = (feature_tower(read_siglip(SIGLIP), -2),) if conversion.tower_elsewhere else ()
    whole = conversion.read_config(config, *tower)
    rng = np.random.default_rng(0)
    shapes = expected_tensors(conversion.rules(whole), whole)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def checkpoint(directory: Path, config=QWEN, change=lambda tensors: tensors) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(change(tensors_of(config)), directory / "model.safetensors", {"format": "pt"})
    return directory
