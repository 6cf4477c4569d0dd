"""The mask table of ``gaze_jax.core.masks`` as literal pictures.

Rows are queries and columns keys, both in sequence order whatever the storage order. ``#`` is seen, ``R``
is seen if its region is selected, ``.`` is not seen. ``|`` separates packed samples in the captions.
"""

import jax
import numpy as np
import pytest

from gaze_jax.core import masks
from gaze_jax.core.regions import region_span
from gaze_jax.core.streams import Kind
from tests.helpers.streams import Newline, PlacedView, Text, batch, pack, pad, sample, shuffle

# As programs: one for every operation takes three times as long to compile.
windows = jax.jit(masks.windows, static_argnames=("visual_scope", "visual_causal"))
key_places, view_spans = jax.jit(masks.key_places), jax.jit(masks.view_spans)
span, visible_regions = jax.jit(region_span), jax.jit(masks.visible_regions)


def picture(streams, scope="all", causal=True):
    """Expand the windows of row 0 to a picture, with nothing of the implementation but the intervals."""
    visual, text = windows(streams, visual_scope=scope, visual_causal=causal)
    places = key_places(streams)
    visible = np.asarray(visible_regions(text, places, *span(places.visual_order)))[0]
    regions, slots = places.visual_order.shape[1:]
    queries = []
    for each, order in ((visual, streams.visual_order.reshape(1, -1)), (text, streams.text_order)):
        for t in range(order.shape[1]):
            w = {name: int(np.asarray(getattr(each, name))[0, t]) for name in each.__dataclass_fields__}
            queries.append(((w["segment"], int(order[0, t])), w, visible[t] if each is text else None))
    keys = []
    for r, p in np.ndindex(regions, slots):
        place = int(places.region_segment[0, r]), int(places.visual_order[0, r, p])
        keys.append((place, "visual", r))
    for s in range(streams.tokens.shape[1]):
        place = int(places.text_segment[0, s]), int(places.text_order[0, s])
        keys.append((place, "text", None))

    def cell(w, seen_regions, key):
        (segment, order), stream, region = key
        inside = segment == w["segment"] >= 0 and w[f"{stream}_lo"] <= order <= w[f"{stream}_hi"]
        if not inside or order < 0:
            return "."
        if stream == "text" or not w["routed"]:
            return "#"
        return "R" if seen_regions[region] else "?"  # "?": in the window, but nobody may select its region

    lines = []
    alive = sorted((key for key in keys if key[0][1] >= 0), key=lambda key: key[0])
    for (segment, _), w, seen_regions in sorted(queries, key=lambda query: query[0]):
        if segment < 0:
            assert not any(cell(w, seen_regions, key) != "." for key in keys), "padding sees nothing"
            assert not w["routed"] or seen_regions is None or not seen_regions.any()
        else:
            lines.append("".join(cell(w, seen_regions, key) for key in alive))
    return "\n" + "\n".join(lines) + "\n"


# The picture in the module's docstring: t vvvv cc t.
DOCSTRING = [Text(1), PlacedView(2, 2), Text(1)]
ALL_CAUSAL = """
#.......
##......
###.....
####....
#####...
.#####..
.######.
#RRRR###
"""

# t vvn vvn c n t: newlines in the view, one outside of it.
NEWLINES = [Text(1), PlacedView(2, 2, newlines=True), Newline(), Text(1)]
NEWLINES_ALL_CAUSAL = """
#.........
##........
###.......
####......
#####.....
######....
#######...
.#######..
#RR#RR###.
#RR#RR####
"""
NEWLINES_ALL_FULL = """
#.........
###.##....
###.##....
######....
######....
######....
#######...
.#######..
#RR#RR###.
#RR#RR####
"""

# vv c t vv c t: two views.
TWO = [PlacedView(1, 2), Text(1), PlacedView(1, 2), Text(1)]
TWO_ALL_CAUSAL = """
#.......
##......
###.....
RR##....
#####...
######..
....###.
RR##RR##
"""
TWO_VIEW_CAUSAL = """
#.......
##......
###.....
RR##....
..###...
..####..
....###.
RR##RR##
"""
TWO_VIEW_FULL = """
##......
##......
###.....
RR##....
..####..
..####..
....###.
RR##RR##
"""
TWO_ALL_FULL = """
##......
##......
###.....
RR##....
######..
######..
....###.
RR##RR##
"""

# t vvn vvn c t vvn vvn c t in scope "view": newlines follow their view.
NEWLINES_VIEW_CAUSAL = """
#................
##...............
###..............
####.............
#####............
######...........
#######..........
.#######.........
#RR#RR###........
#..#..####.......
#..#..#####......
#..#..######.....
#..#..#######....
#..#..########...
#..#..#########..
.........#######.
#RR#RR###RR#RR###
"""
TWO_WITH_NEWLINES = [
    Text(1),
    PlacedView(2, 2, newlines=True),
    Text(1),
    PlacedView(2, 2, newlines=True),
    Text(1),
]

