"""The batches of a run: from digit scenes, or from a corpus."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import grain
import jax

from gaze_jax.corpora.digits import DigitScenes, DigitsConfig, make_sample, sequence_lengths
from gaze_jax.corpora.measure import read
from gaze_jax.corpora.phrases import FAMILIES, build_tokenizer
from gaze_jax.data import pipeline
from gaze_jax.data.placement import Arrays
from gaze_jax.data.processor import Processor
from gaze_jax.data.sample import Sample
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError
from gaze_jax.families import get_family
from gaze_jax.parallel import rules
from gaze_jax.parallel.mesh import make_mesh
from gaze_jax.train.config import Experiment, check_steps
from gaze_jax.train.corpus import (
    SKIPPED,
    CorpusBatches,
    Progress,
    TrainingCorpus,
    no_progress,
    open_training_corpus,
)
from gaze_jax.train.start import Start


class Batches(Protocol):
    """This process's part of the batches of a run, one for each step."""

    def __next__(self) -> Arrays: ...

    def close(self) -> None:
        """Stop what makes them."""
        ...

    def summary(self) -> str:
        """What is to be known of them at the end; empty if nothing."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class _DigitBatches:
    """The batches of grain's iterator; none of them is ever bad."""

    iterator: grain.DatasetIterator

    def __next__(self) -> Arrays:
        batch: Arrays = next(self.iterator)
        return batch

    def close(self) -> None:
        self.iterator.close()

    def summary(self) -> str:
        return ""


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """Data that a run evaluates and never trains on.

    Attributes:
      count: number of batches, all of one shape.
      batches: makes this process's part of them.
      sample: one of the samples, to draw; it may have no image.
      processor, bucket: turn it into a row of such a batch.
    """

    count: int
    batches: Callable[[], Batches]
    sample: Callable[[], Sample]
    processor: Processor
    bucket: pipeline.Bucket


@dataclasses.dataclass(frozen=True, eq=False)
class RunData:
    """The data of a run.

    Attributes:
      experiment: the run, with its number of steps.
      tokenizer: what its text is tokenised with.
      fingerprint: everything that the batches depend on.
      lines: for the start of the run.
      batches_from: makes the batches, from that of step ``first`` + 1 to the last.
      held_out: what is evaluated during training; None if nothing is.
    """

    experiment: Experiment
    tokenizer: Tokenizer
    fingerprint: dict[str, object]
    lines: list[str]
    batches_from: Callable[[int], Batches]
    held_out: HeldOut | None = None


# Other scenes than those of eval.json, with digit images that training does not draw. Every run and arm is
# evaluated on the same ones.
_HELD_OUT_SEED = 20_260_103


def make_processor(experiment: Experiment) -> Processor:
    """Make the processor that turns digit scenes into arrays for the model of ``experiment``."""
    layout = experiment.model.layout
    return Processor(layout, build_tokenizer(), FAMILIES, get_family(layout.views.style).views)


def open_data(
    experiment: Experiment,
    start: Start | None,
    workdir: Path,
    progress: Progress = no_progress,
) -> RunData:
    """Open the data of a run.

    Args:
      experiment: from :func:`gaze_jax.train.config.parse`.
      start: the checkpoint that it starts from.
      workdir: gets a list of what is skipped.
      progress: shows how many records of a corpus are measured.

    Raises:
      UserError: the data cannot be read, or do not fit the checkpoint.
    """
    if isinstance(experiment.data, DigitsConfig):
        return _digits(experiment, experiment.data, start)
    assert start is not None, "a run on a corpus starts from a checkpoint"
    training = open_training_corpus(experiment, start, progress)
    if not experiment.steps:
        experiment = dataclasses.replace(experiment, steps=training.steps())
        check_steps(experiment)
    rows = _rows(experiment)
    if experiment.batch_size % rows[1]:
        raise UserError(f"batch_size={experiment.batch_size} must be a multiple of the {rows[1]} processes.")
    name = SKIPPED if jax.process_index() == 0 else f"{jax.process_index()}-{SKIPPED}"

    def batches_from(first: int) -> Batches:
        return CorpusBatches(
            training,
            first=first,
            stop=experiment.steps,
            rows=rows,
            num_workers=experiment.num_workers,
            log=workdir / name,
        )

    held_out = _held_out_records(training, experiment) if experiment.eval_every else None
    return RunData(
        experiment, start.tokenizer, training.fingerprint(), training.summary(), batches_from, held_out
    )


def _rows(experiment: Experiment) -> tuple[int, int]:
    """Which part of a batch's rows this process reads, of how many; see ``rules.rows_of_process``."""
    return (0, 1) if jax.process_count() == 1 else rules.rows_of_process(make_mesh(experiment.mesh))


def _held_out_records(training: TrainingCorpus, experiment: Experiment) -> HeldOut:
    part = training.evaluation(experiment.eval.held_out)
    count = part.order.epoch_batches
    # A record with an image shows more than one without.
    images = part.measurement.lengths[:, 2]
    number = next((each for each in part.plan.samples.tolist() if images[each]), int(part.plan.samples[0]))
    return HeldOut(
        count,
        lambda: CorpusBatches(part, first=0, stop=count, rows=_rows(experiment), num_workers=0),
        lambda: part.conversations.sample(read(part.corpus, number), number),
        part.conversations.processor,
        part.order.rows(0)[0],
    )


def _digits(experiment: Experiment, data: DigitsConfig, start: Start | None) -> RunData:
    tokenizer, layout = build_tokenizer(), experiment.model.layout
    if start is not None and start.tokenizer.digest != tokenizer.digest:
        raise UserError(
            f"init_from={start.name} has another tokenizer than the digit scenes; give a run on them."
        )
    source = DigitScenes(data, experiment.seed, "train")
    processor = make_processor(experiment)
    longest = sequence_lengths(data, tokenizer).sample
    bucket = pipeline.Bucket(regions=layout.regions, text=longest + layout.context_tokens, images=1)
    config = pipeline.PipelineConfig(batch_size=experiment.batch_size, seed=experiment.seed, bucket=bucket)

    def batches_from(first: int) -> Batches:
        return _DigitBatches(
            pipeline.training_iterator(
                source,
                processor,
                config,
                first=first,
                stop=experiment.steps,
                num_workers=experiment.num_workers,
                rows=_rows(experiment),
            )
        )

    fingerprint = pipeline.fingerprint(source, processor, config)
    held_out = _held_out_scenes(experiment, data, processor, config) if experiment.eval_every else None
    return RunData(experiment, tokenizer, fingerprint, [], batches_from, held_out)


def _held_out_scenes(
    experiment: Experiment, data: DigitsConfig, processor: Processor, config: pipeline.PipelineConfig
) -> HeldOut:
    count = -(-experiment.eval.held_out // experiment.batch_size)
    scenes = dataclasses.replace(data, train_scenes=count * experiment.batch_size)
    source = DigitScenes(scenes, _HELD_OUT_SEED, "test")
    asked = next(family for family, weight in zip(FAMILIES, data.families, strict=True) if weight)
    return HeldOut(
        count,
        lambda: _DigitBatches(
            pipeline.training_iterator(
                source,
                processor,
                dataclasses.replace(config, seed=0),
                stop=count,
                rows=_rows(experiment),
            )
        ),
        lambda: make_sample(data, _HELD_OUT_SEED, "test", 0, asked),
        processor,
        config.bucket,
    )
