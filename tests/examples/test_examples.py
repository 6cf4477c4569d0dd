"""The scripts of examples/ run from end to end on a tiny checkpoint of random weights."""

import re
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

from gaze_jax.infer.trace_file import load
from tests.helpers.commands import outcomes
from tests.helpers.videos import write_video

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "fixtures" / "v1" / "converted"
QUESTION = "What is this?"
PHOTO = skimage.data.astronaut()[:120, :200]
ARGUMENTS = {
    "ask_image.py": ("photo.jpg", QUESTION, "--out=answer"),
    "steer.py": ("photo.jpg", QUESTION, "0,0,40,30"),
    "compare_dense.py": ("photo.jpg", QUESTION),
    "stream_video.py": ("film.mp4", QUESTION, "--every=2", "--fps=1"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("examples")
    Image.fromarray(PHOTO).save(made / "photo.jpg")
    write_video(made / "film.mp4", [PHOTO[:80, 2 * t : 2 * t + 96].copy() for t in range(8)], fps=2)
    return made


@pytest.fixture(scope="module")
def printed(folder):
    """What each example prints; one process imports for all of them."""

    def placed(argument):
        """File names as paths in the folder."""
        return re.sub(r"^(--out=)?(photo\.jpg|film\.mp4|answer)$", rf"\g<1>{folder}/\g<2>", argument)

    calls = [
        (ROOT / "examples" / name, CHECKPOINT, *map(placed, arguments), "--max_tokens=4", "--gaze_keep=0.25")
        for name, arguments in ARGUMENTS.items()
    ]
    found = {}
    for name, (status, out, err) in zip(ARGUMENTS, outcomes(calls), strict=True):
        assert status == 0 and not err, (name, status, out, err)
        found[name] = out
    return found


def test_every_example_is_run():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(ARGUMENTS)


def test_ask_image_says_where_each_token_looked(printed, folder):
    trace = load(folder / "answer.gaze")
    assert trace.question == QUESTION and printed["ask_image.py"].startswith(trace.answer)
    boxes = re.findall(r"(\d+)% of the heads selected the region at \[(.*)\]", printed["ask_image.py"])
    assert len(boxes) == len(trace.tokens) == 4
    votes = trace.mask().mean(axis=(1, 2)).max(axis=-1)
    for (share, box), most in zip(boxes, votes, strict=True):
        assert int(share) == pytest.approx(100 * most, abs=0.51)
        x0, y0, x1, y1 = map(int, box.split(","))
        assert x0 < x1 and y0 < y1
    assert (folder / "answer.html").read_text().startswith("<!doctype html>")


def test_steer_selects_in_the_box_only(printed):
    shares = dict(re.findall(r"(\w+): (\d+)% of the selected regions touch the box", printed["steer.py"]))
    assert shares.keys() == {"free", "steered"}
    assert int(shares["free"]) < 100 and int(shares["steered"]) == 100


def test_compare_dense_reads_less_with_gaze(printed):
    rows = re.findall(r"(gaze|dense) +([\d.]+) of (\d+) +([\d.]+)   '", printed["compare_dense.py"])
    entries = {name: float(read) for name, read, _, _ in rows}
    assert 0 < entries["gaze"] < entries["dense"] == int(rows[0][2])
    assert all(float(spent) > 0 for *_, spent in rows)


def test_stream_video_answers_while_the_video_grows(printed):
    seen = re.findall(r"After (\d+) frames, (\d+) regions: (.+)", printed["stream_video.py"])
    assert [int(frames) for frames, _, _ in seen] == [2, 4], "four seconds of video, a frame of each"
    regions = [int(number) for _, number, _ in seen]
    assert regions == sorted(set(regions)), "each question sees more of the video"