CASES = {
    "docstring": (DOCSTRING, 2, "all", True, ALL_CAUSAL),
    "newlines-all-causal": (NEWLINES, 1, "all", True, NEWLINES_ALL_CAUSAL),
    "newlines-all-full": (NEWLINES, 1, "all", False, NEWLINES_ALL_FULL),
    "two-all-causal": (TWO, 1, "all", True, TWO_ALL_CAUSAL),
    "two-view-causal": (TWO, 1, "view", True, TWO_VIEW_CAUSAL),
    "two-view-full": (TWO, 1, "view", False, TWO_VIEW_FULL),
    "two-all-full": (TWO, 1, "all", False, TWO_ALL_FULL),
    "two-newlines-view-causal": (TWO_WITH_NEWLINES, 1, "view", True, NEWLINES_VIEW_CAUSAL),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("storage", ["as built", "padded", "shuffled"])
def test_picture(name, storage):
    """The mask table, cell by cell; padding and storage order change nothing."""
    parts, context, scope, causal, expected = CASES[name]
    row = sample(parts, region=(1, 2), context=context)
    if storage != "as built":
        row = pad(row, regions=6, slots=5, text=12)
    if storage == "shuffled":
        row = shuffle(row, seed=3)
    assert picture(batch([row]), scope, causal) == expected


@pytest.mark.parametrize("shuffled", [False, True])
def test_edge_09_packed_samples_do_not_see_each_other(shuffled):
    """Two samples in a row: the picture is block-diagonal, each block the sample's own picture."""
    row = pad(
        pack([sample(TWO, region=(1, 2), context=1), sample(DOCSTRING, region=(1, 2), context=2)]),
        regions=7,
        text=12,
    )
    if shuffled:
        row = shuffle(row, seed=0)
    first = [line + "." * 8 for line in TWO_ALL_CAUSAL.split()]
    second = ["." * 8 + line for line in ALL_CAUSAL.split()]
    assert picture(batch([row])).split() == first + second


def test_edge_08_a_query_inside_an_image_sees_no_later_key():
    """Causal visual queries never see a later order, and none of them is routed to an unfinished region."""
    streams = batch([sample([Text(2), PlacedView(3, 5, newlines=True), Text(1), PlacedView(2, 3), Text(2)])])
    visual, _ = windows(streams, visual_scope="all", visual_causal=True)
    order = np.asarray(streams.visual_order).reshape(1, -1)
    valid = order >= 0
    assert (np.asarray(visual.visual_hi) <= order)[valid].all()
    assert (np.asarray(visual.text_hi) <= order)[valid].all()
    assert not np.asarray(visual.routed).any()


def test_a_region_becomes_visible_with_its_last_token():
    """A routed query may choose a region only when the region's last valid token is earlier."""
    streams = batch([sample([Text(1), PlacedView(3, 3), Text(2)], region=(2, 2), context=0)])
    _, text = windows(streams, visual_scope="all", visual_causal=True)
    places = key_places(streams)
    first, last = region_span(places.visual_order)
    assert np.asarray(last)[0].tolist() == [5, 6, 8, 9]
    seen = np.asarray(visible_regions(text, places, first, last))[0]
    assert seen.tolist() == [[False] * 4, [True] * 4, [True] * 4]
    cut = text.__class__(**{**vars(text), "visual_hi": text.visual_hi * 0 + 8})
    seen = np.asarray(visible_regions(cut, places, first, last))[0]
    assert seen[1].tolist() == [True, True, True, False]
    cut = text.__class__(**{**vars(text), "visual_lo": text.visual_lo * 0 + 2})
    seen = np.asarray(visible_regions(cut, places, first, last))[0]
    assert seen[1].tolist() == [False, True, True, True]


def test_routed_queries_are_text_and_newlines_outside_of_views():
    """``routed`` follows the table: never visual, context, in-view newline or padding."""
    row = pad(sample(NEWLINES, region=(1, 2), context=1), text=9)
    _, text = windows(batch([row]), visual_scope="all", visual_causal=True)
    kinds, view = row["kind"], row["text_view"]
    expected = (kinds == Kind.TEXT) | ((kinds == Kind.NEWLINE) & (view < 0))
    assert np.asarray(text.routed)[0].tolist() == expected.tolist()
    assert expected.sum() == 3


def test_view_spans_of_packed_rows():
    """First and last order per view id; an absent view spans nothing."""
    row = shuffle(
        pack([sample(TWO, region=(1, 2), context=1), sample(DOCSTRING, region=(1, 2), context=2)]), seed=1
    )
    first, last = (np.asarray(a)[0] for a in view_spans(batch([row])))
    assert list(zip(first[:3].tolist(), last[:3].tolist())) == [(0, 1), (4, 5), (1, 4)]
    assert (first[3:] > last[3:]).all()


def test_edge_03_text_without_regions():
    """R = 0: the text picture is a lower triangle and no span exists."""
    streams = batch([sample([Text(3)])])
    assert streams.visual_src.shape == (1, 0, 1)
    assert picture(streams) == "\n#..\n##.\n###\n"


def test_slabs_interleaved_with_newlines_keep_views_separate():
    """A newline belongs to the view whose id it carries, not to the nearest one in storage."""
    row = sample([PlacedView(1, 2, newlines=True), PlacedView(1, 2, newlines=True)], region=(1, 2), context=0)
    expected = """
#.....
##....
###...
..##..
..###.
..####
"""
    # Scope "view": the second view's tokens see the first one's newline but none of its visual tokens.
    assert picture(batch([shuffle(row, seed=5)]), "view", True) == expected
