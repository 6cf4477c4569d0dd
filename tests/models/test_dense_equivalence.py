"""Invariant 1: selecting every region is dense attention, and selecting fewer is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.models import DUMMY
from tests.helpers import models

REGIONS = 18


def _config(select_per="head", **gaze):
    return models.changed(DUMMY, gaze={"select_per": select_per, **gaze})


@pytest.mark.parametrize(
    ("select_per", "implementation"), [("head", "xla"), ("kv_head", "xla"), ("head", "reference")]
)
def test_top_k_of_all_regions_equals_dense(select_per, implementation):
    """top_k = R, R + 1 and 2**31 - 1 give the dense logits, through a routing that took every region."""
    config = _config(select_per, prefill_implementation=implementation)
    images, streams = models.toy()
    variables = models.parameters(DUMMY)
    dense, out = models.forward(_config())(variables, images, streams, None)
    assert out == {}
    for top_k in (REGIONS, REGIONS + 1, 2**31 - 1):
        logits, out = models.forward(config, collect=True)(variables, images, streams, jnp.int32(top_k))
        models.close(logits, dense)
        last = np.asarray(out["selected"])[:, 1, -1]
        assert last.shape == (3, 4 if select_per == "head" else 2, REGIONS) and last.all()
    sparse, _ = models.forward(config, collect=True)(variables, images, streams, jnp.int32(2))
    assert np.abs(np.asarray(sparse) - np.asarray(dense)).max() > 0.1


@pytest.mark.long  # edge 02 of the kernels' suites has the gradients
@pytest.mark.parametrize("select_per", [pytest.param("head", marks=pytest.mark.long), "kv_head"])
def test_gradients_with_all_regions_equal_dense(select_per):
    """Gradients of every decoder, projector, newline and context parameter."""
    images, streams = models.toy()
    variables = models.parameters(DUMMY)
    loss, expected = models.gradients(_config())(variables, images, streams, None)
    routed_loss, got = models.gradients(_config(select_per))(variables, images, streams, jnp.int32(REGIONS))
    assert float(routed_loss) == pytest.approx(float(loss), rel=1e-5)
    paths = jax.tree_util.tree_flatten_with_path(expected)[0]
    for (path, theirs), mine in zip(paths, jax.tree.leaves(got), strict=True):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(mine).all(), name
        assert np.abs(theirs).max() > 0, name
        models.close(mine, theirs, 2e-4)


def test_top_k_is_traced_from_1_to_9():
    """Nine budgets, one compiled program; the kept count is min(top_k, visible) for every head."""
    images, streams = models.toy()
    run = models.forward(_config(), collect=True)
    run(models.parameters(DUMMY), images, streams, jnp.int32(5))
    programs = run._cache_size()
    for top_k in range(1, 10):
        _, out = run(models.parameters(DUMMY), images, streams, jnp.int32(top_k))
        counts = np.asarray(out["selected"]).sum(-1)
        # Row 0: two text tokens, an image of nine regions, three, another nine, a newline, four.
        assert (counts[:, 0, :4] == 0).all()
        assert (counts[:, 0, 4:7] == min(top_k, 9)).all()
        assert (counts[:, 0, 9:14] == top_k).all()
    assert run._cache_size() == programs


def test_top_k_per_layer_sample_and_query():
    """int32 [L, B, S]: every query of every layer keeps its own number; R makes a layer dense."""
    images, streams = models.toy()
    top_k = jnp.asarray(np.random.default_rng(0).integers(1, 10, (3, 2, streams.tokens.shape[1])), jnp.int32)
    top_k = top_k.at[1].set(REGIONS)
    run = models.forward(_config(), collect=True)
    _, out = run(models.parameters(DUMMY), images, streams, top_k)
    visible = np.asarray(out["selected"])[1].any(2)  # the dense layer shows which regions are in sight
    expected = np.minimum(np.asarray(top_k), visible.sum(-1)[None])
    assert (np.asarray(out["selected"]).sum(-1) == expected[..., None]).all()
    assert visible[1, -1].all()
    # [L, 1, 1] and [B, 1] broadcast.
    _, out = run(models.parameters(DUMMY), images, streams, jnp.array([1, 2, 3], jnp.int32)[:, None, None])
    assert np.asarray(out["selected"])[:, 1, -1].sum(-1).tolist() == [[1] * 4, [2] * 4, [3] * 4]
    _, out = run(models.parameters(DUMMY), images, streams, jnp.array([[4], [6]], jnp.int32))
    assert np.asarray(out["selected"])[0, :, 13].sum(-1).tolist() == [[4] * 4, [6] * 4]
