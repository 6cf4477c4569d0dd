"""Small models of transformers with every parameter random, saved as anyone would save them."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

# A module that imports this one is skipped where these are missing.
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
save_tensors = pytest.importorskip("safetensors.torch").save_file

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

LLAVA = {
    "llava_onevision": {},
    "llava_onevision_tied": {"tied": True},
    "llava_onevision_odd": {"image_size": 20},
    "llava_onevision_max_1": {"vision_aspect_ratio": "anyres_max_1"},
    # The tower's last layer is there and not used: the other two layouts are made of these.
    "llava_onevision_penultimate": {"vision_feature_layer": -2},
    "llava_onevision_penultimate_tied": {"vision_feature_layer": -2, "tied": True},
}
"""Whole models; a grid of 6x6 tokens, but for "odd", which has 5x5."""

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
    if name in LLAVA:
        return transformers.LlavaOnevisionForConditionalGeneration(_llava_config(**LLAVA[name]))
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


def pinpoints(size: int = VISION["image_size"]) -> list[list[int]]:
    """(height, width) of one to four tiles."""
    return [[size, size], [size, 2 * size], [2 * size, size], [2 * size, 2 * size]]


def _llava_config(*, tied: bool = False, image_size: int = VISION["image_size"], **fields: Any) -> Any:
    text = transformers.Qwen2Config(**TEXT, tie_word_embeddings=tied)
    vision = VISION | {"image_size": image_size, "vision_use_head": False}
    return transformers.LlavaOnevisionConfig(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**vision),
        image_token_index=300,
        video_token_index=301,
        image_grid_pinpoints=pinpoints(image_size),
        tie_word_embeddings=tied,
        **fields,
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
    if name in LLAVA:
        _write_preprocessor(directory, LLAVA[name].get("image_size", VISION["image_size"]))
    return directory


def _write_preprocessor(directory: Path, size: int) -> None:
    settings = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": size, "width": size},
        "image_grid_pinpoints": pinpoints(size),
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))


def hub_name(name: str) -> str:
    """A LLaVA-OneVision tensor as transformers 4 named it in files, from what 5 calls it in files."""
    return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)


def memory_name(name: str) -> str:
    """The same as transformers 5 calls it in memory."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


def rename(directory: Path, new: Callable[[str], str]) -> Path:
    """Rename every tensor of a directory."""
    edit_tensors(directory, lambda tensors: {new(name): values for name, values in tensors.items()})
    return directory


def save_tower(name: str, directory: Path) -> Path:
    """The image tower of a whole model, with all of its layers, in a directory of its own."""
    model(name).model.vision_tower.save_pretrained(directory)
    return directory


def _penultimate(tied: bool) -> str:
    return "llava_onevision_penultimate" + ("_tied" if tied else "")


def _plain_tensors(tied: bool, vision: str | None, dtype: str) -> dict[str, Any]:
    """The tensors of a whole model under the names that LLaVA's own code gives them.

    Args:
      tied: without a head, which is the embedding again.
      vision: before the names of the tower, whose last layer that code deletes; None leaves the tower out.
      dtype: of all.
    """
    names = {
        "model.language_model.": "model.",
        "lm_head.": "lm_head.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.image_newline": "model.image_newline",
        "model.vision_tower.": vision,
    }
    last = f"model.vision_tower.encoder.layers.{VISION['num_hidden_layers'] - 1}."
    tensors = {}
    for name, tensor in model(_penultimate(tied)).state_dict().items():
        theirs, ours = next((old, new) for old, new in names.items() if name.startswith(old))
        if ours is not None and not name.startswith(last) and not (tied and theirs == "lm_head."):
            tensors[ours + name.removeprefix(theirs)] = tensor.to(getattr(torch, dtype)).clone()
    return tensors


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_tensors(tensors, directory / "model.safetensors", {"format": "pt"})
    _write_preprocessor(directory, VISION["image_size"])
    return directory


_LLAVA_FIELDS = TEXT | {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "use_sliding_window": False,
    "mm_hidden_size": VISION["hidden_size"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
}


def save_llava_next(directory: Path, *, tied: bool = False, dtype: str = "float32", **fields: Any) -> Path:
    """``model("llava_onevision_penultimate")`` as LLaVA-NeXT's code saves it.

    Args:
      directory: made here.
      tied: ``model("llava_onevision_penultimate_tied")``.
      dtype: of the tensors.
      **fields: of config.json.
    """
    config = _LLAVA_FIELDS | {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": pinpoints(),
        "mm_newline_position": "one_token",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_resampler_type": None,
        "mm_spatial_pool_mode": "bilinear",
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_vision_tower": "tiny/siglip",
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
    }
    vision = "model.vision_tower.vision_tower.vision_model."
    return _write(directory, config | fields, _plain_tensors(tied, vision, dtype))


def save_cambrian(
    directory: Path,
    *,
    tied: bool = False,
    dtype: str = "float32",
    tower: bool = True,
    nfp: bool = False,
    **fields: Any,
) -> Path:
    """``model("llava_onevision_penultimate")`` as Cambrian-S's code saves it.

    Args:
      directory: made here.
      tied: ``model("llava_onevision_penultimate_tied")``.
      dtype: of the tensors.
      tower: with the image tower, as where it was trained.
      nfp: with the head that predicts the next frame.
      **fields: of config.json.
    """
    config = _LLAVA_FIELDS | {
        "architectures": ["CambrianQwenForCausalLM"],
        "model_type": "cambrian_qwen",
        "anyres_max_subimages": 4,
        "connector_only": True,
        "image_aspect_ratio": "anyres",
        "miv_token_len": 9,
        "mm_use_im_newline_token": True,
        "mm_vision_tower_aux_list": ["tiny/siglip2"],
        "mm_vision_tower_aux_token_len_list": [36],
        "nfp_head": nfp,
        "si_token_len": 36,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "unfreeze_mm_vision_tower": tower,
    }
    vision = "model.vision_tower_aux_list.0.vision_tower.vision_model." if tower else None
    tensors = _plain_tensors(tied, vision, dtype)
    if nfp:
        width, features = TEXT["hidden_size"], VISION["hidden_size"]
        for name, out in (("model.nfp_head.0", width), ("model.nfp_head.2", features)):
            tensors[f"{name}.weight"] = torch.full((out, width), 0.5, dtype=getattr(torch, dtype))
            tensors[f"{name}.bias"] = torch.full((out,), 0.5, dtype=getattr(torch, dtype))
    return _write(directory, config | fields, tensors)


def shard(directory: Path, of: Callable[[str], int]) -> Path:
    """Split model.safetensors into shards, ``of`` a tensor's name being its number from 0, with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    count = 1 + max(map(of, tensors))
    where = {name: f"model-{of(name) + 1:05d}-of-{count:05d}.safetensors" for name in tensors}
    for file in set(where.values()):
        part = {name: values for name, values in tensors.items() if where[name] == file}
        save_file(part, directory / file, {"format": "pt"})
    total = sum(values.nbytes for values in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
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
