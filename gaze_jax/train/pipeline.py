"""The batches of a run: from digit scenes, or from a corpus."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import grain
import jax

from gaze_jax.corpora.digits import DigitScenes, DigitsConfig, sequence_lengths
from gaze_jax.corpora.phrases import FAMILIES, build_tokenizer
from gaze_jax.data import pipeline
from gaze_jax.data.placement import Arrays
from gaze_jax.data.processor import Processor
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError
from gaze_jax.families import get_family
from gaze_jax.train.config import Experiment, check_steps
from gaze_jax.train.corpus import SKIPPED, CorpusBatches, Progress, no_progress, open_training_corpus
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
class RunData:
    """The data of a run.

    Attributes:
      experiment: the run, with its number of steps.
      tokenizer: what its text is tokenised with.
      fingerprint: everything that the batches depend on.
      lines: for the start of the run.
      batches_from: makes the batches, from that of step ``first`` + 1 to the last.
    """

    experiment: Experiment
    tokenizer: Tokenizer
    fingerprint: dict[str, object]
    lines: list[str]
    batches_from: Callable[[int], Batches]


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
    if experiment.batch_size % jax.process_count():
        raise UserError(
            f"batch_size={experiment.batch_size} must be a multiple of the {jax.process_count()} processes."
        )
    name = SKIPPED if jax.process_index() == 0 else f"{jax.process_index()}-{SKIPPED}"

    def batches_from(first: int) -> Batches:
        return CorpusBatches(
            training,
            first=first,
            stop=experiment.steps,
            num_workers=experiment.num_workers,
            log=workdir / name,
        )

    return RunData(experiment, start.tokenizer, training.fingerprint(), training.summary(), batches_from)


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
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        )

    return RunData(experiment, tokenizer, pipeline.fingerprint(source, processor, config), [], batches_from)
