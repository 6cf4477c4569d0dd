"""Videos that are refused: cut, damaged, of another kind, too large; one sentence each."""

import sys

import numpy as np
import pytest
from PIL import Image

from gaze_jax.errors import UserError
from gaze_jax.media import container, images
from gaze_jax.media.images import read_image
from gaze_jax.media.video import FrameSampling, open_video
from tests.helpers.videos import (
    FILES,
    FRAMES,
    KINDS,
    bars,
    join,
    number,
    numbers,
    open_kind,
    refuse,
    write_kinds,
    write_sound,
    write_video,
)

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same 60 numbered frames in every kind of file."""
    return write_kinds(tmp_path_factory.mktemp("videos"))


@pytest.mark.parametrize("kind", [*FILES, "gif", "webp"])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8, 0.97])
def test_a_cut_file_is_refused_when_it_is_opened(kind, fraction, folder, tmp_path, capfd):
    """No decoder is asked, none of it is returned, and FFmpeg says nothing."""
    whole = (folder / f"video.{kind}").read_bytes()
    file = tmp_path / f"cut.{kind}"
    file.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(UserError, match="is cut short") as error:
        open_video(file, FrameSampling(max_frames=1))
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
    assert numbers(open_video(file, FrameSampling(max_frames=3))) == [0, 29, 59]
    data = file.read_bytes()
    assert b"\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff" in data
    for fraction in (0.3, 0.6, 0.9):
        file.write_bytes(data[: int(len(data) * fraction)])
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
    assert numbers(open_video(file, FrameSampling(max_frames=3, end=1.0))) == [0, 5, 10]
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
        refuse(folder / f"video.{kind}", "decoding ends after 20 of 60 frames", FrameSampling(max_frames=2))


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
    assert numbers(open_kind(folder, "mkv", FrameSampling(max_frames=2, end=0.6))) == [0, 6]


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
        refuse(tmp_path / name, "is none of MP4, MOV, .*, GIF, WEBP and not a folder of images")


def test_a_container_is_opened_as_nothing_else(folder):
    """Even if a list of files came so far as to be opened, FFmpeg would not follow it."""
    file = folder / "list.mp4"
    file.write_text("ffconcat version 1.0\nfile video.mp4\n")
    with av.open(str(file)) as opened:
        assert number(next(opened.decode(video=0)).to_ndarray(format="rgb24")) == 0
    with pytest.raises(UserError, match="cannot be decoded"):
        container.open_container(str(file), "mov")


def test_a_missing_or_empty_file_is_refused(tmp_path):
    """Before any decoder is asked."""
    refuse(tmp_path / "absent.mp4", "is not a file")
    (tmp_path / "empty.mp4").touch()
    refuse(tmp_path / "empty.mp4", "is empty")


def test_a_path_may_be_a_string(folder, monkeypatch):
    """Also a relative one."""
    monkeypatch.chdir(folder)
    assert numbers(open_video("video.mp4", FrameSampling(max_frames=2))) == [0, 59]


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
    open_kind(folder, kind, FrameSampling(max_frames=1))
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 64 - 1)
    monkeypatch.setattr(container, "_decoded", None)
    with pytest.raises(UserError, match=f"has 64x48 pixels, more than the limit of {48 * 64 - 1}"):
        open_kind(folder, kind, FrameSampling(max_frames=1))


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
        open_kind(folder, "mp4", FrameSampling())
    for kind in ("gif", "webp", "folder"):
        assert numbers(open_kind(folder, kind, FrameSampling(max_frames=2))) == [0, 59]
