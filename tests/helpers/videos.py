"""Real video files whose frames say which they are: every frame is eight bars, the bits of its number."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from gaze_jax.errors import UserError
from gaze_jax.media.video import FrameSampling, open_video

# A module that imports this one is skipped where PyAV is missing.
av = pytest.importorskip("av")

EVERY = FrameSampling()

SIZE = (48, 64)
FRAMES = 60
FILES = ("mp4", "fragmented.mp4", "mov", "mkv", "webm", "avi", "h264.avi")
KINDS = (*FILES, "gif", "webp", "folder")
_CODECS = {"webm": ("libvpx", {"deadline": "realtime", "cpu-used": "8"}), "avi": ("mpeg4", {"bf": "2"})}


def bars(number, size=SIZE):
    """uint8 [h, w, 3]: the lowest bit at the left, light for 1; far enough apart to outlast any codec."""
    assert 0 <= number < 256
    bits = (number >> np.arange(8)) & 1
    row = np.repeat(np.where(bits, 220, 35).astype(np.uint8), size[1] // 8)
    return np.ascontiguousarray(np.broadcast_to(row[None, :, None], (*size, 3)))


def number(frame):
    """Which frame of ``bars`` this is; fails where a bar is neither light nor dark."""
    assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[-1] == 3
    middles = frame.reshape(frame.shape[0], 8, -1, 3)[4:-4, :, 2:-2].mean(axis=(0, 2, 3))
    assert np.all((middles < 75) | (middles > 180)), middles
    return int(((middles > 128) << np.arange(8)).sum())


def numbers(frames):
    return [number(frame) for frame in frames]


def write_video(
    path, frames, fps=10, *, codec="libx264", stamps=None, gop=12, container=None, title="", **options
):
    """Encode uint8 [h, w, 3] frames, or the bars of this many; the suffix of the path says the container.

    Args:
      path: where to; ``.gif`` and ``.webp`` are written by Pillow without loss, others by FFmpeg.
      frames: arrays, or a number of ``bars``.
      fps: frames per second.
      codec: encoder of FFmpeg.
      stamps: for each frame, when it is shown, in views of 1 / fps; default: one after the other.
      gop: a keyframe at least every so many frames.
      container: options of the container.
      title: in the file's metadata.
      options: options of the encoder.
    """
    frames = [bars(i) for i in range(frames)] if isinstance(frames, int) else frames
    if path.suffix in (".gif", ".webp"):
        first, *rest = (Image.fromarray(frame) for frame in frames)
        delay = round(1000 / fps)
        first.save(path, save_all=True, append_images=rest, duration=delay, lossless=True, optimize=False)
        return path
    with av.open(str(path), "w", container_options=container or {}) as file:
        if title:
            file.metadata["title"] = title
        stream = file.add_stream(codec, rate=fps, options={"g": str(gop), **options})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = index if stamps is None else stamps[index]
            picture.time_base = Fraction(1, fps)
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    return path


def write_kinds(path):
    """A video of ``FRAMES`` bars, 10 per second, in every kind of file: ``video.KIND``; returns ``path``."""
    for kind in KINDS[:-1]:
        codec, options = _CODECS.get(kind, ("libx264", {"bf": "3"}))
        pieces = {"movflags": "frag_keyframe+empty_moov"} if "frag" in kind else {}
        write_video(path / f"video.{kind}", FRAMES, codec=codec, container=pieces, **options)
    (path / "video.folder").mkdir()
    for index in range(FRAMES):
        Image.fromarray(bars(index)).save(path / "video.folder" / f"frame{index}.png")
    return path


def open_kind(path, kind, sampling):
    """Open one of the files of ``write_kinds``."""
    return open_video(path / f"video.{kind}", sampling, frames_fps=10.0)


def refuse(path, match, sampling=EVERY):
    """Opening or reading fails with one sentence that names the file."""
    with pytest.raises(UserError, match=match) as error:
        list(open_video(path, sampling))
    assert repr(str(path)) in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


def remux(source, target, *, skip=0, shift=0, container=None):
    """Copy the packets of a video without the first ``skip``, shown ``shift`` frames later."""
    with av.open(str(source)) as old, av.open(str(target), "w", container_options=container or {}) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        step = round(1 / (stream.average_rate * stream.time_base))
        for index, packet in enumerate(old.demux(stream)):
            if packet.size and index >= skip:
                packet.pts += shift * step
                packet.dts = None if packet.dts is None else packet.dts + shift * step
                packet.stream = copy
                new.mux(packet)
    return target


def join(first, second, target):
    """The packets of one video behind those of another, under the headers of the first."""
    with av.open(str(target), "w") as new:
        copy, end = None, 0
        for path in (first, second):
            with av.open(str(path)) as old:
                stream = old.streams.video[0]
                copy = copy or new.add_stream_from_template(stream)
                packets = [packet for packet in old.demux(stream) if packet.size]
                for packet in packets:
                    packet.pts, packet.dts, packet.stream = packet.pts + end, packet.dts + end, copy
                    new.mux(packet)
                end = max(packet.pts + packet.duration for packet in packets)
    return target


def turn(path, matrix):
    """Write a display matrix (a, b, c, d), in ones, into the track header of an MP4."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    for place, value in zip((0, 4, 12, 16), matrix):
        data[at + place : at + place + 4] = round(value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    return path


def write_sound(path, cover=None):
    """An audio file without a picture, or with the picture of its cover."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        if cover is not None:
            image = file.add_stream("png", rate=1)
            image.height, image.width = cover.shape[:2]
            image.pix_fmt = "rgb24"
            image.disposition = av.stream.Disposition.attached_pic.value
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 44100
        file.mux(stream.encode(samples))
        file.mux(stream.encode())
        if cover is not None:
            picture = av.VideoFrame.from_ndarray(cover, format="rgb24")
            picture.pts = 0
            file.mux(image.encode(picture))
            file.mux(image.encode())
    return path
