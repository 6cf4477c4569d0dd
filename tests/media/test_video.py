"""Which frames of a video are read, from every kind of file."""

import gc
import itertools
import pickle

import numpy as np
import pytest
from PIL import Image

from gaze_jax.errors import UserError
from gaze_jax.media import container
from gaze_jax.media.video import Clip, FrameSampling, open_video, sample_indices
from tests.helpers.videos import (
    FRAMES,
    KINDS,
    bars,
    number,
    numbers,
    open_kind,
    refuse,
    remux,
    turn,
    write_kinds,
    write_video,
)

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same 60 numbered frames in every kind of file."""
    return write_kinds(tmp_path_factory.mktemp("videos"))


# ---------------------------------------------------------------------------------------------------------
# Indices


@pytest.mark.parametrize(
    ("frames", "fps", "sampling", "expected"),
    [
        (3, 10.0, FrameSampling(), [0, 1, 2]),
        (10, 10.0, FrameSampling(max_frames=4), [0, 3, 6, 9]),
        (11, 10.0, FrameSampling(max_frames=4), [0, 3, 6, 10]),  # 3.33 and 6.67 are truncated
        (3, 10.0, FrameSampling(max_frames=5), [0, 0, 1, 1, 2]),  # fewer than asked for: they repeat
        (1, 10.0, FrameSampling(max_frames=3), [0, 0, 0]),
        (9, 10.0, FrameSampling(max_frames=1), [0]),
        (1, 10.0, FrameSampling(fps=1.0, max_frames=8), [0]),
        (10, 3.0, FrameSampling(fps=1.0), [0, 3, 6, 9]),
        (9, 25.0, FrameSampling(fps=10.0), [0, 2, 4, 6, 8]),  # 2.5 to the even 2
        (9, 35.0, FrameSampling(fps=10.0), [0, 4, 8]),  # 3.5 to the even 4
        (61, 30000 / 1001, FrameSampling(fps=1.0), [0, 30, 60]),
        (4, 10.0, FrameSampling(fps=25.0), [0, 1, 2, 3]),  # faster than the file: every frame
        (9, 3.0, FrameSampling(fps=1.0, max_frames=3), [0, 3, 6]),  # as many as allowed: left alone
        (9, 3.0, FrameSampling(fps=1.0, max_frames=3, force=True), [0, 4, 8]),
        (10, 3.0, FrameSampling(fps=1.0, max_frames=3), [0, 4, 9]),  # one too many
        (3, 3.0, FrameSampling(fps=1.0, max_frames=4, force=True), [0, 0, 1, 2]),
        (30, 10.0, FrameSampling(start=2.5), [25, 26, 27, 28, 29]),
        (30, 10.0, FrameSampling(end=0.3), [0, 1, 2]),
        (30, 10.0, FrameSampling(fps=5.0, start=1.0, end=2.0), [10, 12, 14, 16, 18]),
        (30, 10.0, FrameSampling(max_frames=3, start=1.0, end=2.0), [10, 15, 20]),
        (30, 10.0, FrameSampling(fps=5.0, max_frames=3, start=1.0, end=2.0), [10, 15, 20]),
        (30, 10.0, FrameSampling(fps=1.0, start=0.5, end=99.0), [5, 15, 25]),
        (30, 10.0, FrameSampling(max_frames=2, end=99.0), [0, 29]),
        (30, 10.0, FrameSampling(start=1.0, end=1.05), [10]),  # shorter than a frame
        (30, 10.0, FrameSampling(start=2.99), [29]),
    ],
)
def test_indices_are_those_worked_out_by_hand(frames, fps, sampling, expected):
    """Strides, even choices, their rounding, and the part from start to end."""
    found = sample_indices(frames, fps, sampling)
    assert found.dtype == np.int64
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"fps": 0.0}, "fps=0.0 must be a positive"),
        ({"fps": float("nan")}, "fps=nan must"),
        ({"fps": float("inf")}, "fps=inf must"),
        ({"max_frames": 0}, "max_frames=0 must be at least 1"),
        ({"force": True}, "needs both"),
        ({"force": True, "fps": 1.0}, "needs both"),
        ({"force": True, "max_frames": 8}, "needs both"),
        ({"start": -1.0}, "start=-1.0 must"),
        ({"end": 0.0}, "end=0.0 must"),
        ({"start": 2.0, "end": 2.0}, "end=2.0 must be a number of seconds after start=2.0"),
        ({"end": float("nan")}, "end=nan must"),
    ],
)
def test_a_sampling_that_makes_no_sense_is_refused(fields, match):
    """Every field is checked, and force is never ignored."""
    with pytest.raises(UserError, match=match):
        FrameSampling(**fields)


def test_sampling_behind_the_end_is_refused(folder):
    """A start that the video does not reach names the file, its frames and its length."""
    with pytest.raises(UserError, match=r"start=3\.0 is after its end: it has 30 frames, 3 seconds"):
        sample_indices(30, 10.0, FrameSampling(start=3.0))
    refuse(folder / "video.mp4", "it has 60 frames, 6 seconds", FrameSampling(start=6.0))


@pytest.mark.parametrize(("frames", "fps"), [(0, 10.0), (5, 0.0), (5, -1.0), (5, float("nan"))])
def test_frames_and_rate_must_be_positive(frames, fps):
    """A caller's mistake, not a user's."""
    with pytest.raises(ValueError, match="must be positive"):
        sample_indices(frames, fps, FrameSampling())


# ---------------------------------------------------------------------------------------------------------
# Frames


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (FrameSampling(), list(range(60))),
        (FrameSampling(max_frames=5), [0, 14, 29, 44, 59]),
        (FrameSampling(fps=1.0), [0, 10, 20, 30, 40, 50]),
        (FrameSampling(fps=4.0, start=1.0, end=2.0), [10, 12, 14, 16, 18]),
        (FrameSampling(fps=1.0, max_frames=4), [0, 19, 39, 59]),
        (FrameSampling(fps=0.4, max_frames=4, force=True, end=2.0), [0, 6, 13, 20]),
        (FrameSampling(max_frames=4, start=5.8), [58, 58, 58, 59]),
        (FrameSampling(start=5.9), [59]),
    ],
)
def test_exactly_the_sampled_frames_are_read(kind, sampling, expected, folder):
    """The numbers in the pixels are the chosen ones, in order, from every kind of file."""
    clip = open_kind(folder, kind, sampling)
    assert isinstance(clip, Clip)
    assert clip.indices.tolist() == expected
    assert numbers(clip) == expected
    assert numbers(clip) == expected  # a clip can be read again
    assert (len(clip), clip.frames, clip.size) == (len(expected), FRAMES, (48, 64))
    assert clip.fps == pytest.approx(10.0)
    assert clip.path == str(folder / f"video.{kind}")
    np.testing.assert_allclose(clip.times, np.array(expected) / 10.0, atol=1e-9)


def test_the_files_have_frames_that_are_stored_out_of_order(folder):
    """Otherwise the test above would say nothing about order."""
    for kind in ("mp4", "mkv", "h264.avi"):
        with av.open(str(folder / f"video.{kind}")) as file:
            kinds = [frame.pict_type for frame in file.decode(video=0)]
        assert av.video.frame.PictureType.B in kinds


def test_lossless_frames_are_equal_to_the_last_bit(folder):
    """A folder and the animations give back the very pixels, which nobody may write to."""
    for kind in ("folder", "gif", "webp"):
        for index, frame in zip((0, 59), open_kind(folder, kind, FrameSampling(max_frames=2))):
            np.testing.assert_array_equal(frame, bars(index))
            assert not frame.flags.writeable


def test_colours_come_back(tmp_path):
    """Red is the first channel, and the colour matrix is that of the file."""
    picture = np.zeros((48, 64, 3), np.uint8)
    colours = np.array([[220, 20, 30], [20, 200, 30], [30, 20, 230], [240, 240, 20]])
    for place, colour in enumerate(colours):
        picture[:, 16 * place : 16 * place + 16] = colour
    file = write_video(tmp_path / "video.mp4", [picture] * 3, crf="5")
    frame = next(iter(open_video(file, FrameSampling())))
    np.testing.assert_allclose(frame[24, 8::16].astype(int), colours, atol=6)


class Counted:
    """A container that counts the packets it hands out."""

    def __init__(self, file):
        self.file, self.packets = file, 0

    def demux(self, stream):
        for packet in self.file.demux(stream):
            self.packets += 1
            yield packet


@pytest.fixture
def fed(monkeypatch):
    """Containers whose packets the decoder was fed with."""
    seen, decoded = [], container._decoded

    def count(file, stream):
        seen.append(Counted(file))
        return decoded(seen[-1], stream)

    monkeypatch.setattr(container, "_decoded", count)
    return lambda: sum(file.packets for file in seen)


def test_frames_are_decoded_when_they_are_asked_for(tmp_path, fed):
    """Opening and the first frame feed the decoder a few packets of 240, and iterating goes on from there."""
    clip = open_video(write_video(tmp_path / "video.mp4", 240, gop=240, bf="3"), FrameSampling())
    opened = fed()
    assert 1 <= opened < 60
    frames = iter(clip)
    assert fed() == opened  # nothing yet
    assert number(next(frames)) == 0
    first = fed() - opened
    assert 1 <= first < 60
    assert numbers(next(frames) for _ in range(50)) == list(range(1, 51))
    assert fed() - opened <= first + 50


def test_frames_do_not_pile_up(tmp_path):
    """Memory does not grow with the length of a video, also while nobody collects garbage."""

    def alive():
        # Not isinstance, which asks every object, and some of torch's warn when they are asked.
        return sum(issubclass(type(thing), av.VideoFrame) for thing in gc.get_objects())

    gc.collect()
    gc.freeze()  # to look at new objects only: all that other tests left take seconds
    clip = open_video(write_video(tmp_path / "video.mkv", 240, bf="3"), FrameSampling())
    gc.disable()
    try:
        before = alive()
        assert sum(1 for _ in clip) == 240
        assert alive() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("gops", ["closed", "open"])
def test_seeking_saves_work_and_changes_nothing(suffix, gops, tmp_path, fed, monkeypatch):
    """The same frames with and without, where frames refer to one another across keyframes too."""
    more = {"x264-params": "open-gop=1"} if gops == "open" else {}
    file = write_video(tmp_path / f"video.{suffix}", 240, gop=12, bf="3", **more)
    clip = open_video(file, FrameSampling(max_frames=7))
    before = fed()
    assert numbers(clip) == [0, 39, 79, 119, 159, 199, 239]
    some = fed() - before
    monkeypatch.setattr(container, "SKIP", 10**9)
    assert numbers(clip) == [0, 39, 79, 119, 159, 199, 239]
    assert some < 200 < 240 <= fed() - before - some


def test_a_frame_that_is_chosen_twice_is_decoded_once(folder, fed):
    """Three frames shown ten times over feed the decoder with the first few packets only."""
    clip = open_kind(folder, "mp4", FrameSampling(max_frames=30, end=0.2))
    assert sorted(set(numbers(clip))) == [0, 1, 2]
    assert len(clip) == 30
    frames = list(clip)
    assert sum(a is b for a, b in itertools.pairwise(frames)) == 27


def test_a_clip_travels_to_a_worker(folder):
    """It holds names and numbers, so that pickling and reading it elsewhere gives the same frames."""
    for kind in ("mp4", "gif", "folder"):
        clip = pickle.loads(pickle.dumps(open_kind(folder, kind, FrameSampling(max_frames=3))))
        assert numbers(clip) == [0, 29, 59]


def test_a_varying_frame_rate_is_sampled_by_index(tmp_path):
    """The average rate stands for it, and the times are the real ones."""
    stamps = [0, 1, 2, 3, 40, 41, 42, 43, 80, 81]
    file = write_video(tmp_path / "video.mp4", 10, stamps=stamps, bf="0")
    clip = open_video(file, FrameSampling())
    assert numbers(clip) == list(range(10))
    np.testing.assert_allclose(clip.times, np.array(stamps) / 10)
    assert clip.fps == pytest.approx(10 / 8.2, rel=0.02)
    half = open_video(file, FrameSampling(fps=clip.fps / 5))
    assert numbers(half) == [0, 5]
    np.testing.assert_allclose(half.times, [0.0, 4.1])


def test_an_edit_list_shows_what_players_show(tmp_path):
    """Of a trimmed MP4 the frames before the cut are decoded and neither counted nor returned."""
    file = write_video(tmp_path / "whole.mp4", FRAMES, bf="3", sc_threshold="0")
    cut = remux(file, tmp_path / "cut.mp4", shift=-16, container={"avoid_negative_ts": "disabled"})
    with av.open(str(cut)) as file:
        assert file.streams.video[0].frames == FRAMES  # what the header says
        assert any(packet.is_discard for packet in file.demux(video=0))
    clip = open_video(cut, FrameSampling())
    assert numbers(clip) == list(range(16, 60))
    assert (clip.frames, clip.times[0]) == (44, 0.0)
    assert numbers(open_video(cut, FrameSampling(max_frames=3))) == [16, 37, 59]


def test_what_belongs_before_the_first_keyframe_is_not_shown(tmp_path):
    """A cut in front of an open group leaves frames behind that refer to what is gone."""
    more = {"x264-params": "open-gop=1", "sc_threshold": "0"}
    whole = write_video(tmp_path / "whole.mp4", FRAMES, bf="3", gop=12, **more)
    with av.open(str(whole)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
        step = packets[0].duration
        second = [index for index, packet in enumerate(packets) if packet.is_keyframe][1]
        shown = packets[second].pts // step
        assert packets[second + 1].pts < packets[second].pts
    clip = open_video(remux(whole, tmp_path / "rest.mkv", skip=second), FrameSampling())
    assert numbers(clip) == list(range(shown, FRAMES))
    assert clip.times[0] == 0.0


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_video_without_its_beginning_is_refused(suffix, tmp_path):
    """FFmpeg drops frames up to the first keyframe and says nothing."""
    whole = write_video(tmp_path / "whole.mp4", FRAMES, bf="3")
    refuse(remux(whole, tmp_path / f"rest.{suffix}", skip=3), "does not begin with a keyframe")


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda x: x),
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
        ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
        ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
        ((1, 0, 0, -1), lambda x: x[::-1]),
        ((0, 1, 1, 0), lambda x: np.swapaxes(x, 0, 1)),
        ((0, -1, -1, 0), lambda x: np.swapaxes(x[::-1, ::-1], 0, 1)),
    ],
)
def test_a_video_is_turned_the_way_its_camera_was(matrix, shown, tmp_path):
    """All eight display matrices; FFmpeg's own reading of the angle agrees."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32], picture[:24, 32:], picture[24:, :32] = 200, 120, 60
    file = turn(write_video(tmp_path / "video.mp4", [picture] * 2), matrix)
    clip = open_video(file, FrameSampling())
    expected = shown(picture)
    assert clip.size == expected.shape[:2]
    for frame in clip:
        assert np.mean(np.abs(frame.astype(int) - expected) > 16) < 0.02
    if matrix[0] * matrix[3] - matrix[1] * matrix[2] > 0:  # a mirror has no angle
        with av.open(str(file)) as opened:
            angle = next(opened.decode(video=0)).rotation
        np.testing.assert_array_equal(np.rot90(picture, angle // 90), expected)


def test_a_video_at_a_slant_is_refused(tmp_path):
    """Nothing is resampled behind the user's back."""
    for matrix in ((0.7, 0.7, -0.7, 0.7), (0.98, 0.17, -0.17, 0.98), (0.0, 0.0, 0.0, 0.0)):
        refuse(
            turn(write_video(tmp_path / "video.mp4", 3), matrix), "is not rotated by a multiple of 90 degrees"
        )


def test_a_title_that_is_not_utf8_is_no_obstacle(tmp_path):
    """Old cameras write their own alphabets, and only the frames are wanted."""
    file = write_video(tmp_path / "video.mkv", 3, title="*title*")
    data = file.read_bytes()
    assert b"*title*" in data
    file.write_bytes(data.replace(b"*title*", b"\xff\xfetitle"))
    assert numbers(open_video(file, FrameSampling())) == [0, 1, 2]


def test_frames_without_time_stamps_are_counted(folder, monkeypatch):
    """Then the rate says when they are shown."""

    def unstamped(file, stream, decoded=container._decoded):
        for frame in decoded(file, stream):
            frame.pts = None
            yield frame

    monkeypatch.setattr(container, "_decoded", unstamped)
    clip = open_kind(folder, "avi", FrameSampling(fps=1.0))
    assert numbers(clip) == [0, 10, 20, 30, 40, 50]
    np.testing.assert_allclose(clip.times, np.arange(6.0))


# ---------------------------------------------------------------------------------------------------------
# Folders and animations


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    """2 comes before 10, whatever stands around it, and hidden files are no frames."""
    names = ("2.png", "10.png", "a1b3.png", "a1b20.PNG", "a02.png", "a10.png")
    for index, name in enumerate(names):
        Image.fromarray(bars(index)).save(tmp_path / name, "PNG")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    clip = open_video(tmp_path, FrameSampling())
    assert numbers(clip) == list(range(6))
    np.testing.assert_array_equal(clip.times, np.arange(6.0))  # 1 per second by default
    assert open_video(tmp_path, FrameSampling(), frames_fps=3.0).fps == 3.0
    assert numbers(open_video(tmp_path, FrameSampling(fps=1.0), frames_fps=3.0)) == [0, 3]


def test_a_folder_that_is_no_video_is_refused(tmp_path):
    """Empty, with another file in it, with a damaged frame, of two sizes, or at an impossible rate."""
    refuse(tmp_path, "is a folder without images")
    Image.fromarray(bars(0)).save(tmp_path / "0.png")
    (tmp_path / "notes.json").write_text("{}")
    refuse(tmp_path, "is a folder that contains 'notes.json', which is no image")
    (tmp_path / "notes.json").unlink()
    Image.fromarray(bars(1, (40, 64))).save(tmp_path / "1.png")
    refuse(tmp_path, "frame 1 has 64x40 pixels and the first has 64x48")
    with pytest.raises(UserError, match="frames_fps=0 must be a positive number"):
        open_video(tmp_path, FrameSampling(), frames_fps=0)
    (tmp_path / "0.png").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"0\.png' is none of"):
        open_video(tmp_path, FrameSampling())


def test_an_animation_shows_each_picture_for_its_time(tmp_path):
    """Delays make the times; 0 means a tenth of a second."""
    pictures = [Image.fromarray(bars(index)) for index in range(4)]
    for name in ("video.gif", "video.webp"):
        file = tmp_path / name
        pictures[0].save(
            file, save_all=True, append_images=pictures[1:], duration=[200, 0, 500, 50], lossless=True
        )
        clip = open_video(file, FrameSampling())
        assert numbers(clip) == [0, 1, 2, 3]
        np.testing.assert_allclose(clip.times, [0.0, 0.2, 0.3, 0.8])
        assert clip.fps == pytest.approx(4 / 0.85)


@pytest.mark.parametrize("name", ["video.gif", "video.webp"])
def test_what_an_animation_leaves_open_is_white(name, tmp_path):
    """Where no picture has a colour the page shows."""
    first = np.full((16, 16, 4), (200, 0, 0, 255), np.uint8)
    first[1::2] = 0  # transparent
    second = np.zeros((16, 16, 4), np.uint8)
    second[:, ::4] = (0, 0, 200, 255)
    file = tmp_path / name
    Image.fromarray(first).save(
        file, save_all=True, append_images=[Image.fromarray(second)], duration=100, lossless=True, disposal=2
    )
    found = list(open_video(file, FrameSampling()))
    for frame, picture in zip(found, (first, second)):
        expected = np.where(picture[..., 3:] > 0, picture[..., :3], 255)
        np.testing.assert_array_equal(frame, expected)
