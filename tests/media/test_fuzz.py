"""Damaged and odd files by the thousand, with fixed seeds: an array, or one sentence that names the file."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from gaze_jax.errors import UserError
from gaze_jax.media.images import decode_image
from gaze_jax.media.video import FrameSampling, open_video
from tests.helpers.videos import FILES, write_kinds

pytestmark = pytest.mark.long

SIDE = 40


def damaged(data, rng):
    """Bytes changed, cut, doubled, exchanged or put in: what disks, networks and people do to files."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(data)))
        size = int(rng.integers(1, 1 + min(64, len(data) - at)))
        kind = rng.integers(6)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at : at + size] = rng.integers(256, size=size, dtype=np.uint8).tobytes()
        elif kind == 2:
            data[at : at + size] = bytes(size)
        elif kind == 3:
            del data[at : at + size]
        elif kind == 4:
            data[at:at] = data[at : at + size]
        else:
            data = data[: max(at, 1)]
        if len(data) < 2:
            break
    return bytes(data)


def one_sentence(error):
    text = str(error)
    assert "\n" not in text and text.endswith(".") and "Traceback" not in text, text


def pictures():
    """The content of a file of every format and mode."""
    pixels = np.random.default_rng(0).integers(256, size=(SIDE, SIDE, 4), dtype=np.uint8)
    for kind, modes in {
        "JPEG": ("RGB", "L", "CMYK"),
        "PNG": ("RGB", "RGBA", "P", "LA", "1", "I;16"),
        "WEBP": ("RGB", "RGBA"),
        "GIF": ("P", "L"),
        "BMP": ("RGB", "L", "P"),
    }.items():
        for mode in modes:
            image = Image.fromarray(pixels)
            image = (
                Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
                if mode == "I;16"
                else image.convert(mode)
            )
            file = io.BytesIO()
            exif = {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}
            image.save(file, kind, **(exif if kind in ("JPEG", "PNG", "WEBP") else {}))
            yield file.getvalue()


@pytest.mark.parametrize("seed", range(20))
def test_two_thousand_images(seed):
    files = list(pictures())
    rng = np.random.default_rng(seed)
    read = refused = 0
    for number in range(100):
        data = damaged(files[number % len(files)], rng)
        with warnings.catch_warnings(action="error"):
            try:
                found = decode_image(data, "picture.bin")
            except UserError as error:
                one_sentence(error)
                refused += 1
            else:
                assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[-1] == 3
                read += 1
    assert read and refused


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = write_kinds(tmp_path_factory.mktemp("films"))
    return [(folder / f"video.{kind}").read_bytes() for kind in (*FILES, "gif", "webp")]


@pytest.mark.parametrize("seed", range(10))
def test_five_hundred_videos(seed, films, tmp_path, capfd):
    rng = np.random.default_rng(seed)
    file = tmp_path / "film.bin"
    for number in range(50):
        file.write_bytes(damaged(films[number % len(films)], rng))
        try:
            found = list(open_video(file, FrameSampling(max_frames=3)))
        except UserError as error:
            one_sentence(error)
        else:
            assert len(found) == 3 and all(frame.shape[-1] == 3 for frame in found)
    assert capfd.readouterr() == ("", "")
