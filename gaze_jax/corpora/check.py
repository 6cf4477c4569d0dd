"""Check a corpus before training: every record is read, measured, and its media decoded to the last frame.

What training would stumble over after hours is found here in minutes, with the name of each record::

    report = check_corpus(corpus, conversations, config, workers=8)
    print("\\n".join(summary_lines(report)))
"""

import array
import collections
import contextlib
import dataclasses
import functools
import unicodedata
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from gaze_jax.corpora.config import CorpusConfig
from gaze_jax.corpora.conversations import Conversations, Measured
from gaze_jax.corpora.measure import read
from gaze_jax.corpora.records import CAUSES, Corpus, Medium, Record, RecordError, failing
from gaze_jax.corpora.workers import Failure, map_records
from gaze_jax.errors import UserError, first_line
from gaze_jax.media.video import FrameSampling

DUPLICATE = "duplicate"
MEANINGS: Mapping[str, str] = {
    "record": "malformed",
    "missing": "a medium is not there",
    "medium": "a medium cannot be decoded",
    "conversation": "the conversation cannot be rendered",
    "targets": "nothing to learn from",
    "length": "too long",
    DUPLICATE: "the id of an earlier record",
}
"""Cause of a problem -> what is wrong: those of :data:`gaze_jax.corpora.records.CAUSES`, and "duplicate"."""
assert tuple(MEANINGS) == (*CAUSES, DUPLICATE)

SHOWN = 20
"""Problems of a cause that are printed; all are in the report's files."""

_BARS = 30
"""Most bars of a histogram."""
_LONGEST = 600
"""Characters of a message; some quote a conversation."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found of one record.

    Attributes:
      name: where it stands.
      id: its id, "" if it has none.
      cause, message: what is wrong with it; "" if nothing is.
      skipped: it is too long, and left out as ``data.too_long`` tells.
      measured: its lengths, if it is fine or its length is all that is wrong.
    """

    name: str
    id: str = ""
    cause: str = ""
    message: str = ""
    skipped: bool = False
    measured: Measured | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with a record: its index, where it stands, a key of :data:`MEANINGS`, and a sentence."""

    index: int
    name: str
    cause: str
    message: str


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How often values occur.

    Attributes:
      edges: of the bars, one more than ``counts``; a bar includes its first edge, not its last.
      counts: values in each bar.
      log: the edges are spaced by ratios.
      smallest, median, p95, largest, mean: of the values; ``p95`` is the 95th percentile.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    log: bool
    smallest: float
    median: float
    p95: float
    largest: float
    mean: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found of a corpus.

    Attributes:
      records: number of records.
      usable: records that can be trained on; one with the id of another can.
      skipped: records that are too long and left out, with ``data.too_long="skip"``.
      shortened, turns: records that lost turns, and how many, with ``data.too_long="truncate"``.
      targets: tokens to learn from, of all usable records.
      problems: in order of the records.
      histograms: of what is in :data:`QUANTITIES`, if there is any; of the records that are usable or whose
        length is all that is wrong.
    """

    records: int
    usable: int
    skipped: int
    shortened: int
    turns: int
    targets: int
    problems: tuple[Problem, ...]
    histograms: Mapping[str, Histogram]

    @property
    def ok(self) -> bool:
        """Nothing is wrong: training can start. What the settings leave out is not wrong."""
        return not self.problems and self.usable > 0

    @property
    def causes(self) -> dict[str, int]:
        """Number of problems of each cause that there is, in the order of :data:`MEANINGS`."""
        counts = collections.Counter(problem.cause for problem in self.problems)
        return {cause: counts[cause] for cause in MEANINGS if counts[cause]}


QUANTITIES: Mapping[str, str] = {
    "tokens": "tokens of a sample",
    "text": "text-stream tokens of a sample",
    "visual": "visual tokens of a sample",
    "targets": "tokens of a sample to learn",
    "regions": "regions of a sample",
    "images": "images of a sample for the tower",
    "frames": "frames taken of a video",
    "width": "width of an image in pixels",
    "height": "height of an image in pixels",
    "megapixels": "megapixels of an image",
}
"""Key of :attr:`Report.histograms` -> what is counted."""


_UNPRINTED = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's controls, marks of direction and the like, halves of pairs, and separators of lines."""
_JOINERS = "\u200c\u200d"
"""Which scripts and emoji need."""


