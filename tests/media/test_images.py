import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from gaze_jax.errors import UserError
from gaze_jax.media import images
from gaze_jax.media.images import FORMATS, check_image, read_image

LOSSLESS = {"WEBP": {"lossless": True, "exact": True}, "JPEG": {"quality": 95, "subsampling": 0}}


def picture(height=24, width=32):
    """A few flat colours, so that a palette holds them and JPEG hardly changes them."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (200, 30, 40)
    pixels[height // 2 :, width // 2 :] = (20, 90, 250)
    return pixels


def write(file, pixels, kind, mode="RGB", **options):
    Image.fromarray(pixels).convert(mode).save(file, kind, **{**LOSSLESS.get(kind, {}), **options})
    return file


def png(width, height):
    """A PNG that says how large it is and holds next to nothing."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def refusal(read, file):
    """The message with which a file is refused; None if it is not."""
    try:
        read(file)
    except UserError as error:
        return str(error)
    return None


def refuse(file, match):
    """The error is one sentence that names the file."""
    with pytest.raises(UserError, match=match) as error:
        read_image(file)
    assert refusal(check_image, file) == str(error.value)
    assert repr(str(file)) in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_decodes_whatever_the_file_is_called(kind, tmp_path):
    pixels = picture()
    for name in (f"picture.{kind.lower()}", "no-extension", "wrong.txt"):
        found = read_image(write(tmp_path / name, pixels, kind))
        assert (found.dtype, found.shape) == (np.uint8, pixels.shape)
        # The edges between the colours are where JPEG differs.
        close = np.abs(found.astype(int) - pixels).max(-1) <= (8 if kind == "JPEG" else 0)
        assert close.mean() > (0.9 if kind == "JPEG" else 0.999)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode, tmp_path):
    grey = np.zeros((8, 8, 3), np.uint8)
    grey[:, 4:] = 255
    kind = "JPEG" if mode == "CMYK" else "PNG"
    found = read_image(write(tmp_path / "picture", grey, kind, mode=mode))
    assert (found.dtype, found.shape) == (np.uint8, grey.shape)
    assert np.abs(found.astype(int) - grey).max() <= 2


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.fromarray(picture()), Image.fromarray(picture()[::-1])]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "moves.gif"), picture())


def test_a_path_may_be_a_string(tmp_path):
    file = write(tmp_path / "picture.png", picture(), "PNG")
    np.testing.assert_array_equal(read_image(str(file)), read_image(file))


@pytest.mark.parametrize(
    "url",
    ["https://example.org/cat.png", "http://x/y.jpg", "FILE:///cat.png", "s3://bucket/cat.png", "data:,"],
)
def test_a_url_is_refused(url):
    refuse(url, "looks like a URL")


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    refuse(tmp_path / "absent.png", "is not a file")
    refuse(tmp_path, "is not a file")


def test_an_empty_file_is_refused(tmp_path):
    file = tmp_path / "empty.png"
    file.touch()
    refuse(file, "is empty")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9])
def test_a_truncated_file_is_refused(kind, fraction, tmp_path):
    file = tmp_path / "cut"
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    whole = write(tmp_path / "whole", noise, kind).read_bytes()
    file.write_bytes(whole[: int(len(whole) * fraction)])
    refuse(file, "is none of|cannot be decoded")


def test_what_is_no_image_is_refused_whatever_it_is_called(tmp_path):
    file = tmp_path / "notes.png"
    for content in (
        b"not an image",
        b"\0" * 1000,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7\n",
    ):
        file.write_bytes(content)
        refuse(file, "is none of")


def test_a_pickle_is_refused_and_not_run(tmp_path):
    file, trace = tmp_path / "model.png", tmp_path / "trace"
    # Protocol 0 by hand: unpickling it would make the folder.
    file.write_bytes(f"cos\nmkdir\n(V{trace}\ntR.".encode())
    refuse(file, "is none of")
    assert not trace.exists()


def test_formats_that_are_not_listed_are_refused(tmp_path):
    for kind in ("TIFF", "PPM", "ICO"):
        refuse(write(tmp_path / "picture.png", picture(), kind), "is none of JPEG, PNG")


def test_size_is_checked_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 24 * 32)
    file = write(tmp_path / "picture.png", picture(), "PNG")
    assert read_image(file).shape == (24, 32, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 24 * 32 - 1)
    refuse(file, f"has 32x24 pixels, more than the limit of {24 * 32 - 1}")
    # Nothing to decode: a decoder that began would complain of that instead.
    file.write_bytes(png(32, 24))
    refuse(file, "more than the limit")
    monkeypatch.undo()
    refuse(file, "cannot be decoded")


@pytest.mark.parametrize("side", [10_001, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused(side, tmp_path):
    file = tmp_path / "bomb.png"
    file.write_bytes(png(side, side))
    assert side**2 > images.MAX_PIXELS
    refuse(file, "pixels")


def test_a_damaged_header_is_the_users_to_mend(tmp_path):
    data = bytearray(write(tmp_path / "picture", picture(), "PNG").read_bytes())
    data[8:12] = (5).to_bytes(4, "big")  # length of IHDR
    (tmp_path / "picture").write_bytes(data)
    refuse(tmp_path / "picture", "damaged")


def test_sixteen_bits_are_scaled(tmp_path):
    grey = np.array([[0, 0x4000], [0x8000, 0xFFFF]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png")[..., 0].tolist() == [[0, 0x40], [0x80, 0xFF]]


def test_a_photograph_is_turned_the_way_its_camera_was(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned clockwise by 90 degrees
    Image.fromarray(picture()).save(tmp_path / "phone.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "phone.png"), np.rot90(picture(), -1))


KINDS = {
    "JPEG": {"quality": 80},
    "JPEG progressive": {"progressive": True},
    "JPEG 4:4:4": {"subsampling": 0},
    "JPEG CMYK": {},
    "PNG": {},
    "PNG LA": {},
    "WEBP": {"lossless": False},
    "GIF P": {},
    "BMP": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_refuses_what_reading_refuses(kind, tmp_path):
    """Cut at every byte near the end and at some before, or damaged; with the same words."""
    name, *mode = kind.split()
    mode = mode[0] if mode and mode[0].isupper() else "RGB"
    pixels = np.random.default_rng(0).integers(256, size=(40, 56, 3), dtype=np.uint8)
    file = write(tmp_path / "a", pixels, name, mode, **KINDS[kind])
    data, rng = file.read_bytes(), np.random.default_rng(1)
    tried = [data, *(data[:-n] for n in range(1, 30)), *(data[:n] for n in rng.integers(1, len(data), 20))]
    for _ in range(40):
        damaged = bytearray(data)
        for at in rng.integers(len(data), size=3):
            damaged[at] = rng.integers(256)
        tried.append(bytes(damaged))
    found = []
    for content in tried:
        file.write_bytes(content)
        found.append(refusal(read_image, file))
        assert refusal(check_image, file) == found[-1]
    assert found[0] is None and sum(message is not None for message in found) > 10


def test_the_check_computes_few_pixels(tmp_path, monkeypatch):
    """Of a JPEG, also of one with fewer than eight pixels a side."""
    sizes, load = [], ImageFile.ImageFile.load

    def recorded(self):
        sizes.append(self.size)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", recorded)
    for side in (800, 5):
        check_image(write(tmp_path / "a", picture(side, side), "JPEG"))
    assert sizes[0] == (100, 100) and sizes[-1] <= (5, 5)
