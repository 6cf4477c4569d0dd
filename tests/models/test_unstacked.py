"""Parameters with an array per layer compute what stacked ones do, and nothing copies them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.models import DUMMY, unstacked
from tests.helpers import models
from tests.helpers.streams import batch, find, pad

VARIANTS = {
    "tied, as in Qwen3": DUMMY,
    "untied with biases, as in Qwen2.5": models.changed(
        DUMMY,
        decoder={"tie_embeddings": False, "qk_norm": False, "qkv_bias": True},
        gaze={"select_per": "kv_head"},
    ),
}


def _split(variables):
    return {"params": unstacked.split_layers(variables["params"])}


@pytest.mark.parametrize(
    "name, top_k",
    [
        pytest.param("tied, as in Qwen3", None, marks=pytest.mark.long),
        pytest.param("tied, as in Qwen3", 3, marks=pytest.mark.long),  # tests/convert/test_parity.py has both
        ("untied with biases, as in Qwen2.5", 3),
    ],
)
def test_prefill_and_decode_are_those_of_stacked_parameters(name, top_k):
    """Logits of a prompt and of two decoded tokens, the cache and every selection."""
    config, rows = VARIANTS[name], [models.two_images(0), models.two_images(1, first=1, text=1)]
    prompts = batch([pad(row, text=20) for row in rows])
    order = jnp.array([int(row["text_order"].max()) + 1 for row in rows], jnp.int32)
    tokens, found = jnp.array([5, 9], jnp.int32), []
    for variables in (models.parameters(config), _split(models.parameters(config))):
        logits, cache, out = models.prefill(config, 2)(variables, models.images(2, 2), prompts, top_k)
        stages = [(logits, out.get("selected"))]
        for t in range(2):
            logits, cache, out = models.decode(config, top_k)(
                variables, tokens + t, order + t, cache, models.step(order + t, 20 + t), top_k
            )
            stages.append((logits, out.get("indices")))
        found.append((stages, jax.tree.leaves(cache)))
    (stacked, own), (split, other) = found
    for (logits, picks), (expected, wanted) in zip(split, stacked):
        models.close(logits, expected, 1e-5)
        np.testing.assert_array_equal(picks, wanted)
    for a, b in zip(other, own):
        models.close(a, b, 1e-5)


@pytest.mark.parametrize("rows", [1, unstacked._MANY - 1, unstacked._MANY, 300])
def test_a_product_is_that_of_any_side(rows):
    """Few rows and many are multiplied from different sides."""
    rng = np.random.default_rng(rows)
    kernel, x = rng.normal(size=(24, 16)).astype(np.float32), rng.normal(size=(rows, 16)).astype(np.float32)
    a, b = jnp.asarray(kernel), jnp.asarray(x)
    np.testing.assert_allclose(unstacked.product(a, b), x @ kernel.T, rtol=1e-5, atol=1e-5)
    deep = unstacked.product(a, b.reshape(1, rows, 16))
    np.testing.assert_allclose(deep[0], x @ kernel.T, rtol=1e-5, atol=1e-5)


def test_teacher_forced_logits_of_split_parameters():
    """Whole sequences, of unequal lengths."""
    images, streams = models.toy()
    config = VARIANTS["untied with biases, as in Qwen2.5"]
    variables = models.parameters(config)
    expected, _ = models.forward(config)(variables, images, streams, 4)
    got, _ = models.forward(config)(_split(variables), images, streams, 4)
    for row, (a, b) in enumerate(zip(got, expected)):
        valid = np.flatnonzero(streams.text_segment[row] >= 0)
        models.close(a[valid], b[valid], 1e-5)


def test_only_kernels_are_unstacked():
    """[out, in] arrays per layer that hold the stacked values; everything else is the same object."""
    config = VARIANTS["untied with biases, as in Qwen2.5"]
    params = models.parameters(config)["params"]
    split = unstacked.split_layers(params)
    flat = dict(jax.tree_util.tree_leaves_with_path(split, is_leaf=unstacked.is_unstacked))
    paths = [path for path, leaf in flat.items() if unstacked.is_unstacked(leaf)]
    assert len(paths) == 7 + 1
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path not in paths:
            assert flat[path] is leaf
        else:
            whole = leaf if leaf.ndim == 3 else leaf[None]
            np.testing.assert_array_equal(np.stack(flat[path].layers), np.swapaxes(whole, 1, 2))
    assert unstacked.is_split(split["decoder"]["layers"]) and not unstacked.is_split(
        params["decoder"]["layers"]
    )


def _kernels_written(config, variables):
    """Operations of a compiled decoding step that make an array as large as a kernel of the MLP."""
    row = models.two_images(0)
    prompt = batch([row])
    _, cache, _ = jax.eval_shape(models.prefill(config, 1), variables, models.images(1, 2), prompt, None)
    one = jnp.zeros(1, jnp.int32)
    run = models.decode(config, None)
    text = run.lower(variables, one, one, cache, models.step(one, len(find(row))), None).compile().as_text()
    sides = {config.decoder.width, config.decoder.mlp_dim}
    made = re.findall(r"%(\S+) = f32\[(?:1,)?(\d+),(\d+)\]\S* (?!parameter|get-tuple-element|bitcast)", text)
    return [name for name, *size in made if {int(n) for n in size} == sides]


def test_no_kernel_is_copied():
    """A step with split parameters writes no kernel anywhere; with stacked ones a CPU cuts them out."""
    variables = models.parameters(DUMMY)
    assert not _kernels_written(DUMMY, _split(variables))
    assert jax.default_backend() != "cpu" or _kernels_written(DUMMY, variables)


def test_the_kernel_stays_the_left_side():
    """Turned around, as XLA would have it, the kernel is packed at every product: twice the time."""
    kernel, x = jnp.ones((48, 32)), jnp.ones((3, 32))
    text = jax.jit(unstacked.product).lower(kernel, x).compile().as_text()
    assert re.search(r"= f32\[48,3\]\S* dot\(", text) and not re.search(r"= f32\[3,48\]\S* dot\(", text)
