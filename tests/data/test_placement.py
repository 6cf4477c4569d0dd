"""Where the tokens of views stand, which region holds them, and what they are made of."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core.layout import ViewConfig, VisualLayout
from gaze_jax.core.regions import partition_frames, pool_to_regions
from gaze_jax.data.placement import Cursor, join, pad_slots, place_views
from gaze_jax.data.views import View

# Images of 12 pixels and 3x3 patches; what the style does with them is not asked here.
TOKENS = 9


def layout(**fields):
    return VisualLayout(12, 4, (2, 2), views=ViewConfig("llava_onevision"), **{"context_tokens": 0} | fields)


def view(height, width, *, newlines=False, tiles=1, seed=0):
    """A view whose tokens mix random tokens of its tiles, the last tap unused."""
    rng = np.random.default_rng(seed)
    pool_indices = rng.integers(0, tiles * TOKENS, (height, width, 4)).astype(np.int32)
    pool_weights = rng.uniform(0.1, 1, (height, width, 4)).astype(np.float32)
    pool_indices[..., 3], pool_weights[..., 3] = 0, 0
    images = np.zeros((tiles, 12, 12, 3), np.uint8)
    return View(images, pool_indices, pool_weights, newlines, (0.0, 0.0, 1.0, 1.0))


def spell(views, context):
    """The sequence by the letter: (what, view, row, column) in order."""
    out = []
    for view, each in enumerate(views):
        height, width = each.pool_indices.shape[:2]
        for row in range(height):
            out += [("visual", view, row, column) for column in range(width)]
            out += [("newline", view, row, width)] * each.newlines
        out += [("context", view, c, 0) for c in range(context)]
    return out


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("newlines", [False, True])
@pytest.mark.parametrize("routed", ["text", "region"])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("region", [(1, 2, 2), (2, 2, 3), (3, 9, 9)])
def test_every_token_stands_where_the_sequence_has_it(frames, newlines, routed, context, region):
    """Orders and views of visual tokens, newlines and context tokens are those of the spelt sequence."""
    views = [view(3, 5, newlines=newlines, seed=i) for i in range(frames)]
    at = Cursor(order=7, view=2, token=11, image=4, region=3)
    found = place_views(layout(context_tokens=context, newlines=routed), views, region, at)
    sequence = spell(views, context)
    in_visual = {"visual"} | ({"newline"} if routed == "region" else set())
    fields = found.fields
    valid = fields["visual_src"] >= 0
    got = sorted(zip(fields["visual_order"][valid], fields["visual_view"][valid], strict=True))
    expected = [(7 + i, 2 + view) for i, (what, view, *_) in enumerate(sequence) if what in in_visual]
    assert got == expected
    assert (fields["visual_positions"][valid] == fields["visual_order"][valid]).all()
    assert (fields["visual_order"][~valid] == -1).all() and (fields["visual_view"][~valid] == -1).all()
    assert sorted(fields["visual_src"][valid]) == list(range(11, 11 + len(expected)))
    text = [(7 + i, view) for i, (what, view, *_) in enumerate(sequence) if what == "newline"]
    text = [] if routed == "region" else text
    assert [(int(o), view) for view, row in enumerate(found.newlines) for o in row] == text
    ends = [7 + sum(1 for what, u, *_ in sequence if u <= view) - context for view in range(frames)]
    assert found.ends.tolist() == ends
    assert found.next == Cursor(
        order=7 + len(sequence),
        view=2 + frames,
        token=11 + len(expected),
        image=4 + frames,
        region=3 + len(fields["visual_src"]),
    )


@pytest.mark.parametrize("newlines", [False, True])
def test_regions_are_boxes_of_time_and_space(newlines):
    """Slabs of at most r_t frames, balanced tokens; a routed newline lies with its row's last token."""
    views = [view(4, 6, newlines=newlines, seed=i) for i in range(5)]
    made = layout(newlines="region")
    found = place_views(made, views, (2, 2, 3), Cursor())
    regions = found.grids
    assert regions.shape == (5, 4, 6)
    # 5 frames in slabs of at most 2 are 2, 2, 1.
    slabs, rows, columns = [0, 0, 1, 1, 2], [0, 0, 1, 1], [0, 0, 0, 1, 1, 1]
    for f, r, c in itertools.product(range(5), range(4), range(6)):
        assert regions[f, r, c] == (slabs[f] * 2 + rows[r]) * 2 + columns[c]
    if newlines:
        orders, tokens = found.fields["visual_order"], found.fields["visual_src"] >= 0
        where = {int(o): r for r, row in enumerate(orders) for o in row if o >= 0}
        for f, r in itertools.product(range(5), range(4)):
            newline = (f * 4 + r) * 7 + 6
            assert where[newline] == regions[f, r, 5]
        assert tokens.sum() == 5 * 4 * 7


