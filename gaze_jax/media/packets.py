"""What a video's packets say about its frames, without decoding them.

In most streams a packet holds one frame and says when it is shown. Where this is not so, the answer is None,
and the frames have to be counted by decoding them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

AvPacket = Any  # PyAV is an optional extra, and nothing here needs its types

_COUNTED = frozenset(("mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "wmv3", "vc1", "h263"))
"""Codecs whose packets may hold several frames or none: packed B-frames, frames that only repeat the last."""

_EMPTY = 8  # a packet of up to this many bytes may hold no picture: so MPEG-4 marks a repeated frame


class Packet(NamedTuple):
    """Data of a packet: size, time and duration of its frame (pts may be None), and flags."""

    size: int
    pts: Any
    duration: int
    key: bool
    hidden: bool
    corrupt: bool

    @classmethod
    def of(cls, packet: AvPacket, codec: str) -> "Packet":
        """The data of a packet of PyAV; ``codec`` is FFmpeg's name of its codec."""
        hidden = packet.is_discard or _invisible(packet, codec)
        return cls(
            packet.size, packet.pts, packet.duration or 0, packet.is_keyframe, hidden, packet.is_corrupt
        )

    @property
    def shows(self) -> bool:
        """Whether it must give a frame."""
        return self.size > _EMPTY and not self.hidden


def _invisible(packet: AvPacket, codec: str) -> bool:
    """Whether the frame is never shown: an alternate reference of VP8 or VP9, which others refer to."""
    if codec == "vp8":
        return not bytes(memoryview(packet)[:1])[0] & 0x10  # RFC 6386, section 9.1: show_frame
    if codec != "vp9":
        return False
    # VP9 bitstream specification, section 6.2. A packet that ends in an index of several frames shows one.
    first, last = bytes(memoryview(packet)[:1])[0], bytes(memoryview(packet)[-1:])[0]
    if last & 0xE0 == 0xC0 or first >> 6 != 2:
        return False
    below = 3 if first & 0x30 == 0x30 else 4  # the bits behind the profile: profile 3 has one more
    if first >> (below - 1) & 1:  # show_existing_frame
        return False
    if below == 4:
        return not first >> 1 & 1
    return not first & 1


def listed(packets: Sequence[Packet], codec: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Time stamps of the shown frames, and which of them are keyframes; None if packets do not say it.

    Frames before the first keyframe cannot be shown, and an edit list may hide more.
    """
    if codec in _COUNTED or any(packet.pts is None for packet in packets):
        return None
    shown = [packet for packet in packets if packet.pts >= packets[0].pts and not packet.hidden]
    stamps = np.sort(np.array([packet.pts for packet in shown], np.int64))
    if len(np.unique(stamps)) < len(stamps):
        return None
    keys = np.searchsorted(stamps, np.array([packet.pts for packet in shown if packet.key], np.int64))
    return stamps, np.union1d(np.zeros(1, np.int64), keys)


def average_rate(times: np.ndarray, last: float, stated: float | None) -> float:
    """Average frames per second.

    Args:
      times: float64 [N], when each frame is shown in seconds, ascending.
      last: how long the last frame is shown in seconds; 0 if unknown.
      stated: the rate in the file's header, taken if it agrees with the times: it is not rounded as they are.
    """
    frames = len(times)
    if frames < 2:
        return stated or (1 / last if last > 0 else 1.0)
    span = float(times[-1] - times[0])
    if stated is not None and abs(stated * span - (frames - 1)) < 1:
        return stated
    return frames / (span + (last if last > 0 else span / (frames - 1)))
