"""A checkpoint that can be asked: one call for an answer, a batch of them, or a conversation."""

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gaze_jax.chat.template import ChatTemplate
from gaze_jax.convert import load as checkpoints
from gaze_jax.convert.checkpoint import Converted
from gaze_jax.core.layout import VisualLayout
from gaze_jax.data.sample import Frames
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError
from gaze_jax.families import get_family
from gaze_jax.families.family import Family
from gaze_jax.infer.chat_session import ChatSession, StreamChunk
from gaze_jax.infer.detokenizer import check_limits
from gaze_jax.infer.gaze_options import GazeOptions
from gaze_jax.infer.memory import cache_bytes, free_bytes, written
from gaze_jax.infer.programs import Params
from gaze_jax.infer.sampling import check_sampling
from gaze_jax.infer.trace import Trace
from gaze_jax.media.images import read_image
from gaze_jax.media.video import open_video
from gaze_jax.models import MLLM, MLLMConfig
from gaze_jax.models.config import VisionConfig
from gaze_jax.models.unstacked import split_layers

PLAIN = ChatTemplate(
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ message['content'] | replace('<image>\n', '<image>') }}\n"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}",
    {},
    "the form that train.py teaches",
)
"""How a model that was trained here reads a question: its image, its text, a line feed."""

