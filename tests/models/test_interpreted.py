"""Whole models whose attention runs on interpreted kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.models import DUMMY
from tests.helpers import models
from tests.helpers.streams import batch, pad

pytestmark = pytest.mark.long


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
