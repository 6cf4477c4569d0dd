"""A corpus as a run trains on it: opened, measured, planned, and taken batch by batch."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import queue
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import numpy as np

from gaze_jax.corpora.batches import BatchOrder, LoadBatch, LoadedBatch
from gaze_jax.corpora.busy import busy
from gaze_jax.corpora.config import CorpusConfig
from gaze_jax.corpora.conversations import Conversations
from gaze_jax.corpora.measure import Measurement, measure_corpus
from gaze_jax.corpora.reading import Joined, open_corpus
from gaze_jax.corpora.records import Corpus, RecordError
from gaze_jax.data.pipeline import prefetched
from gaze_jax.data.placement import Arrays
from gaze_jax.data.plan import Limits, RowPlan, make_plan
from gaze_jax.errors import UserError, renamed
from gaze_jax.train.config import Experiment
from gaze_jax.train.holdout import held_out, lowest
from gaze_jax.train.start import Start

SKIPPED = "skipped.jsonl"
"""File of a run with the records that were left out, and why."""

_ENDLESS = 2**62
_CLOSING = 10.0
"""Seconds for the record that this process is reading when it stops."""
_ENOUGH = 100
"""Records after which the fraction of bad ones counts."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingCorpus:
    """What a run trains on.

    Attributes:
      config: the settings.
      corpus, conversations: the records, and how they become samples.
      measurement: their lengths, and why some cannot be used.
      plan: which samples each row of a batch holds.
      order: which rows each batch holds.
      held_out: int64 [n], records that are not in the plan, for evaluation.
    """

    config: CorpusConfig
    corpus: Corpus
    conversations: Conversations
    measurement: Measurement
    plan: RowPlan
    order: BatchOrder
    held_out: np.ndarray

    def steps(self) -> int:
        """Steps that ``data.epochs`` take."""
        return max(1, round((self.config.epochs or 0) * self.order.epoch_batches))

    def fingerprint(self) -> dict[str, object]:
        """Everything that decides the batches, as JSON-ready values; long ones as digests."""
        parts = self.conversations.fingerprint()
        held = {"holdout": self.config.holdout} if self.config.holdout else {}
        return held | {
            "corpus": _digest(self.corpus.fingerprint()),
            "records": len(self.corpus),
            **parts,
            "template": _digest(parts["template"]),
            "rows": len(self.plan),
            "plan": self.plan.digest(),
            "batch_size": self.order.batch_size,
            "seed": self.order.seed,
        }

    def evaluation(self, samples: int) -> "TrainingCorpus":
        """The part that is evaluated: at most ``samples`` of the held-out records, in one shape of row.

        Raises:
          UserError: none can be read.
        """
        entries = lowest(self.held_out, samples)
        if not len(entries):
            raise UserError(
                f"data.holdout={self.config.holdout:g} holds out none of the {len(self.corpus)} records; "
                "raise it, or set eval_every=0."
            )
        plan = _planned(self.config, self.measurement, entries, seed=0, buckets=1)
        return dataclasses.replace(self, plan=plan, order=BatchOrder(plan, self.order.batch_size, 0))

    def summary(self) -> list[str]:
        """Lines for the start of a run: how many records, in which rows, and how full these are."""
        used, all_of_them = len(np.unique(self.plan.samples)), len(self.corpus)
        lines = [
            f"{used:,} of {all_of_them:,} records in {len(self.plan):,} rows; an epoch is "
            f"{self.order.epoch_batches:,} batches"
        ]
        if self.config.holdout:
            lines.append(f"  {len(self.held_out):,} records are held out for evaluation")
        causes = Counter(error.cause for error in self.measurement.failures.values())
        if causes:
            counts = ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items()))
            lines.append(f"  left out: {counts}; {SKIPPED} lists them")
        fills = self.plan.fill(self.measurement.lengths)
        for bucket, fill in zip(self.plan.buckets, fills, strict=True):
            lines.append(
                f"  {fill.rows:,} rows of {bucket.text} text tokens, {bucket.regions} regions of "
                f"{bucket.slots} slots and {bucket.images} images, which are {fill.text:.0%}, "
                f"{fill.regions:.0%} and {fill.images:.0%} full"
            )
        return lines


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def open_records(config: CorpusConfig) -> Corpus:
    """The records that a run's settings name.

    Raises:
      UserError: a corpus cannot be opened.
    """
    if not config.path and not config.sources:
        raise UserError("data.path is empty; name the corpus to train on.")
    parts = tuple(open_corpus(part.path, media=part.media, prompt=part.prompt) for part in config.parts)
    return parts[0] if len(parts) == 1 else Joined(parts)


def conversations_of(experiment: Experiment, start: Start) -> Conversations:
    """How records become samples for the model of a run.

    Raises:
      UserError: the settings contradict the family's.
    """
    assert isinstance(experiment.data, CorpusConfig), "a run on a corpus"
    if start.template is None:
        raise UserError(
            f"init_from={start.name} is a run on digit scenes, which has no chat template; give a checkpoint "
            "of a language model with an image tower."
        )
    return Conversations.of(experiment.data, experiment.model.layout, start.tokenizer, start.template)


Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]]
"""Shows progress: (what is counted, how many) -> a context with a function that takes the newly done."""


