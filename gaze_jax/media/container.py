"""Video files through PyAV: list the frames of a container and decode some of them.

FFmpeg stops early on a damaged file without an error, and a container's information about its frames may be
missing or wrong. So the packets of the whole file are listed first, without decoding, and every decoded frame
must be the next one in that list. Where a list cannot be made, or decoding contradicts it, the whole file is
decoded once: only what decoding cannot read is damaged.
"""

import contextlib
import dataclasses
import os
import struct
from collections.abc import Generator, Iterator
from types import ModuleType
from typing import Any

import numpy as np
from absl import logging

from gaze_jax.errors import UserError
from gaze_jax.media.images import check_pixels
from gaze_jax.media.packets import Packet, average_rate, listed

# PyAV is an optional extra, and nothing here needs its types.
AvContainer = Any
AvStream = Any
AvFrame = Any

SKIP = 16
"""Seek if the next keyframe is at least this many frames ahead; decoding fewer is faster than a seek."""

_ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC: the cover art of a music file
_HALF = 1 << 15  # one half in the 16.16 fixed point of a display matrix


@dataclasses.dataclass(frozen=True, eq=False)
class Container:
    """The frames of one video stream of a file.

    Attributes:
      name: path of the file.
      kind: FFmpeg's name of the container.
      size: (height, width) of the first frame in pixels, upright.
      fps: average frames per second.
      times: float64 [N]: when each frame is shown, in seconds after the first.
      stamps: int64 [N]: time stamps, which identify the frames; None in an AVI, which has none, or if some
        are missing or not distinct: then frames are identified by counting from the first.
      keys: int64, ascending: frames from which decoding can start, including 0.
      turn: how to make a stored frame upright: whether to swap its axes, then the step, 1 or -1, of its rows
        and its columns.
    """

    name: str
    kind: str
    size: tuple[int, int]
    fps: float
    times: np.ndarray
    stamps: np.ndarray | None
    keys: np.ndarray
    turn: tuple[bool, int, int]

    def read(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        """Decode the ``wanted`` frames, ascending and distinct: upright uint8 [height, width, 3] each.

        Raises:
          UserError: the decoder fails, or gives another number of frames than the container lists.
        """
        done = 0
        try:
            for frame in self._read(wanted):
                yield frame
                done += 1
        except _UnlistedFrame as error:
            yield from self._without_stamps(error).read(wanted[done:])

    def _read(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        with _opened(self.name, self.kind) as (container, stream):
            stream.thread_type = "AUTO"
            frames = _decoded(container, stream)
            position = 0  # index of the next frame from the decoder
            for target in map(int, wanted):
                key = int(self.keys[int(np.searchsorted(self.keys, target, "right")) - 1])
                if self.stamps is not None and key - position >= SKIP:
                    frames.close()
                    container.seek(int(self.stamps[key]), stream=stream)
                    frames, position = _decoded(container, stream), key
                while position < target:
                    self._next(frames, position)
                    position += 1
                yield self._upright(self._next(frames, target))
                position += 1

    def _next(self, frames: Iterator[AvFrame], position: int) -> AvFrame:
        """Return the next frame, which must be the one at ``position``."""
        try:
            for frame in frames:
                # After a seek: an incomplete frame that refers to one before the keyframe.
                if self.stamps is not None and frame.pts is not None and frame.pts < self.stamps[position]:
                    continue
                if frame.is_corrupt or (self.stamps is not None and frame.pts != self.stamps[position]):
                    break
                return frame
        except _av().FFmpegError as error:
            raise _UnlistedFrame(position, f" ({error.strerror})") from error
        raise _UnlistedFrame(position, "")

    def _first(self) -> AvFrame:
        with _opened(self.name, self.kind) as (container, stream):
            return self._next(_decoded(container, stream), 0)

    def _without_stamps(self, error: "_UnlistedFrame") -> "Container":
        """The same frames identified by counting, if all of them can be decoded.

        Time stamps are wrong in a stream that was copied between containers, and its frames are in order.

        Raises:
          UserError: they were counted before, cannot be decoded, or their number is another.
        """
        try:
            count = 0 if self.stamps is None else len(_decode_all(self.name, self.kind))
        except _UnlistedFrame:
            count = 0
        if count < len(self.times):
            raise UserError(
                f"Video {self.name!r} is damaged or encrypted: decoding ends after {error.position} of "
                f"{len(self.times)} frames{error.reason}; copy or download it again."
            ) from error
        if count > len(self.times):
            raise UserError(
                f"Video {self.name!r} has {count} frames where its container lists {len(self.times)}, so "
                "their times are unknown; encode it anew."
            ) from error
        logging.warning("Video %r has wrong time stamps; its %d frames were counted.", self.name, count)
        return dataclasses.replace(self, stamps=None, keys=np.zeros(1, np.int64))

    def _upright(self, frame: AvFrame) -> np.ndarray:
        check_pixels(self.name, "Video", frame.width, frame.height)
        pixels = frame.to_ndarray(format="rgb24")
        swapped, rows, columns = self.turn
        pixels = pixels.swapaxes(0, 1) if swapped else pixels
        return np.ascontiguousarray(pixels[::rows, ::columns])


def open_container(name: str, kind: str) -> Container:
    """List the frames of a video file.

    Args:
      name: path of the file.
      kind: its container, as ``gaze_jax.media.probe.video_kind`` says.

    Raises:
      UserError: PyAV is not installed, or the file has no video, no frames or too large frames, needs a
        missing decoder, or is damaged. One sentence that names the file.
    """
    with _opened(name, kind) as (container, stream):
        codec = stream.codec_context.name
        # Do not keep the packets themselves: together they are as large as the file.
        packets = [Packet.of(packet, codec) for packet in container.demux(stream) if packet.size]
        _check_complete(name, kind, stream, packets)
        rate = stream.average_rate or stream.guessed_rate
        stated, base = (float(rate) if rate else None), float(stream.time_base)
    last = packets[-1].duration * base if packets else 0.0
    found = None if kind == "avi" else listed(packets, codec)
    if found is not None:
        stamps, keys = found
        times = (stamps - stamps[:1]) * base
    else:
        stamps, keys = None, np.zeros(1, np.int64)
        times = _counted(name, kind, stated, sum(packet.shows for packet in packets))
    if not len(times):
        raise UserError(f"Video {name!r} has no frame that can be shown; download or create it again.")
    clip = Container(
        name, kind, (0, 0), average_rate(times, last, stated), times, stamps, keys, (False, 1, 1)
    )
    try:
        first = clip._first()
    except _UnlistedFrame as error:
        clip = clip._without_stamps(error)
        first = clip._first()
    turn = _turn(name, first)
    size = (first.width, first.height) if turn[0] else (first.height, first.width)
    return dataclasses.replace(clip, size=size, turn=turn)


class _UnlistedFrame(Exception):
    """The decoder does not give the frame that is next in the list.

    Args:
      position: index of that frame.
      reason: the decoder's error in brackets, or nothing.
    """

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(position, reason)
        self.position, self.reason = position, reason


def _check_complete(name: str, kind: str, stream: AvStream, packets: list[Packet]) -> None:
    """Refuse a file without a first keyframe or with a cut packet, or an MP4 with fewer frames than stated.

    Fewer frames may also result from an edit list, which shows a part of the stream. Then the duration agrees
    with the header, except for a split frame at each end.
    """
    if packets and not packets[0].key:
        raise UserError(
            f"Video {name!r} does not begin with a keyframe, so its first frames cannot be decoded; "
            "encode it anew from the original."
        )
    if any(packet.corrupt for packet in packets):
        raise UserError(f"Video {name!r} is damaged or cut short; copy or download it again.")
    if kind == "mov" and len(packets) < stream.frames and stream.duration is not None:
        shown = [packet.duration for packet in packets if not packet.hidden]
        if sum(shown) + 2 * max(shown, default=0) < stream.duration:
            raise UserError(
                f"Video {name!r} is cut short: its header says {stream.frames} frames and {len(packets)} are "
                "there; copy or download it again."
            )


def _decode_all(name: str, kind: str) -> list[float | None]:
    """When each frame is shown in seconds, found by decoding all of them; None for an unknown time.

    Raises:
      _UnlistedFrame: the decoder fails, or gives a damaged frame.
    """
    found: list[float | None] = []
    with _opened(name, kind) as (container, stream):
        stream.thread_type = "AUTO"
        base = float(stream.time_base)
        try:
            for frame in _decoded(container, stream):
                if frame.is_corrupt:
                    raise _UnlistedFrame(len(found), "")
                found.append(None if frame.pts is None else frame.pts * base)
        except _av().FFmpegError as error:
            raise _UnlistedFrame(len(found), f" ({error.strerror})") from error
    return found


def _counted(name: str, kind: str, rate: float | None, least: int) -> np.ndarray:
    """float64 [N]: when each frame is shown, found by decoding all frames once; at least ``least`` frames."""
    try:
        found = _decode_all(name, kind)
    except _UnlistedFrame as error:
        raise UserError(
            f"Video {name!r} is damaged: decoding ends after {error.position} frames{error.reason}; "
            "copy or download it again."
        ) from error
    if len(found) < least:
        raise UserError(
            f"Video {name!r} is damaged: only {len(found)} of {least} frames can be decoded; "
            "copy or download it again."
        )
    times = [time for time in found if time is not None]
    if len(times) < len(found) or times != sorted(set(times)):  # guessed from the storage order, or repeated
        return np.arange(len(found)) / (rate or 1.0)
    return np.array(times) - (times[0] if times else 0.0)


def _av() -> ModuleType:
    """Import PyAV, which is optional.

    Raises:
      UserError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(
            "Reading a video file needs PyAV, which is not installed; run: pip install 'gaze-jax[video]'"
        ) from error
    return av


@contextlib.contextmanager
def _opened(name: str, kind: str) -> Iterator[tuple[AvContainer, AvStream]]:
    """Open a container and its video stream; FFmpeg's errors become a one-sentence UserError.

    Opens only this file, and only as ``kind``: some formats, such as playlists, name other files or URLs.
    """
    av = _av()
    options = {"format_whitelist": kind, "protocol_whitelist": "file"}
    path = f"file:{os.path.abspath(name)}"
    # A title need not be UTF-8. PyAV has to be told to read on; from 19 on it does, and has no such argument.
    more = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        with av.open(path, container_options=options, **more) as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition.value & _ATTACHED_PICTURE:
                raise UserError(f"Video {name!r} has no video stream; give a file with moving pictures.")
            if stream.codec_context is None:
                raise UserError(f"Video {name!r} needs a decoder that PyAV lacks; convert it to H.264.")
            check_pixels(name, "Video", stream.codec_context.width, stream.codec_context.height)
            yield container, stream
    except av.FFmpegError as error:
        raise UserError(
            f"Video {name!r} cannot be decoded ({error.strerror}); it is damaged or unfinished."
        ) from error


def _decoded(container: AvContainer, stream: AvStream) -> Generator[AvFrame, None, None]:
    """Yield frames from the next keyframe on, in display order."""
    for packet in container.demux(stream):
        if packet.size:  # an empty packet would end the decoding
            yield from packet.decode()
    yield from stream.codec_context.decode(None)


def _turn(name: str, frame: AvFrame) -> tuple[bool, int, int]:
    """Rotation and mirroring by a frame's display matrix, as in players; see ``Container.turn``.

    The matrix has rows (a, b, u), (c, d, v), (x, y, w); a pixel (p, q) is shown at (a p + c q, b p + d q). It
    is the same for all frames of a stream; read it once, because PyAV keeps a frame in memory after its side
    data was read.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, 1, 1
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    along, across = min(abs(a), abs(d)) > _HALF, min(abs(b), abs(c)) > _HALF
    if along == across or max(map(abs, (b, c) if along else (a, d))) > _HALF // 50:
        raise UserError(f"Video {name!r} is not rotated by a multiple of 90 degrees; re-encode it upright.")
    rows, columns = (b, c) if across else (d, a)
    return across, 1 if rows > 0 else -1, 1 if columns > 0 else -1
