"""Video files through PyAV: list the frames of a container and decode some of them.

FFmpeg stops early on a damaged file without an error, and a container's information about its frames may be
missing or wrong. So the packets of the whole file are listed first, without decoding, and every decoded frame
must be the next one in that list.
"""

import contextlib
import dataclasses
import os
import struct
from collections.abc import Generator, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from gaze_jax.errors import UserError
from gaze_jax.media.images import check_pixels

# PyAV is an optional extra, and nothing here needs its types.
AvContainer = Any
AvStream = Any
AvFrame = Any
AvPacket = Any

SKIP = 16
"""Seek if the next keyframe is at least this many frames ahead; decoding fewer is faster than a seek."""

_ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC: the cover art of a music file
_EMPTY = 8  # a packet of up to this many bytes may hold no picture: so MPEG-4 marks a repeated frame
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
          UserError: the decoder fails, or its frames are not those that the container lists.
        """
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
        reason = ""
        try:
            for frame in frames:
                # After a seek: an incomplete frame that refers to one before the keyframe.
                if self.stamps is not None and frame.pts is not None and frame.pts < self.stamps[position]:
                    continue
                if frame.is_corrupt or (self.stamps is not None and frame.pts != self.stamps[position]):
                    break
                return frame
        except _av().FFmpegError as error:
            reason = f" ({error.strerror})"
        raise UserError(
            f"Video {self.name!r} is damaged or encrypted: decoding ends after {position} of "
            f"{len(self.times)} frames{reason}; copy or download it again."
        )

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
        # Do not keep the packets themselves: together they are as large as the file.
        packets = [_Packet.of(packet) for packet in container.demux(stream) if packet.size]
        _check_complete(name, kind, stream, packets)
        # Both rates are missing only if there is a single frame.
        rate, base = float(stream.average_rate or stream.guessed_rate or 1), float(stream.time_base)
    listed = None if kind == "avi" else _listed(packets)
    if listed is not None:
        stamps, keys = listed
        times = (stamps - stamps[:1]) * base
    else:
        stamps, keys = None, np.zeros(1, np.int64)
        least = sum(packet.size > _EMPTY and not packet.hidden for packet in packets)
        times = _counted(name, kind, rate, least)
    if not len(times):
        raise UserError(f"Video {name!r} has no frame that can be shown; download or create it again.")
    clip = Container(name, kind, (0, 0), rate, times, stamps, keys, (False, 1, 1))
    with _opened(name, kind) as (container, stream):
        first = clip._next(_decoded(container, stream), 0)
        turn = _turn(name, first)
        size = (first.width, first.height) if turn[0] else (first.height, first.width)
    return dataclasses.replace(clip, size=size, turn=turn)


class _Packet(NamedTuple):
    """Data of a packet: size, time and duration of its frame (pts may be None), and flags."""

    size: int
    pts: Any
    duration: int
    key: bool
    hidden: bool
    corrupt: bool

    @classmethod
    def of(cls, packet: AvPacket) -> "_Packet":
        flags = packet.is_keyframe, packet.is_discard, packet.is_corrupt
        return cls(packet.size, packet.pts, packet.duration or 0, *flags)


def _check_complete(name: str, kind: str, stream: AvStream, packets: list[_Packet]) -> None:
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


def _listed(packets: list[_Packet]) -> tuple[np.ndarray, np.ndarray] | None:
    """Time stamps of the shown frames, and which of them are keyframes; None if time stamps are missing.

    Frames before the first keyframe cannot be shown, and an edit list may hide more.
    """
    if any(packet.pts is None for packet in packets):
        return None
    shown = [packet for packet in packets if packet.pts >= packets[0].pts and not packet.hidden]
    stamps = np.sort(np.array([packet.pts for packet in shown], np.int64))
    if len(np.unique(stamps)) < len(stamps):
        return None
    keys = np.searchsorted(stamps, np.array([packet.pts for packet in shown if packet.key], np.int64))
    return stamps, np.union1d(np.zeros(1, np.int64), keys)


def _counted(name: str, kind: str, rate: float, least: int) -> np.ndarray:
    """float64 [N]: when each frame is shown, found by decoding all frames once; at least ``least`` frames."""
    with _opened(name, kind) as (container, stream):
        stream.thread_type = "AUTO"
        stamps = [frame.pts for frame in _decoded(container, stream)]
        base = float(stream.time_base)
    if len(stamps) < least:
        raise UserError(
            f"Video {name!r} is damaged: only {len(stamps)} of {least} frames can be decoded; "
            "copy or download it again."
        )
    if None in stamps or stamps != sorted(stamps):  # time stamps guessed from the storage order
        return np.arange(len(stamps)) / rate
    return (np.array(stamps, np.int64) - min(stamps, default=0)) * base


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
