"""Whole models whose attention runs on interpreted kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.models import DUMMY, DecodePosition, GazeConfig
from gaze_jax.models.cache import Cache, decode_spec
from gaze_jax.models.decode import _in_one_call, decode_attention, decode_masks
from pallas_kernels.gaze_decode import api
from tests.helpers import cases, models
from tests.helpers.streams import batch, pad


@pytest.mark.long
@pytest.mark.parametrize("visual_dtype", [None, "int8"])
@pytest.mark.parametrize("select_per", ["head", "kv_head"])
@pytest.mark.parametrize(("prefill", "decode"), [("tpu", "tpu"), ("xla", "gpu")])
def test_prefill_and_decode_are_those_of_the_reference(prefill, decode, select_per, visual_dtype):
    """Logits of a prompt and of two decoded tokens."""
    found = {}
    for name, gaze in {
        "kernels": {"prefill_implementation": prefill, "decode_implementation": decode, "interpret": True},
        "reference": {"prefill_implementation": "reference", "decode_implementation": "reference"},
    }.items():
        config = models.changed(DUMMY, gaze={**gaze, "select_per": select_per, "visual_dtype": visual_dtype})
        variables = models.parameters(DUMMY)
        rows = [models.two_images(0), models.two_images(1, first=1, text=1)]
        prompts = batch([pad(row, text=20) for row in rows])
        order = jnp.array([int(row["text_order"].max()) + 1 for row in rows], jnp.int32)
        logits, cache, _ = models.prefill(config, 2)(variables, models.images(2, 2), prompts, jnp.int32(3))
        out = [logits]
        for step in range(2):
            token = jnp.array([step + 1, step + 2], jnp.int32)
            logits, cache, _ = models.decode(config, 4)(
                variables, token, order + step, cache, models.step(order + step, 20 + step), jnp.int32(3)
            )
            out.append(logits)
        found[name] = jax.device_get(out)
    for mine, theirs in zip(found["kernels"], found["reference"], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4 if visual_dtype is None else 2e-3)


@pytest.mark.parametrize("select_per", ["kv_head", pytest.param("head", marks=pytest.mark.long)])
def test_a_layer_that_routes_in_the_kernel_is_that_of_the_reference(select_per):
    """Output, regions and scores of one decoding layer, whose second row may not select its last regions."""
    case = cases.decode(select_per=select_per, regions=11, slots=3, capacity=3)
    rng = np.random.default_rng(0)
    order = jnp.asarray(np.stack([rng.permutation(33).reshape(11, 3) for _ in range(2)]), jnp.int32)
    descriptors = jnp.asarray(rng.normal(size=(*case.k.shape[:4], 8)), jnp.float32)
    position = DecodePosition(jnp.array([60, 28]), jnp.int32(0), jnp.arange(2))
    found = {}
    for name in ("tpu", "reference"):
        gaze = GazeConfig(select_per=select_per, decode_implementation=name, interpret=name == "tpu")

        @jax.jit
        def layer(case, gaze=gaze):
            spec = decode_spec(gaze, 8)
            packed = api.pack(case.k, case.v, spec=spec, implementation=gaze.decode_implementation)
            text_order = jnp.where(case.text_seen, 40, -1)
            cache = Cache(packed, descriptors, case.text_k, case.text_v, order, text_order)
            selected = (decode_masks(cache, position), Selection(jnp.int32(3)), SelectionSpec(capacity=4))
            return decode_attention(case.q[:, None], cache, *selected, gaze=gaze, layer=case.layer)

        assert _in_one_call(Selection(jnp.int32(3)), SelectionSpec(), gaze) == (name == "tpu")
        found[name] = jax.device_get(layer(case))
    (out, more), (expected, rest) = found["tpu"], found["reference"]
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(more["indices"], rest["indices"])
    np.testing.assert_allclose(more["scores"], rest["scores"], rtol=1e-5, atol=1e-5)
    assert (more["indices"] >= 0).any((1, 2)).all()
