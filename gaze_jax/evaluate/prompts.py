"""Questions about images for comparisons: two bundled photographs, or a file of the user's."""

import dataclasses
import os

import numpy as np

from gaze_jax.corpora import bundled
from gaze_jax.errors import UserError
from gaze_jax.media.images import read_image
from gaze_jax.media.jsonl import media_path, parse_object, read_lines

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
    return tuple(
        Prompt(name, bundled.photo(name), question)
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
    prompts = []
    for number, line in read_lines(path):
        name = f"Line {number} of {os.fspath(path)}"
        fields = parse_object(line, name)
        if set(fields) != {"image", "question"}:
            raise UserError(f'{name} must have exactly the keys "image" and "question".')
        for key, value in fields.items():
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{name} has {key}={value!r}, which must be a text and not empty.")
        try:
            image = read_image(media_path(path, fields["image"]))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        prompts.append(Prompt(fields["image"], image, fields["question"]))
    return tuple(prompts)