def no_progress(what: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """Shows nothing."""
    return contextlib.nullcontext(lambda count: None)


def open_training_corpus(
    experiment: Experiment, start: Start, progress: Progress = no_progress
) -> TrainingCorpus:
    """Open, measure and plan the corpus of a run.

    Args:
      experiment: a run on a corpus.
      start: the checkpoint it starts from, which has the tokenizer and the template.
      progress: shows how many records are measured.

    Raises:
      UserError: a corpus cannot be opened; a record cannot be used, and ``data.bad`` is "error"; or there is
        nothing to train on.
    """
    config = experiment.data
    assert isinstance(config, CorpusConfig), "a run on a corpus"
    vocabulary, rows = start.tokenizer.vocab_size, experiment.model.decoder.vocab_size
    if vocabulary > rows:
        raise UserError(
            f"The tokenizer of init_from={start.name} has {vocabulary} tokens but its model has rows for "
            f"{rows}; use the tokenizer that came with it."
        )
    corpus = open_records(config)
    conversations = conversations_of(experiment, start)
    workers = max(1, experiment.num_workers)
    with progress("records measured", len(corpus)) as advance:
        found = measure_corpus(corpus, conversations, workers=workers, advance=advance)
    found = _without_long(found, config)
    short = config.too_long == "skip"
    failures = {i: error for i, error in found.failures.items() if not (short and error.cause == "length")}
    if failures and config.bad == "error":
        _, first = next(iter(failures.items()))
        raise UserError(
            f"{len(failures)} of {len(corpus)} records cannot be trained on; gaze-jax data check lists them, "
            f"and data.bad=skip leaves them out. The first: {first}"
        )
    _check_rate(len(failures), len(corpus), config)
    held = held_out(_source_sizes(corpus, config), config.holdout)
    held[list(found.failures)] = False
    entries = _entries(corpus, config, experiment.seed)
    entries = entries[~np.isin(entries, list(found.failures)) & ~held[entries]]
    if not len(entries):
        raise UserError(f"None of the {len(corpus)} records can be trained on; run gaze-jax data check.")
    plan = _planned(config, found, entries, seed=experiment.seed, buckets=config.buckets)
    order = BatchOrder(plan, experiment.batch_size, experiment.seed)
    return TrainingCorpus(config, corpus, conversations, found, plan, order, np.flatnonzero(held))


def _planned(
    config: CorpusConfig, found: Measurement, entries: np.ndarray, *, seed: int, buckets: int
) -> RowPlan:
    """Which of the records ``entries`` share a row."""
    sizes = dataclasses.asdict(config.row)
    with renamed({f"limits.{name}": f"data.row.{name}" for name in sizes}):
        return make_plan(
            found.lengths,
            entries,
            pack=config.pack,
            limits=Limits(**{name: size or None for name, size in sizes.items()}),
            buckets=buckets,
            seed=seed,
        )


def _without_long(found: Measurement, config: CorpusConfig) -> Measurement:
    """The measurement with samples of more than ``max_tokens`` among the failures.

    Raises:
      UserError: there are some and ``too_long`` is "error".
    """
    if config.max_tokens is None:
        return found
    long = np.flatnonzero(found.tokens > config.max_tokens).tolist()
    if long and config.too_long != "skip":
        most = int(found.tokens.max())
        raise UserError(
            f"{len(long)} samples have more than data.max_tokens={config.max_tokens} tokens, the longest "
            f"{most}; raise it, or set data.too_long to truncate or skip."
        )
    failures = dict(found.failures)
    for index in long:
        why = f"record {index} has {int(found.tokens[index])} tokens, more than {config.max_tokens}."
        failures[index] = RecordError("length", why)
    return Measurement(found.numbers, dict(sorted(failures.items())))


def _source_sizes(corpus: Corpus, config: CorpusConfig) -> list[int]:
    """Records of each source; one source may itself be several files."""
    if len(config.parts) == 1:
        return [len(corpus)]
    assert isinstance(corpus, Joined), "several sources are joined"
    return [len(part) for part in corpus.parts]


def _entries(corpus: Corpus, config: CorpusConfig, seed: int) -> np.ndarray:
    """int64 [n]: the records of an epoch, each as often as the weight of its source says."""
    sizes = _source_sizes(corpus, config)
    out, first = [], 0
    for number, (size, source) in enumerate(zip(sizes, config.parts, strict=True)):
        times, rest = divmod(source.weight, 1)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number])))
        some = np.sort(rng.permutation(size)[: round(rest * size)])
        out += [np.tile(np.arange(size), int(times)) + first, some + first]
        first += size
    return np.concatenate(out).astype(np.int64)


