"""Files of the kinds that people report: odd, and whole. Small ones are in tests/fixtures/cases."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from gaze_jax.errors import UserError
from gaze_jax.media.images import decode_image, read_image, upright_rgb
from gaze_jax.media.jsonl import media_path, parse_object, read_lines
from gaze_jax.media.video import FrameSampling, open_video

CASES = Path(__file__).parents[1] / "fixtures" / "cases"
CORNERS = np.zeros((6, 10, 3), np.uint8)
CORNERS[:3, :5], CORNERS[:3, 5:], CORNERS[3:, :5] = (250, 0, 0), (0, 250, 0), (0, 0, 250)


def write(path, image, **options):
    image.save(path, **options)
    return path


# Orientation


def with_exif(exif):
    """A JPEG with these bytes as EXIF data."""
    file = io.BytesIO()
    Image.fromarray(np.kron(CORNERS, np.ones((8, 8, 1), np.uint8))).save(file, "JPEG", exif=exif, quality=95)
    return file.getvalue()


def tiff(*entries, order="<"):
    """EXIF data of (tag, type, count, four bytes of value)."""
    head = b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    body = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries)
    return head + struct.pack(f"{order}H", len(entries)) + body + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation, order):
    value = struct.pack(f"{order}HH", orientation, 0)
    found = decode_image(with_exif(tiff((0x0112, 3, 1, value), order=order)), "picture")
    turned = {
        1: CORNERS,
        2: CORNERS[:, ::-1],
        3: CORNERS[::-1, ::-1],
        4: CORNERS[::-1],
        5: CORNERS.swapaxes(0, 1),
        6: np.rot90(CORNERS, -1),
        7: CORNERS.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(CORNERS),
    }[orientation]
    assert found.shape == (turned.shape[0] * 8, turned.shape[1] * 8, 3)
    np.testing.assert_allclose(found[4::8, 4::8].astype(int), turned, atol=12)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0nonsense",
        tiff((0x0112, 3, 1, b"\x09\0\0\0")),  # no orientation
        tiff((0x0112, 2, 4, b"six\0")),  # text
        tiff((0x0112, 3, 1, b"\x06\0\0\0"))[:-9],  # cut
        tiff((0x011A, 5, 1, b"\xff\xff\xff\x7f")),  # a fraction far behind the end
    ],
    ids=["no EXIF", "nine", "text", "cut", "offset"],
)
def test_exif_that_cannot_be_read_leaves_the_picture_as_it_is(exif):
    assert decode_image(with_exif(exif), "picture").shape == (48, 80, 3)


def test_whatever_reading_exif_raises_the_picture_is_read(monkeypatch):
    def fail(image):
        raise RuntimeError("odd EXIF")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    np.testing.assert_array_equal(upright_rgb(Image.fromarray(CORNERS)), CORNERS)


def test_other_tags_may_be_malformed():
    """The orientation counts; a resolution that is text does not."""
    data = with_exif(tiff((0x0112, 3, 1, b"\x06\0\0\0"), (0x011A, 2, 4, b"72\0\0")))
    assert decode_image(data, "picture").shape == (80, 48, 3)
    for file in (CASES / "images").iterdir():
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            stored = image.size
        assert sorted(read_image(file).shape[:2]) == sorted(stored)


# Transparency and colour: one rule for images, frames of folders and animations


def test_what_is_transparent_is_white_in_every_kind_of_file(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., :3], pixels[:, :4, 3] = (200, 30, 60), 255  # the right half: a colour that nobody sees
    picture = Image.fromarray(pixels)
    expected = np.where(pixels[..., 3:] > 0, pixels[..., :3], 255)
    static = write(tmp_path / "still.png", picture)
    (tmp_path / "frames").mkdir()
    write(tmp_path / "frames" / "0.png", picture)
    animated = write(
        tmp_path / "moving.webp", picture, save_all=True, append_images=[picture.rotate(90)], lossless=True
    )
    for found in (
        read_image(static),
        *(next(iter(open_video(f, FrameSampling()))) for f in (animated, static.parent / "frames")),
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparency_of_every_kind_of_png(mode, tmp_path):
    """An alpha channel, a palette's entry, or a single colour that counts as transparent."""
    left = np.zeros((4, 8), np.uint8)
    left[:, :4] = 90
    if mode in ("RGBA", "LA"):
        image = Image.fromarray(left).convert(mode)
        image.putalpha(Image.fromarray(np.where(left > 0, 255, 0).astype(np.uint8)))
        file = write(tmp_path / "a.png", image)
    else:
        image = Image.fromarray(left).convert(mode)
        file = write(tmp_path / "a.png", image, transparency=0 if mode != "RGB" else (0, 0, 0))
    found = read_image(file)
    np.testing.assert_array_equal(found[:, :4], 90)
    np.testing.assert_array_equal(found[:, 4:], 255)


def test_half_transparent_is_blended_with_white(tmp_path):
    file = write(tmp_path / "a.png", Image.new("RGBA", (4, 4), (0, 0, 0, 128)))
    np.testing.assert_allclose(read_image(file), 127, atol=1)


# Whole files that a strict reader takes for damaged


