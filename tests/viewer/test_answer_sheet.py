import numpy as np
import pytest

from gaze_jax.core.layout import VisualLayout
from gaze_jax.viewer.answer_sheet import answer_sheet, over_grid
from gaze_jax.viewer.contact_sheet import contact_sheet


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
    share = np.array([[1.0, 0.5], [0.0, 0.0]], np.float32).repeat(2, 0).repeat(2, 1)[None]
    np.testing.assert_array_equal(sheet, contact_sheet(image, ["7"], share, title="q"))