def plain(text: str) -> str:
    """Text of a corpus on one line, safe on a terminal and in UTF-8: what does not print becomes escapes."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _UNPRINTED and character not in _JOINERS
        else character
        for character in text
    )


def _sentence(message: str) -> str:
    """A message on one line; one that quotes a long text is cut in its middle."""
    line = plain(message)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST * 2 // 3]} ... {line[-_LONGEST // 3 :]}"


def check_corpus(
    corpus: Corpus,
    conversations: Conversations,
    config: CorpusConfig,
    *,
    workers: int = 1,
    advance: Callable[[int], None] = lambda records: None,
) -> Report:
    """Check every record of a corpus, in processes of their own.

    A record that takes longer than ``config.timeout`` seconds, or ends its process, is a problem of cause
    "medium" like others, and the check goes on; for this even one worker is another process.

    Args:
      corpus: from :func:`gaze_jax.corpora.reading.open_corpus`.
      conversations: how records become samples, :meth:`Conversations.of` the same config.
      config: the settings of the run.
      workers: processes.
      advance: called with the number of records that are newly checked.

    Raises:
      UserError: ``workers`` is not positive, or processes cannot be started.
    """
    if workers < 1:
        raise UserError(f"workers={workers} must be at least 1.")
    check = functools.partial(check_record, corpus, conversations, config)
    found = map_records(check, range(len(corpus)), workers=workers, timeout=config.timeout, advance=advance)
    with contextlib.closing(found):
        results = (
            (index, _failed(corpus, index, result, config.timeout) if isinstance(result, Failure) else result)
            for index, result in found
        )
        return _report(corpus, results)


def check_record(corpus: Corpus, conversations: Conversations, config: CorpusConfig, index: int) -> Checked:
    """Check one record, in this process: nothing limits its time.

    Whatever a decoder raises is a problem of the record, so that one record cannot end a check of many.
    """
    record, measured = None, None
    try:
        record = read(corpus, index)
        measured = conversations.measure(record)
        _decode(record, measured, conversations.sampling)
        skipped = _too_long(record, measured, config)
    except RecordError as error:
        name, identity = _names(index, record)
        kept = measured if error.cause == "length" else None
        return Checked(name, identity, error.cause, _sentence(str(error)), measured=kept)
    except Exception as error:
        name, identity = _names(index, record)
        cause = "record" if record is None else "conversation" if measured is None else "medium"
        what = "needs more memory than there is"
        if not isinstance(error, MemoryError):
            what = f"fails in a way that was not foreseen ({type(error).__name__}: {first_line(error)})"
        return Checked(name, identity, cause, _sentence(f"{name} {what}; leave it out, or repair it."))
    return Checked(*_names(index, record), skipped=skipped, measured=measured)


def _names(index: int, record: Record | None) -> tuple[str, str]:
    """A record's name and id, as far as it could be read."""
    return (f"record {index}", "") if record is None else (plain(record.name), record.id)


def _decode(record: Record, measured: Measured, sampling: FrameSampling) -> None:
    """Decode the media of a record: images, and the frames of videos that training takes.

    Raises:
      RecordError: one is damaged. Names the record.
    """
    with failing("medium", record.name):
        for medium in record.images:
            medium.check()
        for number, medium in enumerate(record.videos):
            expected = measured.videos[number][1] if number < len(measured.videos) else None
            _check_frames(medium, record.cut.of(sampling), expected)


def _check_frames(medium: Medium, sampling: FrameSampling, expected: int | None) -> None:
    """Decode a video; one may end early without an error."""
    frames = medium.video(sampling)
    expected = len(frames) if expected is None else expected
    count = sum(1 for _ in frames)
    if count != expected:
        raise UserError(
            f"Video {medium.name!r} gives {count} of the {expected} frames to take; it is damaged."
        )


def _too_long(record: Record, measured: Measured, config: CorpusConfig) -> bool:
    """Whether a sample is left out for its length.

    Raises:
      RecordError: it is too long, and the settings do not leave it out; or it is longer than a row.
    """
    lengths = measured.lengths
    if config.max_tokens is not None and lengths.tokens > config.max_tokens:
        if config.too_long == "skip":
            return True
        raise RecordError(
            "length",
            f"{record.name} has {lengths.tokens} tokens, more than data.max_tokens={config.max_tokens}; "
            "raise it, or set data.too_long to 'truncate' or 'skip'.",
        )
    for field in dataclasses.fields(config.row):
        limit, needed = getattr(config.row, field.name), getattr(lengths, field.name)
        if limit and needed > limit:
            raise RecordError(
                "length",
                f"{record.name} needs a row of {needed} {_ROW[field.name]}, more than "
                f"data.row.{field.name}={limit}; raise it, or leave the record out.",
            )
    return False


_ROW = {"text": "text-stream tokens", "regions": "regions", "images": "images"}


def _failed(corpus: Corpus, index: int, failure: Failure, timeout: float) -> Checked:
    """What is known of a record whose process hung or died: its name, if reading that is not the cause."""
    named = functools.partial(_read_names, corpus)
    ((_, names),) = map_records(named, [index], workers=1, timeout=timeout)  # here it would end the check
    name, identity = _names(index, None) if isinstance(names, Failure) else names
    return Checked(name, identity, "medium", f"{name} {failure.message}; leave it out, or repair it.")


