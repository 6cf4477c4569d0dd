import json

import numpy as np
import PIL.Image
import pytest

from gaze_jax.errors import UserError
from gaze_jax.evaluate.prompts import default_prompts, read_prompts


@pytest.fixture
def folder(tmp_path):
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    (tmp_path / "images").mkdir()
    PIL.Image.fromarray(image).save(tmp_path / "images" / "a.png")
    return tmp_path


def test_the_bundled_photographs_are_asked_about():
    prompts = default_prompts()
    assert len(prompts) == 6
    for prompt in prompts:
        assert prompt.image.shape == (427, 640, 3) and prompt.image.dtype == np.uint8
        assert prompt.question.endswith((".", "?"))
    assert len({(prompt.name, prompt.question) for prompt in prompts}) == 6


def test_images_are_found_beside_the_file(folder, monkeypatch):
    lines = [{"image": "images/a.png", "question": q} for q in ("What?", "Où?")]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    monkeypatch.chdir("/")
    prompts = read_prompts(folder / "p.jsonl")
    assert [(p.name, p.question) for p in prompts] == [("images/a.png", "What?"), ("images/a.png", "Où?")]
    np.testing.assert_array_equal(prompts[0].image.ravel(), np.arange(18))


GOOD = '{"image": "images/a.png", "question": "What?"}'
BAD = {
    "not JSON": ("{image", "is not valid JSON"),
    "a list": ("[1]", "must be a JSON object, not list"),
    "missing": ('{"image": "images/a.png"}', "must have exactly the keys"),
    "unknown": ('{"image": "a", "question": "b", "answer": "c"}', "must have exactly the keys"),
    "number": ('{"image": "images/a.png", "question": 3}', "question=3, which must be a text"),
    "empty": ('{"image": "images/a.png", "question": " "}', "question=' ', which must be a text"),
    "no file": ('{"image": "b.png", "question": "What?"}', r"b\.png' is not a file"),
    "URL": ('{"image": "https://x.org/a.png", "question": "What?"}', "looks like a URL"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_refused_by_its_number(name, folder):
    line, sentence = BAD[name]
    (folder / "p.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD}\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"Line 2 of .*p\.jsonl.*{sentence}") as error:
        read_prompts(folder / "p.jsonl")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, r"cannot be read \(No such file"), (b"", "is empty"), (b'"\xe9"', "is not UTF-8")],
)
def test_a_file_that_holds_no_prompts_is_refused(content, sentence, tmp_path):
    if content is not None:
        (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"p\.jsonl {sentence}"):
        read_prompts(tmp_path / "p.jsonl")
