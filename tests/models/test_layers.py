"""The parts of the model against formulas: norms, RoPE, the text stream's embeddings, the tower."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.data.pixels import normalise
from gaze_jax.models import DUMMY, MLLM
from gaze_jax.models.layers import LayerNorm, RMSNorm, apply_rope, rope_angles
from gaze_jax.models.ops import normalised
from tests.helpers import models
from tests.helpers.streams import Newline, PlacedView, Text, batch, pad, sample


def test_rms_norm():
    """x / sqrt(mean(x**2) + eps) * weight; large bfloat16 inputs are averaged in float32."""
    x = np.random.default_rng(0).normal(size=(3, 16)) * 100
    weight = jnp.linspace(0.5, 2, 16)
    norm = RMSNorm(1e-2, jnp.float32, jnp.float32)
    got = norm.apply({"params": {"weight": weight}}, jnp.asarray(x, jnp.float32))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * np.asarray(weight)
    np.testing.assert_allclose(got, expected, rtol=2e-6)
    narrow = RMSNorm(1e-2, jnp.bfloat16, jnp.float32).apply(
        {"params": {"weight": weight}}, jnp.asarray(x, jnp.bfloat16)
    )
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(narrow, np.float32), expected, rtol=2e-2)


def test_layer_norm():
    """(x - mean) / sqrt(var + eps) * scale + bias, also far from 0 and in bfloat16."""
    x = np.random.default_rng(0).normal(size=(3, 16)) + 1000
    params = {"scale": jnp.linspace(0.5, 2, 16), "bias": jnp.linspace(-1, 1, 16)}
    wide = np.asarray(jnp.asarray(x, jnp.float32), np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-2)
    expected = expected * np.asarray(params["scale"]) + np.asarray(params["bias"])
    got = LayerNorm(1e-2, jnp.float32, jnp.float32).apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    narrow = LayerNorm(1e-2, jnp.bfloat16, jnp.float32).apply(
        {"params": params}, jnp.asarray(x - 1000, jnp.bfloat16)
    )
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(narrow, np.float32), expected, atol=0.05)


def test_rope_rotates_channel_i_with_channel_i_plus_half():
    """The rotate-half convention, with frequencies theta ** (-2i / D)."""
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 8)).astype(np.float32)
    positions = np.array([[0, 1, 7, 300, 5000]])
    got = np.asarray(apply_rope(jnp.asarray(x), rope_angles(jnp.asarray(positions, jnp.int32), 8, 1e4)))
    angle = positions[0][:, None] * 1e4 ** (-np.arange(4) / 4)
    complex_x = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[None, :, None]
    np.testing.assert_allclose(
        got, np.concatenate([complex_x.real, complex_x.imag], -1), rtol=1e-3, atol=1e-3
    )
    np.testing.assert_array_equal(got[:, 0], x[:, 0])


def test_rope_logits_depend_on_the_distance_only():
    """q . k is the same for (3, 1) and (1003, 1001)."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def logit(i, j):
        turned = [apply_rope(x, rope_angles(jnp.array([[p]]), 8, 1e4)) for x, p in ((q, i), (k, j))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert logit(1003, 1001) == pytest.approx(logit(3, 1), abs=1e-3)
    assert abs(logit(1003, 1000) - logit(3, 1)) > 1e-2


def test_rope_tells_position_257_from_256_in_bf16():
    """Angles are float32 whatever the activations are."""
    cos, _ = rope_angles(jnp.array([256, 257]), 8, 1e4)
    assert cos.dtype == jnp.float32 and abs(float(cos[0, 0] - cos[1, 0])) > 0.1
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    turned = apply_rope(x, rope_angles(jnp.array([[256, 257]]), 8, 1e4))
    assert turned.dtype == jnp.bfloat16
    assert (turned[0, 0] != turned[0, 1]).any()


def test_each_kind_of_dense_token_has_its_own_embedding():
    """Text from the table, newlines and context tokens from their parameters, padding 0."""
    row = pad(sample([Text(1), PlacedView(2, 2, newlines=True), Newline(), Text(1)], region=(1, 1)), text=8)
    assert row["kind"].tolist() == [1, 2, 2, 3, 3, 2, 1, 0]
    variables = models.parameters(DUMMY)
    got = np.asarray(MLLM(DUMMY).apply(variables, batch([row]), method="_embed_text"))[0]
    params = variables["params"]
    text = [np.asarray(params["decoder"]["embedding"])[t] for t in row["tokens"][[0, 6]]]
    newline, context = np.asarray(params["newline"]), np.asarray(params["context"])
    expected = [text[0], newline, newline, context[0], context[1], newline, text[1], np.zeros(32)]
    np.testing.assert_array_equal(got, np.stack(expected).astype(np.float32))


def _encode(config):
    return jax.jit(lambda v, x: MLLM(config).apply(v, x, method="encode"))


def test_the_tower_encodes_views_one_by_one_in_raster_order():
    """A view's features do not depend on its neighbours, and a patch moves its own token most."""
    images = models.images(1, 2)
    encode, variables = _encode(DUMMY), models.parameters(DUMMY)
    both = np.asarray(encode(variables, images)).reshape(2, 25, -1)
    swapped = np.asarray(encode(variables, images[:, ::-1])).reshape(2, 25, -1)
    np.testing.assert_allclose(swapped[::-1], both, rtol=1e-5, atol=1e-5)
    # Patch (row 1, column 3) covers pixels 4..7 and 12..15.
    moved = images.at[0, 0, 4:8, 12:16].add(0.5)
    change = np.abs(np.asarray(encode(variables, moved)).reshape(2, 25, -1) - both).max(-1)
    assert change[0].argmax() == 1 * 5 + 3 and (change[1] == 0).all()


def test_a_remainder_of_pixels_is_dropped():
    """22 pixels in patches of 4 are 5 patches; the last two rows and columns change nothing."""
    config = models.changed(DUMMY, vision={"image_size": 22})
    images = models.images(1, 1, config=config)
    encode, variables = _encode(config), models.parameters(DUMMY)
    expected = encode(variables, images)
    assert expected.shape == (1, 25, 32)
    np.testing.assert_array_equal(
        encode(variables, images.at[..., 20:, :].set(9).at[:, :, 20:].set(9)), expected
    )


def test_uint8_images_are_normalised_on_the_device_as_in_the_pipeline():
    """Bit for bit, so a corpus may be sent to the device in a quarter of the bytes."""
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 1, 16, 16, 3)
    np.testing.assert_array_equal(normalised(jnp.asarray(pixels)), normalise(pixels))
    images = np.random.default_rng(0).integers(0, 256, (1, 2, 20, 20, 3), dtype=np.uint8)
    params = models.parameters(DUMMY)
    encode = jax.jit(lambda images: MLLM(DUMMY).apply(params, images, method="encode"))
    np.testing.assert_array_equal(encode(images), encode(normalise(images)))
