"""The grain pipeline: from a random-access source of samples to an endless, resumable stream of batches."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Protocol

import absl.flags
import grain
import numpy as np

from gaze_jax.data.padding import pad_to
from gaze_jax.data.processor import Arrays, Processor
from gaze_jax.data.sample import Sample
from gaze_jax.errors import UserError

_ENDLESS = 1 << 48
"""Samples of an endless stream; the length of grain's own is too large for some of its arithmetic."""
SHARED_BYTES = 1 << 16
"""Smallest array that workers hand over in shared memory; for smaller ones a pipe is faster."""


class Source(Protocol):
    """Samples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def fingerprint(self) -> dict[str, object]:
        """Everything that decides the content of the samples: names and plain values, JSON-ready."""
        ...


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The static sizes of a batch.

    Attributes:
      regions, text: R and S of every row.
      images: number of images that the tower reads.
      slots: P; None keeps the layout's, which is the same for all images of one size.
    """

    regions: int
    text: int
    images: int
    slots: int | None = None


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Order and grouping of samples.

    Attributes:
      batch_size: rows of a batch, over all processes.
      seed: seed of the shuffle.
      bucket: static sizes of a row.
    """

    batch_size: int
    seed: int
    bucket: Bucket


class _ProcessAndPad(grain.transforms.Map):
    """Sample -> padded arrays; a class because grain pickles it into worker processes."""

    def __init__(self, processor: Processor, bucket: Bucket):
        self.processor = processor
        self.bucket = bucket

    def map(self, element: Sample) -> Arrays:
        return pad_to(self.processor(element), **dataclasses.asdict(self.bucket))


def training_iterator(
    source: Source,
    processor: Processor,
    config: PipelineConfig,
    *,
    first: int = 0,
    stop: int | None = None,
    num_workers: int = 0,
    rows: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """This process's share of a shuffled stream of batches, which is endless without ``stop``.

    A batch is decided by its number, so a run continues with the number of its next step, on any number of
    workers and processes.

    Args:
      source: source of samples.
      processor: turns samples into arrays.
      config: order and grouping.
      first: number of the first batch.
      stop: number of the batch after the last; workers make none that nobody takes.
      num_workers: worker processes that prepare batches; 0 uses threads of this process. The batches
        are the same.
      rows: which part of a batch's rows this process reads, and into how many parts they are divided.

    Returns:
      An iterator of dicts of numpy arrays with a leading axis of the rows of the part, which follow those of
      the parts before it.

    Raises:
      ValueError: the batch size is not a multiple of the parts, or the source is smaller than a batch.
    """
    part, parts = rows
    if config.batch_size % parts:
        raise ValueError(f"batch_size={config.batch_size} must be a multiple of the {parts} processes.")
    if len(source) < config.batch_size:
        raise ValueError(f"{source!r} has {len(source)} samples, fewer than batch_size={config.batch_size}.")
    dataset = grain.MapDataset.source(source).shuffle(seed=config.seed).repeat()[:_ENDLESS]
    dataset = dataset.map(_ProcessAndPad(processor, config.bucket))
    dataset = dataset.batch(config.batch_size // parts)[part::parts][first:stop]
    # One thread: making a sample is Python code, and the training step needs the cores.
    return prefetched(dataset, num_workers, buffer=4)


def prefetched(dataset: grain.MapDataset, num_workers: int, *, buffer: int) -> grain.DatasetIterator:
    """Elements of ``dataset`` in order, ``buffer`` of them made ahead, by workers if there are any."""
    elements = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=buffer))
    if num_workers:
        options = grain.experimental.DatasetOptions(min_shm_size=SHARED_BYTES)
        elements = grain.experimental.WithOptionsIterDataset(elements, options)
        # grain reads an absl flag when it starts workers, which fails outside absl.app.
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()
        elements = elements.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return iter(elements)


def fingerprint(source: Source, processor: Processor, config: PipelineConfig) -> dict[str, object]:
    """Everything that determines the arrays and their order, as JSON-ready values.

    A run that continues counts on batch N being what it was.
    """
    return {
        "source": source.fingerprint(),
        "length": len(source),
        "layout": json.loads(json.dumps(dataclasses.asdict(processor.layout))),
        "families": list(processor.families),
        "resize": processor.resize,
        "tokenizer": processor.tokenizer.digest,
        "pipeline": dataclasses.asdict(config),
    }


def compare_fingerprints(saved: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Refuse to continue on different data.

    Raises:
      UserError: the fingerprints differ; the message names what changed.
    """
    changed = [
        f"{name} was {saved.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(
            f"The checkpoint's data pipeline differs: {'; '.join(changed)}. Restore the old setting, or "
            "start in a new workdir."
        )


def stack(rows: list[Arrays]) -> Arrays:
    """Stack padded rows into a batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def prompt_length(tokens: int) -> int:
    """``tokens`` rounded up to a multiple of 16, so that text streams have few lengths to compile."""
    return -(-tokens // 16) * 16
