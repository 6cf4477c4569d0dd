"""generate.py on multimodal checkpoints of each family: a photograph, a film, several turns, and mistakes."""

import numpy as np
import pytest
import skimage.data
from PIL import Image

from tests.helpers import multimodal
from tests.helpers.doors import finish, start
from tests.helpers.videos import write_video

ASK = "--question=What is this?"
PHOTO = skimage.data.astronaut()[:120, :200]


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


@pytest.mark.parametrize("family", multimodal.FAMILIES)
def test_answers_about_a_photograph_and_a_film(family, media, tmp_path):
    """Two turns about both: an answer each, and a picture of the views and frames looked at most."""
    picture = tmp_path / "answer.png"
    flags = [f"--image={media / 'photo.jpg'}", f"--video={media / 'film.mp4'}", "--max_frames=5", "--top_k=3"]
    flags += [
        "--question=What is in <image> and in <video>?",
        "--question=And what colour?",
        "--max_tokens=4",
    ]
    flags += [f"--out={picture}", "--units=3", "--temperature=0.8", "--seed=2"]
    flags += ["--share=group", "--region=3,3", "--video_region=2,3,3", "--newlines=region"]
    checkpoint = multimodal.write(family, tmp_path / "checkpoint")
    out, err = finish(start("generate.py", f"--checkpoint={checkpoint}", *flags))
    assert not err
    assert out.count("\n") >= 2 and len(out.strip()) > 0
    with Image.open(picture) as sheet:
        assert sheet.format == "PNG" and sheet.height > 3 * 200, "three sheets, one under the other"


def test_mistakes_are_said_before_the_checkpoint_is_read(media):
    """One sentence each; there is no checkpoint, and nobody asks for it."""
    photo, film = f"--image={media / 'photo.jpg'}", f"--video={media / 'film.mp4'}"
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
        "lies in a folder that does not exist": [photo, ASK, "--top_k=1", "--out=/nowhere/answer.png"],
    }
    found, waiting = {}, list(cases.items())
    while waiting:  # two at a time
        begun = [(said, start("generate.py", "--checkpoint=nowhere", *flags)) for said, flags in waiting[:2]]
        waiting = waiting[2:]
        found |= {sentence: (process.communicate(timeout=300), process) for sentence, process in begun}
    for sentence, ((out, err), process) in found.items():
        assert process.returncode == 2, (sentence, err)
        assert not out and len(err.strip().splitlines()) == 1, err
        assert sentence in err, err
