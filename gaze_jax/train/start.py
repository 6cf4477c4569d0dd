"""Where a run starts from: the parameters of a checkpoint, and what it has besides them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

from gaze_jax.chat.template import ChatTemplate
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError
from gaze_jax.models import MLLM, MLLMConfig
from gaze_jax.models.config import PARAM_DTYPES
from gaze_jax.models.parameters import abstract_params
from gaze_jax.train.losses import Batch
from gaze_jax.train.step import shardings_of

CONTEXT = "context"
"""The one parameter that a checkpoint may lack: the context tokens of a model that was trained without."""

_SPREAD = 0.1
"""Standard deviation of new context tokens, as a fraction of that of the projected features."""


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """A checkpoint to start from.

    Attributes:
      name: what ``init_from`` names.
      config: its model.
      tokenizer: its tokenizer.
      template: its chat template; None for a run on digit scenes.
      load: gives its parameters on a mesh, each in the dtype in which it is stored.
      keep: copies what it has besides parameters into a run's folder, for inference and conversion back.
    """

    name: str
    config: MLLMConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    load: Callable[[Mesh], PyTree]
    keep: Callable[[Path], None]


def check_start(start: Start, config: MLLMConfig) -> tuple[str, ...]:
    """The parameters of ``config`` that ``start`` lacks, which are new.

    Raises:
      UserError: the model is another one, or its context tokens are others in number.
    """
    for part in ("decoder", "vision", "views"):
        if getattr(config, part) != getattr(start.config, part):
            raise UserError(
                f"init_from={start.name} has another {part} than the config's model.{part}; leave it out, so "
                "that it is the checkpoint's."
            )
    have, want = start.config.gaze.context_tokens, config.gaze.context_tokens
    if have and want and have != want:
        raise UserError(
            f"init_from={start.name} has {have} context tokens but model.gaze.context_tokens={want}; keep "
            f"{have}, or 0 to train without them."
        )
    return (CONTEXT,) if want and not have else ()


def initial_params(start: Start, config: MLLMConfig, mesh: Mesh, seed: int, batch: Batch) -> PyTree:
    """The parameters that a run starts with, in ``config.param_dtype`` on ``mesh``.

    New context tokens begin near the mean of the projected features of ``batch``, the first of the run: from
    noise a trained model would first have to learn to ignore them.

    Raises:
      UserError: as :func:`check_start`.
    """
    new = check_start(start, config)
    # The tree of a model is a dictionary of its parts.
    wanted = abstract_params(config, mesh)
    loaded = {name: leaf for name, leaf in start.load(mesh).items() if name in wanted}
    dtype = PARAM_DTYPES[config.param_dtype]
    in_dtype = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree),
        out_shardings={name: shardings_of(wanted[name]) for name in loaded},
        donate_argnums=0,
    )
    params = in_dtype(loaded)
    if new:
        plain = dataclasses.replace(config, gaze=dataclasses.replace(config.gaze, context_tokens=0))
        shape = wanted[CONTEXT]
        make = jax.jit(
            lambda params, images: _near_mean(plain, params, images, jax.random.key(seed), shape.shape),
            out_shardings=shape.sharding,
        )
        with jax.set_mesh(mesh):
            params[CONTEXT] = make(params, batch["images"])
    return {name: params[name] for name in wanted}


def _near_mean(
    config: MLLMConfig, params: PyTree, images: jax.Array, key: PRNGKeyArray, shape: tuple[int, ...]
) -> jax.Array:
    """``shape`` [C, M]: the mean of the projected features of ``images`` with a little noise."""
    encoded = cast(jax.Array, MLLM(config).apply({"params": params}, images, method="encode"))
    features = encoded.astype(jnp.float32)
    # Images that only pad a row are black throughout.
    shown = jnp.any(images != 0, axis=(2, 3, 4)).astype(jnp.float32)
    weights = jnp.repeat(shown, features.shape[1] // images.shape[1], axis=1)[..., None]
    count = jnp.maximum(jnp.sum(weights), 1.0)
    mean = jnp.sum(features * weights, axis=(0, 1)) / count
    spread = jnp.sqrt(jnp.sum(jnp.square(features - mean) * weights, axis=(0, 1)) / count)
    noise = jax.random.normal(key, shape, jnp.float32)
    return (mean + _SPREAD * spread * noise).astype(PARAM_DTYPES[config.param_dtype])