def _check_rate(bad: int, seen: int, config: CorpusConfig) -> None:
    if bad > config.max_bad * max(seen, _ENOUGH):
        raise UserError(
            f"{bad} of {seen} records cannot be used, more than data.max_bad={config.max_bad:g}; run "
            "gaze-jax data check, or raise it."
        )


class CorpusBatches:
    """This process's part of a run's batches, one after the other; bad records are counted, or end the run.

    Another thread takes them from grain, so that a worker that hangs is noticed.
    """

    def __init__(
        self,
        training: TrainingCorpus,
        *,
        first: int,
        stop: int = _ENDLESS,
        rows: tuple[int, int] = (0, 1),
        num_workers: int,
        log: Path | None = None,
    ) -> None:
        """Make batches ``first`` to ``stop``, exclusive; ``log`` is a file for what is skipped.

        ``rows`` is which part of their rows, of how many.
        With a known end, workers make no batch that nobody takes.
        """
        config = training.config
        self._training, self._log = training, log
        self._seen, self._causes = 0, Counter[str]()
        for index, error in training.measurement.failures.items():
            self._note(index, error.cause, str(error))
        # A worker that is killed may leave its note behind.
        self._folder = tempfile.TemporaryDirectory(prefix="gaze-jax-busy-", ignore_cleanup_errors=True)
        load = LoadBatch(
            training.corpus,
            training.conversations,
            training.order,
            training.measurement.lengths,
            rows,
            self._folder.name,
            round(config.worker_memory * 1e9),
        )
        numbers = grain.MapDataset.range(first, stop).map(load)
        self._others = {process.pid for process in multiprocessing.active_children()}
        self._iterator = prefetched(numbers, num_workers, buffer=2)
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._take, daemon=True, name="batches")
        self._thread.start()

    def _take(self) -> None:
        while not self._stopped.is_set():
            try:
                item = next(self._iterator)
            except Exception as error:  # for the thread that waits
                item = error
            self._queue.put(item)
            if isinstance(item, Exception):
                return

    def __next__(self) -> Arrays:
        """The next batch: fields with a leading axis of this process's rows.

        Raises:
          UserError: a record is bad and ``data.bad`` is "error", too many are, or a worker hangs or died.
        """
        timeout = self._training.config.timeout
        try:
            item = self._queue.get(timeout=timeout)
        except queue.Empty:
            reading = self._reading()
            self._kill_workers()
            raise UserError(
                f"No batch for {timeout:g} seconds (data.timeout){reading}; mend or leave out that "
                "record, or raise the limit, and run the same command to go on from the newest checkpoint."
            ) from None
        if isinstance(item, Exception):
            if "terminated unexpectedly" not in str(item):
                raise item
            raise UserError(
                f"A worker process died, perhaps for want of memory{self._reading()}; run the same command "
                "to go on from the newest checkpoint, with fewer workers (num_workers) if memory is short or "
                "a larger /dev/shm in a container (docker run --shm-size)."
            ) from item
        self._judge(item)
        return item.arrays

    def _reading(self) -> str:
        """What the workers are reading, for a message."""
        found = [self._name(number) for number, _ in busy(self._folder.name)]
        return f", while workers read {', '.join(found)}" if found else ""

    def _kill_workers(self) -> None:
        """End the workers, of which one hangs: grain would wait for it.

        They are the processes that were started since: one may hang before it notes what it reads.
        """
        for process in multiprocessing.active_children():
            if process.pid not in self._others:
                process.kill()

    def _name(self, number: int) -> str:
        with contextlib.suppress(UserError):
            return self._training.corpus[number].name
        return f"record {number}"

    def _judge(self, batch: LoadedBatch) -> None:
        """Count the bad records of a batch, or end the run."""
        self._seen += batch.records
        if batch.bad and self._training.config.bad == "error":
            raise UserError(batch.bad[0].message)
        for bad in batch.bad:
            self._causes[bad.cause] += 1
            self._note(bad.index, bad.cause, bad.message)
        if batch.bad:
            _check_rate(self._causes.total(), self._seen, self._training.config)

    @functools.cached_property
    def _noted(self) -> set[int]:
        """Records that are in the log already, some from before a restart."""
        if self._log is None or not self._log.exists():
            return set()
        return {json.loads(line)["record"] for line in self._log.read_text(encoding="utf-8").splitlines()}

    def _note(self, index: int, cause: str, message: str) -> None:
        if self._log is None or index in self._noted:
            return
        self._noted.add(index)
        with self._log.open("a", encoding="utf-8") as file:
            line = {"record": index, "cause": cause, "message": message}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def summary(self) -> str:
        """What was left out, on one line; empty if nothing was."""
        if not self._causes:
            return ""
        causes = ", ".join(f"{count} {cause}" for cause, count in sorted(self._causes.items()))
        return f"{self._causes.total()} of {self._seen} records were left out ({causes}): {self._log}"

    def close(self) -> None:
        """Stop the workers."""
        self._stopped.set()
        self._iterator.close()
        deadline = time.monotonic() + _CLOSING
        while self._thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):  # the thread may be waiting to put one
                self._queue.get(timeout=0.05)
        self._folder.cleanup()
