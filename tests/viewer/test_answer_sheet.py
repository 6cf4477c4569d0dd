import dataclasses

import numpy as np
import pytest

from gaze_jax.core.layout import VisualLayout
from gaze_jax.data.placement import PlacedView
from gaze_jax.errors import UserError
from gaze_jax.infer.trace import budget_text
from gaze_jax.viewer.answer_sheet import (
    answer_sheet,
    most_looked_at,
    over_grid,
    sheet,
    titles_of,
    view_sheets,
)
from gaze_jax.viewer.contact_sheet import contact_sheet
from tests.helpers.traces import make_media, make_trace


@pytest.mark.parametrize(("grid", "region"), [(4, (2, 2)), (5, (2, 3)), (3, (1, 1))])
def test_every_token_gets_the_value_of_its_region(grid, region):
    layout = VisualLayout(grid * 5, 5, region, 0)
    values = np.arange(2 * layout.regions, dtype=float).reshape(2, layout.regions)
    spread = over_grid(values, layout)
    assert spread.shape == (2, grid, grid)
    for r, tokens in enumerate(layout.table):
        for token in tokens[tokens >= 0]:
            np.testing.assert_array_equal(spread[:, token // grid, token % grid], values[:, r])


def test_the_sheet_shows_the_share_of_heads():
    layout = VisualLayout(20, 5, (2, 2), 0)
    image = np.random.default_rng(0).integers(256, size=(20, 20, 3), dtype=np.uint8)
    selected = np.array([[[True, False, False, False], [True, True, False, False]]])
    sheet = answer_sheet(image, ["7"], selected, layout, title="q")
    fraction = np.array([[1.0, 0.5], [0.0, 0.0]], np.float32).repeat(2, 0).repeat(2, 1)[None]
    np.testing.assert_array_equal(sheet, contact_sheet(image, ["7"], fraction, title="q"))


def view(number, regions, corners=(0.0, 0.0, 20.0, 10.0)):
    return PlacedView(number, True, 0, number, corners, np.array(regions, np.int32))


def test_the_most_selected_views_keep_their_order():
    """Ties go to the earlier view."""
    views = [view(0, [[0, 1]]), view(1, [[2, 2]]), view(2, [[3, 4]])]
    selected = np.zeros((2, 2, 5), bool)
    selected[:, 0, 4] = selected[:, 1, 2] = True
    assert [u.view for u in most_looked_at(views, selected, 1)] == [1]
    assert [u.view for u in most_looked_at(views, selected, 2)] == [1, 2]
    selected[:] = False
    assert [u.view for u in most_looked_at(views, selected, 2)] == [0, 1]


def test_sheets_of_views_are_stacked():
    """Each is the contact sheet of what its view covers, with the fraction of heads per region, one scale."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(256, size=(10, 20, 3), dtype=np.uint8) for _ in range(2)]
    views = [view(0, [[0, 1]]), view(1, [[2, 2]], (5.0, 2.0, 20.0, 10.0))]
    selected = rng.random((3, 2, 3)) < 0.5
    whole = np.asarray(view_sheets(pictures, views, list("abc"), selected, titles=["one", "two"]))
    fraction = selected.mean(axis=1).astype(np.float32)
    scale = {"clearest": float(fraction.max())}
    first = np.asarray(contact_sheet(pictures[0], list("abc"), fraction[:, [[0, 1]]], title="one", **scale))
    part = pictures[1][2:10, 5:]
    second = np.asarray(contact_sheet(part, list("abc"), fraction[:, [[2, 2]]], title="two", **scale))
    np.testing.assert_array_equal(whole[: len(first), : first.shape[1]], first)
    np.testing.assert_array_equal(whole[len(first) :, : second.shape[1]], second)
    assert len(whole) == len(first) + len(second)


def test_padding_that_a_grid_shows_is_black():
    """A picture padded to a square is drawn as the model saw its shape."""
    picture = np.full((10, 20, 3), 200, np.uint8)
    padded = np.zeros((20, 20, 3), np.uint8)
    padded[5:15] = picture
    one = view(0, [[0]], (0.0, -5.0, 20.0, 15.0))
    got = view_sheets([picture], [one], ["a"], np.ones((1, 2, 1), bool), titles=["t"])
    np.testing.assert_array_equal(got, contact_sheet(padded, ["a"], np.ones((1, 1, 1)), title="t"))


def test_the_sheet_of_a_trace_shows_its_most_selected_views():
    """Of one layer, or of the heads of all; the first title has the question and the budget."""
    trace = make_trace(media=make_media(np.random.default_rng(0), views=2, frames=3), selectors=2)
    mask = trace.mask()
    for layer, selected, where in ((1, mask[:, 1], "layer 1"), (None, mask.reshape(5, 6, -1), "all layers")):
        views = most_looked_at(trace.views, selected, 2)
        titles = [titles_of(trace)[view.view] for view in views]
        titles[0] = f"What is this?\n2 of {trace.regions} regions, {where}. {titles[0]}"
        pictures = [trace.picture_of(view).pixels() for view in views]
        wanted = view_sheets(pictures, views, trace.tokens, selected, titles=titles)
        np.testing.assert_array_equal(sheet(trace, layer=layer, views=2), wanted)


def test_titles_say_what_a_view_of_a_trace_shows():
    """Views are counted, frames have their time."""
    trace = make_trace(media=make_media(np.random.default_rng(0), views=2, frames=2))
    assert titles_of(trace) == [
        "Image 1, view 1 of 2",
        "Image 1, view 2 of 2",
        "Video 1, frame 1 of 2, 0.0 s",
        "Video 1, frame 2 of 2, 0.5 s",
    ]


def test_a_sheet_is_cut_from_the_copy_as_the_view_from_the_original():
    """The original was ten times as large."""
    views, pictures = make_media(np.random.default_rng(0), views=2)
    large = tuple(dataclasses.replace(picture, size=(480, 640)) for picture in pictures)
    wide = tuple(
        dataclasses.replace(view, corners=tuple(10 * edge for edge in view.corners)) for view in views
    )
    one, other = make_trace(media=(views, pictures)), make_trace(media=(wide, large))
    np.testing.assert_array_equal(sheet(one, layer=0, views=2), sheet(other, layer=0, views=2))


def test_what_cannot_be_drawn_is_refused():
    """A layer that is not there, and a dense run."""
    with pytest.raises(UserError, match="layer=3 must be between 0 and 2"):
        sheet(make_trace(), layer=3, views=1)
    with pytest.raises(UserError, match="dense run, which selects nothing"):
        sheet(make_trace(top_k=None), layer=None, views=1)


def test_a_sheet_is_headed_by_the_budgets_of_its_layers():
    """One number, that of the layer, or the range of all."""
    trace = make_trace(top_k=(1, 3, 2))
    assert [budget_text(trace, layer) for layer in (None, 0, 1, 2)] == ["1 to 3", "1", "3", "2"]
    assert budget_text(make_trace(top_k=(2, 2, 2))) == budget_text(make_trace(top_k=2), 1) == "2"
    other = dataclasses.replace(trace, top_k=(1, 2, 2))
    assert np.any(sheet(trace, layer=1, views=1) != sheet(other, layer=1, views=1)), "it is in the heading"
    np.testing.assert_array_equal(sheet(trace, layer=0, views=1), sheet(other, layer=0, views=1))
