"""Chatting with a checkpoint about images and videos: its template, its views, its answers as they come."""

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gaze_jax.convert.checkpoint import Converted
from gaze_jax.convert.load import load, one_device
from gaze_jax.core.layout import VisualLayout
from gaze_jax.data.chat import conversation_parts, default_system
from gaze_jax.data.messages import TAG, Message, from_llava
from gaze_jax.data.processor import Processor, process_with_units
from gaze_jax.data.sample import Frames, Sample, Text
from gaze_jax.data.template import ChatTemplate
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.data.units import Unit
from gaze_jax.data.video import Sampling
from gaze_jax.errors import UserError
from gaze_jax.infer.generate import Params
from gaze_jax.infer.session import Session, check_sampling
from gaze_jax.models.config import MLLMConfig, VisionConfig

_FAMILY = "chat"
_NAME = "The question"
_ROOM = 128  # tokens that follow before the cache has to grow
_BROKEN = "\ufffd"  # how a tokenizer writes bytes that are no character yet

SAMPLING = {
    "square": Sampling(max_frames=32),
    "llava_onevision": Sampling(max_frames=32),
    "cambrian_s": Sampling(fps=1.0, max_frames=128),
}
"""Style of views -> which frames of a video its models are shown, as their authors evaluate them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Assistant:
    """A checkpoint that can be talked to.

    Attributes:
      config, params: of the model.
      tokenizer: of the model.
      template: how it was trained to read a conversation.
      end_ids: tokens that end an answer.
    """

    config: MLLMConfig
    params: Params
    tokenizer: Tokenizer
    template: ChatTemplate
    end_ids: frozenset[int]

    @property
    def layout(self) -> VisualLayout:
        """How it makes tokens of images and frames."""
        return self.config.layout

    @classmethod
    def load(cls, directory: Path, *, check: bool = True) -> "Assistant":
        """Load a checkpoint: converted, or a Hugging Face directory as it is.

        Args:
          directory: of the checkpoint.
          check: compare a converted checkpoint with its checksums.

        Raises:
          UserError: it is damaged, has no image tower, or lacks its tokenizer or chat template.
        """
        return cls.of(load(directory, one_device(), check=check), directory)

    @classmethod
    def of(cls, found: Converted, directory: Path) -> "Assistant":
        """The assistant in a loaded checkpoint; ``directory`` is for messages.

        Raises:
          UserError: it has no image tower, or lacks its tokenizer or chat template.
        """
        config = found.config
        if isinstance(config, VisionConfig) or config.vision is None:
            kind = "an image tower" if isinstance(config, VisionConfig) else "a language model"
            raise UserError(f"{directory} is {kind} alone; give a multimodal checkpoint.")
        if found.tokenizer is not None and found.files is None:
            raise UserError(
                f"{directory} is a run of train.py, whose models know no chat; ask it with --workdir."
            )
        if found.tokenizer is None or found.files is None:
            raise UserError(
                f"{directory} has no tokenizer.json, so no question can be read to it; add the file."
            )
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
        return cls(config, found.params, tokenizer, ChatTemplate.load(found.files), ends)

    def looking(self, **fields: Any) -> "Assistant":
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


def check_questions(questions: Sequence[str], images: int, videos: int) -> None:
    """Refuse what :class:`Talk` would refuse of its questions; costs nothing, so it can come before a load.

    Args:
      questions: in order. The first may hold a tag ``<image>`` or ``<video>`` for each of the media; without
        any, media come first.
      images, videos: how many there are.

    Raises:
      UserError: there is no question or one is empty, tags and media differ in number, or a later question
        shows media.
    """
    if not questions:
        raise UserError("There is no question; ask one.")
    _first_messages(questions[0], images, videos, None)
    for question in questions[1:]:
        _check_further(question)


def _check_further(question: str) -> None:
    if TAG.search(question):
        raise UserError("A later question shows media; show them with the first one, or begin anew.")
    if not question.strip():
        raise UserError("The question is empty; ask something.")


def _first_messages(question: str, images: int, videos: int, system: str | None) -> tuple[Message, ...]:
    if not TAG.sub("", question).strip():
        raise UserError("The question is empty; ask something.")
    record: dict[str, Any] = {
        "conversations": [{"from": "human", "value": question}],
        "image": ["given"] * images,
        "video": ["given"] * videos,
    }
    return from_llava(record, name=_NAME, system=system).messages


def _unused(texts: Iterable[str]) -> str:
    """A character that none of the texts has, from the range that Unicode leaves to private use."""
    taken = set[str]().union(*texts)
    return next(character for character in map(chr, range(0xE000, 0xF900)) if character not in taken)


@dataclasses.dataclass(frozen=True, eq=False)
class Said:
    """One step of an answer.

    Attributes:
      text: what can be shown now; empty while a character is incomplete, and for the token that ends it all.
      token: the token as text.
      selected: bool [L, Hs, R], the regions that the query which emitted it attended to; None under dense
        attention.
    """

    text: str
    token: str
    selected: np.ndarray | None


class Talk:
    """One conversation: media and a first question, answers as they come, further questions.

    Args:
      assistant: who answers.
      question: the first one, see :func:`check_questions`.
      images: uint8 [height, width, 3] each.
      videos: frames of each, uint8 [height, width, 3].
      system: system prompt, also an empty one; None takes that of the model's style.
      top_k: regions per query; None is what the model is configured for, or all regions if it is more.
      dense: attend to everything, whatever the model is configured for.

    Raises:
      UserError: tags and media differ in number, the question cannot be read, or ``top_k`` is out of range.
    """

    def __init__(
        self,
        assistant: Assistant,
        question: str,
        *,
        images: Sequence[np.ndarray] = (),
        videos: Sequence[Frames] = (),
        system: str | None = None,
        top_k: int | None = None,
        dense: bool = False,
    ) -> None:
        self._assistant = assistant
        if system is None:
            system = default_system(assistant.layout.views.style)
        self._messages = _first_messages(question, len(images), len(videos), system)
        # Other styles fit any image to the tower anyway.
        processor = Processor(assistant.layout, assistant.tokenizer, (_FAMILY,), resize=True)
        try:
            sample = Sample(0, tuple(images), self._parts(self._messages), _FAMILY, tuple(videos))
            arrays, self.units = process_with_units(processor, sample)
        except ValueError as error:
            raise UserError(str(error)) from error
        configured = assistant.config.gaze.top_k
        if top_k is None and configured is not None:
            top_k = min(configured, len(arrays["visual_src"])) or None
        self.top_k = None if dense else top_k
        self._session = Session(assistant.config, assistant.params, arrays, room=_ROOM, top_k=self.top_k)
        self._unread: int | None = None  # the last token that was said, which no step has read yet
        self._waiting = True

    units: tuple[Unit, ...]
    """Where each view and frame is in the regions that :class:`Said` speaks of."""

    top_k: int | None
    """Regions per query; None is dense attention."""

    def _parts(self, messages: Sequence[Message]) -> Any:
        return conversation_parts(
            self._assistant.template,
            messages,
            style=self._assistant.layout.views.style,
            add_generation_prompt=True,
        )

    @property
    def regions(self) -> int:
        """R of the conversation."""
        return self._session.regions

    def ask(self, question: str) -> None:
        """Read a further question; only its own tokens are computed.

        What was read and said stays as it was, also where the template would show it otherwise by now
        (Qwen3's leaves the reasoning of earlier answers out).

        Raises:
          UserError: it shows media or is empty, or there is no answer yet.
        """
        if self._waiting:
            raise UserError("The last question has no answer yet; let it be answered first.")
        tokens, self._messages = self._following(question)
        if self._unread is not None:
            tokens = [self._unread, *tokens]
        self._session.grow(len(tokens))
        self._session.feed(tokens)
        self._unread, self._waiting = None, True

    def _following(self, question: str) -> tuple[list[int], tuple[Message, ...]]:
        """The tokens from the end of the last answer to the next, and the conversation up to there."""
        _check_further(question)
        asked = [message.text for message in self._messages]
        mark = _unused([question, *asked, self._assistant.template.source])
        messages = (*self._messages, Message("assistant", mark), Message("user", question))
        texts = [part.text for part in self._parts(messages) if isinstance(part, Text)]
        _, found, tail = texts[-1].rpartition(mark)
        if not found:
            raise UserError(
                f"{self._assistant.template.name} leaves the last answer out of what follows it, so the "
                "conversation cannot go on from where it is; begin anew."
            )
        try:
            return self._assistant.tokenizer.encode(tail)[0], messages
        except ValueError as error:
            raise UserError(str(error)) from error

    def answer(self, max_tokens: int, *, temperature: float = 0.0, seed: int = 0) -> Iterator[Said]:
        """Answer the last question, token by token.

        Args:
          max_tokens: most tokens to generate; the answer is cut there.
          temperature: 0 is greedy.
          seed: of the sampling.

        Raises:
          UserError: a number is out of range, or the question was answered.
        """
        if not self._waiting:
            raise UserError("The last question was answered; ask another.")
        check_sampling(max_tokens, temperature, seed)
        self._waiting = False
        self._session.grow(max_tokens)
        tokenizer, ends = self._assistant.tokenizer, self._assistant.end_ids
        ids: list[int] = []
        shown = ""
        emitted = self._session.generate(max_tokens, end_ids=ends, temperature=temperature, seed=seed)
        for step in emitted:
            ended = step.token in ends
            ids += [] if ended else [step.token]
            # What follows an answer in the template begins with its end.
            self._unread = None if ended else step.token
            whole = tokenizer.decode(ids)
            last = ended or len(ids) == max_tokens
            new = whole[len(shown) :] if last or not whole.endswith(_BROKEN) else ""
            shown += new
            yield Said(new, tokenizer.decode([step.token]), step.selected)
