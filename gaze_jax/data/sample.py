"""The sample contract between a data source and the processor.

A sample is a list of images or videos and a sequence of parts that shows them between pieces of text::

    Sample(
        id=0,
        images=(pixels,),
        parts=(
            Image(0),
            Text("Which digit is in row 2, column 3?\\n"),
            Text("7<|im_end|>", supervised=True, boxes=(Box(0, 1, (20.0, 10.0, 28.0, 18.0)),)),
        ),
        family="read",
    )

Special tokens are written out in the text; the processor adds nothing.
"""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from gaze_jax.data.pixels import Picture, check_image

Corners = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Box:
    """Characters ``start`` to ``end`` (exclusive) of a text refer to a rectangle of an image.

    The range is in characters because a sample is made without the tokenizer. Every token that overlaps the
    characters gets the box.

    Attributes:
      start, end: character range in the text.
      corners: (x0, y0, x1, y1) in pixels of the sample's image, x1 and y1 exclusive.
      image: index into the sample's images.
    """

    start: int
    end: int
    corners: Corners
    image: int = 0


@dataclasses.dataclass(frozen=True)
class Image:
    """Show image number ``index`` of the sample; it becomes one or more views."""

    index: int


@dataclasses.dataclass(frozen=True)
class Video:
    """Show video number ``index`` of the sample, or part of it; each frame becomes a view.

    Attributes:
      index: index of the video.
      start, stop: frames to show, ``stop`` exclusive; None shows all to the end. The range may be empty: then
        only what follows a video is added.
      ends: the video ends here; False if more of its frames will follow.
    """

    index: int
    start: int = 0
    stop: int | None = None
    ends: bool = True


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of text, tokenised separately, so that no token crosses its ends.

    Attributes:
      text: not empty.
      supervised: all its tokens are training targets.
      boxes: what its characters refer to; ranges must not overlap.
      targets: (start, end) character ranges, end exclusive, sorted and disjoint. Every token that overlaps
        one is a training target. (Cutting the text at the ranges instead could change its tokens.)

    Raises:
      ValueError: the text is empty, a box or a target range lies outside it, ranges are not sorted or not
        disjoint, or a supervised text has targets.
    """

    text: str
    supervised: bool = False
    boxes: tuple[Box, ...] = ()
    targets: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("Text part is empty; leave the part out.")
        for box in self.boxes:
            if not 0 <= box.start < box.end <= len(self.text):
                raise ValueError(
                    f"Box of characters {box.start}..{box.end} lies outside the text {self.text!r} "
                    f"of {len(self.text)} characters; give 0 <= start < end <= length."
                )
        if self.supervised and self.targets:
            raise ValueError("Text part is supervised as a whole; leave its targets out.")
        last = 0
        for start, end in self.targets:
            if not last <= start < end <= len(self.text):
                raise ValueError(
                    f"Targets {self.targets} are not ranges of the {len(self.text)} characters of the text; "
                    "give 0 <= start < end <= length, sorted and disjoint."
                )
            last = end


class Frames(Protocol):
    """Frames of a video: an array [T, height, width, 3], or a decoder that yields them one by one."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[np.ndarray]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One training or evaluation example.

    Attributes:
      id: identifies the sample within its source, a non-negative int32.
      images: uint8 [height, width, 3] each, or of Pillow's mode RGB.
      parts: images, videos and texts in reading order.
      family: kind of question, for per-family metrics.
      videos: each has a length and iterates over its frames, uint8 [height, width, 3] of one size.

    Raises:
      ValueError: an image has the wrong shape or dtype, an index is out of range, a video has no frames, a
        box refers to an image that no part shows, or the id does not fit int32.
    """

    id: int
    images: tuple[Picture, ...]
    parts: tuple[Image | Video | Text, ...]
    family: str
    videos: tuple[Frames, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.id <= np.iinfo(np.int32).max:
            raise ValueError(f"Sample id {self.id} must be a non-negative 32-bit integer.")
        for i, image in enumerate(self.images):
            check_image(image, f"Image {i} of sample {self.id}")
        for i, video in enumerate(self.videos):
            if len(video) < 1:
                raise ValueError(f"Video {i} of sample {self.id} has no frames; it must have at least one.")
        shown = set()
        for part in self.parts:
            if isinstance(part, Image):
                if not 0 <= part.index < len(self.images):
                    raise ValueError(
                        f"Sample {self.id} shows image {part.index} but holds {len(self.images)} images."
                    )
                shown.add(part.index)
            elif isinstance(part, Video):
                if not 0 <= part.index < len(self.videos):
                    raise ValueError(
                        f"Sample {self.id} shows video {part.index} but holds {len(self.videos)} videos."
                    )
            elif missing := {box.image for box in part.boxes} - shown:
                raise ValueError(
                    f"A box of text {part.text!r} in sample {self.id} refers to image {min(missing)}, "
                    "which no earlier part shows; show the image before the text."
                )
