"""Accounting against the paper's worked examples and against counting by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core import accounting
from gaze_jax.core.streams import Kind
from tests.helpers.streams import Newline, PlacedView, Text, sample

# Qwen3-4B: the decoder of the paper's efficiency figures.
LAYERS, HEADS, KV_HEADS, DIM = 36, 32, 8, 128


def _eight_frames():
    """8 frames of 24x24 in regions of 6x6, 4 context tokens each, and no text."""
    row = sample([PlacedView(24, 24)] * 8, region=(6, 6), context=4)
    return (row["visual_src"] >= 0)[None], (row["kind"] > 0)[None], row["kind"][None]


def test_the_papers_752_entries():
    """20 regions of 36 and 8 x 4 context tokens of 4,608: 752 entries, 16.3 % of dense."""
    valid, seen, kind = _eight_frames()
    selected = jnp.asarray(
        np.random.default_rng(0).permuted(np.arange(128) < 20 * np.ones((1, 4, 1)), axis=-1)
    )
    counted = accounting.entries(valid, seen, kind, selected=selected)
    assert (counted.visual.item(), counted.context.item(), counted.total.item()) == (720, 32, 752)
    dense = accounting.entries(valid, seen & False, kind)
    assert dense.total.item() == 4608
    assert counted.total.item() / dense.total.item() == pytest.approx(0.163, abs=5e-4)


def test_the_papers_flops():
    """36 layers x 32 heads x 128: 5.44 GFLOPs for 16 frames of 576; 5.52 with the prompt's 143 tokens.

    The published 0.89 and -83.9 % are 1,509 entries, the published 0.15 are 256 context tokens.
    """

    def giga(entries):
        return LAYERS * accounting.attention_flops(HEADS, DIM, entries).total / 1e9

    assert giga(16 * 576) == pytest.approx(5.436, abs=5e-4)
    assert giga(16 * 576) == pytest.approx(5.52, rel=0.02)
    assert giga(16 * 576 + 143) == pytest.approx(5.52, abs=5e-4)
    assert giga(1509) == pytest.approx(0.89, abs=5e-4)
    assert 1 - giga(1509) / giga(16 * 576 + 143) == pytest.approx(0.839, abs=5e-4)
    assert giga(256) == pytest.approx(0.15, abs=2e-3)


def test_routing_flops():
    """Per head 2HDR; per kv head the sum of queries and 2KDR; none without regions."""
    head = accounting.attention_flops(HEADS, DIM, 0, regions=256)
    group = accounting.attention_flops(HEADS, DIM, 0, regions=256, kv_heads=KV_HEADS)
    assert head.routing == 2 * 32 * 128 * 256 and head.attention == 0
    assert group.routing == 2 * 8 * 128 * 256 + 24 * 128
    assert accounting.attention_flops(HEADS, DIM, 10, kv_heads=KV_HEADS).routing == 0


def test_the_papers_cache_size():
    """16 x 576 tokens of 36 layers in bf16 are the published 1.37 GB (1.36, without the prompt)."""
    floor = accounting.decode_floor(KV_HEADS, DIM, 2, None, 36, 256, 0)
    assert LAYERS * floor.total / 1e9 == pytest.approx(1.359, abs=5e-4)
    assert floor.descriptors == 0


def test_floor_by_hand():
    """K * (bDR + 2bDPU + 2bDS), and 36-token descriptors are 1/72 of the regions' bytes."""
    floor = accounting.decode_floor(2, 8, 4, 10, 36, 3, 5)
    assert (floor.descriptors, floor.visual, floor.text_stream) == (
        2 * 4 * 8 * 10,
        2 * 2 * 4 * 8 * 36 * 3,
        2 * 2 * 4 * 8 * 5,
    )
    assert floor.total == 2 * (4 * 8 * 10 + 2 * 4 * 8 * 36 * 3 + 2 * 4 * 8 * 5)
    whole = accounting.decode_floor(2, 8, 4, 10, 36, 10, 0)
    assert whole.descriptors / whole.visual == pytest.approx(1 / 72)


def test_minmax_descriptors_are_twice_as_wide():
    """Their bytes and operations double, those of attention stay."""
    mean, box = (accounting.decode_floor(2, 8, 4, 10, 36, 3, 5, descriptor=d) for d in ("mean", "minmax"))
    assert box.descriptors == 2 * mean.descriptors
    assert (box.visual, box.text_stream) == (mean.visual, mean.text_stream)
    for kv_heads in (None, KV_HEADS):
        mean, box = (
            accounting.attention_flops(HEADS, DIM, 7, regions=256, kv_heads=kv_heads, descriptor=d)
            for d in ("mean", "minmax")
        )
        assert box.routing == 2 * mean.routing and box.attention == mean.attention
    valid, kind = _small()
    selected = jnp.array([[[False, False, False, True]]])
    shape = {"kv_heads": 1, "head_dim": 8, "itemsize": 2, "selected": selected}
    read = accounting.reads(valid, kind > 0, descriptor="minmax", **shape)
    assert read.descriptors == 2 * accounting.reads(valid, kind > 0, **shape).descriptors == 2 * 2 * 8 * 4


