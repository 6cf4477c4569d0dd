"""Whole videos whose packets are not one per frame, or whose stamps and headers cannot be trusted."""

from pathlib import Path

import numpy as np
import pytest

from gaze_jax.media import packets
from gaze_jax.media.video import FrameSampling, open_video
from tests.helpers.videos import bars, numbers, write_video

av = pytest.importorskip("av")

CASES = Path(__file__).parents[1] / "fixtures" / "cases" / "video"
EVERY = FrameSampling()


def decoded(path):
    """All frames as FFmpeg decodes them."""
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


@pytest.mark.parametrize(
    ("name", "frames"), [("remuxed_with_b_frames.mp4", 200), ("vp8_two_pass_altref.webm", 120)]
)
@pytest.mark.parametrize("sampling", [EVERY, FrameSampling(max_frames=5)], ids=["all", "five"])
def test_reported_videos_are_read_as_ffmpeg_reads_them(name, frames, sampling):
    expected = decoded(CASES / name)
    clip = open_video(CASES / name, sampling)
    assert clip.frames == len(expected) == frames
    found = list(clip)
    assert len(found) == len(clip)
    for index, frame in zip(clip.indices, found, strict=True):
        np.testing.assert_array_equal(frame, expected[index])
    assert (np.diff(clip.times) > 0).all()


def test_a_varying_rate_is_the_same_in_every_container():
    """The header of one says 10 per second, and both show 11 frames over two seconds and a half."""
    clips = [open_video(CASES / name, FrameSampling(fps=1.0)) for name in ("vfr.mkv", "vfr.mp4")]
    for clip in clips:
        assert clip.fps == pytest.approx(5.5, abs=0.05)
    np.testing.assert_array_equal(clips[0].indices, clips[1].indices)
    np.testing.assert_allclose(clips[0].times, clips[1].times, atol=1e-3)


@pytest.mark.parametrize("fps", [24, 25, 30])
def test_one_film_gives_the_same_frames_in_every_container(fps, tmp_path):
    """At one frame per second, whatever its container rounds times to."""
    found = {}
    for kind, codec in (("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")):
        options = {"bf": "2"} if codec != "libvpx" else {"deadline": "realtime", "cpu-used": "8"}
        clip = open_video(
            write_video(tmp_path / f"a.{kind}", 100, fps, codec=codec, **options), FrameSampling(fps=1.0)
        )
        found[kind] = numbers(clip)
        np.testing.assert_allclose(clip.times, clip.indices / fps, atol=2e-3)
    assert set(map(tuple, found.values())) == {tuple(range(0, 100, fps))}


