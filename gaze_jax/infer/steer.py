"""Steering: which regions of a picture an answer may look at, or rather should."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from gaze_jax.data.placement import PlacedView
from gaze_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LookAt:
    """Selection into a box.

    Attributes:
      box: (x0, y0, x1, y1) in pixels of the image or frame as it was given.
      frame: number of the one frame of a video that is meant, from 0; None: every frame, and every image.
      layers: that are steered; None: all.
      bias: in logits: how much likelier regions in the box are selected, negative for less; None: no others
        are.

    Raises:
      UserError: a box without area, or a number out of range.
    """

    box: tuple[float, float, float, float]
    frame: int | None = None
    layers: tuple[int, ...] | None = None
    bias: float | None = None

    def __post_init__(self) -> None:
        if len(self.box) != 4:
            raise UserError(f"look_at={self.box} must be four numbers: x0,y0,x1,y1.")
        x0, y0, x1, y1 = self.box
        if not all(map(math.isfinite, self.box)) or not (x0 < x1 and y0 < y1):
            raise UserError(f"look_at={self.box} must be x0,y0,x1,y1 with x0 < x1 and y0 < y1, in pixels.")
        if self.frame is not None and self.frame < 0:
            raise UserError(f"look_at frame {self.frame} must be 0 or more.")
        if self.bias is not None and not math.isfinite(self.bias):
            raise UserError(f"look_at bias {self.bias} must be a finite number of logits; none restricts.")

    @classmethod
    def parse(
        cls, text: str, *, layers: tuple[int, ...] | None = None, bias: float | None = None
    ) -> "LookAt":
        """Read "x0,y0,x1,y1" or "x0,y0,x1,y1,frame".

        Raises:
          UserError: it is neither.
        """
        try:
            numbers = [float(word) for word in text.split(",")]
            frame = int(text.split(",")[4]) if len(numbers) == 5 else None
        except ValueError:
            numbers, frame = [], None
        if len(numbers) not in (4, 5):
            raise UserError(f"look_at={text!r} must be x0,y0,x1,y1 in pixels, and perhaps a frame's number.")
        return cls((numbers[0], numbers[1], numbers[2], numbers[3]), frame, layers, bias)


def _inside(target: LookAt, view: PlacedView) -> np.ndarray:
    """int32 [n], regions of a view with a token whose pixels the box overlaps."""
    rows, columns = view.regions.shape
    left, top, right, bottom = view.corners
    xs, ys = np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)
    x0, y0, x1, y1 = target.box
    across = (xs[:-1] < x1) & (xs[1:] > x0)
    down = (ys[:-1] < y1) & (ys[1:] > y0)
    return np.unique(view.regions[down][:, across])


def bias_of(targets: Sequence[LookAt], views: Sequence[PlacedView], layers: int, regions: int) -> np.ndarray:
    """What steering adds to the scores: float32 [L, R] in logits, -inf for regions that are left out.

    Boxes that restrict are joined: a region in any of them may be selected. Biases add up.

    Args:
      targets: what to look at.
      views: where each view or frame is in the regions.
      layers: L of the model.
      regions: R of the sequence; those beyond the views are left alone.

    Raises:
      UserError: a layer that the model has not, a frame that is not shown, or a box outside of everything.
    """
    if targets and not views:
        raise UserError("Nothing is shown, so there is nowhere to look; drop look_at.")
    bias = np.zeros((layers, regions), np.float32)
    restricted = np.zeros(layers, bool)
    allowed = np.zeros((layers, regions), bool)
    for target in targets:
        chosen = np.arange(layers) if target.layers is None else np.asarray(target.layers, int)
        if len(chosen) == 0 or chosen.min() < 0 or chosen.max() >= layers:
            raise UserError(
                f"look_at layers {target.layers} must be between 0 and {layers - 1}, the model's last."
            )
        meant = [
            view for view in views if target.frame is None or (view.video and view.frame == target.frame)
        ]
        if not meant:
            shown = sum(view.video for view in views)
            raise UserError(f"look_at frame {target.frame} is not shown; there are {shown} frames of video.")
        found = np.concatenate([_inside(target, view) for view in meant])
        if not found.size:
            raise UserError(f"look_at={target.box} lies outside of everything that is shown.")
        if target.bias is None:
            restricted[chosen] = True
            allowed[np.ix_(chosen, found)] = True
        else:
            bias[np.ix_(chosen, np.unique(found))] += target.bias
    bias[restricted[:, None] & ~allowed] = -np.inf
    return bias
