"""Steering: boxes to regions, and what the model then selects."""

import dataclasses

import numpy as np
import pytest

from gaze_jax.data.placement import PlacedView
from gaze_jax.errors import UserError
from gaze_jax.infer.gaze_options import GazeOptions
from gaze_jax.infer.steer import LookAt, bias_of
from tests.helpers.engines import MODEL, decode, make_engine, row

GRID = np.arange(16, dtype=np.int32).reshape(4, 4) // 2 % 2 + np.arange(16).reshape(4, 4) // 8 * 2
IMAGE = PlacedView(0, False, 0, 0, (0.0, 0.0, 20.0, 20.0), GRID.astype(np.int32))
CORNERS = (0.0, 0.0, 20.0, 20.0)
FRAMES = [PlacedView(1 + t, True, 0, t, CORNERS, (4 + 4 * t + GRID).astype(np.int32)) for t in (0, 1)]
VIEWS = (IMAGE, *FRAMES)


def allowed(*looks, views=VIEWS, regions=12):
    """Regions that layer 0 may select."""
    return np.nonzero(np.isfinite(bias_of(looks, views, 2, regions)[0]))[0].tolist()


def test_a_box_allows_the_regions_that_it_overlaps():
    """Tokens are 5 pixels wide, regions two tokens; touching an edge is no overlap."""
    one = (IMAGE,)
    assert allowed(LookAt((0, 0, 1, 1)), views=one, regions=4) == [0]
    assert allowed(LookAt((0, 0, 10, 10)), views=one, regions=4) == [0]
    assert allowed(LookAt((9, 0, 11, 1)), views=one, regions=4) == [0, 1]
    assert allowed(LookAt((-5, 15, 100, 16)), views=one, regions=4) == [2, 3]
    assert allowed(LookAt((0, 0, 1, 1)), LookAt((19, 19, 20, 20)), views=one, regions=4) == [0, 3]


def test_a_frame_is_one_of_the_video():
    """Without a number every frame and image is meant; regions beyond the views are excluded."""
    assert allowed(LookAt((0, 0, 1, 1))) == [0, 4, 8]
    assert allowed(LookAt((0, 0, 1, 1), frame=1)) == [8]


def test_biases_add_up_in_their_layers():
    """And restrict nothing."""
    looks = (LookAt((0, 0, 1, 1), frame=0, bias=2.0, layers=(1,)), LookAt((0, 0, 11, 1), frame=0, bias=-0.5))
    bias = bias_of(looks, VIEWS, 2, 12)
    expected = np.zeros((2, 12), np.float32)
    expected[:, [4, 5]] = -0.5
    expected[1, 4] += 2.0
    np.testing.assert_array_equal(bias, expected)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LookAt((5, 0, 5, 9)), "must be x0,y0,x1,y1 with x0 < x1"),
        (lambda: LookAt((0, 0, float("nan"), 1)), "must be x0,y0,x1,y1"),
        (lambda: LookAt((0, 0, 1, 1), frame=-1), "frame -1 must be 0 or more"),
        (lambda: LookAt((0, 0, 1, 1), bias=float("inf")), "must be a finite number of logits"),
        (lambda: LookAt.parse("1,2,3"), "look_at='1,2,3' must be x0,y0,x1,y1"),
        (lambda: LookAt.parse("1,2,3,4,a"), "optionally with a frame's number"),
        (lambda: allowed(LookAt((0, 0, 1, 1), frame=2)), "frame 2 is not shown; there are 2 frames"),
        (lambda: allowed(LookAt((0, 0, 1, 1)), views=()), "Nothing is shown, so there is nowhere to look"),
        (lambda: allowed(LookAt((30, 0, 31, 1))), "lies outside of everything that is shown"),
        (lambda: allowed(LookAt((0, 0, 1, 1), layers=(2,))), "must be between 0 and 1, the model's last"),
        (
            lambda: GazeOptions(dense=True, look_at=(LookAt((0, 0, 1, 1)),)),
            "look_at has no effect with dense",
        ),
        (
            lambda: GazeOptions(look_at=(LookAt((0, 0, 1, 1)),)).budget(None),
            "attends densely, so",
        ),
        (lambda: GazeOptions(top_k=1, keep=0.5), "both budgets"),
        (lambda: GazeOptions(keep=0.0), "keep=0.0 must be above 0"),
        (lambda: GazeOptions(top_k=0), "top_k=0 must be at least 1"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(make, sentence):
    """One sentence each."""
    with pytest.raises(UserError, match=sentence):
        make()


def test_boxes_are_read_from_text():
    """With a frame or without."""
    assert LookAt.parse("1,2.5,3,4") == LookAt((1.0, 2.5, 3.0, 4.0))
    assert LookAt.parse("1,2,3,4,7", bias=2.0).frame == 7


@pytest.mark.parametrize("select_per", [pytest.param("head", marks=pytest.mark.long), "kv_head"])
def test_the_model_selects_in_the_box(select_per):
    """Restricted: nowhere else, even if that is less than the budget, in the steered layer only."""
    config = dataclasses.replace(MODEL, gaze=dataclasses.replace(MODEL.gaze, select_per=select_per))
    prompt = row(0, "Where is the only 7?\n", config=config)

    def selected(*looks, length=3):
        gaze = GazeOptions(top_k=2, look_at=looks)
        engine = make_engine(prompt, config=config, gaze=gaze, views=(IMAGE,))
        return decode(engine, length, returns="selection")["selected"][:, :, 0]

    corner = (19, 19, 20, 20)
    free, held = selected(), selected(LookAt(corner, layers=(1,)))
    assert held[:, 1, :, 3].all() and not held[:, 1, :, :3].any(), "fewer than top_k, for there are no others"
    np.testing.assert_array_equal(held[0, 0], free[0, 0])
    assert selected(LookAt(corner, bias=50.0))[:, :, :, 3].all()
    assert not selected(LookAt(corner, bias=-50.0))[:, :, :, 3].any()
    assert (selected(LookAt(corner, bias=50.0)).sum(axis=-1) == 2).all()