def with_stamps(source, target, stamps):
    """Copy a video's packets under other time stamps: a function of (index, pts, dts, step)."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        step = round(1 / (stream.average_rate * stream.time_base))
        for index, packet in enumerate(old.demux(stream)):
            if packet.size:
                packet.pts, packet.dts = stamps(index, packet.pts, packet.dts, step)
                packet.stream = copy
                new.mux(packet)
    return target


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_stamps_in_the_order_of_storage_are_not_trusted(suffix, tmp_path):
    """So a stream with B-frames is copied out of an AVI; FFmpeg decodes all frames in their order."""
    whole = write_video(tmp_path / "whole.mp4", 60, bf="3")
    file = with_stamps(
        whole, tmp_path / f"copy.{suffix}", lambda index, pts, dts, step: (index * step, index * step)
    )
    assert numbers(open_video(file, EVERY)) == list(range(60))
    assert numbers(open_video(file, FrameSampling(max_frames=4))) == [0, 19, 39, 59]


def test_it_is_said_that_frames_were_counted(tmp_path, caplog):
    file = with_stamps(
        write_video(tmp_path / "whole.mp4", 60, bf="3"),
        tmp_path / "copy.mp4",
        lambda index, pts, dts, step: (index * step, index * step),
    )
    with caplog.at_level("WARNING", logger="absl"):
        list(open_video(file, EVERY))
    assert "has wrong time stamps; its 60 frames were counted" in caplog.text


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("options", [{"bf": "2"}, {"bf": "2", "flags": "+qpel"}, {"bf": "0"}], ids=str)
def test_mpeg_4_may_pack_frames(suffix, options, tmp_path):
    """The frames of MPEG-4 part 2 are counted, as several may be in one packet."""
    file = write_video(tmp_path / f"a.{suffix}", 40, codec="mpeg4", **options)
    assert numbers(open_video(file, EVERY)) == list(range(40))


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "16"},
        {
            "codec": "libvpx-vp9",
            "auto-alt-ref": "1",
            "lag-in-frames": "16",
            "cpu-used": "8",
            "deadline": "good",
        },
        {
            "codec": "libvpx-vp9",
            "auto-alt-ref": "6",
            "lag-in-frames": "25",
            "cpu-used": "8",
            "deadline": "good",
        },
    ],
    ids=["vp8", "vp9", "vp9 in layers"],
)
@pytest.mark.parametrize("suffix", ["webm", "mkv"])
def test_frames_that_are_never_shown_are_not_counted(options, suffix, tmp_path):
    pictures = [np.roll(bars(200), shift, axis=1) for shift in range(50)]
    file = write_video(tmp_path / f"a.{suffix}", pictures, gop=50, **options)
    clip = open_video(file, EVERY)
    assert clip.frames == len(list(clip)) == len(decoded(file)) == 50


def test_the_visible_frames_of_vp9_are_those_whose_headers_say_so():
    """Section 6.2 of its specification: shown, hidden, an old frame again, an index behind."""
    hidden = lambda first, last=0: packets._invisible(bytes((first, 0, last)), "vp9")  # noqa: E731
    for profile in range(4):
        bits = 0b10 << 6 | (profile & 1) << 5 | (profile >> 1) << 4
        shown, again = (1, 3) if profile < 3 else (0, 2)  # the places of show_frame, show_existing_frame
        assert hidden(bits)
        assert not hidden(bits | 1 << shown)
        assert not hidden(bits | 1 << again)
        assert not hidden(bits, 0b1100_0001)


ENCODERS = {
    "x264 closed": ("mp4", {"codec": "libx264", "bf": "3"}),
    "x264 open": ("mkv", {"codec": "libx264", "bf": "3", "x264-params": "open-gop=1"}),
    "x264 pyramid": ("mp4", {"codec": "libx264", "bf": "8", "x264-params": "b-pyramid=normal:ref=6"}),
    "x264 intra refresh": ("mkv", {"codec": "libx264", "bf": "0", "x264-params": "intra-refresh=1"}),
    "x264 zerolatency": ("mp4", {"codec": "libx264", "tune": "zerolatency"}),
    "x264 one keyframe": ("mov", {"codec": "libx264", "bf": "3", "gop": 600}),
    "x264 all keyframes": ("mp4", {"codec": "libx264", "gop": 1}),
    "x264 slices": ("mp4", {"codec": "libx264", "x264-params": "slices=4"}),
    "x264 interlaced": ("mkv", {"codec": "libx264", "x264-params": "interlaced=1"}),
    "x264 lossless": ("mp4", {"codec": "libx264", "crf": "0"}),
    "x264 fragmented": ("mp4", {"codec": "libx264", "container": {"movflags": "frag_keyframe+empty_moov"}}),
    "x264 index first": ("mp4", {"codec": "libx264", "container": {"movflags": "faststart"}}),
    "x265": ("mp4", {"codec": "libx265", "x265-params": "log-level=none"}),
    "x265 open": ("mkv", {"codec": "libx265", "x265-params": "log-level=none:open-gop=1:bframes=4"}),
    "vp8": ("webm", {"codec": "libvpx", "cpu-used": "8", "deadline": "realtime"}),
    "vp8 alternate references": ("webm", {"codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9": ("webm", {"codec": "libvpx-vp9", "cpu-used": "8", "deadline": "realtime"}),
    "vp9 alternate references": ("mkv", {"codec": "libvpx-vp9", "cpu-used": "8", "lag-in-frames": "25"}),
    "av1": ("mkv", {"codec": "libaom-av1", "cpu-used": "8", "lag-in-frames": "16"}),
    "svt av1": ("mp4", {"codec": "libsvtav1", "preset": "12"}),
    "mpeg4": ("avi", {"codec": "mpeg4", "bf": "2"}),
    "mpeg4 in mp4": ("mp4", {"codec": "mpeg4", "bf": "2"}),
    "msmpeg4": ("avi", {"codec": "msmpeg4"}),
    "mpeg2": ("mkv", {"codec": "mpeg2video", "bf": "2"}),
    "mpeg1": ("avi", {"codec": "mpeg1video", "bf": "2", "fps": 25}),
    "mjpeg": ("avi", {"codec": "mjpeg", "strict": "unofficial"}),
    "mjpeg in mov": ("mov", {"codec": "mjpeg", "strict": "unofficial"}),
    "ffv1": ("mkv", {"codec": "ffv1"}),
    "h263": ("avi", {"codec": "h263p"}),
    "flv1": ("avi", {"codec": "flv"}),
    "huffyuv": ("avi", {"codec": "ffvhuff"}),
}
"""What people's files are encoded with; those that this build of FFmpeg lacks are skipped."""
QUICK = ("x264 open", "x264 intra refresh", "vp8", "mpeg2", "mjpeg", "ffv1")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in ENCODERS]
)
def test_whole_files_of_every_encoder_are_read(name, tmp_path):
    """All frames as FFmpeg decodes them, and every seventh."""
    suffix, options = ENCODERS[name]
    if options["codec"] not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {options['codec']}")
    file = write_video(
        tmp_path / f"a.{suffix}",
        [np.kron(bars(i), np.ones((3, 3, 1), np.uint8)) for i in range(120)],
        **options,
    )
    expected = decoded(file)
    clip = open_video(file, EVERY)
    assert clip.frames == len(expected) == 120
    for mine, theirs in zip(clip, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    some = open_video(file, FrameSampling(fps=clip.fps / 7))
    for index, mine in zip(some.indices, some, strict=True):
        np.testing.assert_array_equal(mine, expected[index])


@pytest.mark.parametrize(
    ("times", "last", "stated", "expected"),
    [
        ([0.0, 0.1, 0.2], 0.1, 10.0, 10.0),
        ([0.0, 0.033, 0.067, 0.1], 0.033, 30000 / 1001, 30000 / 1001),  # rounded times, exact header
        ([0.0, 1.0, 5.0], 1.0, 10.0, 0.5),  # the header contradicts
        ([0.0, 1.0, 2.0], 0.0, None, 1.0),
        ([0.0], 0.5, None, 2.0),
        ([0.0], 0.0, None, 1.0),
    ],
)
def test_the_average_rate_is_that_of_the_times(times, last, stated, expected):
    assert packets.average_rate(np.array(times), last, stated) == pytest.approx(expected)
