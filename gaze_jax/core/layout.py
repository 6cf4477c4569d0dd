"""How one image becomes tokens: the few numbers that the tower, the decoder and the data agree on."""

import dataclasses
import functools

import numpy as np

from gaze_jax.core.regions import partition


@functools.lru_cache(maxsize=64)
def _regions(grid: int, region: tuple[int, int]) -> np.ndarray:
    table = partition(grid, grid, region)
    table.setflags(write=False)  # shared by every caller
    return table


@dataclasses.dataclass(frozen=True)
class VisualLayout:
    """The token layout of one unit, an image of a fixed square size.

    Attributes:
      image_size: side of the tower's input in pixels.
      patch_size: side of a patch in pixels; a remainder at the right and bottom is dropped.
      region: (r_h, r_w) target size of a region in tokens.
      context_tokens: C, tokens appended after each unit.

    Raises:
      ValueError: a size is not positive, or the region does not fit the token grid.
    """

    image_size: int
    patch_size: int
    region: tuple[int, int]
    context_tokens: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "region", tuple(self.region))
        if not 1 <= self.patch_size <= self.image_size:
            raise ValueError(
                f"layout.patch_size={self.patch_size} must be between 1 and "
                f"layout.image_size={self.image_size}."
            )
        if self.context_tokens < 0:
            raise ValueError(f"layout.context_tokens={self.context_tokens} must not be negative.")
        _regions(self.grid, self.region)

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Visual tokens of one unit."""
        return self.grid * self.grid

    @property
    def table(self) -> np.ndarray:
        """int32 [R, P], read-only: raster index of the token in each slot of each region, -1 if empty."""
        return _regions(self.grid, self.region)

    @property
    def regions(self) -> int:
        """R, regions of one unit."""
        return self.table.shape[0]

    @property
    def slots(self) -> int:
        """P, token slots of a region."""
        return self.table.shape[1]
