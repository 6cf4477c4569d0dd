"""The options of generate.py as one value, checked before anything is read.

Two tables say which options are refused in which situation, and with what message: :data:`RULES` and, once
the checkpoint is known, :data:`CHECKPOINT_RULES`.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from gaze_jax.commands.devices import SIZES
from gaze_jax.commands.generate_groups import (
    GAZE_FLAGS,
    BatchOptions,
    DeviceOptions,
    OutputOptions,
    SamplingOptions,
    SelectionOptions,
    ShownOptions,
    or_default,
)
from gaze_jax.errors import UserError, renamed

DRAWN = (".png", ".mp4")
"""Suffixes of ``--out`` files that show only what was selected."""


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """All options of generate.py.

    Raises:
      UserError: an option is out of range, is missing, or has no effect with the others (:data:`RULES`).
    """

    checkpoint: str | None = None
    shown: ShownOptions = dataclasses.field(default_factory=ShownOptions)
    selection: SelectionOptions = dataclasses.field(default_factory=SelectionOptions)
    sampling: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    output: OutputOptions = dataclasses.field(default_factory=OutputOptions)
    batch: BatchOptions = dataclasses.field(default_factory=BatchOptions)
    devices: DeviceOptions = dataclasses.field(default_factory=DeviceOptions)

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            raise UserError(
                "Give --checkpoint, a converted one, a Hugging Face directory or a run of train.py."
            )
        check(self, self, RULES)
        if self.batch.questions is None:
            from gaze_jax.infer.prompt import check_questions

            check_questions(self.shown.question, len(self.shown.image), len(self.shown.video))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Make from a mapping of option names to values; missing options get their defaults."""
        groups = {field.name: field.type for field in dataclasses.fields(cls) if field.name != "checkpoint"}
        given: dict[str, Any] = {"checkpoint": values.get("checkpoint")}
        for name, kind in groups.items():
            fields = dataclasses.fields(typing.cast(Any, kind))
            chosen = {field.name: values[field.name] for field in fields if field.name in values}
            given[name] = typing.cast(Any, kind)(**chosen)
        return cls(**given)

    def value(self, name: str) -> Any:
        """An option of a group by its name, or its default if it is None."""
        return or_default(self._group(name), name)

    def given(self, name: str) -> bool:
        """Whether an option was given; a boolean that is off counts as not given."""
        value = getattr(self._group(name), name)
        return value is not None and value is not False and value != ()

    def _group(self, name: str) -> object:
        groups = (getattr(self, field.name) for field in dataclasses.fields(self))
        return next(group for group in groups if hasattr(group, name))

    def check_checkpoint(self, *, top_k: int | None, depth: int, resizes: bool) -> None:
        """Refuse options that have no effect with this checkpoint.

        Args:
          top_k: the checkpoint's configured regions per query; None is dense attention.
          depth: number of decoder layers.
          resizes: the model handles images of any size itself.

        Raises:
          UserError: an option has no effect (:data:`CHECKPOINT_RULES`), a layer does not exist, or
            ``gaze_top_k`` has another number of layers.
        """
        from gaze_jax.infer.gaze_options import check_layers

        with renamed(GAZE_FLAGS):
            check_layers(self.selection.options, depth)
        check(self, Opened(self, top_k, resizes), CHECKPOINT_RULES)
        layer = self.output.layer
        if layer is not None and not 0 <= layer < depth:
            raise UserError(f"--layer={layer} must be between 0 and {depth - 1}.")


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Rule(Generic[T]):
    """Options that are refused in a situation.

    Attributes:
      options: names of the options.
      when: the situation.
      why: the message after the option's name.
      mend: the end of the message: how to fix it.
    """

    options: tuple[str, ...]
    when: Callable[[T], bool]
    why: str
    mend: str = "drop it"


def check(options: GenerateOptions, situation: T, rules: Sequence[Rule[T]]) -> None:
    """Raise the message of the first rule that an option breaks.

    Args:
      options: the options.
      situation: the argument of the rules' ``when``.
      rules: the rules, in order of precedence.

    Raises:
      UserError: a rule is broken.
    """
    for rule in rules:
        if rule.when(situation):
            for name in filter(options.given, rule.options):
                raise UserError(f"--{name} {rule.why}; {rule.mend}.")


def one_conversation(options: GenerateOptions) -> bool:
    """There is no file of questions."""
    return options.batch.questions is None


def file_of_questions(options: GenerateOptions) -> bool:
    """There is a file of questions."""
    return not one_conversation(options)


def no_video(options: GenerateOptions) -> bool:
    """A conversation without a video."""
    return one_conversation(options) and not options.shown.video


def no_folder(options: GenerateOptions) -> bool:
    """A conversation without frames in a folder."""
    return one_conversation(options) and not any(Path(name).is_dir() for name in options.shown.video)


