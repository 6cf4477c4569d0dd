"""The settings of training on a corpus: what is read, how it fills rows, what happens to bad records."""

import dataclasses
import math

from gaze_jax.corpora.reading import PROMPT

TOO_LONG = ("error", "truncate", "skip")
BAD = ("error", "skip")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One of several corpora that are mixed.

    Attributes:
      path, media, prompt: as in :class:`CorpusConfig`.
      weight: how often an epoch takes each of its records: 1 once, 2 twice, 0.5 half of them, chosen by the
        seed.
    """

    path: str
    media: tuple[str, ...] = ()
    prompt: str = PROMPT
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """Sizes of a row of a batch; 0 lets the plan choose from the corpus.

    Attributes:
      text: tokens of the text stream.
      regions: regions of visual tokens.
      images: images that the tower reads: whole images, tiles, frames.
    """

    text: int = 0
    regions: int = 0
    images: int = 0


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Training on records with images and videos; docs/data.md describes what can be read.

    Attributes:
      path: a file, a folder, or a pattern such as "shards/*.tar"; empty if ``sources`` is given.
      media: for JSON: the folder, or the plain tars, that hold the media.
      prompt: what is asked of media that come with a caption.
      sources: several corpora to mix, instead of ``path``.
      system: system prompt of records without one; None takes the model family's.
      fps, max_frames: frames of a video to take per second, and at most; None takes the model family's.
      max_tokens: most tokens of a sample, visual and text; None: no limit.
      too_long: what happens to a longer sample. "error": the run does not start. "truncate": its last turns
        are left out, never a part of one. "skip": it is left out.
      holdout: fraction of the records, of at least 0 and less than 1, that are never trained on but evaluated
        every ``eval_every`` steps. Chosen by a hash of a record's index in its source, so that appending
        records changes nothing for those that were there.
      pack: put several samples into one row.
      row: sizes of a row.
      epochs: how often training takes the corpus if ``steps`` is 0.
      buckets: most shapes of a row; each is compiled once.
      bad: what happens to a record that cannot be read. "error": it ends the run, by name. "skip": its place
        stays empty, and it is counted and listed in skipped.jsonl.
      max_bad: with "skip", the largest fraction of bad records among those read so far; more end the run.
      timeout: seconds without a batch after which the run ends, naming the record that is being read.
      worker_memory: GB that a worker may allocate.
    """

    path: str = ""
    media: tuple[str, ...] = ()
    prompt: str = PROMPT
    sources: tuple[SourceConfig, ...] = ()
    system: str | None = None
    fps: float | None = None
    max_frames: int | None = None
    max_tokens: int | None = None
    too_long: str = "error"
    holdout: float = 0.0
    pack: bool = True
    row: RowConfig = RowConfig()
    epochs: float | None = None
    buckets: int = 1
    bad: str = "error"
    max_bad: float = 0.01
    timeout: float = 600.0
    worker_memory: float = 4.0

    def __post_init__(self) -> None:
        numbers = (
            self.max_bad,
            self.timeout,
            self.worker_memory,
            *(source.weight for source in self.sources),
        )
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"data has a number that is not finite: {numbers}.")
        sizes = (self.row.text, self.row.regions, self.row.images)
        checks = (
            (not (self.path and self.sources), "path", self.path, "empty if data.sources is given"),
            (self.path != "" or not self.media, "media", self.media, "empty without data.path"),
            (all(source.path for source in self.sources), "sources", self.sources, "with a path each"),
            (
                all(source.weight > 0 for source in self.sources),
                "sources",
                [source.weight for source in self.sources],
                "of positive weights",
            ),
            (self.fps is None or 0 < self.fps < math.inf, "fps", self.fps, "positive"),
            (self.max_frames is None or self.max_frames >= 1, "max_frames", self.max_frames, "at least 1"),
            (self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1"),
            (self.too_long in TOO_LONG, "too_long", self.too_long, f"one of {TOO_LONG}"),
            (
                self.max_tokens is not None or self.too_long == "error",
                "too_long",
                self.too_long,
                "'error' without data.max_tokens, since nothing is too long then",
            ),
            (min(sizes) >= 0, "row", sizes, "sizes of 0 or more"),
            (self.epochs is None or 0 < self.epochs < math.inf, "epochs", self.epochs, "positive"),
            (0 <= self.holdout < 1, "holdout", self.holdout, "a fraction of at least 0 and less than 1"),
            (self.buckets >= 1, "buckets", self.buckets, "at least 1"),
            (self.bad in BAD, "bad", self.bad, f"one of {BAD}"),
            (0 <= self.max_bad <= 1, "max_bad", self.max_bad, "between 0 and 1"),
            (self.timeout > 0, "timeout", self.timeout, "a positive number of seconds"),
            (self.worker_memory > 0, "worker_memory", self.worker_memory, "a positive number of GB"),
        )
        for fine, name, value, expected in checks:
            if not fine:
                raise ValueError(f"data.{name}={value!r} must be {expected}.")

    @property
    def parts(self) -> tuple[SourceConfig, ...]:
        """The corpora to read: those of ``sources``, or the one of ``path``."""
        return self.sources or (SourceConfig(self.path, self.media, self.prompt),)
