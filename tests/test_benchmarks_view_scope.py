"""benchmarks/view_scope.py: its sequence, and the FLOPs that it counts."""

import json

import numpy as np
import pytest

from benchmarks import view_scope
from gaze_jax.core.masks import windows
from gaze_jax.core.streams import IGNORE, Kind, Streams


def test_a_sequence_of_frames():
    """Every token has its place; a frame sees itself with "view"; the text behind is supervised."""
    batch = view_scope.frames_batch(3, before=5, behind=7)
    streams = Streams.from_batch(batch)
    orders = np.concatenate([streams.visual_order.ravel(), streams.text_order.ravel()])
    np.testing.assert_array_equal(np.sort(orders), np.arange(5 + 3 * 68 + 7))
    assert (np.sort(streams.visual_src.ravel()) == np.arange(3 * 64)).all()
    assert (np.diff(streams.text_order) > 0).all()
    visual, _ = windows(streams, visual_scope="view", visual_causal=True)
    first = 5 + 68 * streams.visual_view.reshape(1, -1)
    np.testing.assert_array_equal(visual.visual_lo, first)
    context = streams.kind == Kind.CONTEXT
    assert (streams.tokens[context].reshape(3, 4) == np.arange(4)).all()
    np.testing.assert_array_equal(streams.text_view[context], np.repeat(np.arange(3), 4))
    assert (streams.targets != IGNORE).sum() == 7 and (streams.targets[:, -7:] != IGNORE).all()


@pytest.mark.standard_promotion
@pytest.mark.long  # two training steps are compiled; tests/kernels/test_prefill_chunks.py counts the visits
def test_flops_that_are_really_computed(tmp_path):
    """Of the chunks, "view" computes the frames' own and the text; of the rest, both compute the same."""
    path = tmp_path / "result.json"
    view_scope.main(["--quick", f"--json={path}"])
    (row,) = json.loads(path.read_text())["rows"]
    flops = row["flops"]
    assert flops["view"]["rest"] == flops["all"]["rest"] > 0
    assert 0 < flops["view"]["chunks"] < flops["all"]["chunks"] / 2
    totals = {scope: sum(parts.values()) for scope, parts in flops.items()}
    assert row["faster_by_flops"] == pytest.approx(totals["all"] / totals["view"])
    assert row["of_expected"] == pytest.approx(row["faster"]["median"] / row["faster_by_flops"])