def _read_names(corpus: Corpus, index: int) -> tuple[str, str]:
    try:
        return _names(index, read(corpus, index))
    except Exception:  # whatever it is, it is not why the record is a problem
        return _names(index, None)


def _report(corpus: Corpus, results: Iterable[tuple[int, Checked]]) -> Report:
    """Add up what was found of the records, in their order."""
    problems: list[Problem] = []
    values = {name: array.array("d") for name in QUANTITIES}
    firsts: dict[str, int] = {}
    records = usable = skipped = shortened = turns = targets = 0
    for index, found in results:
        records += 1
        if found.cause:
            problems.append(Problem(index, found.name, found.cause, found.message))
        if found.id and (first := firsts.setdefault(found.id, index)) != index:
            problems.append(_duplicate(corpus, index, first, found))
        if found.measured is not None:
            _add(values, found.measured)
        skipped += found.skipped
        if found.measured is None or found.cause or found.skipped:
            continue
        usable, targets = usable + 1, targets + found.measured.targets
        shortened, turns = shortened + (found.measured.left_out > 0), turns + found.measured.left_out
    histograms = {name: histogram(np.asarray(of_name)) for name, of_name in values.items() if of_name}
    return Report(records, usable, skipped, shortened, turns, targets, tuple(problems), histograms)


def _duplicate(corpus: Corpus, index: int, first: int, found: Checked) -> Problem:
    name = f"record {first}"
    with contextlib.suppress(UserError):
        name = plain(read(corpus, first).name)
    message = f"{found.name} has the id {found.id!r} of {name}; give every record an id of its own."
    return Problem(index, found.name, DUPLICATE, _sentence(message))


def _add(values: dict[str, "array.array[float]"], measured: Measured) -> None:
    """Add the numbers of a record to the values of the histograms."""
    lengths = measured.lengths
    for name in ("tokens", "text", "visual", "regions", "images"):
        values[name].append(getattr(lengths, name))
    values["targets"].append(measured.targets)
    values["frames"].extend(frames for _, frames in measured.videos)
    for height, width in measured.images:
        values["height"].append(height)
        values["width"].append(width)
        values["megapixels"].append(height * width / 1e6)


def histogram(values: np.ndarray) -> Histogram:
    """The histogram of at least one number, none negative, with edges that are easy to read."""
    smallest, largest = float(values.min()), float(values.max())
    median, p95 = (float(found) for found in np.percentile(values, (50, 95), method="higher"))
    whole_numbers = bool(np.all(values == np.round(values)))
    step = 1.0 if whole_numbers else 0.0
    log = smallest > 0 and largest - smallest > _BARS * step and largest > 20 * median
    if log:
        edges = np.geomspace(smallest, max(largest + step, largest * 1.001), _BARS + 1)
        edges = np.unique(np.round(edges)) if whole_numbers else edges
        edges[0], edges[-1] = smallest, max(edges[-1], largest + step)
    else:
        width = max(_nice((largest - smallest + step) / _BARS), step) or 1.0
        first = np.floor(smallest / width)
        edges = (first + np.arange(int(np.floor(largest / width) - first) + 2)) * width
    counts, _ = np.histogram(values, edges)
    return Histogram(
        tuple(map(float, edges)), tuple(map(int, counts)), log, smallest, median, p95, largest, values.mean()
    )


def _nice(width: float) -> float:
    """The least of 1, 2, 5, 10, ... and their fractions that is at least ``width``."""
    if width <= 0:
        return 0.0
    power = 10.0 ** np.floor(np.log10(width))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width * 0.999999))


def summary_lines(report: Report) -> list[str]:
    """The report for a terminal: how many records can be trained on, what is wrong, how long they are."""
    lines = [f"{report.usable} of {report.records} records can be trained on."]
    left_out = left_out_line(report)
    lines += [left_out] if left_out else []
    for cause, count in report.causes.items():
        lines.append(f"{cause} ({MEANINGS[cause]}): {count}")
        of_cause = [problem for problem in report.problems if problem.cause == cause]
        lines += [f"  {problem.message}" for problem in of_cause[:SHOWN]]
        if count > SHOWN:
            lines.append(f"  and {count - SHOWN} more, which check.json lists")
    for name in ("tokens", "regions", "images", "frames"):
        if found := report.histograms.get(name):
            numbers = f"median {found.median:.6g}, 95% up to {found.p95:.6g}, at most {found.largest:.6g}"
            lines.append(f"{QUANTITIES[name]}: {numbers}")
    return lines


def left_out_line(report: Report) -> str:
    """What the settings leave out, as a sentence; empty if that is nothing."""
    parts = []
    if report.skipped:
        parts.append(f"{_count(report.skipped, 'record')} left out for their length")
    if report.turns:
        parts.append(f"{_count(report.turns, 'turn')} left out of {_count(report.shortened, 'record')}")
    return f"As data.too_long tells: {', '.join(parts)}." if parts else ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
