"""Messages of a conversation with their media, and conversion of data set records to messages."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

from gaze_jax.data.sample import Image, Video
from gaze_jax.errors import UserError

TAGS: Mapping[str, type[Image] | type[Video]] = {"<image>": Image, "<video>": Video}
"""Tags that represent media in text."""

TAG = re.compile("(" + "|".join(TAGS) + ")")

Content = str | Image | Video

_LEADING_TAGS = re.compile(rf"(?:\s*{TAG.pattern})+\s*")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_NO_FILE = ("", "None", "none", "nan")


def kind_of(item: Image | Video) -> str:
    """Name of the item's kind, "image" or "video"; in angle brackets it is the tag."""
    return type(item).__name__.lower()


def as_written(items: tuple[Content, ...]) -> tuple[Content, ...]:
    """The items of a turn in the order given."""
    return items


def media_first(items: Iterable[Content]) -> tuple[Content, ...]:
    """The media of a turn in order, then its text with surrounding white space stripped."""
    items = tuple(items)
    media = [item for item in items if not isinstance(item, str)]
    if not media:
        return items
    text = "".join(item for item in items if isinstance(item, str)).strip()
    return (*media, text) if text else tuple(media)


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
      role: "system", "user", "assistant", or another that the template knows.
      content: text, or text and media in reading order; stored as a tuple, adjacent texts joined.

    Raises:
      UserError: text contains a literal tag, which would be read as media, or an answer contains media.
    """

    role: str
    content: str | tuple[Content, ...]

    def __post_init__(self) -> None:
        items = (self.content,) if isinstance(self.content, str) else tuple(self.content)
        joined: list[Content] = []
        for item in items:
            if isinstance(item, str) and joined and isinstance(joined[-1], str):
                joined[-1] += item
            elif item != "":
                joined.append(item)
        object.__setattr__(self, "content", tuple(joined))
        for item in self.items:
            if isinstance(item, str) and (tag := TAG.search(item)):
                raise UserError(
                    f"Text of a turn of role {self.role!r} contains {tag[0]}, which is a tag for media; "
                    f"give {TAGS[tag[0]].__name__}(index) instead, or spell it differently."
                )
            if not isinstance(item, str) and self.role == "assistant":
                raise UserError(
                    f"An answer shows {kind_of(item)} {item.index}, but a model answers in text; show it in "
                    "the turn of the user."
                )

    @property
    def items(self) -> tuple[Content, ...]:
        """``content`` as stored."""
        assert isinstance(self.content, tuple)
        return self.content

    @property
    def text(self) -> str:
        """All text of the turn."""
        return "".join(item for item in self.items if isinstance(item, str))


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, and the names of the files that ``Image(i)`` and ``Video(i)`` in them stand for."""

    messages: tuple[Message, ...]
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()


def _files(record: Mapping[str, object], key: str, name: str) -> tuple[str, ...]:
    """File names under ``key`` of a record; none if it is missing or has a value that means "no file"."""
    value = record.get(key)
    if value is None or value in _NO_FILE or value != value:  # a NaN is a missing cell of a table
        return ()
    files = [value] if isinstance(value, str) else value
    if not isinstance(files, list) or not all(isinstance(file, str) and file for file in files):
        raise UserError(f"{name} has {key}={value!r}; give the name of a file, or a list of them.")
    return tuple(files)


def _turns(record: Mapping[str, object], name: str) -> list[tuple[str, str]]:
    """(role, text) of every turn of a record."""
    conversations = record.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise UserError(f"{name} has no list of turns in 'conversations'; give one of at least one turn.")
    turns = []
    for i, turn in enumerate(conversations):
        turn = turn if isinstance(turn, Mapping) else {}
        role = _ROLES.get(str(turn.get("from", turn.get("role"))))
        text = turn.get("value", turn.get("content"))
        if role is None or not isinstance(text, str):
            raise UserError(
                f"{name} has a turn {i} that is not understood; give 'from' as one of {', '.join(_ROLES)} "
                "and 'value' as text."
            )
        turns.append((role, text))
    if next((role for role, _ in turns if role != "system"), None) != "user":
        raise UserError(f"{name} does not begin with a turn of the user (human); put the question first.")
    return turns


def _with_media(text: str, media: Iterator[Image | Video]) -> tuple[Content, ...]:
    """``text`` with the tags replaced by ``media``; white space around leading tags is dropped."""
    leading = _LEADING_TAGS.match(text)
    first = leading.end() if leading else 0
    items: list[Content] = [next(media) for _ in TAG.findall(text[:first])]
    for piece in TAG.split(text[first:]):
        items.append(next(media) if piece in TAGS else piece)
    return tuple(items)


def from_llava(record: Mapping[str, object], *, name: str, system: str | None = None) -> Conversation:
    """Read a record in LLaVA's form.

    That is ``{"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", ...}]}`` with
    "image" and "video", each a file name or a list of them. Every tag in a turn counts as one image or
    video, in order. Cambrian-S writes ``<image>`` for a video too, so in a record without images both tags
    mean a video. Without tags, all media are put before the first question.

    Args:
      record: parsed from JSON; other keys are ignored.
      name: name of the record, for error messages.
      system: a system prompt for records without one.

    Raises:
      UserError: a field is malformed, the numbers of tags and media differ, or an answer contains a tag.
    """
    turns, images, videos = _turns(record, name), _files(record, "image", name), _files(record, "video", name)
    tags = [tag for _, text in turns for tag in TAG.findall(text)]
    media: list[Image | Video] = [*map(Image, range(len(images))), *map(Video, range(len(videos)))]
    if any(role == "assistant" and TAG.search(text) for role, text in turns):
        raise UserError(f"{name} has a tag in an answer (gpt), but a model answers in text; take it out.")
    if not tags:
        first = next(i for i, (role, _) in enumerate(turns) if role == "user")
        turns[first] = ("user", "".join(f"<{kind_of(m)}>" for m in media) + turns[first][1])
    elif len(tags) != len(media) or (images and tags.count("<image>") != len(images)):
        raise UserError(
            f"{name} has {tags.count('<image>')} <image> and {tags.count('<video>')} <video> tags but "
            f"{len(images)} images and {len(videos)} videos; write one tag for each, or none at all."
        )
    else:
        left = {tag: [m for m in media if isinstance(m, kind)] for tag, kind in TAGS.items()}
        media = [left[tag].pop(0) for tag in tags] if images else media
    remaining = iter(media)
    messages = [Message(role, _with_media(text, remaining)) for role, text in turns]
    if system is not None and all(message.role != "system" for message in messages):
        messages.insert(0, Message("system", system))
    return Conversation(tuple(messages), images, videos)