def test_regions_come_in_the_order_of_their_first_token():
    """Which is how ties are broken."""
    table = partition_frames(4, 5, 7, (3, 2, 3), newlines=True)
    first = np.where(table >= 0, table, table.max() + 1).min(axis=1)
    assert (np.diff(first) > 0).all() and (table[:, 0] == first).all()
    assert sorted(table[table >= 0]) == list(range(4 * 5 * 8))


def test_pool_indices_point_into_the_images_of_their_view():
    """Pooled tokens are the weighted sums of their own tiles' tokens, wherever the images stand."""
    made = layout(newlines="region")
    first = place_views(made, [view(2, 2, tiles=3, newlines=True, seed=1)], (1, 2, 2), Cursor(image=1))
    second = place_views(made, [view(2, 4, seed=2), view(2, 4, seed=3)], (2, 1, 3), first.next)
    arrays = join(made, [first, second], pooled=True)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1, 6 * TOKENS, 8)).astype(np.float32)
    newline = jnp.asarray(rng.normal(size=8), jnp.float32)
    pool_indices, pool_weights = arrays["pool_indices"][None], arrays["pool_weights"][None]
    got = np.asarray(
        pool_to_regions(jnp.asarray(features), jnp.asarray(pool_indices), jnp.asarray(pool_weights), newline)
    )
    by_order = {int(o): got[0, r, p] for (r, p), o in np.ndenumerate(arrays["visual_order"]) if o >= 0}
    order = 0
    for made_of, start in (
        (view(2, 2, tiles=3, newlines=True, seed=1), 1),
        (view(2, 4, seed=2), 4),
        (view(2, 4, seed=3), 5),
    ):
        tower = features[0, start * TOKENS : (start + len(made_of.images)) * TOKENS]
        for row in range(made_of.pool_indices.shape[0]):
            for column in range(made_of.pool_indices.shape[1]):
                expected = made_of.pool_weights[row, column] @ tower[made_of.pool_indices[row, column]]
                np.testing.assert_allclose(by_order.pop(order), expected, rtol=1e-5, atol=1e-6)
                order += 1
            if made_of.newlines:
                np.testing.assert_array_equal(by_order.pop(order), newline)
                order += 1
    assert not by_order
    assert (got[0][arrays["visual_src"] < 0] == 0).all()


def test_regions_of_several_sizes_share_the_largest():
    """P is the largest region of the sample, and padding marks what is empty."""
    made = layout()
    parts = [place_views(made, [view(3, 3)], (1, 3, 3), Cursor())]
    parts.append(place_views(made, [view(2, 2)], (1, 2, 2), parts[0].next))
    arrays = join(made, parts, pooled=True)
    assert arrays["visual_src"].shape == (2, 9) and (arrays["visual_src"] >= 0).sum() == 13
    assert (arrays["pool_weights"][arrays["visual_src"] < 0] == 0).all()
    assert (arrays["pool_indices"][arrays["visual_src"] < 0] == 0).all()
    with pytest.raises(ValueError, match="slots=8"):
        pad_slots(arrays["visual_src"], "visual_src", 8)


def test_unpooled_tokens_need_no_pool_indices():
    """The index alone says which it is."""
    made = VisualLayout(12, 4, (2, 2), 0)
    grid = np.arange(9, dtype=np.int32).reshape(3, 3)
    plain = View(
        np.zeros((1, 12, 12, 3), np.uint8),
        np.stack([grid, 0 * grid, 0 * grid, 0 * grid], axis=-1),
        np.broadcast_to(np.float32([1, 0, 0, 0]), (3, 3, 4)),
        False,
        (0.0, 0.0, 12.0, 12.0),
    )
    arrays = join(made, [place_views(made, [plain, plain], (2, 2, 2), Cursor())], pooled=False)
    assert "pool_indices" not in arrays and arrays["visual_src"].shape == (4, 8)
