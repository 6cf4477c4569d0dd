"""generate.py on multimodal checkpoints of each family: media, turns, files of questions, and mistakes."""

import json

import numpy as np
import pytest
from PIL import Image

from gaze_jax.infer.steer import LookAt, bias_of
from gaze_jax.infer.trace_file import load
from tests.helpers import multimodal
from tests.helpers.commands import call, refusals
from tests.helpers.videos import write_video

skimage_data = pytest.importorskip("skimage.data")

ASK = "--question=What is this?"
PHOTO = skimage_data.astronaut()[:120, :200]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A photograph, a film of a camera that pans over it, and broken relatives of both."""
    folder = tmp_path_factory.mktemp("media")
    Image.fromarray(PHOTO).save(folder / "photo.jpg")
    Image.fromarray(PHOTO[:, ::-1]).save(folder / "mirror.png")
    frames = [np.ascontiguousarray(PHOTO[10:90, 2 * t : 2 * t + 96]) for t in range(40)]
    write_video(folder / "film.mp4", frames, fps=10)
    whole = (folder / "film.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "empty.png").touch()
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    return folder


# Their conversations are tested in tests/infer; one family shows that the command opens for all.
EACH = [f if f == "cambrian_s" else pytest.param(f, marks=pytest.mark.long) for f in multimodal.FAMILIES]


@pytest.mark.parametrize("family", EACH)
def test_answers_about_a_photograph_and_a_film(family, media, tmp_path):
    """Two turns about both: an answer each; of one family, everything that shows where the second looked."""
    suffixes = (".png", ".html", ".gaze", ".mp4") if family == "cambrian_s" else ()
    files = [tmp_path / f"answer{suffix}" for suffix in suffixes]
    flags = [
        f"--image={media / 'photo.jpg'}",
        f"--video={media / 'film.mp4'}",
        "--max_frames=5",
        "--gaze_top_k=3,2,1",
    ]
    flags += [
        "--question=What is in <image> and in <video>?",
        "--question=And what colour?",
        "--max_tokens=4",
    ]
    flags += [
        *(f"--out={file}" for file in files),
        *["--views=3"] * bool(files),
        "--temperature=0.8",
        "--seed=2",
    ]
    flags += ["--gaze_select_per=kv_head", "--gaze_region=3,3", "--gaze_video_region=2,3,3"]
    flags += ["--gaze_newlines=region", "--top_p=0.9", "--sample_top_k=50"]
    flags += ["--look_at=0,0,50,50", "--look_at_layers=1", "--look_at_bias=2", "--gaze_full_layers=2"]
    flags += [f"--compilation_cache={tmp_path / 'programs'}"]
    checkpoint = multimodal.write(family, tmp_path / "checkpoint")
    out, err = call("generate.py", f"--checkpoint={checkpoint}", *flags)
    assert not err
    assert out.count("\n") >= 2 and len(out.strip()) > 0
    assert any((tmp_path / "programs").iterdir()), "compiled programs are kept"
    if not files:
        return
    with Image.open(files[0]) as sheet:
        assert sheet.format == "PNG" and sheet.height > 3 * 200, "three sheets, one under the other"
    assert files[1].read_text().startswith("<!doctype html>") and files[3].stat().st_size > 1000
    trace = load(files[2])
    assert trace.question == "And what colour?"
    assert len(trace.pictures) == 5, "the photograph, and a frame of each of the four seconds"
    chosen = trace.mask().sum(axis=-1)
    assert trace.top_k == (3, 2, 1) and (chosen[:, 0] == 3).all() and (chosen[:, 1] == 2).all()
    assert (chosen[:, 2] == trace.regions).all(), "the last layer reads all"


def test_answers_a_file_of_questions(media, tmp_path):
    """An answer a line, in order, and a page of each with an index; the cache in the host's memory."""
    checkpoint = multimodal.write("cambrian_s", tmp_path / "checkpoint")
    photo = str(media / "photo.jpg")
    lines = [
        {"question": "What is this?", "images": [photo]},
        {"question": "<image> or <image>?", "images": [photo, str(media / "mirror.png")], "id": "two"}
        | {"gaze_top_k": [2, 1, 1]},
        {"question": "How long?", "videos": [str(media / "film.mp4")], "gaze_keep": 0.5, "max_tokens": 2},
    ]
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text("\n".join(map(json.dumps, lines)))
    flags = [f"--questions={questions}", f"--answers={answers}", f"--traces={tmp_path / 'looked'}"]
    flags += ["--gaze_top_k=2", "--max_tokens=3", "--offload", "--compilation_cache="]
    flags += ["--look_at=0,0,9,9", "--gaze_full_layers=2"]
    out, err = call("generate.py", f"--checkpoint={checkpoint}", *flags)
    assert not err and not out
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["id"] for line in found] == ["1", "two", "3"]
    assert [(line["gaze_top_k"], line.get("gaze_keep")) for line in found] == [
        (2, None),
        ([2, 1, 1], None),
        (None, 0.5),
    ]
    assert found[2]["tokens"] <= 2 and all(line["finish_reason"] in ("stop", "length") for line in found)
    index = (tmp_path / "looked" / "index.html").read_text()
    outside = 0
    for line in found:
        assert f'"{line["id"]}.html"' in index
        trace = load(tmp_path / "looked" / f"{line['id']}.gaze")
        assert trace.answer == line["answer"]
        inside = np.isfinite(bias_of([LookAt.parse("0,0,9,9")], trace.views, 3, trace.regions)[0])
        outside += int((~inside).sum())
        assert inside.any() and not trace.mask()[:, :2, :, ~inside].any() and trace.mask()[:, 2].all()
    assert outside, "or the box restricts nothing"


