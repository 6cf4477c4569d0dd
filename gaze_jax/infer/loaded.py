"""A checkpoint in memory: parameters, tokenizer, template, media reading and memory checks."""

import dataclasses
import difflib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from gaze_jax.chat.template import ChatTemplate, template_of
from gaze_jax.convert import load as checkpoints
from gaze_jax.convert.checkpoint import Converted
from gaze_jax.convert.hub import resolve
from gaze_jax.convert.source import CONFIG, commit_of, read_config
from gaze_jax.core.layout import VisualLayout
from gaze_jax.data.processor import Processor
from gaze_jax.data.sample import Frames
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError
from gaze_jax.families import get_family
from gaze_jax.families.family import Family
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.inputs import Film, Picture, as_image, as_video
from gaze_jax.infer.memory import cache_bytes, format_bytes, free_bytes
from gaze_jax.infer.programs import Params
from gaze_jax.infer.prompt import FAMILY, PLAIN, PromptBuilder
from gaze_jax.models import MLLM, MLLMConfig
from gaze_jax.models.config import GazeConfig, VisionConfig
from gaze_jax.models.unstacked import split_layers
from gaze_jax.parallel import together
from gaze_jax.parallel.rules import split_sizes
from gaze_jax.train.step import check_heads


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
      max_positions: tokens of a sequence that the language model was trained with; None if that is unknown.
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
    max_positions: int | None = None

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
          directory: the checkpoint's directory, or an id on the Hugging Face Hub (``convert.hub``).
          mesh: devices for the parameters and the batches; None means one device.
          check: verify the checksums of a converted checkpoint.

        Raises:
          UserError: it is damaged, has no image tower, lacks its tokenizer, or the mesh does not divide the
            model's heads.
        """
        path = resolve(os.fspath(directory))
        found = checkpoints.load(path, checkpoints.one_device() if mesh is None else mesh, check=check)
        sampler = dataclasses.replace(cls.of(found, path), mesh=mesh)
        if mesh is not None:
            check_heads(sampler.config, mesh)
        if mesh is None and jax.local_devices()[0].platform == "cpu":
            return dataclasses.replace(sampler, params=split_layers(sampler.params))
        return sampler

    @classmethod
    def of(cls, found: Converted, directory: Path) -> Self:
        """Build from a loaded checkpoint; ``directory`` gives the name and is quoted in messages.

        :func:`gaze_jax.chat.template.template_of` chooses the chat template.

        Raises:
          UserError: it has no image tower, or lacks its tokenizer.
        """
        config, name = found.config, _name(directory)
        if isinstance(config, VisionConfig) or config.vision is None:
            kind = "an image tower" if isinstance(config, VisionConfig) else "a language model"
            raise UserError(f"{directory} is {kind} alone; give a multimodal checkpoint.")
        if found.tokenizer is None:
            raise UserError(f"{directory} has no tokenizer.json, so it cannot read questions; add the file.")
        if found.files is None:  # a run on digit scenes, which stores its tokenizer in its checkpoints
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
                f"for {config.decoder.vocab_size}; use the tokenizer that came with it."
            )
        ends = frozenset({tokenizer.end_id, *_generation_ends(found.files)})
        system = get_family(config.views.style).system
        template, longest = template_of(found.files), _max_positions(found.files)
        return cls(config, found.params, tokenizer, template, ends, name, system, max_positions=longest)

    def with_gaze(self, **fields: Any) -> Self:
        """The same model with some fields of its ``GazeConfig`` replaced; the parameters stay the same.

        Raises:
          UserError: a value is out of range, or the field is ``context_tokens``, which are parameters.
        """
        check_gaze_fields(fields)
        try:
            gaze = dataclasses.replace(self.config.gaze, **fields)
            config = dataclasses.replace(self.config, gaze=gaze)
            _ = config.layout  # checks it
        except ValueError as error:
            raise UserError(str(error)) from error
        return dataclasses.replace(self, config=config)

    def read_images(self, images: Sequence[Picture] | None) -> list[np.ndarray]:
        """Decode images; returns uint8 [height, width, 3] each."""
        return [as_image(image, f"images[{i}]") for i, image in enumerate(_listed(images, "images"))]

    def read_videos(self, videos: Sequence[Film] | None) -> list[Frames]:
        """Open videos; returns each video's frames, sampled by this model family's convention."""
        sampling = self.family.frames
        return [as_video(film, sampling, f"videos[{i}]") for i, film in enumerate(_listed(videos, "videos"))]

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
        if self.max_positions is not None and visual + text > self.max_positions:
            _warn_of_length(self.name, visual + text, self.max_positions)
        wanted = count * (visual + text)
        if self.cache_tokens is not None and wanted > self.cache_tokens:
            each = f"{count} rows of " if count > 1 else ""
            raise UserError(
                f"{each}{visual} visual and {text} other tokens, the answer included, are {wanted}, "
                f"but the cache may hold cache_tokens={self.cache_tokens}; show less, or raise it."
            )
        if fits:
            return
        devices, ranks = 1, 1
        if self.mesh is not None:
            devices, ranks = (split_sizes(self.mesh, name)[1] for name in ("batch", "regions"))
        device = jax.local_devices()[0] if self.mesh is None else self.mesh.local_devices[0]
        sizes = -(-count // devices), -(-regions // ranks), slots, -(-text // ranks)
        needed = cache_bytes(self.config, *sizes, on_host=device.platform == "cpu")
        free = free_bytes(device)
        if self.mesh is not None and self.mesh.is_multi_process:  # so that all come to one decision
            known = map(json.loads, together.exchanged(json.dumps(free)))
            free = min((each for each in known if each is not None), default=None)
        if free is not None and needed > free:
            raise UserError(
                f"A cache of {count} x {visual} visual and {text} other tokens takes {format_bytes(needed)} "
                f"on a device but {format_bytes(free)} are free; show less, or use a smaller batch."
            )


def check_gaze_fields(fields: Mapping[str, Any]) -> None:
    """Check fields of ``GazeConfig`` that a checkpoint's are to be replaced with.

    Raises:
      UserError: a field does not exist or is ``context_tokens``, which are parameters, or a value is out of
        range.
    """
    known = [field.name for field in dataclasses.fields(GazeConfig)]
    for name in fields:
        if name == "context_tokens":
            raise UserError(
                "context_tokens are parameters of the checkpoint; convert it again with another number."
            )
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}."
            raise UserError(f"{name!r} is no field of GazeConfig; {hint}")
    try:
        GazeConfig(**fields)
    except ValueError as error:
        raise UserError(str(error)) from error
    except TypeError as error:
        given = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        raise UserError(f"A value of {given} is of the wrong type ({error}).") from error


def _listed(media: Any, name: str) -> list[Any]:
    """Media as a list; None is none, and a batch of images is a list of them."""
    if media is None:
        return []
    if isinstance(media, list | tuple) or (isinstance(media, np.ndarray) and media.ndim == 4):
        return list(media)
    shown = repr(media) if isinstance(media, str | os.PathLike) else f"a {type(media).__name__}"
    raise UserError(f"{name}={shown} must be a list of {name}; put brackets around it.")


def _name(directory: Path) -> str:
    """A checkpoint's name for headings: its folder's, or its id and commit on the Hub."""
    where = directory.resolve()
    commit = commit_of(where)
    if commit is None:
        return where.name
    return f"{where.parents[1].name.removeprefix('models--').replace('--', '/')}@{commit[:7]}"


def _max_positions(directory: Path) -> int | None:
    """``max_position_embeddings`` of the language model, if its config.json states it."""
    if not (directory / CONFIG).is_file():
        return None
    values = read_config(directory)
    text = values.get("text_config")
    stated = (text if isinstance(text, dict) else values).get("max_position_embeddings")
    return stated if type(stated) is int and stated > 0 else None


_warned: set[str] = set()


def _warn_of_length(name: str, tokens: int, most: int) -> None:
    """Warn once for each model, whatever the lengths that follow."""
    if name in _warned:
        return
    _warned.add(name)
    logging.warning(
        "A sequence of %d tokens, the answer included, exceeds the %d that %s was trained with "
        "(max_position_embeddings); answers may be poor.",
        tokens,
        most,
        name,
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
