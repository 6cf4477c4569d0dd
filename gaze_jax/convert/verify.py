"""Verify a conversion: run both models on the same inputs and compare them stage by stage.

Needs torch and transformers. Everything is computed in float32 on the CPU, by transformers with its
plain ("eager") attention; bfloat16 and float16 weights are exact in float32.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gaze_jax.convert.load import load, one_device
from gaze_jax.convert.original import TorchModule, TorchTensor, import_torch, load_original, load_tower
from gaze_jax.core.streams import Streams, text_streams
from gaze_jax.errors import UserError
from gaze_jax.models import MLLM
from gaze_jax.models.config import MLLMConfig, Numerics, VisionConfig
from gaze_jax.models.vision import VisionTower

TOLERANCE = 1e-4
"""Maximum error of a stage, relative to the stage's largest value."""

_ROWS, _LENGTH, _SHORT = 2, 24, 17


@dataclasses.dataclass(frozen=True)
class Stage:
    """Difference between one stage and the original.

    Attributes:
      name: the stage's name.
      max_abs: largest absolute difference.
      relative: ``max_abs`` divided by the largest absolute value of the original.
      kl: mean KL divergence of the next-token distributions in nats; only for logits, else None.
      top1: fraction of positions with the same most likely token; only for logits, else None.
    """

    name: str
    max_abs: float
    relative: float
    kl: float | None = None
    top1: float | None = None


def _stage(name: str, ours: np.ndarray, theirs: np.ndarray) -> Stage:
    error = float(np.abs(ours - theirs).max())
    return Stage(name, error, error / max(float(np.abs(theirs).max()), 1e-30))


