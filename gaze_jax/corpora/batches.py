"""Batches of a corpus by number: the rows of a plan, decoded and processed, in any process.

What a batch holds is decided by the plan, the seed and the batch's number alone. So any number of processes
and workers make the same batches, and a run continues with the number of its next step.
"""

import dataclasses
import functools
import multiprocessing
import resource
from typing import NamedTuple

import grain
import numpy as np

from gaze_jax.corpora.busy import busy_with
from gaze_jax.corpora.conversations import KIND, Conversations
from gaze_jax.corpora.measure import read
from gaze_jax.corpora.records import Corpus, RecordError
from gaze_jax.data.packing import pack
from gaze_jax.data.padding import pad_to
from gaze_jax.data.pipeline import Bucket, stack
from gaze_jax.data.placement import FILL, Arrays
from gaze_jax.data.plan import RowPlan, batches
from gaze_jax.data.sample import Sample

NO_ROW = -1
"""In a batch: an empty row, since its bucket has no more."""


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record whose place in its row stays empty.

    Attributes:
      index: its index in the corpus.
      cause: one of ``records.CAUSES``.
      message: why, in one sentence that names it.
    """

    index: int
    cause: str
    message: str


class LoadedBatch(NamedTuple):
    """One process's rows of a batch; a tuple, so that grain finds the arrays in it and shares their memory.

    Attributes:
      arrays: the fields of ``processor.process`` with a leading axis of rows; images uint8.
      records: how many records were read for it.
      bad: those of them that could not be used.
    """

    arrays: Arrays
    records: int
    bad: tuple[BadRecord, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class BatchOrder:
    """Which rows each batch of a run holds; every epoch has another order.

    Attributes:
      plan: the rows.
      batch_size: rows of a batch, over all processes.
      seed: seed of the order.
    """

    plan: RowPlan
    batch_size: int
    seed: int

    @functools.cached_property
    def _table(self) -> np.ndarray:
        return batches(self.plan, self.batch_size)

    @property
    def epoch_batches(self) -> int:
        """Batches of an epoch."""
        return len(self._table)

    @functools.lru_cache(maxsize=2)  # noqa: B019  one order lives as long as its process
    def _epoch(self, epoch: int) -> np.ndarray:
        """int64 [batches, batch_size]: the rows of an epoch's batches."""
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
        table = self._table.copy()
        bucket = self.plan.bucket[table.max(axis=1)]
        for number in range(len(self.plan.buckets)):
            of_it = table[bucket == number]
            rows = rng.permutation(of_it[of_it != NO_ROW])
            table[bucket == number] = np.pad(
                rows, (0, of_it.size - len(rows)), constant_values=NO_ROW
            ).reshape(of_it.shape)
        return table[rng.permutation(len(table))]

    def rows(self, number: int) -> tuple[Bucket, np.ndarray]:
        """The sizes of batch ``number`` of a run, and its rows, int64 [batch_size], -1 for an empty one."""
        epoch, within = divmod(number, self.epoch_batches)
        rows = self._epoch(epoch)[within]
        bucket = self.plan.buckets[self.plan.bucket[rows.max()]]
        # A corpus without media has an array of images too, of padding alone.
        least = {"regions": bucket.regions, "images": bucket.images, "slots": bucket.slots or 1}
        return dataclasses.replace(bucket, **{name: max(1, size) for name, size in least.items()}), rows


