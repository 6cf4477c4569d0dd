"""The scripts of examples/ run from end to end on a tiny checkpoint of random weights."""

import re
import runpy
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

from gaze_jax.infer.trace_file import load
from tests.helpers.videos import write_video

# One process: the scripts fraction compiled programs.
pytestmark = pytest.mark.xdist_group("examples")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CHECKPOINT = ROOT / "tests" / "fixtures" / "v1" / "converted"
QUESTION = "What is this?"
PHOTO = skimage.data.astronaut()[:120, :200]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a script of examples/ as the main program, in an empty folder; returns what it prints."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PHOTO).save("photo.jpg")

    def call(name, *arguments):
        shared = ("--max_tokens=4", "--gaze_keep=0.25")
        monkeypatch.setattr("sys.argv", [name, str(CHECKPOINT), *arguments, *shared])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_ask_image_says_where_each_token_looked(run):
    out = run("ask_image.py", "photo.jpg", QUESTION, "--out=looked")
    trace = load("looked.gaze")
    assert trace.question == QUESTION and out.startswith(trace.answer)
    found = re.findall(r"(\d+)% of the heads selected the region at \[(.*)\]", out)
    assert len(found) == len(trace.tokens) == 4
    votes = trace.mask().mean(axis=(1, 2)).max(axis=-1)
    height, width = PHOTO.shape[:2]
    for (fraction, box), most in zip(found, votes, strict=True):
        assert int(fraction) == pytest.approx(100 * most, abs=0.51)
        x0, y0, x1, y1 = map(int, box.split(","))
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    assert Path("looked.html").read_text().startswith("<!doctype html>")


def test_steer_selects_in_the_box_only(run):
    out = run("steer.py", "photo.jpg", QUESTION, "0,0,40,30")
    fractions = dict(re.findall(r"(\w+): (\d+)% of the selected regions touch the box", out))
    assert fractions.keys() == {"free", "steered"}
    assert int(fractions["free"]) < 100 and int(fractions["steered"]) == 100


def test_compare_dense_reads_less_with_gaze(run):
    out = run("compare_dense.py", "photo.jpg", QUESTION)
    rows = re.findall(r"(gaze|dense) +([\d.]+) of (\d+) +([\d.]+)   '", out)
    entries = {name: float(read) for name, read, _, _ in rows}
    assert 0 < entries["gaze"] < entries["dense"] == int(rows[0][2])
    assert all(float(spent) > 0 for *_, spent in rows)


def test_stream_video_answers_while_the_video_grows(run, tmp_path):
    write_video(tmp_path / "film.mp4", [PHOTO[:80, 2 * t : 2 * t + 96].copy() for t in range(8)], fps=2)
    out = run("stream_video.py", "film.mp4", QUESTION, "--every=2", "--fps=1")
    seen = re.findall(r"After (\d+) frames, (\d+) regions: (.+)", out)
    assert [int(frames) for frames, _, _ in seen] == [2, 4], "four seconds of video, a frame of each"
    regions = [int(number) for _, number, _ in seen]
    assert regions[0] < regions[1], "each question sees more of the video"


def test_every_example_is_run():
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'run("{path.name}"' in text for path in EXAMPLES.glob("*.py"))
