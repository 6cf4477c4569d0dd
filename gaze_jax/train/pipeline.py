"""The data of an experiment: processor, batch sizes, iterator and fingerprint."""

import grain
import jax

from gaze_jax.corpora.digits import DigitScenes, sequence_lengths
from gaze_jax.corpora.phrases import FAMILIES, build_tokenizer
from gaze_jax.data import pipeline
from gaze_jax.data.processor import Processor
from gaze_jax.families import get_family
from gaze_jax.train.config import Experiment


def make_processor(experiment: Experiment) -> Processor:
    """Make the processor that turns samples into arrays for the model of ``experiment``."""
    layout = experiment.model.layout
    return Processor(layout, build_tokenizer(), FAMILIES, get_family(layout.views.style).views)


def _config(experiment: Experiment) -> pipeline.PipelineConfig:
    layout = experiment.model.layout
    longest = sequence_lengths(experiment.data, build_tokenizer()).sample
    bucket = pipeline.Bucket(regions=layout.regions, text=longest + layout.context_tokens, images=1)
    return pipeline.PipelineConfig(batch_size=experiment.batch_size, seed=experiment.seed, bucket=bucket)


def make_iterator(experiment: Experiment) -> tuple[grain.DatasetIterator, dict[str, object]]:
    """Return this process's part of the training batches, and a fingerprint of everything they depend on."""
    source = DigitScenes(experiment.data, experiment.seed, "train")
    processor, config = make_processor(experiment), _config(experiment)
    iterator = pipeline.training_iterator(
        source,
        processor,
        config,
        num_workers=experiment.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return iterator, pipeline.fingerprint(source, processor, config, process_count=jax.process_count())
