"""The config of a training run: frozen, parsed strictly and checked before anything starts."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from gaze_jax.config import from_dict
from gaze_jax.core.layout import ViewConfig
from gaze_jax.core.schedule import Schedule
from gaze_jax.corpora.digits import DigitsConfig
from gaze_jax.corpora.phrases import build_tokenizer
from gaze_jax.errors import UserError
from gaze_jax.models import MLLMConfig
from gaze_jax.parallel.mesh import MeshConfig
from gaze_jax.train.optimizer import OptimizerConfig

ARMS = ("gaze", "dense_context", "dense", "sparse_start")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation after training.

    Attributes:
      samples: number of samples per family of questions.
      batch_size: samples answered at once.
    """

    samples: int = 256
    batch_size: int = 32


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training run. A config file holds exactly these fields, nested.

    Attributes:
      model: architecture; ``model.gaze.top_k`` is the final number of regions per query.
      data: the scenes and the questions about them.
      seed: seed of the parameters and of the data order.
      arm: "gaze"; "dense_context": attend to everything, with context tokens; "dense": attend to
        everything, without them (the baseline); "sparse_start": gaze without the schedule. Changing this
        field is enough: :func:`resolve` derives the rest.
      steps: optimizer steps.
      batch_size: samples per step, over all devices.
      optimizer: how parameters are updated.
      schedule: fraction of the regions to keep, from all down to ``top_k``.
      mesh: sizes of the device mesh.
      checkpoint_every: steps between checkpoints; 0 writes one only at the end.
      keep_checkpoints: how many of the newest checkpoints to keep.
      log_every: steps per progress line and row of metrics.jsonl.
      num_workers: processes that make batches; 0 uses the training process.
      eval: evaluation after training.
    """

    model: MLLMConfig
    data: DigitsConfig
    seed: int = 0
    arm: str = "gaze"
    steps: int = 3000
    batch_size: int = 32
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: Schedule = Schedule()
    mesh: MeshConfig = MeshConfig()
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    log_every: int = 50
    num_workers: int = 0
    eval: EvalConfig = EvalConfig()


def complete(config: Mapping[str, object]) -> ml_collections.ConfigDict:
    """Add the default of every missing field to a config, so that flags can override any field.

    Raises:
      UserError: an unknown or missing key, or a value of the wrong type.
    """
    return _overridable(_read(config))


def _overridable(config: Any) -> ml_collections.ConfigDict:
    """Convert a dataclass to a ``ConfigDict`` that flags can override: an empty field keeps its type."""
    hints = typing.get_type_hints(type(config))
    out = ml_collections.ConfigDict()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = _overridable(value)
        elif value is None:
            (kind,) = (hint for hint in typing.get_args(hints[field.name]) if hint is not type(None))
            value = ml_collections.config_dict.placeholder(typing.get_origin(kind) or kind)
        out[field.name] = value
    return out


def parse(config: Mapping[str, object]) -> Experiment:
    """Read an experiment from a ``ConfigDict`` or a nested dictionary and :func:`resolve` it.

    Raises:
      UserError: an unknown or missing key, or a value of the wrong type or out of range.
    """
    return resolve(_read(config))


def _read(config: Mapping[str, object]) -> Experiment:
    try:
        return from_dict(Experiment, config)
    except (KeyError, TypeError, ValueError) as error:
        # str() of a KeyError adds quotes; args[0] is the bare message.
        raise UserError(str(error.args[0])) from error


def _apply_arm(experiment: Experiment) -> Experiment:
    gaze, schedule = experiment.model.gaze, experiment.schedule
    if experiment.arm in ("dense", "dense_context"):
        gaze = dataclasses.replace(gaze, top_k=None)
    if experiment.arm == "dense":
        gaze = dataclasses.replace(gaze, context_tokens=0)
    if experiment.arm == "sparse_start":
        schedule = Schedule(0.0, 0.0)
    model = dataclasses.replace(experiment.model, gaze=gaze)
    return dataclasses.replace(experiment, model=model, schedule=schedule)


def resolve(experiment: Experiment) -> Experiment:
    """Apply the arm and check fields against each other. Resolving twice changes nothing.

    Raises:
      UserError: fields contradict each other.
    """

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    require(experiment.arm in ARMS, f"arm={experiment.arm!r} must be one of {ARMS}.")
    require(experiment.model.vision is not None, "model.vision is empty; training needs an image tower.")
    require(
        experiment.model.views == ViewConfig()
        and experiment.model.gaze.video_region is None
        and experiment.model.gaze.newlines == "text",
        "model.views, model.gaze.video_region and model.gaze.newlines have no effect on the digit scenes, "
        "which are one view each without newlines; leave them out.",
    )
    experiment = _apply_arm(experiment)
    for name in ("steps", "batch_size", "keep_checkpoints", "log_every"):
        value = getattr(experiment, name)
        require(value >= 1, f"{name}={value} must be at least 1.")
    for name, least in (("samples", 2), ("batch_size", 1)):
        value = getattr(experiment.eval, name)
        require(value >= least, f"eval.{name}={value} must be at least {least}.")
    for name in ("checkpoint_every", "num_workers", "seed"):
        value = getattr(experiment, name)
        require(value >= 0, f"{name}={value} must not be negative.")
    require(experiment.seed < 2**32, f"seed={experiment.seed} must be less than 2**32.")
    require(
        experiment.optimizer.warmup_steps < experiment.steps,
        f"optimizer.warmup_steps={experiment.optimizer.warmup_steps} must be less than "
        f"steps={experiment.steps}.",
    )
    gaze, layout = experiment.model.gaze, experiment.model.layout
    if experiment.arm in ("gaze", "sparse_start"):
        require(
            gaze.top_k is not None,
            f"arm={experiment.arm!r} needs model.gaze.top_k, the number of regions that a query selects.",
        )
        require(
            gaze.top_k is None or gaze.top_k <= layout.regions,
            f"model.gaze.top_k={gaze.top_k} must be at most {layout.regions}, the regions of one image.",
        )
    size = experiment.data.image_size
    require(
        size == experiment.model.tower.image_size,
        f"model.vision.image_size={experiment.model.tower.image_size} must be {size}, the size of a scene: "
        f"data.rows={experiment.data.rows} cells of data.cell={experiment.data.cell} pixels.",
    )
    vocabulary = build_tokenizer().vocab_size
    require(
        experiment.model.decoder.vocab_size >= vocabulary,
        f"model.decoder.vocab_size={experiment.model.decoder.vocab_size} must be at least {vocabulary}, "
        "the tokenizer's size.",
    )
    return experiment