def _small():
    """Regions of 4, 2, 2 and 1 tokens in 4 slots; text, context, newlines and padding."""
    row = sample([Text(2), PlacedView(3, 3, newlines=True), Newline(), Text(3)], context=2)
    return (row["visual_src"] >= 0)[None], row["kind"][None]


def test_kinds_are_counted_separately():
    """Newlines in and outside of views, context and text; unseen keys and padding count nowhere."""
    valid, kind = _small()
    kind = np.pad(kind, ((0, 0), (0, 3)))
    seen = kind > 0
    counted = accounting.entries(valid, seen, kind)
    assert [float(getattr(counted, n)[0]) for n in ("visual", "newline", "context", "text")] == [9, 4, 2, 5]
    assert float(counted.total[0]) == 20
    seen = seen & (np.arange(seen.shape[1]) != 0) & (kind != Kind.CONTEXT)
    counted = accounting.entries(valid, seen, kind)
    assert [float(getattr(counted, n)[0]) for n in ("newline", "context", "text")] == [4, 0, 4]


def test_entries_are_valid_keys_and_reads_are_slots():
    """A partial region of 1 valid token in 4 slots is 1 entry and 4 slots of traffic."""
    valid, kind = _small()
    selected = jnp.array([[[False, False, False, True]]])
    assert accounting.entries(valid, kind > 0, kind, selected=selected).visual.item() == 1
    read = accounting.reads(valid, kind > 0, kv_heads=1, head_dim=8, itemsize=2, selected=selected)
    assert read.visual.item() == 2 * 2 * 8 * 4
    assert read.descriptors == 2 * 8 * 4 and read.text_stream.item() == 2 * 2 * 8 * 11


def test_heads_average_entries_and_unite_reads():
    """Heads that pick different regions: entries are their mean, reads the union in each group."""
    valid, kind = _small()
    sizes = [4, 2, 2, 1]
    assert valid.sum(-1).tolist() == [sizes]
    # kv head 0: {0} and {0, 1}; kv head 1: {2} and {3}.
    picks = [[0], [0, 1], [2], [3]]
    selected = jnp.asarray([[[r in p for r in range(4)] for p in picks]])
    counted = accounting.entries(valid, kind > 0, kind, selected=selected)
    assert counted.visual.item() == np.mean([sum(sizes[r] for r in p) for p in picks])
    assert accounting.union_over_group(selected, 2).tolist() == [[2, 2]]
    assert accounting.union_over_group(selected, 4).tolist() == [[1, 2, 1, 1]]
    assert accounting.union_over_group(selected, 1).tolist() == [[4]]
    read = accounting.reads(valid, kind > 0, kv_heads=2, head_dim=8, itemsize=4, selected=selected)
    assert read.visual.item() == 2 * 4 * 8 * 4 * (2 + 2)
    with pytest.raises(ValueError, match="4 selections are not a multiple of 3 kv heads"):
        accounting.union_over_group(selected, 3)


def test_edge_07_indices_with_duplicates_and_minus_one_equal_the_mask():
    """-1 reads nothing and a duplicate is read once; extra leading axes broadcast."""
    valid, kind = _small()
    indices = jnp.array([[[[3, 1, -1, 3], [-1, -1, -1, -1]]]] * 2, jnp.int32)
    selected = jnp.array([[[[False, True, False, True], [False] * 4]]] * 2)
    np.testing.assert_array_equal(accounting.mask_from_indices(indices, 4), selected)
    by_index = accounting.entries(valid, kind > 0, kind, indices=indices)
    by_mask = accounting.entries(valid, kind > 0, kind, selected=selected)
    assert by_index.visual.tolist() == by_mask.visual.tolist() == [[1.5], [1.5]]
    shape = {"kv_heads": 1, "head_dim": 8, "itemsize": 4}
    read = accounting.reads(valid, kind > 0, indices=indices, **shape)
    assert read.visual.tolist() == [[2 * 4 * 8 * 4 * 2.0]] * 2
    with pytest.raises(ValueError, match="selected or indices, not both"):
        accounting.entries(valid, kind > 0, kind, indices=indices, selected=selected)


def test_edge_03_no_regions():
    """A text-only sample has text entries and reads only."""
    valid, kind = np.zeros((1, 0, 1), bool), np.array([[1, 1, 0]])
    for selected in (None, jnp.zeros((1, 2, 0), bool)):
        counted = accounting.entries(valid, kind > 0, kind, selected=selected)
        assert (counted.visual.item(), counted.text.item(), counted.total.item()) == (0, 2, 2)
        read = accounting.reads(valid, kind > 0, kv_heads=1, head_dim=4, itemsize=2, selected=selected)
        assert float(np.asarray(read.total).item()) == 2 * 2 * 4 * 2


def test_dense_reads_every_slot_and_no_descriptor():
    """Dense attention reads all R * P slots; measured reads equal the floor with U = R."""
    valid, kind = _small()
    read = accounting.reads(valid, kind > 0, kv_heads=2, head_dim=8, itemsize=2)
    assert read.descriptors == 0 and read.visual == 2 * 2 * 2 * 8 * 16
    assert float(read.total[0]) == float(accounting.decode_floor(2, 8, 2, None, 4, 4, 11).total)
