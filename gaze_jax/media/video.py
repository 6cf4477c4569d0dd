"""Videos: files, folders of frames and animations, sampled to the frames that a model sees.

A video is opened with a :class:`FrameSampling` and becomes a :class:`Clip`, which decodes while it is
iterated::

    clip = open_video("walk.mp4", FrameSampling(fps=1.0, max_frames=128))
    for seconds, frame in zip(clip.times, clip):
        ...

Frames are chosen by index, as in the original models, even if the frame rate varies: then the average rate is
used, and :attr:`Clip.times` holds the true times of the chosen frames.
"""

import contextlib
import dataclasses
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from gaze_jax.errors import UserError
from gaze_jax.media.container import open_container
from gaze_jax.media.images import decode_image, open_picture, read_image, reading_pictures, upright_rgb
from gaze_jax.media.probe import (
    VIDEO_FORMATS,
    animation_delays,
    check_file,
    check_whole,
    is_animation,
    is_static_image,
    is_url,
    read_head,
    video_kind,
)

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_ANIMATED = ("GIF", "WEBP")
_DEFAULT_DELAY = 100
"""Milliseconds for which a picture with delay 0 is shown, as in browsers."""


@dataclasses.dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video to read.

    ===========================  ==========================================================================
    no field                     every frame
    max_frames                   that many, evenly from the first to the last; frames of a shorter video
                                 repeat (LLaVA-OneVision, with 32)
    fps                          every n-th frame, n = round(the video's rate / fps), at least 1
    fps, max_frames              the same; evenly, as with max_frames alone, if those were more than
                                 max_frames (Cambrian-S)
    fps, max_frames, force       evenly in any case (Cambrian-S with video_force_sample)
    ===========================  ==========================================================================

    Attributes:
      fps: frames to take per second of video.
      max_frames: maximum number of frames to take.
      force: take max_frames frames, regardless of fps.
      start, end: seconds, the part of the video to choose from: frames int(start * rate) to int(end * rate).
        The last of these is included when frames are spread evenly, excluded when every n-th is taken.
      start_frame, end_frame: the same part by numbers of frames, from 0; given instead of seconds.

    Raises:
      UserError: a value is out of range, or force is set without both fps and max_frames.
    """

    fps: float | None = None
    max_frames: int | None = None
    force: bool = False
    start: float | None = None
    end: float | None = None
    start_frame: int | None = None
    end_frame: int | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise UserError(f"fps={self.fps} must be a positive number of frames per second.")
        if self.max_frames is not None and self.max_frames < 1:
            raise UserError(f"max_frames={self.max_frames} must be at least 1.")
        if self.force and (self.fps is None or self.max_frames is None):
            raise UserError(
                "force=True takes max_frames frames regardless of fps, so it needs both; "
                "max_frames alone is always spread evenly."
            )
        if self.start is not None and not 0 <= self.start < math.inf:
            raise UserError(f"start={self.start} must be a number of seconds, 0 or more.")
        if self.end is not None and not (self.start or 0.0) < self.end < math.inf:
            raise UserError(f"end={self.end} must be a number of seconds after start={self.start or 0.0}.")
        if self.start_frame is not None and self.start_frame < 0:
            raise UserError(f"start_frame={self.start_frame} must be the number of a frame, 0 or more.")
        if self.end_frame is not None and self.end_frame < (self.start_frame or 0):
            raise UserError(
                f"end_frame={self.end_frame} must not be before start_frame={self.start_frame or 0}."
            )
        if {self.start, self.end} != {None} and {self.start_frame, self.end_frame} != {None}:
            raise UserError("start and end are seconds, start_frame and end_frame are frames; give one pair.")


def sample_indices(frames: int, fps: float, sampling: FrameSampling) -> np.ndarray:
    """int64 [T]: indices of the frames to take of ``frames`` at ``fps`` per second, ascending, may repeat.

    The rules and their rounding are those of the code that the models were trained with (Cambrian-S
    ``process_video_with_decord``, LLaVA-NeXT ``llava/utils.py``): Python's round, half to even; evenly spaced
    indices are truncated.

    Raises:
      UserError: ``sampling`` starts after the last frame.
      ValueError: ``frames`` or ``fps`` is not positive.
    """
    if frames < 1 or not fps > 0:
        raise ValueError(f"frames={frames} and fps={fps} must be positive.")
    first, last, stop = int((sampling.start or 0.0) * fps), frames - 1, frames
    first_name = f"start={sampling.start}"
    if sampling.start_frame is not None:
        first, first_name = sampling.start_frame, f"start_frame={sampling.start_frame}"
    if first > last:
        raise UserError(f"{first_name} is after its end: it has {frames} frames, {frames / fps:g} seconds.")
    if sampling.end is not None:
        last = min(last, int(sampling.end * fps))
        stop = min(stop, max(int(sampling.end * fps), first + 1))
    if sampling.end_frame is not None:
        last, stop = min(last, sampling.end_frame), min(stop, max(sampling.end_frame, first + 1))
    if sampling.fps is not None:
        strided = np.arange(first, stop, max(1, round(fps / sampling.fps)))
        if sampling.max_frames is None or (len(strided) <= sampling.max_frames and not sampling.force):
            return strided
    if sampling.max_frames is None:
        return np.arange(first, stop)
    return np.linspace(first, last, sampling.max_frames, dtype=np.int64)


class Source(Protocol):
    """All frames of a video: size, number, rate and times, and a method to read some."""

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def fps(self) -> float: ...

    @property
    def times(self) -> np.ndarray: ...

    def read(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        """Decode the ``wanted`` frames, ascending and distinct: uint8 [height, width, 3] each."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """The sampled frames of a video; iterating decodes them in order, one at a time.

    Attributes:
      path: the path that was opened.
      indices: int64 [T], the chosen frames.
      times: float64 [T], when these are shown, in seconds after the video's first frame.
      fps: average frames per second of the video.
      size: (height, width) of every frame in pixels, upright. Pixels count as square.
      frames: number of frames of the video.
      source: where the frames come from.
    """

    path: str
    indices: np.ndarray
    times: np.ndarray
    fps: float
    size: tuple[int, int]
    frames: int
    source: Source

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield frames, uint8 [height, width, 3] RGB, read-only; a frame chosen twice is decoded once.

        Raises:
          UserError: the video is damaged, or a frame's size differs from the first's. Names the file.
        """
        wanted, counts = np.unique(self.indices, return_counts=True)
        for index, count, frame in zip(wanted, counts, self.source.read(wanted)):
            if frame.shape[:2] != self.size:
                height, width = frame.shape[:2]
                raise UserError(
                    f"Video {self.path!r}: frame {index} has {width}x{height} pixels and the first has "
                    f"{self.size[1]}x{self.size[0]}; all frames must have one size."
                )
            frame.setflags(write=False)
            for _ in range(count):
                yield frame


def open_video(path: str | os.PathLike[str], sampling: FrameSampling, *, frames_fps: float = 1.0) -> Clip:
    """Open a video and choose its frames.

    For a video file, every packet is listed and the first frame decoded; for an AVI, whose frames have no
    time stamps, all frames are decoded once to count them.

    Args:
      path: a video file, an animated GIF or WEBP, or a folder of images, one frame each, in natural order of
        their names (2 before 10).
      sampling: which frames to take.
      frames_fps: frames per second of a folder.

    Raises:
      UserError: a URL; a file that is missing, empty, an image, of an unsupported format, without frames,
        with too large frames, truncated or damaged; ``sampling`` selects no frame; or PyAV is needed and not
        installed. One sentence that names the file.
    """
    name = os.fspath(path)
    return _clip(name, _source(name, frames_fps), sampling)


def _clip(name: str, source: Source, sampling: FrameSampling) -> Clip:
    try:
        indices = sample_indices(len(source.times), source.fps, sampling)
    except UserError as error:
        raise UserError(f"Video {name!r}: {error}") from error
    times = source.times
    return Clip(name, indices, times[indices], source.fps, source.size, len(times), source)


def decode_video(data: bytes, sampling: FrameSampling, name: str) -> np.ndarray:
    """:func:`open_video` of a file's content, decoded: uint8 [T, height, width, 3].

    FFmpeg reads files, so the content is written to one for that time. ``name`` names it in messages.
    """
    with _as_file(data, name) as path:
        return np.stack(list(open_video(path, sampling)))


@contextlib.contextmanager
def _as_file(data: bytes, name: str) -> Iterator[str]:
    """The path of a file with this content, while it is needed; messages name it ``name``."""
    if not data:
        raise UserError(f"Video {name!r} is empty (0 bytes).")
    with tempfile.NamedTemporaryFile(prefix="gaze-jax-", suffix=".video") as file:
        file.write(data)
        file.flush()
        try:
            yield file.name
        except UserError as error:
            raise UserError(str(error).replace(repr(file.name), repr(name))) from error


def video_size(data: bytes, sampling: FrameSampling, name: str) -> tuple[tuple[int, int], int]:
    """(height, width) of the frames that :func:`decode_video` gives, and their number; nothing is decoded."""
    with _as_file(data, name) as path:
        clip = open_video(path, sampling)
        return clip.size, len(clip)


def _source(name: str, frames_fps: float) -> Source:
    if not is_url(name) and os.path.isdir(name):
        return _open_folder(name, frames_fps)
    check_file(name, "Video")
    try:
        head = read_head(name)
    except OSError as error:
        raise UserError(f"Video {name!r} cannot be read ({error.strerror}).") from error
    kind = video_kind(head)
    if kind is not None:
        check_whole(name, kind)
        return open_container(name, kind)
    delays = animation_delays(name) if is_animation(head) else []
    if len(delays) > 1:
        return _open_animation(name, delays)
    if delays or is_animation(head) or is_static_image(head):
        raise UserError(f"Video {name!r} is an image; use --image, or 'image' in a record.")
    formats = ", ".join((*VIDEO_FORMATS, "GIF", "WEBP"))
    raise UserError(f"Video {name!r} is none of {formats} and not a folder of images; convert it to one.")


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
    """Images as frames; ``files`` are their paths in order, ``size`` is the size of the first."""

    files: tuple[str, ...]
    size: tuple[int, int]
    fps: float

    @property
    def times(self) -> np.ndarray:
        """float64 [N]: when each frame is shown, in seconds after the first."""
        return np.arange(len(self.files)) / self.fps

    def read(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        """Decode the ``wanted`` frames: uint8 [height, width, 3] each."""
        for index in wanted:
            yield read_image(self.files[index])


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """Images as frames; ``contents`` are those of their files in order, ``size`` is the size of the first."""

    name: str
    contents: tuple[bytes, ...]
    size: tuple[int, int]
    fps: float

    @property
    def times(self) -> np.ndarray:
        """float64 [N]: when each frame is shown, in seconds after the first."""
        return np.arange(len(self.contents)) / self.fps

    def read(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        """Decode the ``wanted`` frames: uint8 [height, width, 3] each."""
        for index in wanted:
            yield decode_image(self.contents[index], f"{self.name}, frame {index}")


def open_frames(
    contents: Sequence[bytes], sampling: FrameSampling, name: str, *, frames_fps: float = 1.0
) -> Clip:
    """:func:`open_video` of a folder of frames, given as the contents of its files.

    ``name`` names it in messages.
    """
    first = decode_image(contents[0], f"{name}, frame 0")
    source = Pictures(name, tuple(contents), (first.shape[0], first.shape[1]), frames_fps)
    return _clip(name, source, sampling)


def frame_files(name: str) -> tuple[str, ...]:
    """The frames in a folder, in natural order.

    Raises:
      UserError: there is none, or something that is no image.
    """
    try:
        names = [entry for entry in os.listdir(name) if not entry.startswith(".")]
    except OSError as error:
        raise UserError(f"Video {name!r} cannot be read ({error.strerror}).") from error
    if not names:
        raise UserError(f"Video {name!r} is a folder without images; give a folder of frames.")
    for entry in names:
        if not entry.lower().endswith(FRAME_SUFFIXES):
            raise UserError(
                f"Video {name!r} is a folder that contains {entry!r}, which is no image; keep only frames."
            )
    return tuple(os.path.join(name, entry) for entry in sorted(names, key=natural))


def _open_folder(name: str, fps: float) -> Folder:
    if not 0 < fps < math.inf:
        raise UserError(f"Video {name!r} is a folder, whose frames_fps={fps} must be a positive number.")
    files = frame_files(name)
    height, width = read_image(files[0]).shape[:2]
    return Folder(files, (height, width), fps)


def natural(name: str) -> tuple[list[tuple[str, int, str]], str]:
    """Sort key: frame2 before frame10, 1.25 before 1.5; 1 and 01 are ordered by spelling."""
    key: list[tuple[str, int, str]] = []
    for text, number in re.findall(r"([^0-9]*)([0-9]+(?:[.][0-9]+)*|$)", name):
        first, *parts = number.split(".")
        if len(parts) == 1:  # a decimal, such as a time in seconds
            key.append((text, int(first), parts[0].rstrip("0")))
        else:  # one number, several as of a version, or the end of the name
            key += [(text, int(part or -1), "") for part in (first, *parts)]
    return key, name


@dataclasses.dataclass(frozen=True, eq=False)
class Animation:
    """The pictures of a GIF or WEBP, composed as in a viewer.

    Attributes:
      name: path of the file.
      size: (height, width) in pixels.
      times: float64 [N]: when each picture is shown, in seconds after the first.
      fps: pictures per second, on average.
    """

    name: str
    size: tuple[int, int]
    times: np.ndarray
    fps: float

    def read(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        """Compose the ``wanted`` pictures on white: uint8 [height, width, 3] each."""
        with (
            reading_pictures(self.name, "Video"),
            open_picture(self.name, _ANIMATED, "Video", self.name) as image,
        ):
            for index in wanted:
                image.seek(int(index))
                yield upright_rgb(image.convert("RGBA"))


def _open_animation(name: str, delays: list[int]) -> Animation:
    ends = np.cumsum([delay or _DEFAULT_DELAY for delay in delays]) / 1000
    clip = Animation(name, (0, 0), np.concatenate([[0.0], ends[:-1]]), len(delays) / float(ends[-1]))
    height, width = next(clip.read(np.zeros(1, np.int64))).shape[:2]
    return dataclasses.replace(clip, size=(height, width))
