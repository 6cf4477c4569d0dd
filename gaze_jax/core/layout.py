"""How images and frames become tokens: the numbers shared by the tower, the decoder and the data."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int32

from gaze_jax.core.regions import partition

NEWLINES = ("text", "region")


@dataclasses.dataclass(frozen=True)
class ViewConfig:
    """How images and video frames become views: the convention that a checkpoint was trained with.

    A view is one token grid: a whole image, the joined tiles of an image, or a video frame.

    Attributes:
      style: name of the model family, a key of ``gaze_jax.families.FAMILIES``. "square": an image or a frame
        is one view of the tower's size, without newlines. The family decides which of the other fields it
        uses, and refuses the ones it would ignore.
      canvases: (height, width) in pixels that the tiles of an image may fill, multiples of the tower's
        size; empty: an image is never cut into tiles.
      max_tiles: a tile grid with more tokens than this many whole images is shrunk (LLaVA-OneVision's
        "anyres_max_9"); None: no limit.
      image_side: tokens per side of a whole image or a tile after pooling; None: the tower's, no pooling.
      frame_side: the same for a video frame.

    Raises:
      ValueError: a number that is not positive.
    """

    style: str = "square"
    canvases: tuple[tuple[int, int], ...] = ()
    max_tiles: int | None = None
    image_side: int | None = None
    frame_side: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "canvases", tuple(tuple(canvas) for canvas in self.canvases))
        for canvas in self.canvases:
            if len(canvas) != 2 or min(canvas) < 1:
                raise ValueError(f"views.canvases has {canvas}, which should be (height, width) in pixels.")
        for name in ("max_tiles", "image_side", "frame_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"views.{name}={value} must be at least 1, or None.")


@functools.lru_cache(maxsize=64)
def _regions(grid: int, region: tuple[int, int]) -> Int32[np.ndarray, "R P"]:
    table = partition(grid, grid, region)
    table.setflags(write=False)  # shared by every caller
    return table


@dataclasses.dataclass(frozen=True)
class VisualLayout:
    """The token layout of views. ``table``, ``regions`` and ``slots`` are those of one whole square image.

    Attributes:
      image_size: side of the tower's input in pixels.
      patch_size: side of a patch in pixels; a remainder at the right and bottom is dropped.
      region: (r_h, r_w) target size in tokens of a region of an image.
      context_tokens: C, tokens appended after each view.
      views: how images and frames become views.
      video_region: (r_t, r_h, r_w) target size of a region of a video, in frames and tokens; None: (1,
        *region).
      newlines: "text": newlines are tokens of the text stream. "region": a newline inside a view belongs to
        the last region of its row.

    Raises:
      ValueError: a size is not positive, or the region does not fit the token grid.
    """

    image_size: int
    patch_size: int
    region: tuple[int, int]
    context_tokens: int
    views: ViewConfig = ViewConfig()
    video_region: tuple[int, int, int] | None = None
    newlines: str = "text"

    def __post_init__(self) -> None:
        object.__setattr__(self, "region", tuple(self.region))
        if self.video_region is not None:
            object.__setattr__(self, "video_region", tuple(self.video_region))
        if len(self.frame_region) != 3 or min(self.frame_region) < 1:
            raise ValueError(
                f"layout.video_region={self.video_region} must be three sizes (r_t, r_h, r_w) of at least 1."
            )
        if self.newlines not in NEWLINES:
            raise ValueError(f"layout.newlines={self.newlines!r} must be one of {NEWLINES}.")
        for height, width in self.views.canvases:
            if height % self.image_size or width % self.image_size:
                raise ValueError(
                    f"views.canvases has {height}x{width}, whose sides must be multiples of the tower's "
                    f"{self.image_size} pixels."
                )
        if not 1 <= self.patch_size <= self.image_size:
            raise ValueError(
                f"layout.patch_size={self.patch_size} must be between 1 and "
                f"layout.image_size={self.image_size}."
            )
        if self.context_tokens < 0:
            raise ValueError(f"layout.context_tokens={self.context_tokens} must not be negative.")
        _regions(self.grid, self.region)

    @property
    def frame_region(self) -> tuple[int, int, int]:
        """(r_t, r_h, r_w) target size of a region of a video."""
        return (1, *self.region) if self.video_region is None else self.video_region

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Visual tokens of one view."""
        return self.grid * self.grid

    @property
    def table(self) -> Int32[np.ndarray, "R P"]:
        """int32 [R, P], read-only: raster index of the token in each slot of each region, -1 if empty."""
        return _regions(self.grid, self.region)

    @property
    def regions(self) -> int:
        """R, regions of one view."""
        return self.table.shape[0]

    @property
    def slots(self) -> int:
        """P, token slots of a region."""
        return self.table.shape[1]
