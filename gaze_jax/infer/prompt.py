"""Prompts: the one place where a question becomes the parts and arrays that a model reads.

Chat, batches and comparison build their prompts here, so one question about one picture has the same tokens
in all of them. Evaluation reads samples of the training corpus up to their answer
(:func:`gaze_jax.data.processor.prompt`); they are written in the form of :data:`PLAIN`, and a test holds both
to the same tokens.

One rule decides about the template (:func:`template_of`): a run of train.py is asked in the form that it was
trained on, :data:`PLAIN`; a checkpoint with a chat template is asked with that; any other in :data:`CHATML`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from gaze_jax.chat.conversation import Arrange, Parts, conversation_parts
from gaze_jax.chat.messages import TAG, Message, from_llava
from gaze_jax.chat.template import ChatTemplate
from gaze_jax.data.placement import Arrays, PlacedView
from gaze_jax.data.processor import Processor, process_with_views
from gaze_jax.data.sample import Frames, Image, Sample, Text, Video
from gaze_jax.errors import UserError

FAMILY = "prompt"
"""The question family of every prompt; nothing depends on it."""

PLAIN = ChatTemplate(
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ message['content'] | replace('<image>\n', '<image>') }}\n"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}",
    {},
    "the form that train.py teaches",
)
"""How a run of train.py reads a question: its image, its text, a line feed."""

CHATML = ChatTemplate(
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    {},
    "ChatML, since the checkpoint has no chat template",
)
"""How a checkpoint without a chat template is asked: in turns like Qwen's, which every family here has."""


def template_of(files: Path | None) -> ChatTemplate:
    """The template of a checkpoint.

    Args:
      files: the directory with its tokenizer; None is a run of train.py.

    Raises:
      UserError: its chat template cannot be read.
    """
    if files is None:
        return PLAIN
    found = ChatTemplate.find(files)
    if found is None:
        logging.warning("%s has no chat template, so questions are asked in ChatML.", files)
        return CHATML
    return found


def check_questions(questions: Sequence[str], images: int, videos: int) -> None:
    """Refuse questions of one conversation that no prompt can be made of, before a checkpoint is loaded.

    Args:
      questions: in order. The first may hold a tag ``<image>`` or ``<video>`` for each of the media; without
        any, media come first.
      images, videos: how many there are.

    Raises:
      UserError: there is no question or one is empty, tags and media differ in number, or a later question
        has tags.
    """
    if not questions:
        raise UserError("There is no question; ask one.")
    user_turn(questions[0], range(images), range(videos))
    for question in questions[1:]:
        user_turn(question, (), ())


def user_turn(question: str, images: Sequence[int], videos: Sequence[int]) -> Message:
    """The turn that asks ``question`` and shows these images and videos of the conversation.

    Raises:
      UserError: the question is empty, or its tags and the media differ in number.
    """
    if not TAG.sub("", question).strip():
        raise UserError("The question is empty; ask something.")
    record: dict[str, Any] = {
        "conversations": [{"from": "human", "value": question}],
        "image": ["given"] * len(images),
        "video": ["given"] * len(videos),
    }
    (message,) = from_llava(record, name="The question", system=None).messages

    def numbered(item: Any) -> Any:
        if isinstance(item, Image):
            return Image(images[item.index])
        return Video(videos[item.index]) if isinstance(item, Video) else item

    return Message("user", tuple(numbered(item) for item in message.items))


def split_at_video(parts: Parts) -> tuple[Parts, Parts]:
    """What a turn about a running video has before the video, and what after it."""
    at = [isinstance(part, Video) for part in parts].index(True)
    return parts[:at], parts[at + 1 :]


@dataclasses.dataclass(frozen=True, eq=False)
class ProcessedPrompt:
    """What a model reads next.

    Attributes:
      arrays: of :func:`gaze_jax.data.processor.process`, unpadded.
      views: where each view and frame is in the regions of the arrays.
    """

    arrays: Arrays
    views: tuple[PlacedView, ...]

    @property
    def regions(self) -> int:
        """R of the arrays."""
        return len(self.arrays["visual_src"])


