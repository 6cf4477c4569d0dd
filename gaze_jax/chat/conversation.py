"""Conversations to the parts of a sample: chat template, media, and supervision.

A checkpoint's template renders a conversation into one string. The tags ``<image>`` and ``<video>`` in it
become :class:`Image` and :class:`Video` parts, the text between them :class:`Text` parts::

    template = ChatTemplate.load(directory)
    messages = (
        Message("system", "You are a helpful assistant."),
        Message("user", (Image(0), "What is this?")),
        Message("assistant", "A cat."),
    )
    conversation_parts(template, messages, arrange=media_first)

    Text("<|im_start|>system\\nYou are ...<|im_end|>\\n<|im_start|>user\\n")
    Image(0)
    Text("\\nWhat is this?<|im_end|>\\n<|im_start|>assistant\\nA cat.<|im_end|>\\n", targets=((47, 63),))

Supervision is located in characters, not by tokenising twice: the conversation is rendered a second time with
the answers between marks that occur nowhere else, and a rendering that differs in more than the marks is
refused. A text is not cut where supervision begins, so its tokens are those of the whole string.

Turns must have the form ``<|im_start|>role ... <|im_end|>``, as in Qwen and models built on it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from gaze_jax.chat.messages import TAG, TAGS, Content, Message, kind_of
from gaze_jax.chat.template import ChatTemplate
from gaze_jax.data.sample import Image, Text, Video
from gaze_jax.data.tokenizer import END, Tokenizer
from gaze_jax.errors import UserError

START = "<|im_start|>"

Parts = tuple[Image | Video | Text, ...]
Span = tuple[int, int]
"""(start, end) of a range of characters."""
Arrange = Callable[[tuple[Content, ...]], tuple[Content, ...]]
"""Items of a turn -> the same items in the order a family uses, such as ``messages.media_first``."""

_THINK = re.compile(r"</?think>")
_END = re.compile(rf"\s*{re.escape(END)}")


def _as_text(items: Iterable[Content]) -> str:
    """A turn as text with tags for media; a line feed separates leading media from the text after them."""
    pieces: list[str] = []
    for item in items:
        if not isinstance(item, str):
            pieces.append(f"<{kind_of(item)}>")
        elif pieces and all(piece in TAGS for piece in pieces):
            pieces.append("\n" + item)
        else:
            pieces.append(item)
    return "".join(pieces)


def _as_list(items: Iterable[Content]) -> list[dict[str, str]]:
    """A turn in the form that templates of multimodal processors take."""
    return [
        {"type": "text", "text": item} if isinstance(item, str) else {"type": kind_of(item)} for item in items
    ]


@functools.lru_cache(maxsize=16)
def _takes_lists(template: ChatTemplate) -> bool:
    """Whether the template places the media of a turn given as a list; found by trying."""
    turn = {"role": "user", "content": _as_list((Image(0), "probe"))}
    try:
        rendered = template.render([turn], add_generation_prompt=False)
    except UserError:
        return False
    return "<image>" in rendered and "probe" in rendered


def _pieces(answer: str) -> list[Span]:
    """Character ranges of an answer before, between and after reasoning tags, white space stripped."""
    cuts = [0, *(cut for tag in _THINK.finditer(answer) for cut in tag.span()), len(answer)]
    pieces = []
    for start, end in zip(cuts[::2], cuts[1::2], strict=True):
        if core := answer[start:end].strip():
            first = answer.index(core, start)
            pieces.append((first, first + len(core)))
    return pieces


@dataclasses.dataclass(frozen=True)
class _Marks:
    """Four characters that occur nowhere in a conversation or its template."""

    opening: str
    closing: str
    generation: tuple[str, str]

    @classmethod
    def for_texts(cls, texts: Iterable[str]) -> "_Marks":
        """Marks from Unicode's private use area: no letters, no white space, so nothing strips them."""
        taken = set[str]().union(*texts)
        free = (character for character in map(chr, range(0xE000, 0xF900)) if character not in taken)
        return cls(next(free), next(free), (next(free), next(free)))

    def around(self, answer: str) -> str:
        """``answer`` with its pieces between marks."""
        for start, end in reversed(_pieces(answer)):
            answer = f"{answer[:start]}{self.opening}{answer[start:end]}{self.closing}{answer[end:]}"
        return answer

    def remove(self, text: str) -> tuple[str, dict[str, list[int]]]:
        """``text`` without marks, and the positions of each mark in it."""
        found: dict[str, list[int]] = {mark: [] for mark in (self.opening, self.closing, *self.generation)}
        pattern = re.compile(f"[{''.join(found)}]")
        for count, match in enumerate(pattern.finditer(text)):
            found[match[0]].append(match.start() - count)
        return pattern.sub("", text), found


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A conversation with the settings it is rendered with, except generation prompt and marks.

    Attributes:
      template: the checkpoint's template.
      messages: the messages, in order.
      arrange: orders the items of a turn.
      variables: variables of the template.
    """

    template: ChatTemplate
    messages: tuple[Message, ...]
    arrange: Arrange
    variables: Mapping[str, object]

    def __call__(self, *, add_generation_prompt: bool = False, marks: _Marks | None = None) -> str:
        lists, turns = _takes_lists(self.template), []
        for message in self.messages:
            items = self.arrange(message.items)
            if marks and message.role == "assistant":
                items = (marks.around(message.text),)
            turns.append({"role": message.role, "content": _as_list(items) if lists else _as_text(items)})
        return self.template.render(
            turns,
            add_generation_prompt=add_generation_prompt,
            generation_marks=marks.generation if marks else None,
            **self.variables,
        )

    @property
    def name(self) -> str:
        """Name of the template, for error messages."""
        return self.template.name

    @property
    def answer_texts(self) -> list[str]:
        """Text of every answer."""
        return [message.text for message in self.messages if message.role == "assistant"]

    def answers(self, whole: str) -> tuple[list[list[Span]], list[Span]]:
        """Character ranges in ``whole`` of the pieces of each answer and of ``{% generation %}`` blocks."""
        pieces = [_pieces(answer) for answer in self.answer_texts]
        if [] in pieces:
            raise UserError(f"Answer {pieces.index([])} of the conversation is empty; leave its turn out.")
        marks = _Marks.for_texts([whole, self.template.source, *self.answer_texts])
        bare, found = marks.remove(self(marks=marks))
        spans = list(zip(found[marks.opening], found[marks.closing]))
        begins, ends = (found[mark] for mark in marks.generation)
        written = [whole[start:end] for start, end in spans]
        expected = [
            answer[start:end] for answer, of_it in zip(self.answer_texts, pieces) for start, end in of_it
        ]
        if bare != whole or written != expected:
            raise UserError(
                f"{self.name} rewrites or leaves out a part of an answer, so it cannot be learnt as it is "
                "(Qwen3's drops the reasoning in <think> from all turns but the last); take that part out, "
                "or end the conversation with that answer."
            )
        left = iter(spans)
        return [[next(left) for _ in of_it] for of_it in pieces], list(zip(begins, ends, strict=True))


def _turn_start(render: Rendering, whole: str, at: int) -> int:
    """Where the turn starts whose answer starts at character ``at``."""
    start = whole.rfind(START, 0, at)
    if start < 0:
        raise UserError(
            f"{render.name} does not open an answer with {START}; give a template in ChatML's form."
        )
    return start


def _turn_end(render: Rendering, whole: str, at: int) -> int:
    """Where the end token ends that follows the answer ending at character ``at``."""
    end = _END.match(whole, at)
    if end is None:
        raise UserError(f"{render.name} does not end an answer with {END}; give a template in ChatML's form.")
    return end.end()


def answer_spans(render: Rendering, whole: str) -> list[Span]:
    """Characters that a model would generate: from the end of the generation prompt to the end token."""
    answers, blocks = render.answers(whole)
    blocks = [(start, end) for start, end in blocks if start < end]
    if blocks:
        # Some blocks omit the token that ends the turn; a model that never learns it never stops.
        return [(start, end + len(END) * whole.startswith(END, end)) for start, end in blocks]
    prompted = render(add_generation_prompt=True)
    header = prompted.removeprefix(whole) if prompted.startswith(whole) else ""
    spans = []
    for answer, pieces in zip(render.answer_texts, answers, strict=True):
        first, last = pieces[0][0], pieces[-1][1]
        opened, before = _turn_start(render, whole, first), answer[: _pieces(answer)[0][0]]
        if header and whole.startswith(header, opened):
            first = opened + len(header)
        elif whole.endswith(before, opened, first):
            first -= len(before)
        spans.append((first, _turn_end(render, whole, last)))
    return spans


def turn_spans(render: Rendering, whole: str) -> list[Span]:
    """Whole turns of the assistant, with header, end token and the line feed that follows."""
    spans = []
    for pieces in render.answers(whole)[0]:
        end = _turn_end(render, whole, pieces[-1][1])
        spans.append((_turn_start(render, whole, pieces[0][0]), end + whole.startswith("\n", end)))
    return spans


@dataclasses.dataclass(frozen=True)
class Supervision:
    """Which parts of a conversation are training targets.

    Attributes:
      spans: (rendering, the rendered string) -> the character ranges that are targets, in order.
      tokens: text of tokens that are targets wherever they occur: the value of ``Processor.supervise``.
    """

    spans: Callable[[Rendering, str], list[Span]]
    tokens: tuple[str, ...] = ()


ANSWER = Supervision(answer_spans)
"""What the model generates after a generation prompt, with the end token. If the template has ``{% generation
%}`` blocks: those blocks, each with the end token that follows."""


def _split(render: Rendering, whole: str, spans: Sequence[Span]) -> Parts:
    """Cut ``whole`` at its tags; the targets of each text are the ``spans`` inside it."""
    arranged = [item for message in render.messages for item in render.arrange(message.items)]
    media = {tag: [item for item in arranged if isinstance(item, kind)] for tag, kind in TAGS.items()}
    for tag, items in media.items():
        if whole.count(tag) != len(items):
            raise UserError(
                f"{render.name} writes {whole.count(tag)} {tag} tags but the conversation has {len(items)}; "
                "use a template for these media."
            )
    parts: list[Image | Video | Text] = []
    start = 0
    for piece in TAG.split(whole):
        end = start + len(piece)
        if piece in TAGS:
            parts.append(media[piece].pop(0))
        elif piece:
            inside = ((max(a, start) - start, min(b, end) - start) for a, b in spans)
            parts.append(Text(piece, targets=tuple((a, b) for a, b in inside if a < b)))
        start = end
    return tuple(parts)


def conversation_parts(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    arrange: Arrange,
    supervision: Supervision = ANSWER,
    add_generation_prompt: bool = False,
    **variables: object,
) -> Parts:
    """Render a conversation into the parts of a sample.

    If a template does not support media, a line feed follows media at the start of a turn.

    Qwen3's template adds (empty) reasoning to an answer only in the last turn, as the model sees it later.
    So the first tokens that the model learns differ between turns. If that matters, make a separate
    conversation of each answer and what precedes it.

    Args:
      template: the checkpoint's template.
      messages: the messages, in order. ``Image`` and ``Video`` keep their indices.
      arrange: the order of media and text in a turn, ``Family.arrange``.
      supervision: what the targets are: :data:`ANSWER`, or ``Family.supervision`` for what the family's
        authors trained on.
      add_generation_prompt: ask for an answer; nothing is supervised.
      **variables: variables of the template, such as ``enable_thinking``.

    Returns:
      Images, videos and texts with ``targets``.

    Raises:
      UserError: the template fails, omits a text, rewrites an answer or does not place the media; there is no
        answer to learn; or ``add_generation_prompt`` is set and the conversation ends in an answer.
    """
    render = Rendering(template, tuple(messages), arrange, variables)
    answered = [message.role == "assistant" for message in messages]
    if not messages or (not add_generation_prompt and True not in answered):
        raise UserError(
            "The conversation has no answer to learn from; add one, or ask for a generation prompt."
        )
    if add_generation_prompt and answered[-1]:
        raise UserError("The conversation ends in an answer, so there is none to ask for; take it out.")
    whole = render(add_generation_prompt=add_generation_prompt)
    for message in messages:
        if message.role != "assistant":
            for item in arrange(message.items):
                if isinstance(item, str) and item.strip() not in whole:
                    raise UserError(
                        f"{template.name} leaves out or rewrites text of a turn of role {message.role!r} "
                        f"({item.strip()[:40]!r}); change the turn or the template."
                    )
    return _split(render, whole, [] if add_generation_prompt else supervision.spans(render, whole))


def count_tokens(
    tokenizer: Tokenizer, parts: Sequence[Image | Video | Text], media_tokens: Callable[[Image | Video], int]
) -> int:
    """Number of tokens of ``parts``; ``media_tokens`` counts those of an image or a video."""
    return sum(
        len(tokenizer.encode(part.text)[0]) if isinstance(part, Text) else media_tokens(part)
        for part in parts
    )


def truncate(
    messages: Sequence[Message], max_tokens: int, tokens: Callable[[tuple[Message, ...]], int]
) -> tuple[Message, ...]:
    """The longest prefix of a conversation, in whole turns, that fits.

    A question is kept with its answer and its media, so no image or video is ever cut. Truncate before
    rendering, because a template may render the last turn differently.

    Args:
      messages: a conversation.
      max_tokens: the largest number of tokens allowed.
      tokens: counts the tokens of a conversation, with ``conversation_parts`` and :func:`count_tokens`.

    Raises:
      UserError: the first question with its answer does not fit.
    """
    questions = [i for i, message in enumerate(messages) if message.role == "user"]
    needed = 0
    for end in reversed([*questions[1:], len(messages)]):
        kept = tuple(messages[:end])
        needed = tokens(kept)
        if needed <= max_tokens:
            return kept
    raise UserError(
        f"The first turn of the conversation alone needs {needed} tokens but max_tokens={max_tokens}; "
        "raise it, or show fewer or smaller images and fewer frames."
    )