def _logits_stage(ours: np.ndarray, theirs: np.ndarray) -> Stage:
    """Compare logits [N, V]."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    log_p, log_q = log_softmax(theirs), log_softmax(ours)
    kl = float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())
    top1 = float((ours.argmax(axis=-1) == theirs.argmax(axis=-1)).mean())
    return dataclasses.replace(_stage("logits", ours, theirs), kl=kl, top1=top1)


# Compiled once per model, even if several of its checkpoints are verified.
@functools.partial(jax.jit, static_argnums=0)
def _run_stages(model: MLLM, params: PyTree, streams: Streams) -> tuple[jax.Array, jax.Array]:
    return cast(tuple[jax.Array, jax.Array], model.apply({"params": params}, None, streams, method="stages"))


@functools.partial(jax.jit, static_argnums=0)
def _run_encode(model: MLLM, params: PyTree, images: jax.Array) -> jax.Array:
    return cast(jax.Array, model.apply({"params": params}, images, method="encode"))


@functools.partial(jax.jit, static_argnums=0)
def _run_tower(tower: VisionTower, params: PyTree, images: jax.Array) -> jax.Array:
    return cast(jax.Array, tower.apply({"params": params}, images))


def _decoder_stages(
    original: TorchModule, layers: Iterable[TorchModule], config: MLLMConfig, params: PyTree, seed: int
) -> list[Stage]:
    """Compare a decoder with a transformers model on random text, one row of it padded."""
    torch, _ = import_torch()
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.decoder.vocab_size, (_ROWS, _LENGTH))
    valid = np.arange(_LENGTH) < np.array([[_LENGTH], [_SHORT]])
    hidden: list[np.ndarray] = []
    # Use hooks, because transformers returns the last layer's output only after the final norm.
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: hidden.append(np.asarray(output)))
    with torch.no_grad():
        out = original(torch.tensor(tokens), attention_mask=torch.tensor(valid.astype(np.int64)))
    theirs_logits = np.asarray(out.logits)
    model = MLLM(dataclasses.replace(config, dtype="float32"))
    streams = text_streams(jnp.asarray(tokens), jnp.asarray(valid))
    ours, ours_logits = jax.device_get(_run_stages(model, params, streams))
    stages = [
        _stage(f"decoder layer {layer}", mine[valid], theirs[valid])
        for layer, (mine, theirs) in enumerate(zip(ours, hidden, strict=True))
    ]
    return [*stages, _logits_stage(ours_logits[valid], theirs_logits[valid])]


def verify_decoder(directory: Path, config: MLLMConfig, params: PyTree, *, seed: int = 0) -> list[Stage]:
    """Compare a decoder with transformers on random text, one row of it padded.

    Args:
      directory: a directory that transformers loads.
      config: the model's config; only its decoder is used.
      params: the model's parameters.
      seed: seed of the tokens.

    Returns:
      One stage per layer, and one for the logits.
    """
    torch, transformers = import_torch()
    original = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return _decoder_stages(original, original.model.layers, config, params, seed)


def _pixels(config: VisionConfig, seed: int) -> np.ndarray:
    """Random images, float32 [2, image_size, image_size, 3]."""
    size = config.image_size
    return np.random.default_rng(seed).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)


def _features(tower: TorchModule, pixels: np.ndarray, layer: int | None) -> TorchTensor:
    """Features of transformers' tower for ``pixels``, a tensor [2, tokens, width].

    Args:
      tower: transformers' tower.
      pixels: see :func:`_pixels`.
      layer: index of the hidden state; None is the last one after the final LayerNorm.
    """
    torch, _ = import_torch()
    with torch.no_grad():
        out = tower(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    return out.last_hidden_state if layer is None else out.hidden_states[layer]


def _tower_stage(config: VisionConfig, params: PyTree, pixels: np.ndarray, theirs: TorchTensor) -> Stage:
    ours = _run_tower(VisionTower(config, Numerics()), params, pixels)
    return _stage("image tower", np.asarray(ours), np.asarray(theirs))


def verify_tower(directory: Path, config: VisionConfig, params: PyTree, *, seed: int = 0) -> list[Stage]:
    """Compare an image tower's features with transformers on random pixels.

    Args:
      directory: a directory that transformers loads.
      config: the tower's config.
      params: the tower's parameters, without the "vision" level.
      seed: seed of the pixels.
    """
    pixels = _pixels(config, seed)
    layer = None if config.post_norm else config.depth
    return [_tower_stage(config, params, pixels, _features(load_tower(directory), pixels, layer))]


def verify_whole(
    directory: Path, vision: Path | None, config: MLLMConfig, params: PyTree, *, seed: int = 0
) -> list[Stage]:
    """Compare a whole model with the original: tower, projector, newline embedding, decoder on text.

    Args:
      directory: the original's directory.
      vision: directory of its image tower, if separate.
      config, params: the model's config and parameters.
      seed: seed of pixels and tokens.
    """
    original = load_original(directory, vision, config.tower)
    pixels = _pixels(config.tower, seed)
    features = _features(original.tower, pixels, original.feature_layer)
    model = MLLM(dataclasses.replace(config, dtype="float32"))
    ours = np.asarray(_run_encode(model, params, pixels[None]))
    projected = np.asarray(original.projector(features).detach()).reshape(ours.shape)
    return [
        _tower_stage(config.tower, params["vision"], pixels, features),
        _stage("projector", ours, projected),
        _stage("newline", np.asarray(params["newline"], np.float32), np.asarray(original.newline.detach())),
        *_decoder_stages(original.decoder, original.layers, config, params, seed),
    ]


def verify(directory: Path, originals: Mapping[str, Path]) -> list[Stage]:
    """Compare every part of a model with its source directory.

    Args:
      directory: any directory that :func:`gaze_jax.convert.load.load` reads.
      originals: directories by part: "decoder" and "vision", or "model" (and "vision" for a separate tower).

    Raises:
      UserError: torch or transformers are not installed, or the model cannot be loaded.
    """
    found = load(directory, one_device())
    config, params = found.config, found.params
    if isinstance(config, MLLMConfig) and "model" in originals:
        return verify_whole(originals["model"], originals.get("vision"), config, params)
    stages = []
    tower = config if isinstance(config, VisionConfig) else config.vision
    if tower is not None and "vision" in originals:
        stages += verify_tower(originals["vision"], tower, params["vision"])
    if isinstance(config, MLLMConfig) and "decoder" in originals:
        stages += verify_decoder(originals["decoder"], config, params)
    return stages


def table(stages: Sequence[Stage]) -> str:
    """Format the stages as a table."""
    lines = [f"{'':18}{'max abs':>11}{'relative':>11}{'KL':>11}{'top-1':>8}"]
    for stage in stages:
        line = f"{stage.name:18}{stage.max_abs:>11.1e}{stage.relative:>11.1e}"
        if stage.kl is not None:
            line += f"{stage.kl:>11.1e}{stage.top1:>8.3f}"
        lines.append(line)
    return "\n".join(lines)


def require_equal(stages: Sequence[Stage]) -> None:
    """Raise a UserError if the error of any stage exceeds :data:`TOLERANCE`."""
    worst = max(stages, key=lambda stage: stage.relative)
    if not worst.relative <= TOLERANCE:
        raise UserError(
            f"The models differ: {worst.name} has a relative error of {worst.relative:.1e}, more than "
            f"{TOLERANCE:.0e}; do not use this conversion and report it with the table above."
        )
