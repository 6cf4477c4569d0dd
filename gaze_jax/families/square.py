"""Square: an image or a frame is resized to the tower's square and becomes one view without newlines.

Used by the digit scenes, by models composed of a language model and a tower, and by the paper's models.
"""

from gaze_jax.chat.messages import as_written
from gaze_jax.core.layout import VisualLayout
from gaze_jax.data.pixels import Size
from gaze_jax.data.views import Grid, ViewStyle, whole_grid
from gaze_jax.families.family import Family
from gaze_jax.media.video import FrameSampling

_REASON = "has no tiles and pools nothing"


def _frame_grid(layout: VisualLayout, size: Size) -> Grid:
    return whole_grid(layout, size, layout.grid, "squash")


def _image_grids(layout: VisualLayout, size: Size, alone: bool) -> tuple[list[Grid], bool]:
    return [_frame_grid(layout, size)], False


SQUARE = Family(
    views=ViewStyle(
        "square",
        _image_grids,
        _frame_grid,
        tower_tokens=True,
        unused=dict.fromkeys(("canvases", "max_tiles", "image_side", "frame_side"), _REASON),
    ),
    frames=FrameSampling(max_frames=32),
    arrange=as_written,
    system="You are a helpful assistant.",
)
