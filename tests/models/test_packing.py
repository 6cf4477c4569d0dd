"""Invariant 3: packing, padding, batch composition, bucket size and storage order change nothing for a
sample."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core.routing import Routing
from gaze_jax.models import DUMMY
from tests.helpers import models
from tests.helpers.streams import Newline, PlacedView, Text, batch, find, pack, pad, sample, shuffle

VIEWS = 3
NAMES = ("two images", "one image", "text")


@functools.cache
def _sample(name):
    """A sample's row, its own images and its id."""
    grid = PlacedView(models.GRID, models.GRID)
    parts = {
        "two images": [
            Text(2),
            grid,
            Text(3),
            PlacedView(models.GRID, models.GRID, newlines=True),
            Newline(),
            Text(4),
        ],
        "one image": [grid, Text(5)],
        "text": [Text(6)],
    }[name]
    seed = NAMES.index(name)
    images = models.images(1, sum(isinstance(p, PlacedView) for p in parts), seed=seed)[0]
    return sample(parts, seed=seed), images, 100 + seed


def _row(names, *, shuffled=None, garbage=7):
    """Samples packed into one row of a bucket; unused image slots hold noise that must not matter."""
    rows, images, ids = zip(*(_sample(name) for name in names), strict=True)
    row = pad(pack(rows), regions=30, slots=4, text=40)
    if shuffled is not None:
        row = shuffle(row, seed=shuffled)
    noise = models.images(1, VIEWS, seed=garbage)[0]
    pixels = jnp.concatenate([*images, noise])[:VIEWS]
    segment = row["text_segment"]
    return row, pixels, np.where(segment >= 0, np.array(ids)[segment], -1)


def _run(rows, run, top_k, variables=None):
    """Logits of each (row, segment) in order, and the chosen regions by the order of their first token."""
    built, pixels, ids = zip(*rows, strict=True)
    streams = batch(built)
    sample_id = jnp.asarray(np.stack(ids), jnp.int32)
    logits, out = run(
        variables or models.parameters(DUMMY), jnp.stack(pixels), streams, top_k, None, sample_id
    )

    def of(row, segment):
        at = find(built[row], segment)
        if "selected" not in out:
            return np.asarray(logits)[row, at], None
        order = built[row]["visual_order"]
        first = np.where(order >= 0, order, 10**6).min(1)
        chosen = np.asarray(out["selected"])[:, row, at]
        names = [sorted(first[np.flatnonzero(picks)].tolist()) for picks in chosen.reshape(-1, len(first))]
        return np.asarray(logits)[row, at], names

    return of


CONFIGS = {
    "gaze": (DUMMY, Routing(), 3),
    "dense": (DUMMY, Routing(), None),
    "view, not causal, group": (
        models.changed(DUMMY, gaze={"visual_scope": "view", "visual_causal": False, "select_per": "kv_head"}),
        Routing(),
        3,
    ),
    "random": (DUMMY, Routing("random", seed=5), 3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_packing_padding_composition_and_storage(name):
    """Alone, packed before or after others, shuffled, in other batches: the same logits and choices."""
    config, route, top_k = CONFIGS[name]
    run = models.forward(config, route, collect=True)
    top_k = None if top_k is None else jnp.int32(top_k)
    two, one, text = NAMES
    alone = _run([_row([two]), _row([one]), _row([text])], run, top_k)
    expected = {name: alone(i, 0) for i, name in enumerate(NAMES)}
    assert np.abs(expected[one][0][-1]).max() > 0.1
    for rows, where in (
        (
            [_row([two, one]), _row([text], shuffled=1), _row([one], garbage=8)],
            [(two, 0, 0), (one, 0, 1), (text, 1, 0)],
        ),
        (
            [
                _row([text, one, two], shuffled=2),
                _row([two], shuffled=3, garbage=9),
                _row([one, text], shuffled=4),
            ],
            [(text, 0, 0), (one, 0, 1), (two, 0, 2), (two, 1, 0), (one, 2, 0), (text, 2, 1)],
        ),
    ):
        got = _run(rows, run, top_k)
        for sample_name, row, segment in where:
            logits, chosen = got(row, segment)
            models.close(logits, expected[sample_name][0])
            assert chosen == expected[sample_name][1], (sample_name, row, segment)


@pytest.mark.parametrize(
    "sizes",
    [
        {"regions": 33, "slots": 6, "text": 47},
        pytest.param({"regions": 18, "slots": 4, "text": 23}, marks=pytest.mark.long),
    ],
)
def test_bucket_size(sizes):
    """A larger or exact bucket, slots per region included, gives the same logits and choices."""
    row, images, _ = _sample("two images")
    run = models.forward(DUMMY, collect=True)
    small = pad(row, regions=30, slots=4, text=40)
    results = []
    for built in (small, pad(row, **sizes)):
        logits, out = run(models.parameters(DUMMY), images[None], batch([built]), jnp.int32(3), None, None)
        at = find(built)
        results.append((np.asarray(logits)[0, at], np.asarray(out["selected"])[:, 0, at, :, :18]))
        assert not np.asarray(out["selected"])[..., 18:].any()
    models.close(results[1][0], results[0][0])
    np.testing.assert_array_equal(results[1][1], results[0][1])


def test_edge_01_ties_go_to_the_regions_that_come_first():
    """All scores 0: the three regions with the earliest first tokens win, wherever they are stored."""
    config, route, top_k = CONFIGS["gaze"]
    rows = [_row(["two images"]), _row(["two images"], shuffled=5), _row(["text", "two images"], shuffled=6)]
    variables = models.indifferent(models.parameters(DUMMY))
    got = _run(rows, models.forward(config, route, collect=True), jnp.int32(top_k), variables)
    for row, segment in ((0, 0), (1, 0), (2, 1)):
        chosen = {tuple(names) for names in got(row, segment)[1]}
        # The first image starts at order 2; its regions of 2x2 start 2, 4 and 6 tokens into it.
        assert chosen == {(), (2, 4, 6)}


def test_random_choices_are_keyed_by_the_sample_id():
    """Another id draws other regions; the same id draws the same in another row."""
    config, route, top_k = CONFIGS["random"]
    run = models.forward(config, route, collect=True)
    row, pixels, ids = _row(["two images"])
    built = _run([(row, pixels, ids), (row, pixels, ids + 1), (row, pixels, ids)], run, jnp.int32(top_k))
    _, first = built(0, 0)
    _, other = built(1, 0)
    _, again = built(2, 0)
    assert first == again
    assert np.mean([a != b for a, b in zip(first, other, strict=True) if len(a) == top_k]) > 0.8
