"""The stream container, and the toy builder that the other tests trust."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core.streams import IGNORE, Kind, Streams
from gaze_jax.models.mllm import joined_positions
from tests.helpers.streams import Newline, PlacedView, Text, batch, find, pack, pad, prefix, sample, shuffle

PARTS = [Text(3), PlacedView(3, 5, newlines=True), Text(2), Newline(), PlacedView(2, 3), Text(4)]

POOLED = {"pool_indices": jnp.int32, "pool_weights": jnp.float32}


def test_from_batch_takes_its_fields_and_names_the_missing_one():
    """Other entries are left alone; a missing field is a KeyError with its name."""
    streams = batch([sample(PARTS)])
    pooled = {name: jnp.zeros((*streams.visual_src.shape, 4), dtype) for name, dtype in POOLED.items()}
    fields = {f.name: getattr(streams, f.name) for f in dataclasses.fields(Streams)} | pooled
    found = Streams.from_batch(fields | {"images": jnp.zeros(1)})
    assert found.targets is fields["targets"] and found.pool_indices is fields["pool_indices"]
    del fields["pool_indices"]
    assert Streams.from_batch(fields).pool_indices is None
    del fields["text_view"]
    with pytest.raises(KeyError, match="text_view"):
        Streams.from_batch(fields)


def test_streams_are_a_pytree_of_int32():
    """They cross jit boundaries, and every field is int32."""
    streams = batch([sample(PARTS)])
    optional = sum(f.default is None for f in dataclasses.fields(Streams))
    assert len(jax.tree.leaves(streams)) == len(dataclasses.fields(Streams)) - optional
    assert {a.dtype for a in jax.tree.leaves(streams)} == {jnp.dtype("int32")}
    valid = jax.jit(lambda s: s.visual_valid)(streams)
    assert int(valid.sum()) == 21 and valid.shape == streams.visual_src.shape


def _orders(row, segment):
    visual = (row["visual_order"] >= 0) & (row["region_segment"] == segment)[:, None]
    return sorted([*row["visual_order"][visual], *row["text_order"][row["text_segment"] == segment]])


@pytest.mark.parametrize("change", ["built", "padded", "shuffled", "packed"])
def test_toy_rows_splice_to_one_sequence(change):
    """Every order from 0 on occurs exactly once per segment, whatever the storage."""
    row = sample(PARTS)
    if change == "packed":
        row = pack([sample([PlacedView(2, 2), Text(1)]), row])
    if change != "built":
        row = pad(row, regions=20, slots=6, text=40)
    if change in ("shuffled", "packed"):
        row = shuffle(row, seed=0)
    segment = int(change == "packed")
    orders = _orders(row, segment)
    assert orders == list(range(3 + 18 + 2 + 2 + 1 + 6 + 2 + 4))
    at = find(row, segment)
    assert row["text_order"][at].tolist() == sorted(row["text_order"][at])
    assert len(np.unique(row["visual_src"][row["visual_src"] >= 0])) == (row["visual_src"] >= 0).sum()


def test_toy_targets_are_the_next_text_token_in_order():
    """-100 before images, newlines and context; after an image's context the next text token."""
    row = sample([Text(2), PlacedView(2, 2), Text(2), Newline(), Text(1)], context=1)
    a, b, _, c, d, _, e = row["tokens"].tolist()
    assert row["kind"].tolist() == [1, 1, 3, 1, 1, 2, 1]
    assert row["text_order"].tolist() == [0, 1, 6, 7, 8, 9, 10]
    assert row["targets"].tolist() == [b, IGNORE, c, d, IGNORE, e, IGNORE]
    assert a != IGNORE


def test_toy_prefix_keeps_whole_views():
    """A prompt is a prefix in order; one that cuts an image is refused."""
    row = sample(PARTS)
    cut = prefix(row, 36)
    assert cut["text_order"].max() == 35 and (cut["kind"] == Kind.TEXT).sum() == 7
    with pytest.raises(ValueError, match="whole views"):
        prefix(row, 10)


@pytest.mark.parametrize("context", [1, 2])
def test_streams_without_context_are_those_that_never_had_any(context):
    """Packed, padded and shuffled: tokens and RoPE positions, in an order that has gaps.

    A target after a view is the last newline's without context tokens, and that of the last of them with.
    """
    samples = [[PlacedView(2, 2), Text(1)], PARTS, [Text(2)]]

    def built(context):
        rows = [sample(parts, seed=seed, context=context) for seed, parts in enumerate(samples)]
        return batch([shuffle(pad(pack(rows), regions=25, slots=6, text=60), seed=1)])

    plain, found = built(0), built(context).without_context()

    def listed(streams, names, order, segment):
        at = np.flatnonzero(segment >= 0)
        at = at[np.lexsort((order[at], segment[at]))]
        fields = {name: np.asarray(getattr(streams, name)).reshape(-1)[at] for name in names}
        return fields | {"segment": segment[at]}

    def text(streams):
        names = ("tokens", "kind", "text_positions", "text_view")
        return listed(streams, names, *(np.asarray(a[0]) for a in (streams.text_order, streams.text_segment)))

    def visual(streams):
        segment = np.repeat(np.asarray(streams.region_segment[0]), streams.visual_src.shape[2])
        order = np.asarray(streams.visual_order[0]).reshape(-1)
        names = ("visual_src", "visual_positions", "visual_view")
        return listed(streams, names, order, np.where(order >= 0, segment, -1))

    for fields in (text, visual):
        mine, theirs = fields(found), fields(plain)
        for name, value in theirs.items():
            np.testing.assert_array_equal(mine[name], value, err_msg=name)
    assert not (np.asarray(found.kind) == Kind.CONTEXT).any()
    np.testing.assert_array_equal(joined_positions(found)[:, -60:], found.text_positions)
