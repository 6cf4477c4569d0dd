"""Measure every record of a corpus: how long its sample will be, or why it cannot become one.

Rows of training batches are planned from these numbers, so they are kept in the user's cache folder, by
everything that decides them. Records that failed are measured again, in case their media are there now.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gaze_jax.corpora import index as indexes
from gaze_jax.corpora.conversations import Conversations
from gaze_jax.corpora.records import Corpus, Record, RecordError, failing
from gaze_jax.errors import UserError

COLUMNS = ("text", "regions", "images", "slots", "visual", "targets", "left_out")
"""Columns of :attr:`Measurement.numbers`: those of ``data.lengths.Lengths``, then of ``Measured``."""

_CHUNK = 64
"""Records that a worker measures at a time."""
_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """The measured records of a corpus.

    Attributes:
      numbers: int32 [records, columns] of :data:`COLUMNS`; 0 for a record that failed.
      failures: index -> why a record cannot be used.
    """

    numbers: np.ndarray
    failures: dict[int, RecordError]

    @property
    def lengths(self) -> np.ndarray:
        """int32 [records, 4]: text, regions, images and slots."""
        return self.numbers[:, :4]

    @property
    def tokens(self) -> np.ndarray:
        """int64 [records]: tokens of the sequence, visual ones included."""
        return self.numbers[:, 0].astype(np.int64) + self.numbers[:, COLUMNS.index("visual")]


def read(corpus: Corpus, number: int) -> Record:
    """A record of a corpus.

    Raises:
      RecordError: it is malformed, or names a medium that is not there.
    """
    with failing("record"):
        return corpus[number]


def _measured(corpus: Corpus, conversations: Conversations, number: int) -> tuple[int, ...] | RecordError:
    try:
        found = conversations.measure(read(corpus, number))
    except RecordError as error:
        return error
    return (*dataclasses.astuple(found.lengths), found.targets, found.left_out)


def measure_corpus(
    corpus: Corpus,
    conversations: Conversations,
    *,
    workers: int = 1,
    advance: Callable[[int], None] = lambda records: None,
) -> Measurement:
    """Measure every record, or those that the cache does not have.

    Args:
      corpus: from :func:`gaze_jax.corpora.reading.open_corpus`.
      conversations: how records become samples.
      workers: processes that measure.
      advance: called with the number of records that are newly measured.

    Raises:
      UserError: a worker died.
    """
    path = _cached(corpus, conversations)
    numbers, known = _load(path, len(corpus))
    todo = np.flatnonzero(~known)
    advance(len(corpus) - len(todo))
    failures = {}
    for chunk, results in _results(corpus, conversations, todo, workers):
        for number, result in zip(chunk, results, strict=True):
            if isinstance(result, RecordError):
                failures[number] = result
            else:
                numbers[number], known[number] = result, True
        advance(len(chunk))
    if len(todo):
        indexes.keep(path, {"numbers": numbers, "known": known})
    return Measurement(numbers, dict(sorted(failures.items())))


def forget(corpus: Corpus, conversations: Conversations) -> None:
    """Measure every record again, the next time: their media may have changed."""
    with contextlib.suppress(OSError):
        _cached(corpus, conversations).unlink()


def _results(
    corpus: Corpus, conversations: Conversations, todo: np.ndarray, workers: int
) -> Iterator[tuple[Sequence[int], list[tuple[int, ...] | RecordError]]]:
    chunks = [todo[start : start + _CHUNK].tolist() for start in range(0, len(todo), _CHUNK)]
    if workers == 1 or len(chunks) < 2:
        for chunk in chunks:
            yield chunk, [_measured(corpus, conversations, number) for number in chunk]
        return
    # Not a fork: the parent may have threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(corpus, conversations)
    ) as pool:
        try:
            yield from zip(chunks, pool.map(_measure_chunk, chunks))
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                "A process that measured records died, perhaps for want of memory; use fewer workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_work: list[tuple[Corpus, Conversations]] = []
"""What this worker process measures."""


def _start(corpus: Corpus, conversations: Conversations) -> None:
    _work[:] = [(corpus, conversations)]


def _measure_chunk(chunk: Sequence[int]) -> list[tuple[int, ...] | RecordError]:
    ((corpus, conversations),) = _work
    return [_measured(corpus, conversations, number) for number in chunk]


def _cached(corpus: Corpus, conversations: Conversations) -> Path:
    """The file that keeps the measurement."""
    decides = [_VERSION, corpus.fingerprint(), conversations.fingerprint(), len(corpus)]
    name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]
    return indexes.folder() / f"{name}.lengths.npz"


def _load(path: Path, records: int) -> tuple[np.ndarray, np.ndarray]:
    """The cached numbers, and which records have them; none of them if there is no cache."""
    found = indexes.load(path)
    numbers, known = found.get("numbers"), found.get("known")
    if numbers is not None and known is not None and numbers.shape == (records, len(COLUMNS)):
        return numbers, known
    return np.zeros((records, len(COLUMNS)), np.int32), np.zeros(records, bool)