@dataclasses.dataclass(frozen=True, eq=False)
class LoadBatch(grain.transforms.Map):
    """Batch number -> :class:`LoadedBatch`; a class because grain pickles it into worker processes.

    Attributes:
      corpus, conversations: where samples come from, and how.
      order: which rows a batch holds.
      lengths: int32 [records, 4]: what was measured, and planned with.
      part: (index, count): this process's part of the rows.
      busy: the folder in which workers note what they read.
      memory: bytes that a worker may allocate.
    """

    corpus: Corpus
    conversations: Conversations
    order: BatchOrder
    lengths: np.ndarray
    part: tuple[int, int]
    busy: str
    memory: int

    def map(self, element: int) -> LoadedBatch:
        """Read and process this process's rows of batch ``element``."""
        _bound_memory(self.memory)
        bucket, rows = self.order.rows(int(element))
        index, count = self.part
        size = len(rows) // count
        loaded: list[Arrays] = []
        bad: list[BadRecord] = []
        records = 0
        side = self.conversations.layout.image_size
        sizes = dataclasses.asdict(bucket)
        images = np.zeros((size, bucket.images, side, side, 3), np.uint8)
        for place, row in zip(images, rows[index * size : (index + 1) * size].tolist()):
            found = [] if row == NO_ROW else self.order.plan.row(row).tolist()
            records += len(found)
            good: list[Arrays] = []
            for number in found:
                used = sum(len(arrays["images"]) for arrays in good)
                one = self._arrays(number, bucket, place[used : used + self.lengths[number, 2]])
                if isinstance(one, BadRecord):
                    bad.append(one)
                else:
                    good.append(one)
            loaded.append(pad_to(self._row(good, bucket), **sizes))
        return LoadedBatch(stack(loaded) | {"images": images}, records, tuple(bad))

    def _arrays(self, number: int, bucket: Bucket, images: np.ndarray) -> Arrays | BadRecord:
        """A record's arrays, unpadded but for the slots of its regions; its pixels go into ``images``."""
        with busy_with(self.busy, number):
            try:
                record = read(self.corpus, number)
                arrays = self.conversations.arrays(record, number, images)
                self._check(arrays, number, record.name)
            except RecordError as error:
                images[:] = 0  # its place stays empty
                return BadRecord(number, error.cause, str(error))
            except MemoryError:
                limit = f"data.worker_memory={self.memory / 1e9:g} GB"
                return BadRecord(number, "medium", f"record {number} needs more than {limit}; raise it.")
        return _without_slots(arrays, bucket)

    def _check(self, arrays: Arrays, number: int, name: str) -> None:
        regions = arrays["visual_src"]
        have = [len(arrays["tokens"]), len(regions), len(arrays["images"])]
        planned = self.lengths[number, :3].tolist()
        if have != planned:
            raise RecordError(
                "length",
                f"{name} has {have[0]} text tokens, {have[1]} regions and {have[2]} images but was measured "
                f"with {planned[0]}, {planned[1]} and {planned[2]}: its media have changed; run gaze-jax "
                "data check, which measures again, and start in a new workdir.",
            )

    def _row(self, samples: list[Arrays], bucket: Bucket) -> Arrays:
        """The arrays of a row, unpadded, without its pixels, which are in the batch already."""
        layout = self.conversations.layout
        if samples:
            return pack([_without_pixels(arrays) for arrays in samples], image_tokens=layout.tokens)
        empty = self.conversations.processor(Sample(0, (), (), KIND))
        return _without_pixels(_without_slots(empty, bucket))


def _without_pixels(arrays: Arrays) -> Arrays:
    """With as many images, which have no pixels."""
    return arrays | {"images": np.zeros((len(arrays["images"]), 0), np.uint8)}


def _without_slots(arrays: Arrays, bucket: Bucket) -> Arrays:
    """A sample without media takes the slots of the bucket, since the layout's may be more."""
    if len(arrays["visual_src"]):
        return arrays
    slots = bucket.slots or 1
    shaped = {name: (0, slots, *arrays[name].shape[2:]) for name in FILL if name in arrays}
    return arrays | {name: np.zeros(shape, arrays[name].dtype) for name, shape in shaped.items()}


_bounded: list[int] = []
"""The bound of this worker process, once it is set."""


def _bound_memory(size: int) -> None:
    """Let this worker allocate ``size`` bytes more than it has; then a MemoryError names what is read."""
    if _bounded or multiprocessing.parent_process() is None:
        return
    with open("/proc/self/status", encoding="ascii") as file:
        (used,) = (int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + size if hard == resource.RLIM_INFINITY else min(used + size, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    _bounded.append(limit)
