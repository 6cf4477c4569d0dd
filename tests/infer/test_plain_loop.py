"""The engine's greedy answers against the plainest loop: the whole forward pass again for every token."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core.routing import Routing
from gaze_jax.core.selection import Selection
from gaze_jax.core.streams import IGNORE, Kind
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.sampling import SamplingParams
from gaze_jax.models import DUMMY, MLLM
from tests.helpers import models
from tests.helpers.streams import Newline, PlacedView, Text, batch, pad, sample

LENGTH = 5
SAMPLE_ID = (3, 8)
WAYS = {
    "gaze": (2, Routing()),
    "dense": (None, Routing()),
    "random": (2, Routing(strategy="random", seed=4)),
    "oracle": (2, Routing(strategy="oracle")),
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
    """The row with ``tokens`` after it."""
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
    """Tokens [LENGTH, B], each from a full forward pass, and what each selected."""
    top_k, routing = WAYS[way]
    budget = None if top_k is None else jnp.asarray(top_k, jnp.int32)
    run = models.forward(DUMMY, routing, collect=True)
    generated = [[], []]
    selected = []
    for _ in range(LENGTH):
        rows = [pad(continued(row, s), text=20) for row, s in zip(prompts(), generated)]
        names = jnp.asarray(SAMPLE_ID, jnp.int32)
        logits, out = run(models.parameters(DUMMY), models.images(2, 1), batch(rows), budget, None, names)
        last = [int(row["text_order"].argmax()) for row in rows]
        for b in range(2):
            generated[b].append(int(np.argmax(logits[b, last[b]])))
        if top_k is not None:
            selected.append(np.stack([out["selected"][:, b, last[b]] for b in range(2)], axis=1))
    return np.array(generated).T, np.array(selected)


def arrays(row, number):
    """The row as the processor would give it."""
    size = len(row["tokens"])
    pixels = np.asarray(models.images(2, 1)[number])
    boxes = {"target_box": np.full((size, 4), -1, np.float32), "target_view": np.full(size, -1, np.int32)}
    return row | boxes | {"images": pixels, "sample_id": np.int32(SAMPLE_ID[number])}


@functools.cache
def decode(way, ends=()):
    """What the engine yields, joined over steps."""
    top_k, routing = WAYS[way]
    budget = None if top_k is None else jnp.asarray(top_k, jnp.int32)
    engine = Engine(
        MLLM(DUMMY),
        models.parameters(DUMMY)["params"],
        [arrays(row, number) for number, row in enumerate(prompts())],
        free_slots=LENGTH,
        selection=lambda _: Selection(budget),
        routing=routing,
    )
    greedy = SamplingParams.of([0.0, 0.0])
    found = list(
        engine.decode(LENGTH, ends=ends, sampling=greedy, returns="selection", capacity=top_k and top_k + 1)
    )
    return {name: np.concatenate([step[name] for step in found]) for name in found[0]}


# With descriptors and with an oracle, test_decode_matches_forward.py compares each selection.
@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=pytest.mark.long if w in ("oracle", "gaze") else ()) for w in WAYS]
)
def test_greedy_answers_and_selections_are_those_of_the_plain_loop(way):
    """Under every strategy, random routing by the samples' own names."""
    tokens, selected = plain_loop(way)
    found = decode(way)
    np.testing.assert_array_equal(found["tokens"], tokens)
    if way == "dense":
        assert "selected" not in found
    else:
        regions = selected.shape[-1]
        np.testing.assert_array_equal(found["selected"][..., :regions], selected)
        assert not found["selected"][..., regions:].any()


def test_entries_count_what_each_emitting_query_attends_to():
    """Visual keys by the selection; newlines, context and text by the prompt and the answer so far."""
    found = decode("gaze")
    for b, row in enumerate(prompts()):
        tokens = (row["visual_src"] >= 0).sum(axis=1)
        expected = (found["selected"][:, :, b, :, : len(tokens)] * tokens).sum(axis=-1).mean(axis=-1)
        visual, newline, context, text = np.moveaxis(found["entries"][:, :, b], -1, 0)
        np.testing.assert_allclose(visual, expected)
        assert (newline == (row["kind"] == Kind.NEWLINE).sum()).all()
        assert (context == DUMMY.gaze.context_tokens).all()
        count = (row["kind"] == Kind.TEXT).sum() + np.arange(LENGTH)
        np.testing.assert_array_equal(text, np.tile(count[:, None], 3))
    assert (decode("dense")["entries"][..., 0] == models.GRID**2).all()
    assert (decode("gaze")["visual_tokens"] == models.GRID**2).all()


def test_a_row_is_silent_after_its_end_and_changes_nothing_for_others():
    """It yields -100 and selects nothing."""
    free = decode("gaze")["tokens"]
    end = int(free[1, 1])
    found = decode("gaze", ends=(end,))
    stopped = found["tokens"]
    for b in range(2):
        (at,) = np.nonzero(free[:, b] == end)
        last = at[0] + 1 if len(at) else LENGTH
        np.testing.assert_array_equal(stopped[:last, b], free[:last, b])
        assert (stopped[last:, b] == IGNORE).all()
        assert not found["selected"][last:, :, b].any()
    assert (stopped == IGNORE).any()
