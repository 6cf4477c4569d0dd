"""python -m gaze_jax.viewer as a process."""

import numpy as np
import pytest
from PIL import Image

from gaze_jax.infer.trace_file import load, save
from gaze_jax.viewer.answer_sheet import sheet
from gaze_jax.viewer.html import viewer_page
from tests.helpers.commands import call, finish, refusals, start
from tests.helpers.traces import make_trace


def run(*arguments, status=0):
    return call("-m", "gaze_jax.viewer", *arguments, status=status)


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Two traces in files; the second of another question."""
    folder = tmp_path_factory.mktemp("traces")
    save(make_trace(tokens=("a", " b")), folder / "one.gaze")
    save(make_trace(tokens=("c",), question="And this?", seed=1), folder / "two.gaze.npz")
    return folder


def test_traces_become_pages_sheets_clips_and_an_index(traces, tmp_path):
    """What is printed is what is written, and a page and a sheet are those of the functions."""
    flags = ("--png", "--mp4", "--layer=1", "--seconds=0.2", f"--out={tmp_path / 'new' / 'out'}")
    out, err = run(traces / "one.gaze", traces / "two.gaze.npz", *flags)
    folder = tmp_path / "new" / "out"
    names = [f"{name}.{kind}" for name in ("one", "two") for kind in ("html", "png", "mp4")]
    assert out.split() == [str(folder / name) for name in [*names, "index.html"]]
    assert err == ""
    assert {path.name for path in folder.iterdir()} == {*names, "index.html"}
    trace = load(traces / "one.gaze")
    assert (folder / "one.html").read_text() == viewer_page(trace, layer=1)
    np.testing.assert_array_equal(Image.open(folder / "one.png"), sheet(trace, layer=1, views=8))
    index = (folder / "index.html").read_text()
    assert 'href="one.html"' in index and 'href="two.html"' in index and "And this?" in index


def test_what_was_written_is_indexed_whatever_comes_after_it(traces, tmp_path):
    """A folder where a page should be, or a dense trace that has no sheet: named, and no traceback."""
    (tmp_path / "out" / "two.html").mkdir(parents=True)
    _, err = run(traces / "one.gaze", traces / "two.gaze.npz", f"--out={tmp_path / 'out'}", status=2)
    assert "two.html' cannot be written" in err and err.count("\n") == 1
    assert 'href="one.html"' in (tmp_path / "out" / "index.html").read_text()


MISTAKES = {
    "There is no trace to show": ["--out=OUT"],
    "Give --out": ["ONE"],
    "cannot be read (No such file or directory)": ["absent.gaze", "--out=OUT"],
    "would both write one.html; rename one": ["ONE", "ONE", "--out=OUT"],
    "index.gaze would write index.html, which": ["ONE", "index.gaze", "--out=OUT"],
    "layer=9 must be between 0 and 2": ["ONE", "--out=OUT", "--layer=9"],
    "cannot be a folder": ["ONE", "--out=ONE"],
    "--seconds has no effect without --mp4": ["ONE", "--out=OUT", "--seconds=2", "--png"],
    "--views has no effect without --png or --mp4": ["ONE", "--out=OUT", "--views=2"],
    "--font has no effect without --png or --mp4": ["ONE", "--out=OUT", "--font=a.ttf"],
    "--views=0 must be at least 1": ["ONE", "--out=OUT", "--views=0", "--png"],
    "--font=a.ttf is not a readable TrueType file": ["ONE", "--out=OUT", "--font=a.ttf", "--png"],
    "seconds=0 must be between": ["ONE", "--out=OUT", "--seconds=0", "--mp4"],
    "flag --layer=x: invalid": ["ONE", "--layer=x"],
    "Unknown command line flag 'colour'": ["ONE", "--colour=red"],
}


def test_mistakes_are_one_sentence_each(traces, tmp_path):
    """With status 2, no traceback and nothing written; one trace alone writes its page and no index."""
    calls = [
        [word.replace("OUT", str(tmp_path)).replace("ONE", str(traces / "one.gaze")) for word in arguments]
        for arguments in MISTAKES.values()
    ]
    lines = refusals(["-m", "gaze_jax.viewer", *arguments] for arguments in calls)
    for sentence, line in zip(MISTAKES, lines, strict=True):
        assert sentence in line
    (tmp_path / "right").mkdir()
    out, err = run(traces / "one.gaze", f"--out={tmp_path / 'right'}")
    assert [path.name for path in tmp_path.rglob("*")] == ["right", "one.html"]
    assert (out.split(), err) == ([str(tmp_path / "right" / "one.html")], "")


def test_a_mistake_names_the_command(tmp_path):
    """As it was started, not as Python names its file."""
    out, err = finish(start("-m", "gaze_jax.viewer", "absent.gaze", f"--out={tmp_path}"), status=2)
    assert err.startswith("python -m gaze_jax.viewer: Trace 'absent.gaze' cannot be read") and out == ""