def nothing_shown(options: GenerateOptions) -> bool:
    """A conversation of text alone."""
    return no_video(options) and not options.shown.image


def no_layer_shown(options: GenerateOptions) -> bool:
    """A conversation without output files, or only with traces, which contain all layers."""
    return one_conversation(options) and not options.output.suffixes - {".gaze"}


def nothing_drawn(options: GenerateOptions) -> bool:
    """A conversation without a sheet or clip."""
    return one_conversation(options) and options.output.suffixes.isdisjoint(DRAWN)


def greedy(options: GenerateOptions) -> bool:
    """A conversation whose tokens are not sampled."""
    return one_conversation(options) and options.sampling.temperature == 0


def dense(options: GenerateOptions) -> bool:
    """A conversation with dense attention."""
    return one_conversation(options) and options.selection.gaze_dense


def dense_drawn(options: GenerateOptions) -> bool:
    """A dense conversation with a sheet or clip."""
    return dense(options) and not nothing_drawn(options)


def no_traces(options: GenerateOptions) -> bool:
    """A file of questions without traces."""
    return file_of_questions(options) and options.batch.traces is None


def no_box(options: GenerateOptions) -> bool:
    """No box to look at."""
    return not options.selection.look_at


def one_device(options: GenerateOptions) -> bool:
    """Not all devices."""
    return not options.devices.all_devices


_OF_ONE = ("image", "video", "question", "out", "fps", "max_frames", "folder_fps", "views")
_OF_REGIONS = (
    "gaze_select_per",
    "gaze_region",
    "gaze_newlines",
    "gaze_visual_dtype",
    "offload",
    "gaze_top_k",
    "gaze_keep",
    "gaze_dense",
    "gaze_full_layers",
    "look_at",
    "resize",
    "out",
)

RULES = (
    Rule(("answers", "traces", "resume", "batch_size"), one_conversation, "is for --questions"),
    Rule(
        (*_OF_ONE, "look_at_layers", "look_at_bias"),
        file_of_questions,
        "is for one conversation; write it into the lines of --questions",
    ),
    Rule(("fps", "max_frames", "folder_fps", "gaze_video_region"), no_video, "has no effect without --video"),
    Rule(_OF_REGIONS, nothing_shown, "has no effect without --image or --video"),
    Rule(("layer",), no_layer_shown, "has no effect without an --out that shows a layer"),
    Rule(("layer",), no_traces, "has no effect without --traces"),
    Rule(("views",), nothing_drawn, "has no effect without --out=....png or .mp4"),
    Rule(("folder_fps",), no_folder, "has no effect without a --video that is a folder"),
    Rule(
        ("sample_top_k", "top_p", "seed"),
        greedy,
        "has no effect at --temperature=0, which samples nothing",
        "drop it, or raise the temperature",
    ),
    Rule(("look_at_layers", "look_at_bias"), no_box, "has no effect without --look_at"),
    Rule(("gaze_select_per",), dense, "has no effect with --gaze_dense, which selects nothing"),
    Rule(
        ("out",),
        dense_drawn,
        "as .png or .mp4 shows what was selected, and --gaze_dense selects nothing",
        "drop one of them",
    ),
    Rule(SIZES, one_device, "has no effect without --all_devices"),
)
"""Rules that need no checkpoint; the first that applies is reported."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """Options and the properties of the checkpoint that rules depend on.

    Attributes:
      options: the options of the command.
      top_k: the checkpoint's configured regions per query; None is dense attention.
      resizes: the model handles images of any size itself.
    """

    options: GenerateOptions
    top_k: int | None
    resizes: bool


def sizes_images(opened: Opened) -> bool:
    """The checkpoint is not a run of train.py."""
    return opened.resizes


def selects_nothing(opened: Opened) -> bool:
    """A conversation that is dense because neither the checkpoint nor an option sets a budget."""
    selection = opened.options.selection
    budgets = (opened.top_k, selection.gaze_top_k, selection.gaze_keep)
    return one_conversation(opened.options) and all(budget is None for budget in budgets)


def draws_nothing(opened: Opened) -> bool:
    """The same as :func:`selects_nothing`, with a sheet or clip."""
    return selects_nothing(opened) and not nothing_drawn(opened.options)


_GIVE_BUDGET = "give --gaze_top_k or --gaze_keep"

CHECKPOINT_RULES = (
    Rule(("resize",), sizes_images, "is for runs of train.py; other checkpoints resize images themselves"),
    Rule(
        ("gaze_select_per", "gaze_full_layers", "look_at"),
        selects_nothing,
        "has no effect on a checkpoint that attends densely",
        _GIVE_BUDGET,
    ),
    Rule(
        ("out",),
        draws_nothing,
        "as .png or .mp4 shows what was selected, and this checkpoint attends densely",
        _GIVE_BUDGET,
    ),
)
"""Rules that depend on the checkpoint; the first that applies is reported."""
