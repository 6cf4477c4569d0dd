"""Prompts: turn a question and its media into the arrays that a model reads.

Chat, batches and comparison all build their prompts here, so the same question about the same image has the
same tokens in all of them. Evaluation takes samples of the training corpus up to their answer
(:func:`gaze_jax.data.processor.prompt`); these have the form of :data:`PLAIN`, and a test checks that their
tokens are equal.

A run on digit scenes is asked in the form that it was trained in, :data:`PLAIN`; every other checkpoint in
its own chat template (:func:`gaze_jax.chat.template.template_of`).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gaze_jax.chat.conversation import Arrange, Parts, conversation_parts
from gaze_jax.chat.messages import TAG, Content, Message, from_llava
from gaze_jax.chat.template import ChatTemplate
from gaze_jax.core.streams import Kind
from gaze_jax.data.placement import Arrays, PlacedView
from gaze_jax.data.processor import Processor, process_with_views
from gaze_jax.data.sample import Frames, Image, Sample, Text, Video
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError

FAMILY = "prompt"
"""The question family of every prompt; it has no effect."""

PLAIN = ChatTemplate(
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ message['content'] | replace('<image>\n', '<image>') }}\n"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}",
    {},
    "the form that train.py teaches",
)
"""The prompt of a run on digit scenes: the image, the question, a line feed."""


def check_questions(questions: Sequence[str], images: int, videos: int) -> None:
    """Check the questions of a conversation before a checkpoint is loaded.

    Args:
      questions: in order. The first may contain one tag ``<image>`` or ``<video>`` per medium; without tags,
        media come first.
      images, videos: how many images and videos there are.

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
    """The user turn with ``question`` and the images and videos with these numbers.

    Raises:
      UserError: the question is empty, or its tags and the media differ in number.
    """
    if not TAG.sub("", question).strip():
        raise UserError("The question is empty; ask something.")
    record: dict[str, object] = {
        "conversations": [{"from": "human", "value": question}],
        "image": ["given"] * len(images),
        "video": ["given"] * len(videos),
    }
    (message,) = from_llava(record, name="The question", system=None).messages

    def numbered(item: Content) -> Content:
        if isinstance(item, Image):
            return Image(images[item.index])
        return Video(videos[item.index]) if isinstance(item, Video) else item

    return Message("user", tuple(numbered(item) for item in message.items))


def split_at_video(parts: Parts) -> tuple[Parts, Parts]:
    """The parts of a turn before its video, and those after it."""
    at = [isinstance(part, Video) for part in parts].index(True)
    return parts[:at], parts[at + 1 :]


@dataclasses.dataclass(frozen=True, eq=False)
class ProcessedPrompt:
    """A prompt, or a part of one, as arrays.

    Attributes:
      arrays: from :func:`gaze_jax.data.processor.process`, unpadded.
      views: the regions of each view and frame.
    """

    arrays: Arrays
    views: tuple[PlacedView, ...]

    @property
    def regions(self) -> int:
        """R, the number of regions in the arrays."""
        return len(self.arrays["visual_src"])

    @property
    def region_keys(self) -> np.ndarray:
        """int32 [R], the keys of each region."""
        return (self.arrays["visual_order"] >= 0).sum(axis=1, dtype=np.int32)

    def tokens(self, tokenizer: Tokenizer) -> tuple[str | int, ...]:
        """The prompt in order: each text token as text, each view as its number, where its tokens are."""
        arrays = self.arrays
        is_text = arrays["kind"] == Kind.TEXT
        at = [
            (int(order), tokenizer.decode([int(token)]))
            for order, token in zip(arrays["text_order"][is_text], arrays["tokens"][is_text], strict=True)
        ]
        order, view = arrays["visual_order"], arrays["visual_view"]
        shown = [
            (int(order[view == number].min()), number) for number in np.unique(view[order >= 0]).tolist()
        ]
        return tuple(token for _, token in sorted([*at, *shown], key=lambda item: item[0]))


@dataclasses.dataclass(frozen=True)
class PromptBuilder:
    """Builds the prompts of one checkpoint.

    Attributes:
      template: the chat template.
      processor: turns parts into arrays.
      arrange: orders media and text within a turn, ``Family.arrange``.
      system: default system prompt; None means no system prompt.
    """

    template: ChatTemplate
    processor: Processor
    arrange: Arrange
    system: str | None = None

    def opening(self, system: str | None = None) -> tuple[Message, ...]:
        """The messages before the first turn; None takes the checkpoint's system prompt."""
        system = self.system if system is None else system
        return () if system is None else (Message("system", system),)

    def next_turn(self, messages: Sequence[Message], turn: Message) -> tuple[Parts, tuple[Message, ...]]:
        """The parts between the last answer and the next one, and all messages up to there.

        Earlier answers are in the cache as they were generated, so their text is not needed: the template is
        rendered with a marker in place of each, and the parts after the last marker are returned.

        Args:
          messages: :meth:`opening`, or the messages of the last call, whose question has been answered.
          turn: the user's turn, from :func:`user_turn`.

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
            f"{self.template.name} drops the last answer when it renders the next turn, so the conversation "
            "cannot continue; start a new one."
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
        """Turn the parts of a conversation into arrays.

        Args:
          parts: all parts of the conversation so far.
          images, videos: the media that the parts refer to.
          since: index of the first part to process; earlier parts are in the cache.
          order: order of the first new token.
          sample_id: key of random routing.

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
        """Build the prompt of a single question.

        Args:
          question: text, with one tag per medium or with none (media come first).
          images, videos: the media.
          system: system prompt; None takes the checkpoint's.
          sample_id: key of random routing.

        Raises:
          UserError: as :func:`user_turn`, :meth:`next_turn` and :meth:`process`.
        """
        turn = user_turn(question, range(len(images)), range(len(videos)))
        parts, _ = self.next_turn(self.opening(system), turn)
        return self.process(parts, images, videos, sample_id=sample_id)


def _unused(texts: Sequence[str]) -> str:
    """A character of Unicode's private use area that occurs in none of the texts."""
    taken = set[str]().union(*texts)
    return next(character for character in map(chr, range(0xE000, 0xF900)) if character not in taken)
