"""Small models of transformers with every parameter random, saved as anyone would save them."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rope_theta": 1e6,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 4,
    "image_size": 24,
}
SIGLIP_TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

DECODERS = ("qwen2_tied", "qwen2_untied", "qwen3_tied", "qwen3_untied", "llama_untied")
TOWERS = ("siglip", "siglip_odd", "siglip_headless", "siglip_whole")
FAMILIES = DECODERS + TOWERS


def _model(name: str) -> Any:
    if name in DECODERS:
        kind, tied = name.split("_")
        config = {
            "qwen2": transformers.Qwen2Config(**TEXT, tie_word_embeddings=tied == "tied"),
            "qwen3": transformers.Qwen3Config(**TEXT, head_dim=32, tie_word_embeddings=tied == "tied"),
            # No end token, which is 2 by default: the others have none, and answers shall not stop.
            "llama": transformers.LlamaConfig(**TEXT, eos_token_id=None, tie_word_embeddings=tied == "tied"),
        }[kind]
        return transformers.AutoModelForCausalLM.from_config(config)
    fields = {
        "siglip": {},
        "siglip_odd": {"image_size": 26},  # no multiple of the patch
        "siglip_headless": {"vision_use_head": False},
        "siglip_whole": {},
    }[name]
    vision = transformers.SiglipVisionConfig(**VISION | fields)
    if name != "siglip_whole":
        return transformers.SiglipVisionModel(vision)
    text = dict(SIGLIP_TEXT)
    return transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=vision.to_dict(), text_config=text)
    )


def _randomise(model: Any) -> None:
    """Every parameter: a bias or norm that stays at 0 or 1 hides what is wrong with it."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias") or parameter.ndim < 2:
            draw = 0.2 * draw + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            draw = draw * parameter.shape[-1] ** -0.5
        parameter.data.copy_(draw)


@functools.cache
def model(name: str) -> Any:
    """The model, in float32 and eval mode."""
    built = _model(name)
    _randomise(built)
    return built.eval()


def save(name: str, directory: Path, *, dtype: str = "float32", shard: str = "5GB") -> Path:
    """``save_pretrained`` in a dtype and with shards of a size; returns the directory."""
    built = _model(name)
    built.load_state_dict(model(name).state_dict())
    built.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)
    return directory


def edit_config(directory: Path, **fields: Any) -> None:
    """Change fields of config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(directory: Path, change: Any) -> None:
    """Rewrite model.safetensors with ``change(tensors)``, a dictionary of arrays."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file({name: np.ascontiguousarray(t) for name, t in change(tensors).items()}, path, {"format": "pt"})
