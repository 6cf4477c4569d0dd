"""Edge case 3: a batch without any visual token, R = 0, or without a text stream, S = 0."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core.routing import Routing
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import Streams
from gaze_jax.models import DUMMY, MLLM
from tests.helpers import models
from tests.helpers.streams import Text, batch, pad, prefix, sample


def _rows():
    return [sample([Text(6)], seed=0), sample([Text(9)], seed=1)]


@pytest.mark.parametrize(
    ("views", "top_k"),
    [(0, 2), (1, None), *(pytest.param(*rest, marks=pytest.mark.long) for rest in ((0, None), (1, 2)))],
)
def test_edge_03_forward_without_regions(views, top_k):
    """R = 0, with an unused image and without one: the logits of the same rows with empty regions."""
    variables, rows = models.parameters(DUMMY), _rows()
    top_k = None if top_k is None else jnp.int32(top_k)
    got, _ = models.forward(DUMMY)(variables, models.images(2, views), batch(rows), top_k)
    padded = batch([pad(row, regions=2, slots=4) for row in rows])
    expected, _ = models.forward(DUMMY)(variables, models.images(2, 1), padded, top_k)
    assert np.isfinite(got).all()
    models.close(got, expected)


@pytest.mark.parametrize("top_k", [None, 2])
def test_edge_03_decode_without_regions(top_k):
    """Prefill and decode of text only equal teacher forcing."""
    variables, row = models.parameters(DUMMY), _rows()[0]
    top_k = None if top_k is None else jnp.int32(top_k)
    images = models.images(1, 0)
    expected, _ = models.forward(DUMMY)(variables, images, batch([row]), top_k)
    logits, cache, _ = models.prefill(DUMMY, 1)(variables, images, batch([prefix(row, 5)]), top_k)
    models.close(logits, np.asarray(expected)[:, 4])
    order = jnp.array([5])
    logits, _, _ = models.decode(DUMMY, None)(
        variables, jnp.asarray(row["tokens"][5:6]), order, cache, models.step(order, 5), top_k
    )
    models.close(logits, np.asarray(expected)[:, 5])


def test_edge_03_gradients_without_regions():
    """Training on text only: finite, and nothing reaches the projector or the context tokens."""
    rows = _rows()
    loss, got = models.gradients(DUMMY)(
        models.parameters(DUMMY), models.images(2, 1), batch(rows), jnp.int32(2)
    )
    assert np.isfinite(float(loss))
    assert (np.asarray(got["context"]) == 0).all()
    assert (np.asarray(got["projector"]["linear_1"]["kernel"]) == 0).all()
    assert np.abs(got["decoder"]["embedding"]).max() > 0


def test_edge_03_forced_regions_without_regions():
    """Steering a text-only row selects nothing and is no error."""
    row = _rows()[0]
    forced = jnp.zeros((1, 1, 1, 1, 2), jnp.int32)
    run = models.forward(DUMMY, Routing("forced"))
    got, _ = run(models.parameters(DUMMY), models.images(1, 0), batch([row]), jnp.int32(2), forced)
    expected, _ = models.forward(DUMMY)(models.parameters(DUMMY), models.images(1, 0), batch([row]), None)
    models.close(got, expected)


def test_a_model_without_a_tower_is_the_decoder_of_one_with_it():
    """vision=None: no projector, newline or context tokens, and the same logits."""
    variables, rows = models.parameters(DUMMY), batch(_rows())
    expected, _ = models.forward(DUMMY)(variables, models.images(2, 0), rows, None)
    alone = dataclasses.replace(DUMMY, vision=None)
    made = jax.eval_shape(lambda: MLLM(alone).init(jax.random.key(0), None, rows, Selection()))
    assert made["params"].keys() == {"decoder"}
    params = {"params": {"decoder": variables["params"]["decoder"]}}
    got, _ = jax.jit(lambda params: MLLM(alone).apply(params, None, rows, Selection()))(params)
    models.close(got, expected)


def test_visual_tokens_need_a_tower_and_an_image():
    variables, rows = models.parameters(DUMMY), _rows()
    padded = batch([pad(row, regions=2, slots=4) for row in rows])
    with pytest.raises(ValueError, match="no image, or no tower"):
        MLLM(DUMMY).apply(variables, None, padded, Selection())
    with pytest.raises(ValueError, match="no image tower"):
        _ = dataclasses.replace(DUMMY, vision=None).tower


@pytest.mark.parametrize(
    ("strategy", "top_k"),
    [
        ("descriptor", None),
        ("oracle", 2),
        pytest.param("oracle", None, marks=pytest.mark.long),
        pytest.param("descriptor", 2, marks=pytest.mark.long),
    ],
)
def test_edge_03_an_image_alone(strategy, top_k):
    """No text, no newlines, no context tokens: no logits, and no error."""
    config = models.changed(DUMMY, gaze={"context_tokens": 0})
    table = jnp.asarray(config.layout.table)[None]
    empty = jnp.zeros((1, 0), jnp.int32)
    segment = jnp.zeros((1, table.shape[1]), jnp.int32)
    view = jnp.where(table >= 0, 0, -1)
    streams = Streams(table, table, jnp.maximum(table, 0), view, segment, *[empty] * 7)
    budget = None if top_k is None else jnp.int32(top_k)
    logits, _ = jax.jit(
        lambda v: MLLM(config).apply(
            v, models.images(1, 1), streams, Selection(budget), SelectionSpec(Routing(strategy))
        )
    )(models.parameters(config))
    assert logits.shape == (1, 0, 64)
