"""The original of a whole multimodal model in torch, for comparison. Needs torch and transformers.

transformers only has a class for its own layouts (``Conversion.original``). A model in the layout of
LLaVA-NeXT or Cambrian-S is assembled here: every tensor of its files is loaded, under its own name, into
transformers' language model, its image tower or a projector; missing and unexpected tensors are errors.
"""

import dataclasses
import fnmatch
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from gaze_jax.convert import shards
from gaze_jax.convert.source import CONFIG, read_config
from gaze_jax.errors import UserError
from gaze_jax.families import conversion_of
from gaze_jax.families.table import Conversion, Json, Names
from gaze_jax.models.config import VisionConfig

# torch is an optional extra, and nothing here needs its types.
TorchModule = Any
TorchTensor = Any

_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
)


def import_torch() -> tuple[ModuleType, ModuleType]:
    """Import torch and transformers, without the latter's warnings.

    Raises:
      UserError: they are not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            "--verify runs the original too, which needs: pip install 'gaze-jax[parity]'."
        ) from error
    transformers.logging.set_verbosity_error()  # it reports the text tower of a SigLIP as unexpected
    transformers.logging.disable_progress_bar()
    return torch, transformers


def load_tower(directory: Path) -> TorchModule:
    """Load the image tower of a directory with transformers, in float32."""
    torch, transformers = import_torch()
    return transformers.SiglipVisionModel.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@dataclasses.dataclass(frozen=True)
class Original:
    """The parts of a whole model in torch, in float32.

    Attributes:
      decoder: a callable (tokens, attention_mask=) whose result has ``logits``.
      layers: the decoder's layer modules.
      tower: a SiglipVisionModel.
      feature_layer: index of the tower's hidden state that the projector reads.
      projector: a module that maps the tower's features to the decoder's width.
      newline: the newline embedding, a tensor of that width.
    """

    decoder: TorchModule
    layers: Iterable[TorchModule]
    tower: TorchModule
    feature_layer: int
    projector: TorchModule
    newline: TorchTensor


def load_original(directory: Path, vision: Path | None, tower: VisionConfig) -> Original:
    """Load the original of a whole model.

    Args:
      directory: the model's directory, in any supported layout.
      vision: directory of its image tower, if separate.
      tower: config of the tower up to its features, if config.json does not describe it.

    Raises:
      UserError: torch or transformers are not installed.
    """
    torch, transformers = import_torch()
    values = read_config(directory)
    conversion = conversion_of(values, str(directory / CONFIG))
    if conversion.original is None:
        return _assemble(directory, values, conversion, vision, tower)
    where = conversion.original
    whole = (
        getattr(transformers, where.name)
        .from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
        .eval()
    )
    paths = (where.layers, where.tower, where.feature_layer, where.projector, where.newline)
    return Original(whole, *operator.attrgetter(*paths)(whole))


def _split(tensors: Mapping[str, TorchTensor], names: Names) -> dict[str, dict[str, TorchTensor]]:
    """Split tensors by part; each gets the name that it has in the separate part."""
    prefixes = {
        "tower": names.vision,
        "first": f"{names.projector[0]}.",
        "second": f"{names.projector[1]}.",
        "newline": names.newline,
        "decoder": names.decoder,
    }
    parts: dict[str, dict[str, TorchTensor]] = {part: {} for part in prefixes}
    for name, tensor in tensors.items():
        part = next(part for part, prefix in prefixes.items() if name.startswith(prefix))
        parts[part][name.removeprefix(prefixes[part])] = tensor
    return parts


def _assemble(
    directory: Path, values: Json, conversion: Conversion, vision: Path | None, tower: VisionConfig
) -> Original:
    """Assemble a model of which transformers has no class from transformers' parts."""
    torch, transformers = import_torch()
    import safetensors.torch

    assert conversion.names is not None, "a whole model"
    tensors = {}
    for file in shards.open_checkpoint(directory):
        for name, tensor in safetensors.torch.load_file(file.path).items():
            canonical = conversion.canonical(name)
            if not any(fnmatch.fnmatchcase(canonical, glob) for glob in conversion.left_out):
                tensors[canonical] = tensor.float()
    parts = _split(tensors, conversion.names)
    fields = {name: values[name] for name in _TEXT_FIELDS if values.get(name) is not None}
    nested = values.get("rope_parameters") or {}
    text = transformers.Qwen2Config(**{"rope_theta": nested.get("rope_theta", 10_000.0)} | fields)
    text._attn_implementation = "eager"
    decoder = transformers.Qwen2ForCausalLM(text).eval()
    if text.tie_word_embeddings:
        parts["decoder"].setdefault("lm_head.weight", parts["decoder"]["model.embed_tokens.weight"])
    decoder.load_state_dict(parts["decoder"], strict=True)
    width, inner = text.hidden_size, tower.width
    projector = torch.nn.Sequential(
        torch.nn.Linear(inner, width), torch.nn.GELU(), torch.nn.Linear(width, width)
    )
    projector[0].load_state_dict(parts["first"], strict=True)
    projector[2].load_state_dict(parts["second"], strict=True)
    if vision is None:
        found = _tower(parts["tower"], tower)
        # The original code deletes the last layer before saving, or, if a file still has it, on loading.
        feature_layer = -2 if len(found.encoder.layers) == tower.depth + 1 else -1
    else:
        found, feature_layer = load_tower(vision), -2
    return Original(decoder, decoder.model.layers, found, feature_layer, projector, parts["newline"][""])


def _tower(tensors: dict[str, TorchTensor], config: VisionConfig) -> TorchModule:
    """transformers' image tower with the layers and the other modules for which ``tensors`` has values."""
    _, transformers = import_torch()
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")}
    fields = transformers.SiglipVisionConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.width,
        num_hidden_layers=len(layers),
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_dim,
        layer_norm_eps=config.norm_eps,
        vision_use_head=any(name.startswith("head.") for name in tensors),
    )
    fields._attn_implementation = "eager"
    tower = transformers.SiglipVisionModel(fields).eval()
    tower.load_state_dict(tensors, strict=True)
    return tower
