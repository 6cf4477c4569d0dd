"""Proof that a conversion is the same model: both sides run on the same inputs, stage by stage.

Needs torch and transformers. Everything is computed in float32 on the CPU, by transformers with its
plain ("eager") attention; bfloat16 and float16 weights are exact in float32.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gaze_jax.convert.load import load, one_device
from gaze_jax.core.streams import text_streams
from gaze_jax.errors import UserError
from gaze_jax.models import MLLM
from gaze_jax.models.config import MLLMConfig, Numerics, VisionConfig
from gaze_jax.models.vision import VisionTower

Tree = Any

TOLERANCE = 1e-4
"""Largest error of a stage, relative to the largest value of the stage."""

_ROWS, _LENGTH, _SHORT = 2, 24, 17


@dataclasses.dataclass(frozen=True)
class Stage:
    """How far one stage is from the original.

    Attributes:
      name: of the stage.
      max_abs: largest absolute difference.
      relative: that, over the largest absolute value of the original.
      kl: mean KL divergence of the next-token distribution in nats; None but for logits.
      top1: share of positions whose likeliest token is the same; None but for logits.
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
    """Compare [N, V]."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    log_p, log_q = log_softmax(theirs), log_softmax(ours)
    kl = float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())
    top1 = float((ours.argmax(axis=-1) == theirs.argmax(axis=-1)).mean())
    return dataclasses.replace(_stage("logits", ours, theirs), kl=kl, top1=top1)


def _import() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            "--verify runs the original too, which needs: pip install 'gaze-jax[parity]'."
        ) from error
    transformers.logging.set_verbosity_error()  # it lists the text tower of a SigLIP as unexpected
    transformers.logging.disable_progress_bar()
    return torch, transformers


def verify_decoder(directory: Path, config: MLLMConfig, params: Tree, *, seed: int = 0) -> list[Stage]:
    """Compare a decoder with transformers on random text, one row of it padded.

    Args:
      directory: that transformers loads.
      config: of the model; only its decoder is used.
      params: of the model.
      seed: of the tokens.

    Returns:
      A stage per layer, and the logits.
    """
    torch, transformers = _import()
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.decoder.vocab_size, (_ROWS, _LENGTH))
    valid = np.arange(_LENGTH) < np.array([[_LENGTH], [_SHORT]])
    original = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    hidden: list[np.ndarray] = []
    # Hooked, because transformers reports the last layer's output after the final norm only.
    for layer in original.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: hidden.append(np.asarray(output)))
    with torch.no_grad():
        out = original(torch.tensor(tokens), attention_mask=torch.tensor(valid.astype(np.int64)))
    theirs_logits = np.asarray(out.logits)
    del original, out
    model = MLLM(dataclasses.replace(config, dtype="float32"))
    run = jax.jit(lambda params, streams: model.apply({"params": params}, None, streams, method="stages"))
    ours, ours_logits = jax.device_get(run(params, text_streams(jnp.asarray(tokens), jnp.asarray(valid))))
    stages = [
        _stage(f"decoder layer {layer}", mine[valid], theirs[valid])
        for layer, (mine, theirs) in enumerate(zip(ours, hidden, strict=True))
    ]
    return [*stages, _logits_stage(ours_logits[valid], theirs_logits[valid])]


def verify_tower(directory: Path, config: VisionConfig, params: Tree, *, seed: int = 0) -> list[Stage]:
    """Compare an image tower's features with transformers on random pixels.

    Args:
      directory: that transformers loads.
      config: of the tower.
      params: of the tower, without the "vision" around it.
      seed: of the pixels.
    """
    torch, transformers = _import()
    size = config.image_size
    pixels = np.random.default_rng(seed).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    original = transformers.SiglipVisionModel.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        out = original(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    theirs = np.asarray(out.last_hidden_state if config.post_norm else out.hidden_states[config.depth])
    tower = VisionTower(config, Numerics())
    ours = jax.jit(lambda params, pixels: tower.apply({"params": params}, pixels))(params, pixels)
    return [_stage("image tower", np.asarray(ours), theirs)]


def verify(directory: Path, originals: Mapping[str, Path]) -> list[Stage]:
    """Compare every part of a model with the directory that transformers loads.

    Args:
      directory: any that :func:`gaze_jax.convert.load.load` reads.
      originals: by part, "decoder" or "vision".

    Raises:
      UserError: torch or transformers are not installed, or the model cannot be loaded.
    """
    found = load(directory, one_device())
    config, params = found.config, found.params
    stages = []
    tower = config if isinstance(config, VisionConfig) else config.vision
    if tower is not None and "vision" in originals:
        stages += verify_tower(originals["vision"], tower, params["vision"])
    if isinstance(config, MLLMConfig) and "decoder" in originals:
        stages += verify_decoder(originals["decoder"], config, params)
    return stages


def table(stages: Sequence[Stage]) -> str:
    """The stages for a person."""
    lines = [f"{'':18}{'max abs':>11}{'relative':>11}{'KL':>11}{'top-1':>8}"]
    for stage in stages:
        line = f"{stage.name:18}{stage.max_abs:>11.1e}{stage.relative:>11.1e}"
        if stage.kl is not None:
            line += f"{stage.kl:>11.1e}{stage.top1:>8.3f}"
        lines.append(line)
    return "\n".join(lines)


def require_equal(stages: Sequence[Stage]) -> None:
    """Raise a UserError if a stage is further from the original than :data:`TOLERANCE`."""
    worst = max(stages, key=lambda stage: stage.relative)
    if not worst.relative <= TOLERANCE:
        raise UserError(
            f"The models differ: {worst.name} has a relative error of {worst.relative:.1e}, more than "
            f"{TOLERANCE:.0e}; do not use this conversion and report it with the table above."
        )
