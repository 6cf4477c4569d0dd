"""The config of a training run: frozen, parsed strictly and checked before anything starts."""

import contextlib
import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from gaze_jax.config import from_dict, to_dict
from gaze_jax.core.layout import ViewConfig
from gaze_jax.core.schedule import Schedule
from gaze_jax.corpora.config import CorpusConfig
from gaze_jax.corpora.digits import DigitsConfig
from gaze_jax.corpora.phrases import build_tokenizer
from gaze_jax.errors import UserError
from gaze_jax.models import MLLMConfig
from gaze_jax.models.dummy import DUMMY
from gaze_jax.parallel.mesh import MeshConfig
from gaze_jax.train.changes import ModelChanges, changed
from gaze_jax.train.lora import LoraConfig
from gaze_jax.train.objective import ObjectiveConfig
from gaze_jax.train.optimizer import OptimizerConfig, warmup_of

ARMS = ("gaze", "dense_context", "dense", "sparse_start")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation: after training on digit scenes, and every ``eval_every`` steps of any training.

    Attributes:
      samples: after training: number of samples per family of questions.
      batch_size: after training: samples answered at once.
      held_out: during training: most samples of the held-out part that are read each time.
    """

    samples: int = 256
    batch_size: int = 32
    held_out: int = 256


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training run. A config file holds exactly these fields, nested.

    Attributes:
      model: architecture; ``model.gaze.top_k`` is the final number of regions per query. In a config file
        with ``init_from`` it may be :class:`ModelChanges`, what to change of the checkpoint's.
      data: digit scenes, or a corpus; the keys decide which.
      init_from: a converted checkpoint, a Hugging Face directory, or an earlier run to start from: its
        model, parameters, tokenizer and chat template. None starts from new parameters.
      seed: seed of the parameters and of the data order.
      arm: "gaze"; "dense_context": attend to everything, with context tokens; "dense": attend to
        everything, without them (the baseline); "sparse_start": gaze without the schedule. Changing this
        field is enough: :func:`resolve` derives the rest.
      steps: optimizer steps; 0: as many as ``data.epochs`` take.
      batch_size: samples per step, over all devices.
      accumulate: parts of a batch whose gradients are summed one after the other, to save memory; the step
        is that of the whole batch.
      objective: what is learned.
      optimizer: how parameters are updated.
      lora: low-rank adapters that are trained in place of the decoder, which is frozen then.
      average_decay: decay of an exponential moving average of the trained parameters (EMA), which inference,
        evaluation and export then use; None keeps none. 0.999 averages over the last thousand steps or so.
      schedule: fraction of the regions to keep, from all down to ``top_k``.
      mesh: sizes of the device mesh.
      checkpoint_every: steps between checkpoints; 0 writes one only at the end.
      keep_checkpoints: how many of the newest checkpoints to keep.
      max_skipped: as many steps in a row whose loss or gradient is not finite end the run. Such a step
        changes neither parameters nor optimizer.
      log_every: steps per progress line and row of metrics.jsonl.
      eval_every: steps between evaluations of held-out data; the first is before training, the last after it.
        Held out are ``data.holdout`` of a corpus, or scenes of digits that training does not draw. 0: none.
      tensorboard: also write the rows of metrics, evaluations and times as events for TensorBoard.
      profile_steps: first and last of the steps that are traced with JAX's profiler, such as "10:15"; empty:
        none.
      num_workers: processes that make batches; 0 uses the training process.
      eval: how much is evaluated.
    """

    model: MLLMConfig
    data: DigitsConfig | CorpusConfig
    init_from: str | None = None
    seed: int = 0
    arm: str = "gaze"
    steps: int = 3000
    batch_size: int = 32
    accumulate: int = 1
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    average_decay: float | None = None
    schedule: Schedule = Schedule()
    mesh: MeshConfig = MeshConfig()
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    max_skipped: int = 3
    log_every: int = 50
    eval_every: int = 0
    tensorboard: bool = False
    profile_steps: str = ""
    num_workers: int = 0
    eval: EvalConfig = EvalConfig()

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parts of the model that are not trained: with adapters, the decoder too."""
        return (*self.optimizer.frozen, "decoder") if self.lora.rank else self.optimizer.frozen


def complete(config: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Add the default of every missing field to a config, so that flags can override any field.

    Raises:
      UserError: an unknown or missing key, or a value of the wrong type.
    """
    if (changes := _changes(config)) is None:
        return _overridable(_read(config))
    out = _overridable(_read(_with_model(config, DUMMY)))
    out.model = _overridable(changes)
    return out


