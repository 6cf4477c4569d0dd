"""A checkpoint in memory: parameters, tokenizer, template, media reading and memory checks."""

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from gaze_jax.chat.template import ChatTemplate
from gaze_jax.convert import load as checkpoints
from gaze_jax.convert.checkpoint import Converted
from gaze_jax.core.layout import VisualLayout
from gaze_jax.data.processor import Processor
from gaze_jax.data.sample import Frames
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError
from gaze_jax.families import get_family
from gaze_jax.families.family import Family
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.memory import cache_bytes, format_bytes, free_bytes
from gaze_jax.infer.programs import Params
from gaze_jax.infer.prompt import FAMILY, PromptBuilder, template_of
from gaze_jax.media.images import read_image
from gaze_jax.media.video import open_video
from gaze_jax.models import MLLM, MLLMConfig
from gaze_jax.models.config import VisionConfig
from gaze_jax.models.unstacked import split_layers

Picture = str | os.PathLike[str] | np.ndarray
Film = str | os.PathLike[str] | Frames


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A checkpoint in memory, with everything needed to ask it questions.

    Attributes:
      config: the model's configuration.
      params: the model's parameters, on CPUs as one array per layer (:mod:`gaze_jax.models.unstacked`).
      tokenizer: the model's tokenizer.
      template: the chat template.
      end_ids: ids of the tokens that end an answer.
      name: the checkpoint's name, for headings.
      system: default system prompt; None means no system prompt.
      resize: resize images to the tower's size, for views of style "square".
      mesh: devices that batches are split over; None means one device.
      cache_tokens: maximum number of tokens in a cache, all rows together; None means as memory allows.
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
        """How images and frames become visual tokens and regions."""
        return self.config.layout

    @property
    def family(self) -> Family:
        """The model family: views, frame sampling and prompt conventions."""
        return get_family(self.config.views.style)

    @property
    def model(self) -> MLLM:
        """The network."""
        return MLLM(self.config)

    @property
    def prompts(self) -> PromptBuilder:
        """Builds prompts for this model."""
        family = self.family
        processor = Processor(self.layout, self.tokenizer, (FAMILY,), family.views, resize=self.resize)
        return PromptBuilder(self.template, processor, family.arrange, self.system)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, mesh: Mesh | None = None, check: bool = True) -> Self:
        """Load a checkpoint: converted, a Hugging Face directory as it is, or a run of train.py.

        Args:
          directory: the checkpoint's directory.
          mesh: devices for the parameters and the batches; None means one device.
          check: verify the checksums of a converted checkpoint.

        Raises:
          UserError: it is damaged, has no image tower, or lacks its tokenizer.
        """
        path = Path(directory)
        found = checkpoints.load(path, checkpoints.one_device() if mesh is None else mesh, check=check)
        sampler = dataclasses.replace(cls.of(found, path), mesh=mesh)
        if mesh is None and jax.local_devices()[0].platform == "cpu":
            return dataclasses.replace(sampler, params=split_layers(sampler.params))
        return sampler

    @classmethod
    def of(cls, found: Converted, directory: Path) -> Self:
        """Build from a loaded checkpoint; ``directory`` gives the name and is quoted in messages.

        :func:`gaze_jax.infer.prompt.template_of` chooses the chat template.

        Raises:
          UserError: it has no image tower, or lacks its tokenizer.
        """
        config, name = found.config, directory.resolve().name
        if isinstance(config, VisionConfig) or config.vision is None:
            kind = "an image tower" if isinstance(config, VisionConfig) else "a language model"
            raise UserError(f"{directory} is {kind} alone; give a multimodal checkpoint.")
        if found.tokenizer is None:
            raise UserError(f"{directory} has no tokenizer.json, so it cannot read questions; add the file.")
        if found.files is None:  # a run of train.py, which stores its tokenizer in its checkpoints
            tokenizer = Tokenizer(found.tokenizer)
            ends = frozenset({tokenizer.end_id})
            return cls(config, found.params, tokenizer, template_of(None), ends, name, resize=False)
        try:
            tokenizer = Tokenizer(found.tokenizer)
        except ValueError as error:
            raise UserError(f"{found.files / 'tokenizer.json'}: {error}") from error
        if tokenizer.vocab_size > config.decoder.vocab_size:
            raise UserError(
                f"{found.files / 'tokenizer.json'} has {tokenizer.vocab_size} tokens but the model has rows "
                f"for {config.decoder.vocab_size}; use the tokenizer that came with it."
            )
        ends = frozenset({tokenizer.end_id, *_generation_ends(found.files)})
        system = get_family(config.views.style).system
        return cls(config, found.params, tokenizer, template_of(found.files), ends, name, system)

    def with_gaze(self, **fields: Any) -> Self:
        """The same model with some fields of its ``GazeConfig`` replaced; the parameters stay the same.

        Raises:
          UserError: a value is out of range, or the field is ``context_tokens``, which are parameters.
        """
        if "context_tokens" in fields:
            raise UserError(
                "context_tokens are parameters of the checkpoint; convert it again with another number."
            )
        try:
            gaze = dataclasses.replace(self.config.gaze, **fields)
            config = dataclasses.replace(self.config, gaze=gaze)
            _ = config.layout  # checks it
        except ValueError as error:
            raise UserError(str(error)) from error
        return dataclasses.replace(self, config=config)

    def read_images(self, images: Sequence[Picture]) -> list[np.ndarray]:
        """Decode image files; returns uint8 [height, width, 3] each."""
        if isinstance(images, str | os.PathLike):
            raise UserError(f"images={str(images)!r} must be a list of images; put brackets around it.")
        return [image if isinstance(image, np.ndarray) else read_image(image) for image in images]

    def read_videos(self, films: Sequence[Film]) -> list[Frames]:
        """Open video files; returns each video's frames, sampled by this model family's convention."""
        if isinstance(films, str | os.PathLike):
            raise UserError(f"videos={str(films)!r} must be a list of videos; put brackets around it.")
        sampling = self.family.frames
        return [open_video(f, sampling) if isinstance(f, str | os.PathLike) else f for f in films]

    def check_memory(
        self, rows: Sequence[Mapping[str, np.ndarray]], tokens: int, engine: Engine | None = None
    ) -> None:
        """Check that a cache fits, before anything is computed.

        Args:
          rows: arrays to prefill, one per row of the cache; may be empty if ``engine`` is given.
          tokens: text-stream tokens that will follow in each row.
          engine: the engine whose cache is extended; None means a new cache.

        Raises:
          UserError: the cache exceeds :attr:`cache_tokens` or the free memory of a device.
        """
        shown = [row["visual_src"] for row in rows if len(row["visual_src"])]
        count, regions = len(rows), max(map(len, shown), default=0)
        slots = max((source.shape[1] for source in shown), default=1)
        text = tokens + max((len(row["tokens"]) for row in rows), default=0)
        visual = max((int((source >= 0).sum()) for source in shown), default=0)
        fits = False
        if engine is not None:
            count, slots = engine.rows, max(slots, engine.slots)
            fits = engine.fits(text=text, regions=regions, slots=slots)
            regions, text = regions + engine.regions, text + engine.text_length
            visual += engine.visual_tokens
        wanted = count * (visual + text)
        if self.cache_tokens is not None and wanted > self.cache_tokens:
            each = f"{count} rows of " if count > 1 else ""
            raise UserError(
                f"{each}{visual} visual and {text} other tokens, the answer included, are {wanted}, "
                f"but the cache may hold cache_tokens={self.cache_tokens}; show less, or raise it."
            )
        if fits:
            return
        devices = 1 if self.mesh is None else self.mesh.size
        device = jax.local_devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        sizes = -(-count // devices), regions, slots, text
        needed = cache_bytes(self.config, *sizes, on_host=device.platform == "cpu")
        free = free_bytes(device)
        if free is not None and needed > free:
            raise UserError(
                f"A cache of {count} x {visual} visual and {text} other tokens takes {format_bytes(needed)} "
                f"on a device but {format_bytes(free)} are free; show less, or use a smaller batch."
            )


def _generation_ends(directory: Path) -> Collection[int]:
    """The end tokens in generation_config.json, if that file exists."""
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