def test_a_png_with_large_or_damaged_metadata_is_read(tmp_path):
    """Text beyond Pillow's limit, a colour profile that does not unpack, a wrong checksum behind a text."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 3_000_000, zip=True)
    large = write(tmp_path / "large.png", Image.fromarray(CORNERS), pnginfo=info)
    plain = write(tmp_path / "plain.png", Image.fromarray(CORNERS))
    data = plain.read_bytes()

    def chunk(kind, body, wrong=0):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ wrong)

    behind_header = 8 + 25
    profile = zlib.compress(bytes(5_000_000))
    for name, more in {
        "profile": chunk(b"iCCP", b"huge\0\0" + profile),
        "cut profile": chunk(b"iCCP", b"cut\0\0" + profile[:50]),
        "text": chunk(b"tEXt", b"comment\0text", wrong=1),
    }.items():
        file = tmp_path / f"{name}.png"
        file.write_bytes(data[:behind_header] + more + data[behind_header:])
        np.testing.assert_array_equal(read_image(file), CORNERS, err_msg=name)
    np.testing.assert_array_equal(read_image(large), CORNERS)


def test_a_png_whose_pixels_are_damaged_is_refused(tmp_path):
    """Leaving out its metadata does not hide it."""
    file = write(
        tmp_path / "a.png",
        Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)),
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        read_image(file)


def test_an_animation_without_its_end_mark_is_whole(tmp_path):
    """Browsers show it; one that ends inside a picture is cut."""
    pictures = [Image.fromarray(CORNERS), Image.fromarray(CORNERS[::-1]), Image.fromarray(CORNERS[:, ::-1])]
    file = write(tmp_path / "a.gif", pictures[0], save_all=True, append_images=pictures[1:], duration=100)
    data = file.read_bytes()
    assert data.endswith(b";")
    for more in (data[:-1], data[:-1] + b"\0", data + b"trailing"):
        file.write_bytes(more)
        clip = open_video(file, FrameSampling())
        assert clip.frames == 3
        np.testing.assert_array_equal(list(clip), [np.asarray(p) for p in pictures])
    file.write_bytes(data[:-8])
    with pytest.raises(UserError, match="it ends inside a picture"):
        open_video(file, FrameSampling())


def test_sixteen_bits_are_scaled():
    assert read_image(CASES / "jsonl" / "rgb16.png").shape[-1] == 3


# Names


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["f10", "f2", "f1"], ["f1", "f2", "f10"]),
        (["t1.5", "t1.25", "t0.75", "t10.0"], ["t0.75", "t1.25", "t1.5", "t10.0"]),
        (["v1.10.2", "v1.9.1"], ["v1.9.1", "v1.10.2"]),
        (["1", "01", "001"], ["001", "01", "1"]),
        (["a1b10", "a1b9"], ["a1b9", "a1b10"]),
    ],
)
def test_frames_sort_as_people_count(names, order, tmp_path):
    """Seconds are decimals, versions are not."""
    for place, name in enumerate(order):
        Image.new("L", (4, 4), place * 40).save(tmp_path / f"{name}.png")
    found = [int(frame[0, 0, 0]) // 40 for frame in open_video(tmp_path, FrameSampling())]
    assert found == list(range(len(names)))


def test_a_name_with_a_colon_is_a_file_if_it_exists(tmp_path):
    for name in ("scene:1.png", "12:30.png", "http:x.png"):
        write(tmp_path / name, Image.fromarray(CORNERS))
        np.testing.assert_array_equal(read_image(tmp_path / name), CORNERS)


def test_it_is_one_in_the_working_folder_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "scene:1.png", Image.fromarray(CORNERS))
    np.testing.assert_array_equal(read_image("scene:1.png"), CORNERS)
    with pytest.raises(UserError, match="looks like a URL"):
        read_image("http://example.org/a.png")


# JSON Lines


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (b'\xef\xbb\xbf{"a": 1}\n', [(1, 1)]),
        (b'{"a": 1}\r\n\r\n{"a": 2}\r\n', [(1, 1), (3, 2)]),
        (b'\n  \n{"a": 1}', [(3, 1)]),
        ('{"a": "x\u2028y\x85z"}\n{"a": 2}'.encode(), [(1, "x\u2028y\x85z"), (2, 2)]),
    ],
)
def test_lines_are_read_by_one_rule(content, values, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    found = read_lines(tmp_path / "a.jsonl")
    assert [(number, parse_object(line, "line")["a"]) for number, line in found] == values


@pytest.mark.parametrize("name", ["bom.jsonl", "blank.jsonl"])
def test_the_reported_lines_are_read(name):
    ((_, line),) = read_lines(CASES / "jsonl" / name)
    fields = parse_object(line, "line")
    assert fields == {"image": "a.png", "question": "What?"}
    assert read_image(media_path(CASES / "jsonl" / name, fields["image"])).shape[-1] == 3


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"\xff\xfe{\0", "is not UTF-8 text"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"3", "must be a JSON object, not int"),
    ],
)
def test_other_lines_are_refused(content, match, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=match):
        for number, line in read_lines(tmp_path / "a.jsonl"):
            parse_object(line, f"Line {number}")
