"""A whole model with its visual cache in host memory: the resident cache's logits, bit for bit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.models import DUMMY, MLLM, DecodePosition
from tests.helpers import compiler, models
from tests.helpers.streams import Newline, PlacedView, Text, batch, pad, sample

STEPS = 3
KINDS = [("head", "float32"), ("kv_head", "bfloat16")]


def _config(select_per, dtype, implementation):
    gaze = {"select_per": select_per, "decode_implementation": implementation}
    return models.changed(DUMMY, dtype=dtype, gaze=gaze)


@functools.cache
def _prompts():
    grid = models.GRID
    rows = (
        sample([PlacedView(grid, grid), Text(3)], seed=1),
        sample([Text(1), PlacedView(grid, grid), Newline(), Text(4)], seed=2),
    )
    return batch([pad(row, regions=12, text=14) for row in rows])


@functools.cache
def _logits(select_per, dtype, implementation, top_k, fed):
    """float32 [STEPS, B, V] after a prompt and ``fed`` tokens; at most 2 regions of 12 come per query."""
    model = MLLM(_config(select_per, dtype, implementation))
    variables, spec = models.parameters(DUMMY), SelectionSpec(capacity=2)

    def run(variables, images, streams, tokens):
        selection = Selection(None if top_k is None else jnp.int32(top_k))
        _, cache, _ = model.apply(variables, images, streams, selection, free_slots=STEPS, method="prefill")
        last = jnp.max(streams.text_order, axis=1)

        def step(cache, inputs):
            t, token = inputs
            where = DecodePosition(order=last + 1 + t, write_index=14 + t, sample=jnp.zeros_like(last))
            logits, cache, out = model.apply(
                variables, token, last + 1 + t, cache, where, selection, spec, method="decode"
            )
            return cache, (logits, out.get("indices"))

        cache, found = jax.lax.scan(step, cache, (jnp.arange(STEPS, dtype=jnp.int32), tokens))
        return cache.visual, found

    # As users compile it: the tests' quick code rounds by what it happens to join into one loop.
    run = jax.jit(run, compiler_options=compiler.fusion_emitters(True))
    visual, found = run(variables, models.images(2, 1), _prompts(), jnp.asarray(fed, jnp.int32))
    return {a.sharding.memory_kind for a in jax.tree.leaves(visual)}, jax.device_get(found)


@pytest.mark.long  # tests/kernels/test_decode.py compares the bits, test_generate_command.py has --offload
@pytest.mark.parametrize(("select_per", "dtype"), KINDS)
def test_fetched_regions_give_the_resident_logits(select_per, dtype):
    """2 regions of 12 per query, copied from host memory: equal logits, and the cache stayed there."""
    fed = ((5, 7), (9, 11), (3, 2))
    here, expected = _logits(select_per, dtype, "xla", 2, fed)
    there, found = _logits(select_per, dtype, "offload", 2, fed)
    assert there == {"pinned_host"} and here == {"device"}
    chex.assert_trees_all_equal(found, expected, strict=True)
    assert np.isfinite(found[0]).all() and (found[1] >= 0).any()