def _changes(config: Mapping[str, Any]) -> ModelChanges | None:
    """The model section of a config, if it changes a checkpoint's model instead of describing one."""
    section = config.get("model", {})
    if not hasattr(section, "items") or "decoder" in section:
        return None
    with _one_sentence():
        return from_dict(ModelChanges, section, "model")


def _with_model(config: Mapping[str, Any], model: MLLMConfig) -> dict[str, Any]:
    return {**dict(config.items()), "model": to_dict(model)}


def _overridable(config: Any) -> ml_collections.ConfigDict:
    """Convert a dataclass to a ``ConfigDict`` that flags can override: an empty field keeps its type."""
    hints = typing.get_type_hints(type(config))
    out = ml_collections.ConfigDict()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = _overridable(value)
        elif isinstance(value, tuple):
            value = tuple(to_dict(item) if dataclasses.is_dataclass(item) else item for item in value)
        elif value is None:
            (kind,) = (hint for hint in typing.get_args(hints[field.name]) if hint is not type(None))
            value = ml_collections.config_dict.placeholder(typing.get_origin(kind) or kind)
        out[field.name] = value
    return out


def parse(config: Mapping[str, Any], start: MLLMConfig | None = None) -> Experiment:
    """Read an experiment from a ``ConfigDict`` or a nested dictionary and :func:`resolve` it.

    Args:
      config: the values.
      start: the model of the checkpoint that ``init_from`` names; None if there is none, or if the config
        has a model of its own.

    Raises:
      UserError: an unknown or missing key, or a value of the wrong type or out of range.
    """
    if (changes := _changes(config)) is None:
        return resolve(_read(config))
    if start is None:
        raise UserError("model has no decoder, so a checkpoint must have it: name one in init_from.")
    with _one_sentence("model: "):
        model = changed(start, changes)
    return resolve(_read(_with_model(config, model)))


def read_data(config: Mapping[str, Any]) -> DigitsConfig | CorpusConfig:
    """The data of a config, whatever its model is.

    Raises:
      UserError: as :func:`complete`.
    """
    return _read(_with_model(config, DUMMY)).data


def _read(config: Mapping[str, Any]) -> Experiment:
    with _one_sentence():
        return from_dict(Experiment, config)


@contextlib.contextmanager
def _one_sentence(before: str = "") -> Iterator[None]:
    """Context in which a config that cannot be read is a UserError."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        # str() of a KeyError adds quotes; args[0] is the bare message.
        raise UserError(f"{before}{error.args[0]}") from error


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


def require(condition: bool, message: str) -> None:
    """Raise a UserError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def resolve(experiment: Experiment) -> Experiment:
    """Apply the arm and check fields against each other. Resolving twice changes nothing.

    Raises:
      UserError: fields contradict each other.
    """
    require(experiment.arm in ARMS, f"arm={experiment.arm!r} must be one of {ARMS}.")
    require(experiment.model.vision is not None, "model.vision is empty; training needs an image tower.")
    experiment = _apply_arm(experiment)
    for name in ("batch_size", "accumulate", "keep_checkpoints", "max_skipped", "log_every"):
        value = getattr(experiment, name)
        require(value >= 1, f"{name}={value} must be at least 1.")
    require(
        experiment.batch_size % experiment.accumulate == 0,
        f"batch_size={experiment.batch_size} must be a multiple of accumulate={experiment.accumulate}.",
    )
    for name, least in (("samples", 2), ("batch_size", 1), ("held_out", 1)):
        value = getattr(experiment.eval, name)
        require(value >= least, f"eval.{name}={value} must be at least {least}.")
    for name in ("steps", "checkpoint_every", "eval_every", "num_workers", "seed"):
        value = getattr(experiment, name)
        require(value >= 0, f"{name}={value} must not be negative.")
    require(experiment.seed < 2**32, f"seed={experiment.seed} must be less than 2**32.")
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
    decay = experiment.average_decay
    require(
        decay is None or 0 < decay < 1,
        f"average_decay={decay} must lie between 0 and 1; leave it out for none.",
    )
    _check_objective(experiment)
    _check_lora(experiment)
    if isinstance(experiment.data, CorpusConfig):
        _check_corpus(experiment, experiment.data)
    else:
        _check_digits(experiment, experiment.data)
    profiled(experiment.profile_steps)
    if experiment.steps:
        check_steps(experiment)
    return experiment


