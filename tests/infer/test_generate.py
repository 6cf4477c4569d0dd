"""Free-running generation against the plainest loop: the whole forward pass again for every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core.routing import Routing
from gaze_jax.core.streams import IGNORE, Kind
from gaze_jax.infer.generate import Generator
from gaze_jax.models import DUMMY, MLLM
from tests.helpers import models
from tests.helpers.streams import Newline, PlacedView, Text, batch, pad, sample

LENGTH = 5
SAMPLE_ID = jnp.array([3, 8], jnp.int32)
NO_END = 10**6
WAYS = {
    "gaze": (2, Routing()),
    "dense": (None, Routing()),
    "random": (2, Routing(strategy="random", seed=4)),
}


@functools.cache
def prompts():
    """Two prompts of unequal length, as rows without padding."""
    grid = models.GRID
    return (
        sample([PlacedView(grid, grid), Text(3)], seed=1),
        sample([Text(1), PlacedView(grid, grid), Newline(), Text(4)], seed=2),
    )


def continued(row, tokens):
    """The row followed by the generated ``tokens``."""
    end = row["text_order"].max() + 1
    more = np.arange(len(tokens), dtype=np.int32)
    added = {
        "tokens": np.asarray(tokens, np.int32),
        "kind": np.full(len(tokens), Kind.TEXT, np.int32),
        "text_order": end + more,
        "text_positions": end + more,
        "text_segment": 0 * more,
        "text_view": 0 * more - 1,
        "targets": 0 * more + IGNORE,
    }
    return row | {name: np.concatenate([row[name], values]) for name, values in added.items()}


@functools.cache
def plain_loop(way):
    """Tokens [LENGTH, B] by running everything anew for each of them, and what each looked at."""
    top_k, route = WAYS[way]
    budget = None if top_k is None else jnp.asarray(top_k, jnp.int32)
    run = models.forward(DUMMY, route, collect=True)
    generated = [[], []]
    selected = []
    for _ in range(LENGTH):
        rows = [pad(continued(row, s), text=20) for row, s in zip(prompts(), generated)]
        logits, out = run(models.parameters(DUMMY), models.images(2, 1), batch(rows), budget, None, SAMPLE_ID)
        last = [int(row["text_order"].argmax()) for row in rows]
        for b in range(2):
            generated[b].append(int(np.argmax(logits[b, last[b]])))
        if top_k is not None:
            selected.append(np.stack([out["selected"][:, b, last[b]] for b in range(2)], axis=1))
    return np.array(generated).T, np.array(selected)


def generate(way, end_id=NO_END):
    top_k, route = WAYS[way]
    rows = [pad(row, regions=12, text=14) for row in prompts()]
    generator = Generator(MLLM(DUMMY), LENGTH, end_id, route)
    params = models.parameters(DUMMY)["params"]
    return jax.device_get(
        generator(params, models.images(2, 1), batch(rows), top_k=top_k, sample_id=SAMPLE_ID)
    )


@pytest.mark.parametrize("way", WAYS)
def test_greedy_answers_and_gaze_are_those_of_the_plain_loop(way):
    tokens, selected = plain_loop(way)
    found = generate(way)
    np.testing.assert_array_equal(found.tokens, tokens)
    if way == "dense":
        assert found.selected is None
    else:
        regions = selected.shape[-1]
        np.testing.assert_array_equal(found.selected[..., :regions], selected)
        assert not found.selected[..., regions:].any()


def test_entries_count_what_each_emitting_query_attends_to():
    found = generate("gaze")
    for b, row in enumerate(prompts()):
        tokens = (row["visual_src"] >= 0).sum(axis=1)
        expected = (found.selected[:, :, b, :, : len(tokens)] * tokens).sum(axis=-1).mean(axis=-1)
        np.testing.assert_allclose(found.entries.visual[:, :, b], expected)
        text = (row["kind"] == Kind.TEXT).sum() + np.arange(LENGTH)
        np.testing.assert_array_equal(found.entries.text[:, :, b], np.tile(text[:, None], 3))
        np.testing.assert_array_equal(found.entries.context[:, :, b], DUMMY.gaze.context_tokens)
    assert (generate("dense").entries.visual == models.GRID**2).all()


def test_a_row_is_silent_after_its_end_and_changes_nothing_for_others():
    free = generate("gaze").tokens
    end = int(free[2, 0])
    stopped = generate("gaze", end_id=end).tokens
    for b in range(2):
        (at,) = np.nonzero(free[:, b] == end)
        last = at[0] + 1 if len(at) else LENGTH
        np.testing.assert_array_equal(stopped[:last, b], free[:last, b])
        assert (stopped[last:, b] == IGNORE).all()
    assert (stopped == IGNORE).any()
