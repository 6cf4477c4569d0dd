"""Images squashed to the tower's size."""

import numpy as np
import pytest

from gaze_jax.core.layout import ViewConfig
from gaze_jax.data.sample import Image, Video
from gaze_jax.errors import UserError
from gaze_jax.families import check_views
from gaze_jax.families.square import SQUARE
from tests.helpers.views import frame_shape, image_shapes, image_views, layout, noise, video_views


def test_square_tokens_are_the_towers():
    """The first tap is the token itself and nothing else has a weight; no newline anywhere."""
    at = layout(ViewConfig(), 24, 4)
    for views in (image_views(at, noise(9, 30), alone=True), video_views(at, [noise(9, 30)])):
        (view,) = views.views
        assert not view.newlines and not views.end_newline
        np.testing.assert_array_equal(view.pool_indices[..., 0], np.arange(36).reshape(6, 6))
        np.testing.assert_array_equal(view.pool_weights, np.broadcast_to([1, 0, 0, 0], (6, 6, 4)))
    assert image_shapes(at, 9, 30, alone=True) == ([(6, 6, False)], False)
    assert frame_shape(at, 9, 30) == (6, 6, False)


@pytest.mark.parametrize(
    "field", [{"canvases": ((24, 24),)}, {"max_tiles": 9}, {"image_side": 3}, {"frame_side": 3}], ids=str
)
def test_every_other_field_of_views_is_refused(field):
    """No option is ignored."""
    with pytest.raises(
        UserError, match=f"'square' has no tiles and pools nothing; leave views.{next(iter(field))}"
    ):
        check_views(ViewConfig("square", **field))


def test_media_stay_where_they_are():
    """The digit scenes put questions around an image."""
    items = ("Is ", Video(1), "like ", Image(2), "? ")
    assert SQUARE.arrange(items) == items
