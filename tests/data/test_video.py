"""Which frames of a video are read, from every kind of file, and what is refused."""

import gc
import itertools
import pickle
import sys

import av
import numpy as np
import pytest
from PIL import Image

from gaze_jax.data import container, images
from gaze_jax.data.images import read_image
from gaze_jax.data.video import Clip, Sampling, open_video, sample_indices
from gaze_jax.errors import UserError
from tests.helpers.videos import bars, join, number, numbers, remux, turn, write_sound, write_video

FRAMES = 60
FILES = ("mp4", "fragmented.mp4", "mov", "mkv", "webm", "avi", "h264.avi")
KINDS = (*FILES, "gif", "webp", "folder")
CODECS = {"webm": ("libvpx", {"deadline": "realtime", "cpu-used": "8"}), "avi": ("mpeg4", {"bf": "2"})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A video of 60 numbered frames, 10 per second, in every kind of file."""
    path = tmp_path_factory.mktemp("videos")
    for kind in KINDS[:-1]:
        codec, options = CODECS.get(kind, ("libx264", {"bf": "3"}))
        pieces = {"movflags": "frag_keyframe+empty_moov"} if "frag" in kind else {}
        write_video(path / f"video.{kind}", FRAMES, codec=codec, container=pieces, **options)
    (path / "video.folder").mkdir()
    for index in range(FRAMES):
        Image.fromarray(bars(index)).save(path / "video.folder" / f"frame{index}.png")
    return path


def open_kind(folder, kind, sampling):
    return open_video(folder / f"video.{kind}", sampling, frames_fps=10.0)


EVERY = Sampling()


def refuse(path, match, sampling=EVERY):
    """Opening or reading fails with one sentence that names the file."""
    with pytest.raises(UserError, match=match) as error:
        list(open_video(path, sampling))
    assert repr(str(path)) in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


# ---------------------------------------------------------------------------------------------------------
# Indices


@pytest.mark.parametrize(
    ("frames", "fps", "sampling", "expected"),
    [
        (3, 10.0, Sampling(), [0, 1, 2]),
        (10, 10.0, Sampling(max_frames=4), [0, 3, 6, 9]),
        (11, 10.0, Sampling(max_frames=4), [0, 3, 6, 10]),  # 3.33 and 6.67 are truncated
        (3, 10.0, Sampling(max_frames=5), [0, 0, 1, 1, 2]),  # fewer than asked for: they repeat
        (1, 10.0, Sampling(max_frames=3), [0, 0, 0]),
        (9, 10.0, Sampling(max_frames=1), [0]),
        (1, 10.0, Sampling(fps=1.0, max_frames=8), [0]),
        (10, 3.0, Sampling(fps=1.0), [0, 3, 6, 9]),
        (9, 25.0, Sampling(fps=10.0), [0, 2, 4, 6, 8]),  # 2.5 to the even 2
        (9, 35.0, Sampling(fps=10.0), [0, 4, 8]),  # 3.5 to the even 4
        (61, 30000 / 1001, Sampling(fps=1.0), [0, 30, 60]),
        (4, 10.0, Sampling(fps=25.0), [0, 1, 2, 3]),  # faster than the file: every frame
        (9, 3.0, Sampling(fps=1.0, max_frames=3), [0, 3, 6]),  # as many as allowed: left alone
        (9, 3.0, Sampling(fps=1.0, max_frames=3, force=True), [0, 4, 8]),
        (10, 3.0, Sampling(fps=1.0, max_frames=3), [0, 4, 9]),  # one too many
        (3, 3.0, Sampling(fps=1.0, max_frames=4, force=True), [0, 0, 1, 2]),
        (30, 10.0, Sampling(start=2.5), [25, 26, 27, 28, 29]),
        (30, 10.0, Sampling(end=0.3), [0, 1, 2]),
        (30, 10.0, Sampling(fps=5.0, start=1.0, end=2.0), [10, 12, 14, 16, 18]),
        (30, 10.0, Sampling(max_frames=3, start=1.0, end=2.0), [10, 15, 20]),
        (30, 10.0, Sampling(fps=5.0, max_frames=3, start=1.0, end=2.0), [10, 15, 20]),
        (30, 10.0, Sampling(fps=1.0, start=0.5, end=99.0), [5, 15, 25]),
        (30, 10.0, Sampling(max_frames=2, end=99.0), [0, 29]),
        (30, 10.0, Sampling(start=1.0, end=1.05), [10]),  # shorter than a frame
        (30, 10.0, Sampling(start=2.99), [29]),
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
        Sampling(**fields)


def test_sampling_behind_the_end_is_refused(folder):
    """A start that the video does not reach names the file, its frames and its length."""
    with pytest.raises(UserError, match=r"start=3\.0 is behind its end: it has 30 frames, 3 seconds"):
        sample_indices(30, 10.0, Sampling(start=3.0))
    refuse(folder / "video.mp4", "it has 60 frames, 6 seconds", Sampling(start=6.0))


@pytest.mark.parametrize(("frames", "fps"), [(0, 10.0), (5, 0.0), (5, -1.0), (5, float("nan"))])
def test_frames_and_rate_must_be_positive(frames, fps):
    """A caller's mistake, not a user's."""
    with pytest.raises(ValueError, match="must be positive"):
        sample_indices(frames, fps, Sampling())


# ---------------------------------------------------------------------------------------------------------
# Frames


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), list(range(60))),
        (Sampling(max_frames=5), [0, 14, 29, 44, 59]),
        (Sampling(fps=1.0), [0, 10, 20, 30, 40, 50]),
        (Sampling(fps=4.0, start=1.0, end=2.0), [10, 12, 14, 16, 18]),
        (Sampling(fps=1.0, max_frames=4), [0, 19, 39, 59]),
        (Sampling(fps=0.4, max_frames=4, force=True, end=2.0), [0, 6, 13, 20]),
        (Sampling(max_frames=4, start=5.8), [58, 58, 58, 59]),
        (Sampling(start=5.9), [59]),
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
        for index, frame in zip((0, 59), open_kind(folder, kind, Sampling(max_frames=2))):
            np.testing.assert_array_equal(frame, bars(index))
            assert not frame.flags.writeable


def test_colours_come_back(tmp_path):
    """Red is the first channel, and the colour matrix is that of the file."""
    picture = np.zeros((48, 64, 3), np.uint8)
    colours = np.array([[220, 20, 30], [20, 200, 30], [30, 20, 230], [240, 240, 20]])
    for place, colour in enumerate(colours):
        picture[:, 16 * place : 16 * place + 16] = colour
    file = write_video(tmp_path / "video.mp4", [picture] * 3, crf="5")
    frame = next(iter(open_video(file, Sampling())))
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
    clip = open_video(write_video(tmp_path / "video.mp4", 240, gop=240, bf="3"), Sampling())
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
        return sum(isinstance(thing, av.VideoFrame) for thing in gc.get_objects())

    gc.collect()
    clip = open_video(write_video(tmp_path / "video.mkv", 240, bf="3"), Sampling())
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
    clip = open_video(file, Sampling(max_frames=7))
    before = fed()
    assert numbers(clip) == [0, 39, 79, 119, 159, 199, 239]
    some = fed() - before
    monkeypatch.setattr(container, "SKIP", 10**9)
    assert numbers(clip) == [0, 39, 79, 119, 159, 199, 239]
    assert some < 200 < 240 <= fed() - before - some


def test_a_frame_that_is_chosen_twice_is_decoded_once(folder, fed):
    """Three frames shown ten times over feed the decoder with the first few packets only."""
    clip = open_kind(folder, "mp4", Sampling(max_frames=30, end=0.2))
    assert sorted(set(numbers(clip))) == [0, 1, 2]
    assert len(clip) == 30
    frames = list(clip)
    assert sum(a is b for a, b in itertools.pairwise(frames)) == 27


def test_a_clip_travels_to_a_worker(folder):
    """It holds names and numbers, so that pickling and reading it elsewhere gives the same frames."""
    for kind in ("mp4", "gif", "folder"):
        clip = pickle.loads(pickle.dumps(open_kind(folder, kind, Sampling(max_frames=3))))
        assert numbers(clip) == [0, 29, 59]


def test_a_varying_frame_rate_is_sampled_by_index(tmp_path):
    """The average rate stands for it, and the times are the real ones."""
    stamps = [0, 1, 2, 3, 40, 41, 42, 43, 80, 81]
    file = write_video(tmp_path / "video.mp4", 10, stamps=stamps, bf="0")
    clip = open_video(file, Sampling())
    assert numbers(clip) == list(range(10))
    np.testing.assert_allclose(clip.times, np.array(stamps) / 10)
    assert clip.fps == pytest.approx(10 / 8.2, rel=0.02)
    half = open_video(file, Sampling(fps=clip.fps / 5))
    assert numbers(half) == [0, 5]
    np.testing.assert_allclose(half.times, [0.0, 4.1])


def test_an_edit_list_shows_what_players_show(tmp_path):
    """Of a trimmed MP4 the frames before the cut are decoded and neither counted nor returned."""
    file = write_video(tmp_path / "whole.mp4", FRAMES, bf="3", sc_threshold="0")
    cut = remux(file, tmp_path / "cut.mp4", shift=-16, container={"avoid_negative_ts": "disabled"})
    with av.open(str(cut)) as file:
        assert file.streams.video[0].frames == FRAMES  # what the header says
        assert any(packet.is_discard for packet in file.demux(video=0))
    clip = open_video(cut, Sampling())
    assert numbers(clip) == list(range(16, 60))
    assert (clip.frames, clip.times[0]) == (44, 0.0)
    assert numbers(open_video(cut, Sampling(max_frames=3))) == [16, 37, 59]


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
    clip = open_video(remux(whole, tmp_path / "rest.mkv", skip=second), Sampling())
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
    clip = open_video(file, Sampling())
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
        refuse(turn(write_video(tmp_path / "video.mp4", 3), matrix), "at a slant")


def test_frames_without_time_stamps_are_counted(folder, monkeypatch):
    """Then the rate says when they are shown."""

    def unstamped(file, stream, decoded=container._decoded):
        for frame in decoded(file, stream):
            frame.pts = None
            yield frame

    monkeypatch.setattr(container, "_decoded", unstamped)
    clip = open_kind(folder, "avi", Sampling(fps=1.0))
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
    clip = open_video(tmp_path, Sampling())
    assert numbers(clip) == list(range(6))
    np.testing.assert_array_equal(clip.times, np.arange(6.0))  # 1 per second unless said
    assert open_video(tmp_path, Sampling(), frames_fps=3.0).fps == 3.0
    assert numbers(open_video(tmp_path, Sampling(fps=1.0), frames_fps=3.0)) == [0, 3]


def test_a_folder_that_is_no_video_is_refused(tmp_path):
    """Empty, with another file in it, with a damaged frame, of two sizes, or at an impossible rate."""
    refuse(tmp_path, "is a folder without images")
    Image.fromarray(bars(0)).save(tmp_path / "0.png")
    (tmp_path / "notes.json").write_text("{}")
    refuse(tmp_path, "is a folder with 'notes.json' in it, which is no image")
    (tmp_path / "notes.json").unlink()
    Image.fromarray(bars(1, (40, 64))).save(tmp_path / "1.png")
    refuse(tmp_path, "frame 1 has 64x40 pixels and the first has 64x48")
    with pytest.raises(UserError, match="frames_fps=0 must be a positive number"):
        open_video(tmp_path, Sampling(), frames_fps=0)
    (tmp_path / "0.png").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"0\.png' is none of"):
        open_video(tmp_path, Sampling())


def test_an_animation_shows_each_picture_for_its_time(tmp_path):
    """Delays make the times; 0 means a tenth of a second."""
    pictures = [Image.fromarray(bars(index)) for index in range(4)]
    for name in ("video.gif", "video.webp"):
        file = tmp_path / name
        pictures[0].save(
            file, save_all=True, append_images=pictures[1:], duration=[200, 0, 500, 50], lossless=True
        )
        clip = open_video(file, Sampling())
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
    found = list(open_video(file, Sampling()))
    for frame, picture in zip(found, (first, second)):
        expected = np.where(picture[..., 3:] > 0, picture[..., :3], 255)
        np.testing.assert_array_equal(frame, expected)


# ---------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("kind", [*FILES, "gif", "webp"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.97])
def test_a_cut_file_is_refused_when_it_is_opened(kind, share, folder, tmp_path, capfd):
    """No decoder is asked, none of it is returned, and FFmpeg says nothing."""
    whole = (folder / f"video.{kind}").read_bytes()
    file = tmp_path / f"cut.{kind}"
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match="is cut short") as error:
        open_video(file, Sampling(max_frames=1))
    assert repr(str(file)) in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_matroska_file_with_a_piece_missing_is_refused(folder, tmp_path):
    """Bytes taken out of its middle, or written over with zeros; FFmpeg reads both as shorter videos."""
    for kind in ("mkv", "webm"):
        whole = (folder / f"video.{kind}").read_bytes()
        third = len(whole) // 3
        file = tmp_path / f"video.{kind}"
        file.write_bytes(whole[:third] + whole[third + 50 :])
        refuse(file, f"goes on to byte {len(whole)}, but the file has {len(whole) - 50}")
        file.write_bytes(whole[:third] + bytes(third) + whole[2 * third :])
        refuse(file, f"damaged at byte [0-9]+ of {len(whole)}, where no Matroska element begins")


def test_a_matroska_file_of_unknown_length_is_read_and_checked(tmp_path):
    """As a camera writes it that cannot go back: whole it is read, and cut inside a cluster refused."""
    file = write_video(tmp_path / "video.mkv", FRAMES, bf="3", container={"live": "1"})
    assert numbers(open_video(file, Sampling(max_frames=3))) == [0, 29, 59]
    data = file.read_bytes()
    assert b"\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff" in data
    for share in (0.3, 0.6, 0.9):
        file.write_bytes(data[: int(len(data) * share)])
        refuse(file, "is cut short")


def cut_at_a_packet(tmp_path, packets, less=0):
    """An MP4, index first, whose data end behind this many packets, or ``less`` bytes earlier, and say so."""
    file = write_video(tmp_path / "video.mp4", FRAMES, bf="3", container={"movflags": "faststart"})
    with av.open(str(file)) as opened:
        ends = [packet.pos + packet.size for packet in opened.demux(video=0) if packet.size]
    data = bytearray(file.read_bytes())[: ends[packets - 1] - less]
    at = data.index(b"mdat") - 4
    data[at : at + 4] = (len(data) - at).to_bytes(4, "big")
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("packets", [1, 30, 57])
def test_fewer_packets_than_the_header_says_are_refused(packets, tmp_path):
    """Both numbers are in the sentence."""
    refuse(cut_at_a_packet(tmp_path, packets), f"says 60 frames and {packets} are there")


def test_a_packet_that_is_cut_is_refused(tmp_path):
    """Also the last one, with nothing else missing."""
    refuse(cut_at_a_packet(tmp_path, FRAMES, less=3), "is damaged or cut short")


def spoil(file, packet, target):
    """Write zeros over a packet of a video file, the container left as it is."""
    with av.open(str(file)) as opened:
        places = [(packet.pos, packet.size) for packet in opened.demux(video=0) if packet.size]
    data = bytearray(file.read_bytes())
    at, size = places[packet]
    data[at : at + size] = bytes(size)
    target.write_bytes(data)
    return target


def test_a_frame_that_cannot_be_decoded_is_named(folder, tmp_path, capfd):
    """Where the damage lies, out of how many frames; frames before it are still good."""
    file = spoil(folder / "video.mp4", 24, tmp_path / "video.mp4")
    refuse(file, "decoding ends after 2[0-4] of 60 frames")
    assert numbers(open_video(file, Sampling(max_frames=3, end=1.0))) == [0, 5, 10]
    assert capfd.readouterr() == ("", "")


def test_a_decoder_that_gives_too_little_is_caught(folder, monkeypatch):
    """Frames that the container lists and nobody decodes are neither skipped nor replaced by the next."""

    def forgetful(file, stream, decoded=container._decoded):
        return (frame for index, frame in enumerate(decoded(file, stream)) if index != 20)

    monkeypatch.setattr(container, "_decoded", forgetful)
    for kind in ("avi", "h264.avi"):
        refuse(folder / f"video.{kind}", "only 59 of 60 frames can be decoded")
    for kind in ("mp4", "mkv"):
        refuse(folder / f"video.{kind}", "decoding ends after 20 of 60 frames")
        monkeypatch.setattr(container, "SKIP", 10**9)
        refuse(folder / f"video.{kind}", "decoding ends after 20 of 60 frames", Sampling(max_frames=2))


def test_a_damaged_frame_is_refused(folder, monkeypatch):
    """FFmpeg marks a frame that it made from damaged data."""

    class Marked:
        def __init__(self, frame, bad):
            self.frame, self.is_corrupt, self.pts = frame, bad, frame.pts

        def __getattr__(self, name):
            return getattr(self.frame, name)

    def marking(file, stream, decoded=container._decoded):
        return (Marked(frame, index == 7) for index, frame in enumerate(decoded(file, stream)))

    monkeypatch.setattr(container, "_decoded", marking)
    refuse(folder / "video.mkv", "decoding ends after 7 of 60 frames")
    assert numbers(open_kind(folder, "mkv", Sampling(max_frames=2, end=0.6))) == [0, 6]


def test_a_change_of_size_is_refused(tmp_path, monkeypatch):
    """Of frames that are larger than the header says, and before they are converted if too large."""
    headers = {"x264-params": "repeat-headers=1"}
    small = write_video(tmp_path / "small.mp4", 10, bf="0")
    large = write_video(tmp_path / "large.mp4", [bars(i, (64, 96)) for i in range(10)], bf="0", **headers)
    file = join(small, large, tmp_path / "both.mp4")
    refuse(file, "frame 10 has 96x64 pixels and the first has 64x48")
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 64)
    refuse(file, "has 96x64 pixels, more than the limit of 3072")


def test_a_url_is_refused_and_not_opened(tmp_path):
    """Nor anything else that FFmpeg would follow."""
    for url in ("https://example.org/a.mp4", "http://x/y.mkv", "file:///a.mp4", "pipe:0", "concat:a.ts|b.ts"):
        refuse(url, "looks like a URL")


def test_a_playlist_is_refused(folder, tmp_path):
    """Formats that name other files or URLs are none of those that are read."""
    media = folder / "video.mp4"
    for name, text in (
        ("list.m3u8", f"#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n{media}\n#EXT-X-ENDLIST\n"),
        ("list.mp4", f"ffconcat version 1.0\nfile '{media}'\n"),
        ("notes.txt", "nothing moves here\n" * 99),
    ):
        (tmp_path / name).write_text(text)
        refuse(tmp_path / name, "is none of MP4, MOV, .*, GIF, WEBP and no folder of images")


def test_a_missing_or_empty_file_is_refused(tmp_path):
    """Before any decoder is asked."""
    refuse(tmp_path / "absent.mp4", "is not a file")
    (tmp_path / "empty.mp4").touch()
    refuse(tmp_path / "empty.mp4", "is empty")


def test_a_path_may_be_a_string(folder, monkeypatch):
    """Also a relative one."""
    monkeypatch.chdir(folder)
    assert numbers(open_video("video.mp4", Sampling(max_frames=2))) == [0, 59]


def test_sound_alone_is_refused(tmp_path):
    """A cover is no video either."""
    for suffix in ("mp4", "mkv"):
        refuse(write_sound(tmp_path / f"sound.{suffix}"), "has no video stream")
    refuse(write_sound(tmp_path / "covered.mp4", cover=bars(0)), "has no video stream")


def test_an_image_is_refused_as_a_video(tmp_path):
    """Whatever it is called; a GIF or WEBP counts as an image if it does not move."""
    for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP"):
        file = tmp_path / f"{kind}.mp4"
        Image.fromarray(bars(3)).save(file, kind)
        refuse(file, "is an image; use --image")


@pytest.mark.parametrize("kind", FILES)
def test_a_video_is_refused_as_an_image(kind, folder, tmp_path):
    """Whatever it is called."""
    file = tmp_path / "picture.png"
    file.write_bytes((folder / f"video.{kind}").read_bytes())
    with pytest.raises(UserError, match="is a video; use --video") as error:
        read_image(file)
    assert repr(str(file)) in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_size_is_checked_before_decoding(kind, folder, monkeypatch):
    """One pixel too many is refused, and no more."""
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 64)
    open_kind(folder, kind, Sampling(max_frames=1))
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 64 - 1)
    with pytest.raises(UserError, match=f"has 64x48 pixels, more than the limit of {48 * 64 - 1}"):
        open_kind(folder, kind, Sampling(max_frames=1))


def test_an_animation_of_too_many_pixels_is_refused(folder, tmp_path):
    """Above Pillow's own limit too, whose advice is for programmers."""
    data = bytearray((folder / "video.gif").read_bytes())
    for side in (10_001, 65_535):
        data[6:10] = side.to_bytes(2, "little") * 2
        (tmp_path / "video.gif").write_bytes(data)
        refuse(tmp_path / "video.gif", "more .*than the limit of 100000000")


def test_an_encrypted_video_is_refused(tmp_path):
    """Its container is in order."""
    cipher = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "00" * 16, "encryption_kid": "11" * 16}
    file = write_video(tmp_path / "video.mp4", FRAMES, container=cipher)
    refuse(file, "is damaged or encrypted: decoding ends after 0 of 60 frames")