Picture = str | os.PathLike[str] | np.ndarray
Film = str | os.PathLike[str] | Frames


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What a model said.

    Attributes:
      text: the answer, without an end token or a stop string.
      tokens: what was generated, as text, the end token last if it came.
      finish_reason: why it ended: "stop" (an end token or a stop string) or "length" (``max_tokens``).
      stop_reason: the end token or the stop string that ended it, as text; None if neither did.
      regions, top_k: R of what was shown, and how many (or which fraction) a query selected; None: dense.
      trace: where every token looked, if the answer was traced.
    """

    text: str
    tokens: tuple[str, ...]
    finish_reason: str
    stop_reason: str | None
    regions: int
    top_k: int | float | None
    trace: Trace | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A checkpoint in memory; :func:`gaze_jax.load` makes one.

    Attributes:
      config, params: of the model; the parameters as the device wants to read them
        (:mod:`gaze_jax.models.unstacked`).
      tokenizer: of the model.
      template: how it was trained to read a conversation.
      end_ids: tokens that end an answer.
      name: of the checkpoint, for headings.
      system: prompt of conversations that name no other; None is none.
      resize: squash images of another size to the tower's, where its views are of style "square".
      mesh: devices that batches are dealt to.
      cache_tokens: most tokens that the rows of a cache may hold together; None: what memory holds.
    """

    config: MLLMConfig
    params: Params
    tokenizer: Tokenizer
    template: ChatTemplate
    end_ids: frozenset[int]
    name: str = ""
    system: str | None = None
    resize: bool = True
    mesh: Mesh | None = None
    cache_tokens: int | None = None

    @property
    def layout(self) -> VisualLayout:
        """How it makes tokens of images and frames."""
        return self.config.layout

    @property
    def family(self) -> Family:
        """How its models are shown images and videos and asked questions."""
        return get_family(self.config.views.style)

    @property
    def model(self) -> MLLM:
        """The network."""
        return MLLM(self.config)

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], *, mesh: Mesh | None = None, check: bool = True
    ) -> "Sampler":
        """Load a checkpoint: converted, a Hugging Face directory as it is, or a run of train.py.

        Args:
          directory: of the checkpoint.
          mesh: where parameters go and over which batches are split; None is one device.
          check: compare a converted checkpoint with its checksums.

        Raises:
          UserError: it is damaged, has no image tower, or lacks its tokenizer or chat template.
        """
        path = Path(directory)
        found = checkpoints.load(path, checkpoints.one_device() if mesh is None else mesh, check=check)
        sampler = dataclasses.replace(cls.of(found, path), mesh=mesh)
        if mesh is None and jax.local_devices()[0].platform == "cpu":
            return dataclasses.replace(sampler, params=split_layers(sampler.params))
        return sampler

    @classmethod
    def of(cls, found: Converted, directory: Path) -> "Sampler":
        """The assistant in a loaded checkpoint; ``directory`` is for messages.

        Raises:
          UserError: it has no image tower, or lacks its tokenizer or chat template.
        """
        config, name = found.config, directory.resolve().name
        if isinstance(config, VisionConfig) or config.vision is None:
            kind = "an image tower" if isinstance(config, VisionConfig) else "a language model"
            raise UserError(f"{directory} is {kind} alone; give a multimodal checkpoint.")
        if found.tokenizer is None:
            raise UserError(
                f"{directory} has no tokenizer.json, so no question can be read to it; add the file."
            )
        if found.files is None:  # a run of train.py, whose tokenizer lies in its checkpoints
            tokenizer = Tokenizer(found.tokenizer)
            ends = frozenset({tokenizer.end_id})
            return cls(config, found.params, tokenizer, PLAIN, ends, name, resize=False)
        try:
            tokenizer = Tokenizer(found.tokenizer)
        except ValueError as error:
            raise UserError(f"{found.files / 'tokenizer.json'}: {error}") from error
        if tokenizer.vocab_size > config.decoder.vocab_size:
            raise UserError(
                f"{found.files / 'tokenizer.json'} has {tokenizer.vocab_size} tokens but the model has rows "
                f"for {config.decoder.vocab_size}; take the tokenizer that came with it."
            )
        ends = frozenset({tokenizer.end_id, *_stated_ends(found.files)})
        system = get_family(config.views.style).system
        return cls(config, found.params, tokenizer, ChatTemplate.load(found.files), ends, name, system)

    def with_gaze(self, **fields: Any) -> "Sampler":
        """The same assistant with other fields of its ``GazeConfig``; parameters do not depend on most.

        Raises:
          UserError: a value is out of range, or the field decides which parameters there are.
        """
        if "context_tokens" in fields:
            raise UserError("context_tokens are parameters of the checkpoint; convert it with others.")
        try:
            gaze = dataclasses.replace(self.config.gaze, **fields)
            config = dataclasses.replace(self.config, gaze=gaze)
            _ = config.layout  # checks it
        except ValueError as error:
            raise UserError(str(error)) from error
        return dataclasses.replace(self, config=config)

    def chat(self, **options: Any) -> ChatSession:
        """Begin a conversation; options of :class:`gaze_jax.infer.chat_session.ChatSession`."""
        return ChatSession(self, **options)

    def generate(
        self,
        prompt: str,
        *,
        images: Sequence[Picture] = (),
        video: Film | None = None,
        videos: Sequence[Film] = (),
        system: str | None = None,
        gaze: GazeOptions | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        sample_top_k: int | None = None,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        return_trace: bool = False,
        on_text: Callable[[str], Any] | None = None,
    ) -> Answer:
        """Answer one question.

        Args:
          prompt: with a tag ``<image>`` or ``<video>`` for each of the media, or without any: media first.
          images: files, or uint8 [height, width, 3] each.
          video: a file or a folder of frames, sampled as models of this family are shown them; or the
            frames to show, uint8 [height, width, 3] each.
          videos: several such.
          system: system prompt; None is the family's.
          gaze: which regions queries may select; None: as the model is configured.
          max_tokens: most tokens of the answer.
          temperature: 0 takes the likeliest token.
          sample_top_k: draw from the so many likeliest tokens; None or 0 is all. The regions to select are
            ``GazeOptions.top_k``.
          top_p: draw from the likeliest of those tokens that reach this probability together.
          stop: strings that end the answer.
          seed: of the drawing.
          return_trace: record where every token looked; costs as much as dense attention.
          on_text: called with every piece of text as soon as it is there. The answer is the same.

        Raises:
          UserError: media or the prompt cannot be read, a number is out of range, or it does not fit memory.
        """
        check_limits(max_tokens, stop)
        check_sampling(temperature, top_p, seed, sample_top_k)
        chat = self.chat(system=system, gaze=gaze, free_slots=max_tokens)
        films = [*(() if video is None else (video,)), *self.read_videos(videos)]
        chat.ask(prompt, images=images, videos=films)
        steps = chat.stream(
            max_tokens,
            temperature=temperature,
            sample_top_k=sample_top_k,
            top_p=top_p,
            stop=stop,
            seed=seed,
            return_trace=return_trace,
            chunked=on_text is None,
        )
        return collect_answer(chat, steps, on_text)

    def read_images(self, images: Sequence[Picture]) -> list[np.ndarray]:
        """uint8 [height, width, 3] each, files decoded."""
        if isinstance(images, str | os.PathLike):
            raise UserError(f"images={str(images)!r} must be a list of images; put brackets around it.")
        return [image if isinstance(image, np.ndarray) else read_image(image) for image in images]

    def read_videos(self, films: Sequence[Film]) -> list[Frames]:
        """Frames of each video, files sampled as models of this family are shown them."""
        if isinstance(films, str | os.PathLike):
            raise UserError(f"videos={str(films)!r} must be a list of videos; put brackets around it.")
        sampling = self.family.frames
        return [open_video(f, sampling) if isinstance(f, str | os.PathLike) else f for f in films]

    def check_memory(
        self, *, rows: int, regions: int, slots: int, text: int, visual: int, there: bool = False
    ) -> None:
        """Refuse a cache that would not fit, before it is computed.

        Args:
          rows: B.
          regions, slots, text: R, P and S of every row.
          visual: visual tokens of the longest row.
          there: memory holds it already.

        Raises:
          UserError: it is more than :attr:`cache_tokens`, or than the memory of a device.
        """
        wanted = rows * (visual + text)
        if self.cache_tokens is not None and wanted > self.cache_tokens:
            each = f"{rows} rows of " if rows > 1 else ""
            raise UserError(
                f"{each}{visual} visual and {text} other tokens, those to come among them, are {wanted}, "
                f"but the cache may hold cache_tokens={self.cache_tokens}; show less, or raise it."
            )
        if there:
            return
        devices = 1 if self.mesh is None else self.mesh.size
        device = jax.local_devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        sizes = -(-rows // devices), regions, slots, text
        needed = cache_bytes(self.config, *sizes, on_host=device.platform == "cpu")
        free = free_bytes(device)
        if free is not None and needed > free:
            raise UserError(
                f"A cache of {rows} x {visual} visual and {text} other tokens takes {written(needed)} on a "
                f"device but {written(free)} are free; show less, or fewer at once."
            )


def load(
    directory: str | os.PathLike[str], *, mesh: Mesh | None = None, check: bool = True, **gaze: Any
) -> Sampler:
    """Load a checkpoint to ask: converted, a Hugging Face directory as it is, or a run of train.py.

    Args:
      directory: of the checkpoint.
      mesh: where parameters go and over which batches are split (``parallel.mesh.make_mesh``); None is one
        device.
      check: compare a converted checkpoint with its checksums.
      **gaze: fields of ``GazeConfig`` to change, such as ``select_per="kv_head"`` or ``visual_dtype="int8"``.

    Raises:
      UserError: it is damaged, has no image tower, lacks its tokenizer or chat template, or a field is out of
        range.
    """
    return Sampler.load(directory, mesh=mesh, check=check).with_gaze(**gaze)


def collect_answer(
    chat: ChatSession, steps: Iterator[StreamChunk], on_text: Callable[[str], Any] | None = None
) -> Answer:
    """Take an answer to its end."""
    traced = False
    for step in steps:
        traced |= step.token_trace is not None
        if on_text is not None and step.text:
            on_text(step.text)
    detokenizer = chat.detokenizer
    assert detokenizer is not None and detokenizer.finish_reason is not None, "an answer was taken to its end"
    trace = chat.trace() if traced else None
    return Answer(
        detokenizer.text,
        tuple(detokenizer.pieces),
        detokenizer.finish_reason,
        detokenizer.stop_reason,
        chat.regions,
        chat.top_k,
        trace,
    )


def _stated_ends(directory: Path) -> Collection[int]:
    """The end tokens that generation_config.json names, if it is there."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return ()
    try:
        stated = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a JSON object ({error}); download it again.") from error
    ends = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(type(end) is int for end in ends):
        raise UserError(f"{path} has eos_token_id={stated!r}; it must be a token id or a list of them.")
    return ends
