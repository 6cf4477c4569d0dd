"""How long a sample will be, from the sizes of its media: what packing and buckets are planned with.

No pixel is decoded. The numbers are those of the arrays that ``data.processor`` makes; a test compares them.
"""

import dataclasses
import functools

from gaze_jax.core.layout import VisualLayout
from gaze_jax.core.regions import balanced_sides
from gaze_jax.data.pixels import Size
from gaze_jax.data.views import Grid, ViewStyle, check_style


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What a sample, or one medium of it, needs in a row.

    Attributes:
      text: tokens of the text stream: text, newlines and context tokens.
      regions: regions of visual tokens.
      images: images that the tower reads: whole images, tiles, frames.
      slots: token slots of the largest region; 0 without media.
      visual: visual tokens.
    """

    text: int = 0
    regions: int = 0
    images: int = 0
    slots: int = 0
    visual: int = 0

    def __add__(self, other: "Lengths") -> "Lengths":
        return Lengths(
            self.text + other.text,
            self.regions + other.regions,
            self.images + other.images,
            max(self.slots, other.slots),
            self.visual + other.visual,
        )

    @property
    def tokens(self) -> int:
        """Tokens of the sequence that the model reads."""
        return self.text + self.visual


def _placed(layout: VisualLayout, grid: Grid, frames: int, region: tuple[int, int, int]) -> Lengths:
    """``frames`` views of one grid, placed together as ``placement.place_views`` does."""
    height, width = grid.shape
    routed = grid.newlines and layout.newlines == "region"
    sides = [balanced_sides(length, target) for length, target in zip((frames, height, width), region)]
    count = len(sides[0]) * len(sides[1]) * len(sides[2])
    if routed:
        sides[2][-1] += 1
    newlines = height * frames if grid.newlines and not routed else 0
    tiles = (grid.canvas[0] // layout.image_size) * (grid.canvas[1] // layout.image_size)
    return Lengths(
        text=newlines + layout.context_tokens * frames,
        regions=count,
        images=tiles * frames,
        slots=max(sides[0]) * max(sides[1]) * max(sides[2]),
        visual=height * (width + routed) * frames,
    )


@functools.lru_cache(maxsize=65536)
def image_lengths(style: ViewStyle, layout: VisualLayout, size: Size, *, alone: bool) -> Lengths:
    """What an image of (height, width) pixels needs; ``alone``: no other image is in the sample.

    Raises:
      ValueError: ``layout`` is of another style.
      UserError: the image is so narrow that no token shows it.
    """
    check_style(style, layout.views)
    grids, end_newline = style.image_grids(layout, size, alone)
    views = (_placed(layout, grid, 1, (1, *layout.region)) for grid in grids)
    return sum(views, Lengths(text=int(end_newline)))


@functools.lru_cache(maxsize=65536)
def video_lengths(style: ViewStyle, layout: VisualLayout, size: Size, frames: int) -> Lengths:
    """What a video of ``frames`` sampled frames of (height, width) pixels needs.

    Raises:
      ValueError: ``layout`` is of another style.
      UserError: a frame is so narrow that no token shows it.
    """
    check_style(style, layout.views)
    grid = style.frame_grid(layout, size)
    end = Lengths(text=int(style.video_end_newline))
    return _placed(layout, grid, frames, layout.frame_region) + end
