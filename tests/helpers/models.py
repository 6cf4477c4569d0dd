"""A model with random parameters and its passes, compiled once per process for all tests."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gaze_jax.core.routing import Routing
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import Streams
from gaze_jax.models import DUMMY, MLLM, DecodePosition, MLLMConfig
from tests.helpers.streams import Newline, PlacedView, Row, Text, batch, sample

GRID = DUMMY.vision.grid


def changed(config: MLLMConfig, **fields: Any) -> MLLMConfig:
    """``changed(DUMMY, gaze={"select_per": "kv_head"}, remat=True)``: nested fields by section."""
    for name, value in fields.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(config, name), **value)
        config = dataclasses.replace(config, **{name: value})
    return config


@functools.cache
def parameters(config: MLLMConfig, seed: int = 0) -> Any:
    """Random values in the shapes of the model's parameters, without compiling its initialisers."""
    row = sample([PlacedView(GRID, GRID), Text(2)])

    def init(key: jax.Array) -> Any:
        return MLLM(config).init(key, jnp.zeros((1, 1, *_pixels(config))), batch([row]), Selection())

    shapes = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def draw(path: Any, shape: Any) -> jax.Array:
        fan_in = shape.shape[-2] if len(shape.shape) > 1 else 1
        values = rng.normal(size=shape.shape) * fan_in**-0.5
        if path[-1].key in ("weight", "scale"):
            values = 1 + 0.2 * values
        elif path[-1].key == "bias":
            values = 0.2 * values
        return jnp.asarray(values, shape.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def indifferent(variables: Any) -> Any:
    """The same parameters with queries of 0: every region of every layer scores 0, and all tie."""
    zeroed = jax.tree.map(jnp.zeros_like, variables["params"]["decoder"]["layers"]["self_attn"]["q_proj"])
    attention = {**variables["params"]["decoder"]["layers"]["self_attn"], "q_proj": zeroed}
    layers = {**variables["params"]["decoder"]["layers"], "self_attn": attention}
    decoder = {**variables["params"]["decoder"], "layers": layers}
    return {"params": {**variables["params"], "decoder": decoder}}


def _pixels(config: MLLMConfig) -> tuple[int, int, int]:
    return config.vision.image_size, config.vision.image_size, 3


def images(size: int, views: int, *, seed: int = 0, config: MLLMConfig = DUMMY) -> jax.Array:
    """float32 [size, views, image_size, image_size, 3]."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(size, views, *_pixels(config))), jnp.float32)


@functools.cache
def forward(config: MLLMConfig, route: Routing = Routing(), collect: bool = False) -> Any:
    """Jitted (variables, images, streams, top_k, forced, sample_id) -> logits, outputs."""

    def run(variables, images, streams, top_k, forced=None, sample_id=None):
        return MLLM(config).apply(
            variables,
            images,
            streams,
            Selection(top_k, forced=forced),
            SelectionSpec(route, return_trace=collect),
            sample_id=sample_id,
        )

    return jax.jit(run)


@functools.cache
def gradients(config: MLLMConfig) -> Any:
    """Jitted (variables, images, streams, top_k) -> loss and its gradient for all but the tower."""

    def loss(trained, frozen, images, streams, top_k):
        variables = {"params": {**trained, "vision": frozen}}
        logits, _ = MLLM(config).apply(variables, images, streams, Selection(top_k))
        weight = jnp.where(streams.targets >= 0, 1.0, 0.0)
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.maximum(streams.targets, 0)[..., None], axis=-1
        )
        return -jnp.sum(picked[..., 0] * weight) / jnp.sum(weight)

    def run(variables, images, streams, top_k):
        params = dict(variables["params"])
        frozen = params.pop("vision")
        return jax.value_and_grad(loss)(params, frozen, images, streams, top_k)

    return jax.jit(run)


@functools.cache
def prefill(config: MLLMConfig, free_slots: int, route: Routing = Routing()) -> Any:
    """Jitted (variables, images, streams, top_k, forced, sample_id) -> logits, cache, outputs."""

    def run(variables, images, streams, top_k, forced=None, sample_id=None):
        return MLLM(config).apply(
            variables,
            images,
            streams,
            Selection(top_k, forced=forced),
            SelectionSpec(route, return_trace=True),
            free_slots=free_slots,
            sample_id=sample_id,
            method="prefill",
        )

    return jax.jit(run)


@functools.cache
def decode(config: MLLMConfig, capacity: int | None, route: Routing = Routing()) -> Any:
    """Jitted (variables, tokens, pos, cache, step, top_k, forced) -> logits, cache, outputs."""

    def run(variables, tokens, positions, cache, step, top_k, forced=None):
        return MLLM(config).apply(
            variables,
            tokens,
            positions,
            cache,
            step,
            Selection(top_k, forced=forced),
            SelectionSpec(route, capacity),
            method="decode",
        )

    return jax.jit(run)


def step(order: Any, write_index: int, sample_id: Any = None) -> DecodePosition:
    """A decoding step at ``order`` [B], written to ``write_index``."""
    order = jnp.asarray(order, jnp.int32)
    names = jnp.zeros_like(order) if sample_id is None else jnp.asarray(sample_id, jnp.int32)
    return DecodePosition(order=order, write_index=jnp.int32(write_index), sample=names)


def two_images(
    seed: int = 0, *, first: int = 2, text: int = 3, answer: int = 4, newlines: bool = False
) -> Row:
    """Text, image, text, image, text: 5x5 grids in regions of 2x2, so 18 regions with partial ones."""
    second = PlacedView(GRID, GRID, newlines)
    parts = [Text(first), PlacedView(GRID, GRID), Text(text), second, Newline(), Text(answer)]
    return sample(parts, seed=seed)


def toy(seed: int = 0) -> tuple[jax.Array, Streams]:
    """Images and streams of two rows with two images each."""
    rows = [two_images(seed), two_images(seed + 1, first=1, text=1, answer=5, newlines=True)]
    return images(2, 2, seed=seed), batch(rows)


def close(got: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Relative to the largest value."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
