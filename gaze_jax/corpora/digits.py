"""Scenes of real handwritten digits on textures or photographs, with questions about them.

The digits are the UCI handwritten digits that scikit-learn ships; each scene is a grid of them. A scene is a
pure function of (seed, split, index), so workers, resuming and shuffling do not change it.
"""

import dataclasses

import numpy as np

from gaze_jax.config import to_dict
from gaze_jax.corpora.backgrounds import KINDS, PHOTO_CREDIT, cut
from gaze_jax.corpora.glyphs import NATIVE, Glyphs, glyphs
from gaze_jax.corpora.phrases import FAMILIES, PLACE, QUESTIONS
from gaze_jax.data.sample import Box, Image, Sample, Text
from gaze_jax.data.tokenizer import END, Tokenizer

SPLITS = ("train", "test")
# Chalk on a dimmed background: ink is at least this many grey levels lighter than what is behind it.
_CONTRAST = 90.0
_DIM = 0.6


@dataclasses.dataclass(frozen=True)
class DigitsConfig:
    """The scenes and the questions about them.

    Attributes:
      rows, cols: cells of the grid.
      cell: side of a cell in pixels.
      jitter: maximum shift of a digit from the centre of its cell, in pixels.
      background: "texture" or "photo".
      families: weights of the question families "transcribe", "read" and "where" in training.
      reads_per_sample: number of "read" questions per training scene.
      train_scenes: scenes per epoch.
      test_fraction: fraction of the digit images held out from training.
      augment: distort the digits of training scenes.
      few_digits: fraction of training scenes with at most three different digits. In these the answers can
        often be guessed from the digits present, so a model learns to recognise digits before locating them.
    """

    rows: int = 4
    cols: int = 4
    cell: int = 10
    jitter: int = 1
    background: str = "texture"
    families: tuple[float, float, float] = (0.75, 0.25, 0.0)
    reads_per_sample: int = 3
    train_scenes: int = 1_000_000
    test_fraction: float = 0.3
    augment: bool = True
    few_digits: float = 0.5

    def __post_init__(self) -> None:
        checks = (
            (self.rows >= 1 and self.cols >= 1, "rows and cols", "at least 1"),
            (self.rows == self.cols, "rows and cols", "equal: the tower takes square images"),
            (self.cell >= NATIVE, "cell", f"at least {NATIVE}, the size of a digit image"),
            (self.jitter >= 0, "jitter", "0 or more"),
            (self.glyph + 2 * self.jitter <= self.cell, "jitter", f"at most {(self.cell - self.glyph) // 2}"),
            (self.background in KINDS, "background", f"one of {KINDS}"),
            (
                len(self.families) == len(FAMILIES)
                and all(0 <= weight < float("inf") for weight in self.families)
                and sum(self.families) > 0,
                "families",
                f"finite weights of {FAMILIES} with a positive sum",
            ),
            (1 <= self.reads_per_sample <= self.rows * self.cols, "reads_per_sample", "1 to rows * cols"),
            (self.train_scenes >= 1, "train_scenes", "at least 1"),
            (0 < self.test_fraction < 1, "test_fraction", "between 0 and 1"),
            (0 <= self.few_digits <= 1, "few_digits", "between 0 and 1"),
        )
        for fine, name, expected in checks:
            if not fine:
                raise ValueError(f"data.{name} of {self} must be {expected}.")

    @property
    def image_size(self) -> int:
        """Side of a scene in pixels."""
        return self.rows * self.cell

    @property
    def glyph(self) -> int:
        """Side of a drawn digit in pixels: original size in a small cell, enlarged in a large one."""
        return NATIVE if self.cell <= 12 else round(0.8 * self.cell)


