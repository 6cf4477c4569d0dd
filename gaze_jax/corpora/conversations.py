"""Records to samples: the conversation in the model's template, its media, and how long it will be.

A model's family decides how a conversation is written and which of its tokens are targets, so the same corpus
trains models of every family.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence

import numpy as np

from gaze_jax.chat.conversation import Parts, conversation_parts, truncate
from gaze_jax.chat.messages import Message
from gaze_jax.chat.template import ChatTemplate
from gaze_jax.core.layout import VisualLayout
from gaze_jax.corpora.config import CorpusConfig
from gaze_jax.corpora.records import Record, RecordError, failing
from gaze_jax.data.lengths import Lengths, image_lengths, video_lengths
from gaze_jax.data.pixels import Size
from gaze_jax.data.placement import Arrays
from gaze_jax.data.processor import Processor, count_text
from gaze_jax.data.sample import Image, Sample, Text, Video
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError
from gaze_jax.families import get_family
from gaze_jax.media.video import FrameSampling

KIND = "corpus"
"""The question family of every sample of a corpus."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a record will be, measured without decoding its pixels.

    Attributes:
      lengths: what the sample needs in a row.
      targets: tokens that the model learns to predict.
      left_out: turns that truncation left out.
      images: (height, width) of each of its images.
      videos: (height, width) of the frames of each of its videos, and how many are taken.
    """

    lengths: Lengths
    targets: int
    left_out: int
    images: tuple[Size, ...]
    videos: tuple[tuple[Size, int], ...]


@dataclasses.dataclass(frozen=True)
class Conversations:
    """How a corpus becomes samples for one model.

    Attributes:
      layout: the model's visual layout; its style names the family.
      tokenizer: the model's tokenizer.
      template: the model's chat template.
      system: system prompt of records without one; None: no system prompt.
      sampling: which frames of a video are taken.
      truncate_to: a conversation with more tokens loses its last turns; None: none is changed.
    """

    layout: VisualLayout
    tokenizer: Tokenizer
    template: ChatTemplate
    system: str | None
    sampling: FrameSampling
    truncate_to: int | None = None

    @classmethod
    def of(
        cls, config: CorpusConfig, layout: VisualLayout, tokenizer: Tokenizer, template: ChatTemplate
    ) -> "Conversations":
        """For a model and the settings of a run.

        Raises:
          UserError: the settings contradict the family's sampling of frames.
        """
        family = get_family(layout.views.style)
        given = {"fps": config.fps, "max_frames": config.max_frames}
        changes = {name: value for name, value in given.items() if value is not None}
        sampling = dataclasses.replace(family.frames, **changes)  # type: ignore[arg-type]
        system = family.system if config.system is None else config.system or None
        limit = config.max_tokens if config.too_long == "truncate" else None
        return cls(layout, tokenizer, template, system, sampling, limit)

    @functools.cached_property
    def processor(self) -> Processor:
        """Turns the samples into arrays; images stay uint8 until they are on the device."""
        family = get_family(self.layout.views.style)
        return Processor(
            self.layout,
            self.tokenizer,
            (KIND,),
            family.views,
            resize=True,
            supervise=family.supervision.tokens,
            float_images=False,
        )

    def __getstate__(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def fingerprint(self) -> dict[str, object]:
        """What decides the samples besides the corpus, JSON-ready."""
        return {
            "layout": json.loads(json.dumps(dataclasses.asdict(self.layout))),
            "tokenizer": self.tokenizer.digest,
            "template": [self.template.source, dict(self.template.special)],
            "system": self.system,
            "sampling": dataclasses.asdict(self.sampling),
            "truncate_to": self.truncate_to,
        }

    def measure(self, record: Record) -> Measured:
        """How long the sample of a record will be: of a video its packets are read, of an image its header.

        Raises:
          RecordError: the record cannot become a sample. Names the record.
        """
        sizes = _Sizes(record, self.sampling)
        with failing("conversation", record.name):
            parts, left_out = self._parts(record, sizes)
            lengths, targets = self._count(parts, sizes)
        if not targets:
            raise RecordError("targets", f"{record.name} has no token to learn from; give it an answer.")
        return Measured(
            lengths, targets, left_out, tuple(sizes.images.values()), tuple(sizes.videos.values())
        )

    def sample(self, record: Record, index: int) -> Sample:
        """Decode the media of a record; ``index`` becomes the sample's id.

        Raises:
          RecordError: a medium is damaged, or the record cannot become a sample. Names the record.
        """
        sizes = _Sizes(record, self.sampling)
        with failing("conversation", record.name):
            parts, _ = self._parts(record, sizes)
        shown = {part.index for part in parts if isinstance(part, Image)}
        # Truncation leaves out the last media of a conversation, never earlier ones.
        films = sum(isinstance(part, Video) for part in parts)
        with failing("medium", record.name):
            images = tuple(
                medium.image() if number in shown else _NO_IMAGE
                for number, medium in enumerate(record.images)
            )
            videos = tuple(medium.video(record.cut.of(self.sampling)) for medium in record.videos[:films])
        return Sample(index, images, parts, KIND, videos)

    def arrays(self, record: Record, index: int, out: np.ndarray | None = None) -> Arrays:
        """The arrays of a record, unpadded; see :func:`gaze_jax.data.processor.process` for ``out``.

        Raises:
          RecordError: as :meth:`sample`.
        """
        sample = self.sample(record, index)
        with failing("medium", record.name):  # frames of a video are decoded here
            return self.processor(sample, out)

    def _parts(self, record: Record, sizes: "_Sizes") -> tuple[Parts, int]:
        """The parts of a record's sample, and the number of turns that were left out."""
        messages = record.messages
        if self.system is not None and all(message.role != "system" for message in messages):
            messages = (Message("system", self.system), *messages)
        kept = messages
        if self.truncate_to is not None:
            with failing("length", record.name):
                kept = truncate(messages, self.truncate_to, functools.partial(self._tokens, sizes))
        return self._rendered(kept), len(messages) - len(kept)

    def _rendered(self, messages: Sequence[Message]) -> Parts:
        family = get_family(self.layout.views.style)
        return conversation_parts(
            self.template, messages, arrange=family.arrange, supervision=family.supervision
        )

    def _tokens(self, sizes: "_Sizes", messages: Sequence[Message]) -> int:
        with failing("conversation", sizes.record.name):
            return self._count(self._rendered(messages), sizes)[0].tokens

    def _count(self, parts: Parts, sizes: "_Sizes") -> tuple[Lengths, int]:
        """What the parts of a sample need, and how many of their tokens are targets."""
        style, alone = self.processor.views, sum(isinstance(part, Image) for part in parts) == 1
        total, targets = Lengths(), 0
        for part in parts:
            if isinstance(part, Text):
                tokens, learnt = _counted(self.processor, part)
                total, targets = total + Lengths(text=tokens), targets + learnt
            elif isinstance(part, Image):
                total += image_lengths(style, self.layout, sizes.image(part.index), alone=alone)
            else:
                total += video_lengths(style, self.layout, *sizes.video(part.index))
        return total, targets


def _counted(processor: Processor, text: Text) -> tuple[int, int]:
    """:func:`count_text`; text that the tokenizer has no tokens for is the record's fault."""
    try:
        return count_text(processor, text)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


_NO_IMAGE = np.zeros((1, 1, 3), np.uint8)
"""In place of an image that no part of a sample shows."""


class _Sizes:
    """Sizes of the media of a record, each read when it is first needed."""

    def __init__(self, record: Record, sampling: FrameSampling) -> None:
        self.record, self._sampling = record, sampling
        self.images: dict[int, Size] = {}
        self.videos: dict[int, tuple[Size, int]] = {}

    def image(self, number: int) -> Size:
        """(height, width) of an image."""
        if number not in self.images:
            with failing("medium", self.record.name):
                self.images[number] = self.record.images[number].image_size()
        return self.images[number]

    def video(self, number: int) -> tuple[Size, int]:
        """(height, width) of a video's frames, and how many are taken."""
        if number not in self.videos:
            with failing("medium", self.record.name):
                sampling = self.record.cut.of(self._sampling)
                self.videos[number] = self.record.videos[number].video_size(sampling)
        return self.videos[number]