def test_mistakes_are_said_before_the_checkpoint_is_read(media):
    """One sentence each; there is no checkpoint, and nobody asks for it."""
    photo, film = f"--image={media / 'photo.jpg'}", f"--video={media / 'film.mp4'}"
    many = ["--questions=q.jsonl", "--answers=a.jsonl"]
    lines, plain, boxed = (media / f"{name}.jsonl" for name in ("index", "plain", "boxed"))
    lines.write_text('{"question": "What?", "id": "index"}')
    plain.write_text('{"question": "What?"}')
    boxed.write_text('{"question": "<image> What?", "images": ["a.png"], "look_at": ["0,0,1,1"]}')
    asked = [f"--questions={lines}", f"--answers={media / 'answers.jsonl'}"]
    cases = {
        "has 2 <image> and 0 <video> tags but 1 images": [photo, "--question=<image><image> Which?"],
        "has 1 <image> and 0 <video> tags but 2 images": [photo, photo, "--question=<image> Which?"],
        "is a video; use --video": [f"--image={media / 'film.mp4'}", ASK],
        "cut.mp4' is cut": [f"--video={media / 'cut.mp4'}", ASK],
        "is empty (0 bytes)": [f"--image={media / 'empty.png'}", ASK],
        "looks like a URL": ["--image=https://example.org/cat.png", ASK],
        "has more pixels than the limit": [f"--image={media / 'huge.png'}", ASK],
        "The question is empty": [film, "--question="],
        "--fps has no effect without --video": [photo, ASK, "--fps=1"],
        "lies in a folder that does not exist": [photo, ASK, "--gaze_top_k=1", "--out=/nowhere/answer.png"],
        "must end in one of .html": [photo, ASK, "--gaze_top_k=1", "--out=answer.txt"],
        "look_at='1,2,3' must be": [photo, ASK, "--gaze_top_k=1", "--look_at=1,2,3"],
        "q.jsonl cannot be read (No such file or directory); give a": [
            "--questions=q.jsonl",
            "--answers=a.jsonl",
        ],
        "--look_at_layers is for one conversation": [*many, "--look_at=0,0,9,9", "--look_at_layers=1"],
        "--layer has no effect without --traces": [*asked, "--layer=1"],
        "--answers is the file of --questions": [f"--questions={lines}", f"--answers={lines}"],
        "is a folder; give the name of a file": [f"--questions={lines}", f"--answers={media}"],
        "'index' is taken, rename it": [*asked, f"--traces={media / 'looked'}"],
        "cannot be a folder": [f"--questions={plain}", asked[1], f"--traces={plain}"],
        "Question '1': look_at has no effect with gaze_dense": [
            f"--questions={boxed}",
            asked[1],
            "--gaze_dense",
        ],
        "--seed has no effect at --temperature=0": [photo, ASK, "--seed=1"],
        "--gaze_top_k has no effect without --image or --video": [ASK, "--gaze_top_k=1"],
        "--views has no effect without --out=....png": [photo, ASK, "--out=a.html", "--views=2"],
        "--layer has no effect without an --out": [photo, ASK, "--out=a.gaze", "--layer=2"],
        "--folder_fps has no effect without a --video that is a folder": [film, ASK, "--folder_fps=2"],
        "nowhere is not a directory; give a checkpoint": [photo, ASK, "--gaze_top_k=1"],
    }
    lines = refusals(["generate.py", "--checkpoint=nowhere", *flags] for flags in cases.values())
    for sentence, line in zip(cases, lines, strict=True):
        assert sentence in line
