"""Questions about images for comparisons: two bundled photographs, or a file of the user's."""

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np

from gaze_jax.errors import UserError
from gaze_jax.media.images import read_image

_QUESTIONS = {
    "china.jpg": (
        "Describe the image in one sentence.",
        "What kind of building is this?",
        "What is behind the building?",
    ),
    "flower.jpg": (
        "Describe the image in one sentence.",
        "What colour are the petals of the flower?",
        "What is at the bottom edge of the picture?",
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One question about one image.

    Attributes:
      name: the image's name, for reports.
      image: uint8 [height, width, 3].
      question: the question.
    """

    name: str
    image: np.ndarray
    question: str


def default_prompts() -> tuple[Prompt, ...]:
    """Three questions about each of scikit-learn's two photographs (credited in NOTICE)."""
    from sklearn.datasets import load_sample_image

    return tuple(
        Prompt(name, np.asarray(load_sample_image(name)), question)
        for name, questions in _QUESTIONS.items()
        for question in questions
    )


def read_prompts(path: str | os.PathLike[str]) -> tuple[Prompt, ...]:
    """Read a JSON Lines file with lines such as ``{"image": "photo.jpg", "question": "What is this?"}``.

    Image paths are relative to the file.

    Raises:
      UserError: the file is missing or empty, a line does not have exactly these two strings, or its image
        cannot be read. The message is one sentence that names the file and the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"Prompts file {str(path)!r} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"Prompts file {str(path)!r} is not UTF-8 text.") from error
    if not lines:
        raise UserError(f"Prompts file {str(path)!r} is empty; write one JSON object per line.")
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(_read_line(path.parent, line))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
    return tuple(prompts)


def _read_line(folder: Path, line: str) -> Prompt:
    try:
        fields: object = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg} at character {error.pos + 1}).") from error
    if not isinstance(fields, dict) or set(fields) != {"image", "question"}:
        raise UserError('each line must be an object with exactly the keys "image" and "question".')
    for name, value in fields.items():
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{name}={value!r} must be a text and not empty.")
    name = fields["image"]
    # A URL is not joined to the folder, so that read_image recognises and refuses it.
    image = read_image(name if re.match(r"^[a-zA-Z][a-zA-Z0-9+.-]+:", name) else folder / name)
    return Prompt(name, image, fields["question"])
