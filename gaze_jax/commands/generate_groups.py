"""Groups of options of generate.py. Fields are named like their flags, and a group checks its own fields.

Slow imports are inside the functions that need them, so that ``--help`` is fast.
"""

import dataclasses
import typing
from pathlib import Path
from typing import Any

from gaze_jax.commands import cli
from gaze_jax.commands.devices import SIZES, check_sizes
from gaze_jax.errors import UserError, renamed

if typing.TYPE_CHECKING:
    from gaze_jax.infer.gaze_options import GazeOptions

SUFFIXES = (".html", ".png", ".mp4", ".gaze")

DEFAULTS: dict[str, float] = {
    "folder_fps": 1.0,
    "top_p": 1.0,
    "seed": 0,
    "views": 8,
    "batch_size": 8,
}
"""Defaults of fields that are None if the option was not given."""

GAZE_FLAGS = {name: f"--gaze_{name}" for name in ("top_k", "keep", "dense", "full_layers")} | {
    "look_at": "--look_at"
}
"""Fields of ``GazeOptions`` -> the flags that set them."""


def or_default(group: object, name: str) -> Any:
    """A field of a group, or its default if it is None."""
    value = getattr(group, name)
    return DEFAULTS.get(name) if value is None else value


@dataclasses.dataclass(frozen=True)
class ShownOptions:
    """Media and questions of one conversation.

    Attributes:
      image, video: files; a video may be a folder of frames.
      question: turns of one conversation.
      system: system prompt; None is the family's.
      fps, max_frames: frames to show per second, and at most; None is the family's.
      folder_fps: frames per second of a folder of frames.
      resize: resize images to the square that a run's tower takes.
    """

    image: tuple[str, ...] = ()
    video: tuple[str, ...] = ()
    question: tuple[str, ...] = ()
    system: str | None = None
    fps: float | None = None
    max_frames: int | None = None
    folder_fps: float | None = None
    resize: bool = False

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise UserError(f"--fps={self.fps} must be a positive number of frames per second.")
        if self.max_frames is not None and self.max_frames < 1:
            raise UserError(f"--max_frames={self.max_frames} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class SelectionOptions:
    """Regions, their selection, and how the cache stores them.

    Attributes:
      gaze_top_k, gaze_keep, gaze_dense, gaze_full_layers: fields of ``GazeOptions``.
      gaze_select_per, gaze_region, gaze_video_region, gaze_newlines, gaze_visual_dtype: fields of
        ``GazeConfig``; None is the checkpoint's.
      offload: keep visual keys and values in host memory.
      look_at: boxes, in the format of :meth:`gaze_jax.infer.steer.LookAt.parse`.
      look_at_layers, look_at_bias: apply to all boxes.
    """

    gaze_top_k: int | tuple[int, ...] | None = None
    gaze_keep: float | None = None
    gaze_dense: bool = False
    gaze_full_layers: tuple[int, ...] | None = None
    gaze_select_per: str | None = None
    gaze_region: tuple[int, ...] | None = None
    gaze_video_region: tuple[int, ...] | None = None
    gaze_newlines: str | None = None
    gaze_visual_dtype: str | None = None
    offload: bool = False
    look_at: tuple[str, ...] = ()
    look_at_layers: tuple[int, ...] | None = None
    look_at_bias: float | None = None

    def __post_init__(self) -> None:
        for name, sides in (("gaze_region", "7,7"), ("gaze_video_region", "2,4,8")):
            value = getattr(self, name)
            if value is not None and (len(value) != len(sides.split(",")) or min(value) < 1):
                given = ",".join(map(str, value))
                raise UserError(f"--{name}={given} must be sizes of at least 1, such as {sides}.")
        _ = self.options

    @property
    def options(self) -> "GazeOptions":
        """The gaze options given by these fields."""
        from gaze_jax.infer.gaze_options import GazeOptions
        from gaze_jax.infer.steer import LookAt

        with renamed(GAZE_FLAGS):
            boxes = tuple(
                LookAt.parse(text, layers=self.look_at_layers, bias=self.look_at_bias)
                for text in self.look_at
            )
            full_layers = self.gaze_full_layers or ()
            return GazeOptions(self.gaze_top_k, self.gaze_keep, self.gaze_dense, full_layers, boxes)

    @property
    def config(self) -> dict[str, Any]:
        """Fields of ``GazeConfig`` that replace the checkpoint's."""
        names = ("select_per", "region", "video_region", "newlines", "visual_dtype")
        values = {name: getattr(self, f"gaze_{name}") for name in names}
        chosen = {name: value for name, value in values.items() if value is not None}
        return chosen | ({"decode_implementation": "offload"} if self.offload else {})


class _Drawn(typing.TypedDict):
    temperature: float
    sample_top_k: int | None
    top_p: float
    stop: tuple[str, ...]
    seed: int


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How tokens are sampled; see ``Sampler.generate``."""

    max_tokens: int = 64
    temperature: float = 0.0
    sample_top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        from gaze_jax.infer.detokenizer import check_limits
        from gaze_jax.infer.sampling import check_sampling

        with renamed({field.name: f"--{field.name}" for field in dataclasses.fields(self)}):
            check_limits(self.max_tokens, self.stop)
            check_sampling(self.temperature, self.drawn["top_p"], self.drawn["seed"], self.sample_top_k)

    @property
    def drawn(self) -> _Drawn:
        """Sampling arguments of ``ChatSession.stream``, which are also fields of ``Request``."""
        return {
            "temperature": self.temperature,
            "sample_top_k": self.sample_top_k,
            "top_p": or_default(self, "top_p"),
            "stop": self.stop,
            "seed": or_default(self, "seed"),
        }


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """Pictures of one conversation.

    Attributes:
      out: files that show where the last answer looked; the suffix is the format.
      layer: layer to show; None: all, or the best one of a run's eval.json.
      views: maximum number of views and frames in a .png or .mp4.
    """

    out: tuple[str, ...] = ()
    layer: int | None = None
    views: int | None = None

    def __post_init__(self) -> None:
        for name in self.out:
            if Path(name).suffix not in SUFFIXES:
                raise UserError(f"--out={name} must end in one of {', '.join(SUFFIXES)}.")
            cli.check_file("out", name)
            if name.endswith(".mp4"):
                from gaze_jax.viewer.video import need_av

                need_av()
        if self.views is not None and self.views < 1:
            raise UserError(f"--views={self.views} must be at least 1.")

    @property
    def suffixes(self) -> set[str]:
        """The formats of the files."""
        return {Path(name).suffix for name in self.out}


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """A file of questions.

    Attributes:
      questions: JSON Lines file of :class:`gaze_jax.infer.requests.Request`; None: one conversation.
      answers: JSON Lines file to write.
      traces: folder for a trace and a page per question, and an index.
      resume: keep the answers that the file has, and answer the other questions.
      batch_size: maximum number of questions to answer at once.
    """

    questions: str | None = None
    answers: str | None = None
    traces: str | None = None
    resume: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch_size={self.batch_size} must be at least 1.")
        if self.questions is None:
            return
        if self.answers is None:
            raise UserError("Give --answers, the file to write.")
        cli.check_file("answers", self.answers)
        if Path(self.answers).resolve() == Path(self.questions).resolve():
            raise UserError("--answers is the file of --questions, which it would replace; name another.")


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """Devices and memory.

    Attributes:
      all_devices: split batches over all devices instead of using one.
      fsdp: devices that share one copy of the parameters.
      tensor: devices that share every layer's heads and channels.
      context: devices that share each sequence and its cache.
      cache_tokens: maximum number of tokens in the cache; None: what fits.
      compilation_cache: folder for compiled programs; empty for none.
    """

    all_devices: bool = False
    fsdp: int | None = None
    tensor: int | None = None
    context: int | None = None
    cache_tokens: int | None = None
    compilation_cache: str = ""

    def __post_init__(self) -> None:
        check_sizes(self.all_devices, self.sizes)
        if self.cache_tokens is not None and self.cache_tokens < 1:
            raise UserError(f"--cache_tokens={self.cache_tokens} must be at least 1.")

    @property
    def sizes(self) -> dict[str, int | None]:
        """The sizes of the mesh that were given."""
        return {name: getattr(self, name) for name in SIZES}