@dataclasses.dataclass(frozen=True)
class PromptBuilder:
    """Makes the prompts of one checkpoint.

    Attributes:
      template: how the checkpoint reads a conversation.
      processor: makes arrays of parts.
      arrange: the order of media and text in a turn, ``Family.arrange``.
      system: system prompt of conversations that name no other; None is none.
    """

    template: ChatTemplate
    processor: Processor
    arrange: Arrange
    system: str | None = None

    def opening(self, system: str | None = None) -> tuple[Message, ...]:
        """What a conversation begins with; ``system`` None takes that of the checkpoint."""
        system = self.system if system is None else system
        return () if system is None else (Message("system", system),)

    def next_turn(self, messages: Sequence[Message], turn: Message) -> tuple[Parts, tuple[Message, ...]]:
        """What is read after the last answer, up to the next one, and all turns up to there.

        The text of earlier answers is not needed: a mark stands for each, and what the template writes after
        the last mark is what follows the answer. Answers stay in the cache as they were generated.

        Args:
          messages: :meth:`opening`, or what the last call returned, whose question has been answered.
          turn: of the user, from :func:`user_turn`.

        Raises:
          UserError: the template fails, or leaves the last answer out.
        """
        answered = any(message.role == "user" for message in messages)
        mark = _unused([turn.text, *(message.text for message in messages), self.template.source])
        turns = (*messages, *((Message("assistant", mark),) if answered else ()), turn)
        parts = conversation_parts(self.template, turns, arrange=self.arrange, add_generation_prompt=True)
        if not answered:
            return parts, turns
        for number, part in reversed(list(enumerate(parts))):
            if isinstance(part, Text) and mark in part.text:
                tail = part.text.rpartition(mark)[2]
                return (*((Text(tail),) if tail else ()), *parts[number + 1 :]), turns
        raise UserError(
            f"{self.template.name} leaves the last answer out of what follows it, so the conversation cannot "
            "go on from where it is; begin anew."
        )

    def process(
        self,
        parts: Parts,
        images: Sequence[np.ndarray] = (),
        videos: Sequence[Frames] = (),
        *,
        since: int = 0,
        order: int = 0,
        sample_id: int = 0,
    ) -> ProcessedPrompt:
        """Arrays of the parts of a conversation.

        Args:
          parts: all of the conversation so far.
          images, videos: that the parts show.
          since: the first part to process; those before it are in the cache.
          order: of the first token of these parts.
          sample_id: names the conversation for random routing.

        Raises:
          UserError: media do not fit the model, or a text has no tokens.
        """
        try:
            sample = Sample(sample_id, tuple(images), tuple(parts), FAMILY, tuple(videos))
            arrays, views = process_with_views(self.processor, sample, since=since, order=order)
        except ValueError as error:
            raise UserError(str(error)) from error
        return ProcessedPrompt(arrays, views)

    def question(
        self,
        question: str,
        images: Sequence[np.ndarray] = (),
        videos: Sequence[Frames] = (),
        *,
        system: str | None = None,
        sample_id: int = 0,
    ) -> ProcessedPrompt:
        """The prompt of a single question.

        Args:
          question: with a tag for each of the media, or without any: media first.
          images, videos: to show.
          system: system prompt; None is the checkpoint's.
          sample_id: names the question for random routing.

        Raises:
          UserError: as :func:`user_turn`, :meth:`next_turn` and :meth:`process`.
        """
        turn = user_turn(question, range(len(images)), range(len(videos)))
        parts, _ = self.next_turn(self.opening(system), turn)
        return self.process(parts, images, videos, sample_id=sample_id)


def _unused(texts: Sequence[str]) -> str:
    """A character that none of the texts has, from the range that Unicode leaves to private use."""
    taken = set[str]().union(*texts)
    return next(character for character in map(chr, range(0xE000, 0xF900)) if character not in taken)
