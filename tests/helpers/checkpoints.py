"""Small checkpoints of Hugging Face's layout, made without torch."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gaze_jax.convert.families import family_of
from gaze_jax.convert.source import expected_tensors

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


def tensors_of(config) -> dict[str, np.ndarray]:
    family = family_of(config, "config.json")
    whole = family.read_config(config)
    rng = np.random.default_rng(0)
    shapes = expected_tensors(family.rules(whole), whole)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def checkpoint(directory: Path, config=QWEN, change=lambda tensors: tensors) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(change(tensors_of(config)), directory / "model.safetensors", {"format": "pt"})
    return directory