def test_an_unknown_codec_is_refused(folder, tmp_path):
    """The container can be read, its frames not."""
    data = (folder / "video.mkv").read_bytes()
    (tmp_path / "video.mkv").write_bytes(data.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XYZ"))
    refuse(tmp_path / "video.mkv", "needs a decoder that PyAV lacks")


def test_a_video_without_frames_is_refused(folder, tmp_path):
    """The header of a stream whose pieces never came."""
    data = (folder / "video.fragmented.mp4").read_bytes()
    (tmp_path / "video.mp4").write_bytes(data[: data.index(b"moof") - 4])
    refuse(tmp_path / "video.mp4", "has no frame that can be shown")


def test_nonsense_behind_a_good_beginning_is_refused(folder, tmp_path, capfd):
    """One sentence, and nothing of FFmpeg's on stderr."""
    noise = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    for kind in ("mp4", "avi", "mkv"):
        head = (folder / f"video.{kind}").read_bytes()[:512]
        file = tmp_path / f"video.{kind}"
        file.write_bytes(head + noise)
        refuse(file, "cut short|damaged|no video stream")
    assert capfd.readouterr() == ("", "")


def test_without_pyav_the_sentence_says_what_to_install(folder, monkeypatch):
    """Folders and animations are read without it."""
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"run: pip install 'gaze-jax\[video\]'"):
        open_kind(folder, "mp4", Sampling())
    for kind in ("gif", "webp", "folder"):
        assert numbers(open_kind(folder, kind, Sampling(max_frames=2))) == [0, 59]