def _check_objective(experiment: Experiment) -> None:
    objective = experiment.objective
    require(
        objective.name != "distill" or experiment.init_from is not None,
        "objective.name='distill' needs init_from, the dense checkpoint to learn from.",
    )
    require(
        not objective.region_weight or experiment.model.gaze.top_k is not None,
        f"objective.region_weight={objective.region_weight} has no effect with dense attention (arm="
        f"{experiment.arm!r}), which scores no region; set it to 0.",
    )


def _check_lora(experiment: Experiment) -> None:
    lora = experiment.lora
    if not lora.rank:
        changed = [name for name in ("alpha", "modules") if getattr(lora, name) != getattr(LoraConfig, name)]
        require(not changed, f"lora.{''.join(changed[:1])} has no effect with lora.rank=0; set the rank.")
        return
    require(
        experiment.init_from is not None,
        f"lora.rank={lora.rank} needs init_from, the checkpoint that the adapters adapt.",
    )
    require(
        "decoder" not in experiment.optimizer.frozen,
        f"optimizer.frozen names decoder, which lora.rank={lora.rank} freezes but for its adapters; leave it "
        "out, or set the rank to 0.",
    )


def check_steps(experiment: Experiment) -> None:
    """Check the number of steps, once it is known.

    Raises:
      UserError: the warmup takes all of them, or steps after the last are to be traced.
    """
    warmup = warmup_of(experiment.optimizer, experiment.steps)
    require(
        warmup < experiment.steps,
        f"optimizer.warmup_steps={warmup} must be less than steps={experiment.steps}.",
    )
    if traced := profiled(experiment.profile_steps):
        require(
            traced[1] <= experiment.steps,
            f"profile_steps={experiment.profile_steps!r} must end at steps={experiment.steps} or before.",
        )


def profiled(steps: str) -> tuple[int, int] | None:
    """First and last of the steps that "10:15" names; None of an empty text.

    Raises:
      UserError: it is neither.
    """
    if not steps:
        return None
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", steps)
    require(
        match is not None and int(match[1]) <= int(match[2]),
        f"profile_steps={steps!r} must be the first and the last step to trace, counted from 1, such as "
        "'10:15', or empty.",
    )
    assert match is not None
    return int(match[1]), int(match[2])


def _check_corpus(experiment: Experiment, data: CorpusConfig) -> None:
    require(
        experiment.init_from is not None,
        "Training on a corpus needs init_from, a checkpoint with a tokenizer; name a converted one, or one "
        "that gaze-jax convert --llm=... --vision=... joins.",
    )
    require(
        experiment.steps > 0 or data.epochs is not None,
        "steps=0 takes as many steps as data.epochs need; give one of them.",
    )
    require(
        not experiment.eval_every or data.holdout > 0,
        f"eval_every={experiment.eval_every} evaluates what is held out, and data.holdout=0 holds out "
        "nothing; set it to a fraction such as 0.01.",
    )


def _check_digits(experiment: Experiment, data: DigitsConfig) -> None:
    require(experiment.steps >= 1, f"steps={experiment.steps} must be at least 1.")
    require(
        experiment.model.views == ViewConfig()
        and experiment.model.gaze.video_region is None
        and experiment.model.gaze.newlines == "text",
        "model.views, model.gaze.video_region and model.gaze.newlines have no effect on the digit scenes, "
        "which are one view each without newlines; leave them out.",
    )
    size = data.image_size
    require(
        size == experiment.model.tower.image_size,
        f"model.vision.image_size={experiment.model.tower.image_size} must be {size}, the size of a scene: "
        f"data.rows={data.rows} cells of data.cell={data.cell} pixels.",
    )
    vocabulary = build_tokenizer().vocab_size
    require(
        experiment.model.decoder.vocab_size >= vocabulary,
        f"model.decoder.vocab_size={experiment.model.decoder.vocab_size} must be at least {vocabulary}, "
        "the tokenizer's size.",
    )
