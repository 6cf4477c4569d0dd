"""A decoding layer through the GPU kernels: selection in the call equals selection before it."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core.selection import Keep, Selection, SelectionSpec
from gaze_jax.models import DUMMY, GazeConfig
from gaze_jax.models.cache import Cache, decode_spec
from gaze_jax.models.decode import DecodePosition, decode_attention, decode_masks, with_step
from pallas_kernels.gaze_decode import api, gpu_step
from tests.helpers import models
from tests.helpers.streams import batch


def _cache(gaze):
    """Two layers, two rows, seven regions of at most three tokens, of which the last ones are later."""
    layers, rows, kv_heads, regions, slots, text, dim = 2, 2, 2, 7, 3, 11, 8
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(layers, rows, kv_heads, *shape)), jnp.float32)

    k, v = normal(regions, slots, dim), normal(regions, slots, dim)
    order = np.stack([rng.permutation(regions) for _ in range(rows)])[..., None] * slots + np.arange(slots)
    empty = (np.arange(slots) == slots - 1) & (rng.random((rows, regions, 1)) < 0.5)
    # Whole numbers, so that scores tie.
    descriptors = jnp.asarray(rng.integers(-1, 2, size=(layers, rows, kv_heads, regions, dim)), jnp.float32)
    return Cache(
        visual=api.pack(k, v, spec=decode_spec(gaze, dim), implementation=gaze.decode_implementation),
        descriptors=descriptors,
        text_k=normal(text, dim),
        text_v=normal(text, dim),
        visual_order=jnp.asarray(np.where(empty, -1, order), jnp.int32),
        text_order=jnp.asarray(np.stack([np.arange(text) + 2, np.arange(text)]), jnp.int32),
    )


@pytest.mark.parametrize("select_per", ["head", pytest.param("kv_head", marks=pytest.mark.long)])
def test_a_layer_equals_that_of_xla(select_per):
    """The output, the selections and the scores; what the step knows is made before."""
    q = jnp.asarray(np.random.default_rng(1).integers(-1, 2, size=(2, 1, 4, 8)), jnp.float32)
    position = DecodePosition(jnp.asarray([17, 12], jnp.int32), jnp.int32(10), jnp.zeros(2, jnp.int32))

    @functools.partial(jax.jit, static_argnums=0)
    def run(gaze, cache, q):
        masks = with_step(decode_masks(cache, position), cache, gaze)
        selection = Selection(Keep(jnp.full((1, 1), 0.5), jnp.full((1, 1), 3, jnp.int32)))
        spec = SelectionSpec(capacity=4)
        out, found = decode_attention(q, cache, masks, selection, spec, gaze=gaze, layer=jnp.int32(1))
        assert (masks.step is None) == (gaze.decode_implementation == "xla")
        return out, found["indices"], found["scores"]

    gaze = GazeConfig(select_per=select_per, interpret=jax.default_backend() == "cpu")
    both = [dataclasses.replace(gaze, decode_implementation=name) for name in ("gpu", "xla")]
    assert [api.routes(one.decode_implementation) for one in both] == [True, False]
    (out, indices, scores), wanted = (run(one, _cache(one), q) for one in both)
    np.testing.assert_allclose(out, wanted[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(indices, wanted[1])
    assert len(set(np.asarray(scores).ravel().tolist())) < scores.size / 2  # they tie
    np.testing.assert_allclose(scores, wanted[2], rtol=1e-6)


def test_a_step_makes_its_masks_once(monkeypatch):
    """Not in every layer: a decoding step calls for them before its scan, and its layers take them."""
    calls, callers = [], set()
    original = gpu_step.masks

    def counted(*given):
        calls.append(given)
        callers.update(frame.function for frame in inspect.stack())
        return original(*given)

    monkeypatch.setattr(gpu_step, "masks", counted)
    gaze = dataclasses.replace(DUMMY.gaze, decode_implementation="gpu", interpret=True)
    config = dataclasses.replace(DUMMY, gaze=gaze)
    rows = batch([models.two_images(0), models.two_images(1)])
    variables, images, sample = models.parameters(DUMMY), models.images(2, 2), jnp.arange(2)
    _, cache, _ = jax.eval_shape(models.prefill(config, 4), variables, images, rows, 3, None, sample)
    tokens, order = jnp.zeros(2, jnp.int32), jnp.full(2, 40, jnp.int32)
    decode = models.decode(config, 3)
    jax.eval_shape(decode, variables, tokens, order, cache, models.step(order, 20, sample), 3)
    assert len(calls) == 1
    assert "with_step" in callers and "decode_attention" not in callers
    assert calls[0][2] is not None, "with what routing needs"
