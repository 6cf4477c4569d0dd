"""Names, shapes, dtypes and shardings of a model's parameters, and their initial values."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

from gaze_jax.models.config import MLLMConfig, VisionConfig
from gaze_jax.models.mllm import MLLM
from gaze_jax.models.vision import VisionTower
from gaze_jax.parallel import rules


def init_variables(config: MLLMConfig, key: PRNGKeyArray) -> PyTree:
    """Initial parameters of the model, boxed with their logical axis names."""
    images = None
    if config.vision is not None:
        images = jnp.zeros((1, 1, config.vision.image_size, config.vision.image_size, 3))
    return MLLM(config).init(key, images, method="init_forward")["params"]


def _init_tower(config: VisionConfig, key: PRNGKeyArray) -> PyTree:
    image = jnp.zeros((1, config.image_size, config.image_size, 3))
    return {"vision": VisionTower(config).init(key, image)["params"]}


@functools.lru_cache(maxsize=8)  # a run asks again and again, and each answer traces the model
def boxed_params(config: MLLMConfig | VisionConfig) -> PyTree:
    """Shapes and dtypes of the parameters, each boxed with its logical axis names; nothing is computed.

    The tree is that of other calls, too: it must not be changed.

    Args:
      config: configuration of a model, or of an image tower alone, whose tree is ``{"vision": ...}``.
    """
    if isinstance(config, VisionConfig):
        return jax.eval_shape(lambda: _init_tower(config, jax.random.key(0)))
    return jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))


def abstract_params(config: MLLMConfig | VisionConfig, mesh: Mesh) -> PyTree:
    """Shapes, dtypes and shardings of the parameters, without computing them.

    Args:
      config: see :func:`boxed_params`.
      mesh: the mesh they will be placed on.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    boxed = boxed_params(config)
    return with_shardings(nn.meta.unbox(boxed), rules.param_shardings(mesh, boxed))


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """A ``jax.ShapeDtypeStruct`` with a sharding for every leaf of ``shapes``."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