def _scene_digits(
    rng: np.random.Generator, config: DigitsConfig, family: str, few: float
) -> tuple[np.ndarray, int]:
    """Digits int [rows, cols], and the flat cell index of a digit that occurs once (for "where").

    ``few`` is the fraction of scenes with at most three different digits.
    """
    cells = config.rows * config.cols
    if family != "where":
        kinds = int(rng.integers(1, 4)) if rng.random() < few else 10
        return rng.permutation(10)[rng.integers(kinds, size=(config.rows, config.cols))], -1
    only, at = int(rng.integers(10)), int(rng.integers(cells))
    others = rng.integers(9, size=cells)
    digits = np.where(others >= only, others + 1, others)
    digits[at] = only
    return digits.reshape(config.rows, config.cols), at


def _compose(
    rng: np.random.Generator, config: DigitsConfig, pool: Glyphs, digits: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``digits``: uint8 [size, size, 3] pixels and float64 [cells, 4] boxes of the ink."""
    rows, cols, cell, side = config.rows, config.cols, config.cell, config.glyph
    pixels = _DIM * cut(rng, config.background, seed, rows * cell, cols * cell)
    cells = rows * cols
    flat = digits.ravel()
    picks = np.array(
        [
            pool.of_digit[d][int(u * len(pool.of_digit[d]))]
            for d, u in zip(flat, rng.random(cells), strict=True)
        ]
    )
    variants = rng.integers(pool.alpha.shape[1], size=cells)
    shift = rng.integers(-config.jitter, config.jitter + 1, size=(cells, 2)) + (cell - side) // 2
    left = np.tile(np.arange(cols) * cell, rows) + shift[:, 0]
    top = np.repeat(np.arange(rows) * cell, cols) + shift[:, 1]
    # [cells, side, side] pixel coordinates of every digit at once.
    y = top[:, None, None] + np.arange(side)[None, :, None]
    x = left[:, None, None] + np.arange(side)[None, None, :]
    behind = pixels[y, x]
    level = behind.mean(axis=(1, 2, 3))
    ink = level + _CONTRAST + rng.random(cells) * (255 - level - _CONTRAST)
    tint = rng.uniform(-25, 25, size=(cells, 3))
    colour = np.clip(ink[:, None] + tint - tint.mean(axis=1, keepdims=True), 0, 255)
    alpha = pool.alpha[picks, variants][..., None]
    pixels[y, x] = behind * (1 - alpha) + colour[:, None, None, :] * alpha
    boxes = pool.ink[picks, variants] + np.stack([left, top, left, top], axis=1)
    return np.clip(pixels, 0, 255).astype(np.uint8), boxes.astype(np.float64)


def _question(rng: np.random.Generator, family: str, **values: int) -> Text:
    phrasings = QUESTIONS[family]
    return Text(phrasings[int(rng.integers(len(phrasings)))].format(**values) + "\n")


def _transcript(digits: np.ndarray, boxes: np.ndarray) -> Text:
    lines, spans, at = [], [], 0
    for r, row in enumerate(digits):
        # The row number marks the position; without it a model must count its way through the answer.
        label = f"{r + 1}:"
        for c in range(len(row)):
            # A digit's token includes the space before it, so the box covers both.
            start = at + len(label) + 2 * c
            spans.append(Box(start, start + 2, tuple(boxes[r * len(row) + c].tolist())))
        lines.append(label + "".join(f" {d}" for d in row))
        at += len(lines[-1]) + 1
    return Text("\n".join(lines) + END, supervised=True, boxes=tuple(spans))


def _parts(
    rng: np.random.Generator,
    config: DigitsConfig,
    family: str,
    turns: int,
    digits: np.ndarray,
    boxes: np.ndarray,
    only: int,
) -> list[Text]:
    if family == "transcribe":
        return [_question(rng, family), _transcript(digits, boxes)]
    if family == "read":
        texts = []
        for at in rng.permutation(digits.size)[:turns]:
            row, column = divmod(int(at), config.cols)
            box = Box(0, 1, tuple(boxes[at].tolist()))
            texts.append(_question(rng, family, row=row + 1, column=column + 1))
            texts.append(Text(f"{digits[row, column]}{END}", supervised=True, boxes=(box,)))
        return texts
    row, column = divmod(only, config.cols)
    place = PLACE.format(row=row + 1, column=column + 1)
    corners = tuple(boxes[only].tolist())
    at_row, at_column = place.index(str(row + 1)), len(place) - len(str(column + 1))
    spans = (
        Box(at_row - 1, at_row + len(str(row + 1)), corners),
        Box(at_column - 1, len(place), corners),
    )
    digit = int(digits[row, column])
    return [_question(rng, family, digit=digit), Text(place + END, supervised=True, boxes=spans)]


def make_sample(config: DigitsConfig, seed: int, split: str, index: int, family: str | None = None) -> Sample:
    """Make scene ``index`` of a split, with its questions and answers.

    Args:
      config: the scenes' config.
      seed: any non-negative integer.
      split: "train" or "test"; they share no digit image.
      index: non-negative integer.
      family: the question's family; None draws one by ``config.families`` and asks several "read" questions.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, SPLITS.index(split), index])))
    turns = 1 if family is not None else config.reads_per_sample
    weights = np.asarray(config.families) / sum(config.families)
    drawn = FAMILIES[int(rng.choice(len(FAMILIES), p=weights))]
    family = drawn if family is None else family
    augment = config.augment and split == "train"
    pool = glyphs(split, config.test_fraction, config.glyph, augment)
    few = config.few_digits if split == "train" else 0.0
    digits, only = _scene_digits(rng, config, family, few)
    pixels, boxes = _compose(rng, config, pool, digits, seed)
    texts = _parts(rng, config, family, turns, digits, boxes, only)
    return Sample(id=index, images=(pixels,), parts=(Image(0), *texts), family=family)


@dataclasses.dataclass(frozen=True)
class DigitScenes:
    """A random-access source of training samples.

    Attributes:
      config: the scenes' config.
      seed: the scenes' seed.
      split: "train" or "test".
    """

    config: DigitsConfig
    seed: int
    split: str

    def __len__(self) -> int:
        return self.config.train_scenes

    def __getitem__(self, index: int) -> Sample:
        return make_sample(self.config, self.seed, self.split, int(index))

    def fingerprint(self) -> dict[str, object]:
        """Everything that decides the samples, JSON-ready."""
        return {"corpus": "digits"} | to_dict(self)


def evaluation_samples(
    config: DigitsConfig, seed: int, family: str, count: int, split: str = "test"
) -> list[Sample]:
    """``count`` samples of one family, one question each, on digit images held out from training."""
    return [make_sample(config, seed, split, index, family) for index in range(count)]


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Maximum text tokens of a training sample, of a question, and of an answer with its end token."""

    sample: int
    question: int
    answer: int


def sequence_lengths(config: DigitsConfig, tokenizer: Tokenizer) -> Lengths:
    """Maximum text lengths over the families with a non-zero weight."""

    def size(text: str) -> int:
        return len(tokenizer.encode(text)[0])

    digits = np.zeros((config.rows, config.cols), np.int64)
    place = {"row": config.rows, "column": config.cols, "digit": 0}
    answers = {
        "transcribe": _transcript(digits, np.zeros((digits.size, 4))).text,
        "read": f"0{END}",
        "where": PLACE.format(**place) + END,
    }
    asked = [family for family, weight in zip(FAMILIES, config.families, strict=True) if weight]
    question = {f: max(size(phrase.format(**place) + "\n") for phrase in QUESTIONS[f]) for f in asked}
    answer = {family: size(answers[family]) for family in asked}
    turns = {"transcribe": 1, "read": config.reads_per_sample, "where": 1}
    longest = max(turns[family] * (question[family] + answer[family]) for family in asked)
    return Lengths(longest, max(question.values()), max(answer.values()))


def credit(config: DigitsConfig) -> str:
    """The credit line for the images in a scene."""
    digits = "Digits: E. Alpaydin and C. Kaynak, UCI, CC BY 4.0."
    return f"{digits} {PHOTO_CREDIT}" if config.background == "photo" else digits
