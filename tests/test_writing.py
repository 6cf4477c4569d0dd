"""Files are written as a whole or not at all, on a disk that really refuses."""

import os

import pytest

from gaze_jax.errors import UserError
from gaze_jax.viewer.files import write_trace
from gaze_jax.writing import replacing, write_text
from tests.helpers.disks import full_after
from tests.helpers.traces import make_trace

SUFFIXES = (".html", ".png", ".mp4", ".gaze", ".txt")


def write(path):
    """A file of more than 2 kB, by its suffix."""
    if path.suffix == ".mp4":
        pytest.importorskip("av")
    if path.suffix == ".txt":
        write_text(path, "line\n" * 1000)
    else:
        write_trace(make_trace(), path)


@pytest.mark.parametrize(
    ("suffix", "older"),
    [
        *((suffix, True) for suffix in SUFFIXES),
        *((".gaze", False), (".txt", False)),
        *(pytest.param(suffix, False, marks=pytest.mark.long) for suffix in (".html", ".png", ".mp4")),
    ],
)
def test_a_full_disk_leaves_what_was_there(suffix, older, tmp_path):
    """One sentence, no half of a file under any name; with room again, the file is written."""
    path = tmp_path / f"a{suffix}"
    if older:
        path.write_text("older")
    for size in (0, 2000):
        with full_after(size), pytest.raises(UserError) as error:
            write(path)
        message = str(error.value)
        assert message.endswith(f"{str(path)!r} cannot be written (File too large).") and "\n" not in message
        there = {file.name: file.read_text() for file in tmp_path.iterdir()}
        assert there == ({path.name: "older"} if older else {})
    write(path)
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_size > 2000


def test_an_error_of_the_writer_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_text("older")
    with pytest.raises(KeyError), replacing(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


def test_links_stay_links_and_devices_devices(tmp_path):
    """What they lead to is written."""
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "folder" / "file")
    for text in ("one", "two"):
        write_text(link, text)
        assert link.is_symlink() and (tmp_path / "folder" / "file").read_text() == text
    write_text(os.devnull, "text")
    assert not os.path.isfile(os.devnull)
    with pytest.raises(UserError, match=r"'/dev/full' cannot be written \(No space left on device\)"):
        write_text("/dev/full", "text" * 9999)
    with pytest.raises(UserError, match=r"nowhere/a' cannot be written \(No such file"):
        write_text(tmp_path / "nowhere" / "a", "text")
