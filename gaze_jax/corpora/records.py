"""Records: the examples of a corpus as it holds them, before media are decoded.

Every reader of this package gives :class:`Record` by index, whatever the container: the same example in JSON
Lines, parquet, a tar or a folder has the same conversation and the same pixels.
"""

import contextlib
import dataclasses
import io
import math
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import PIL.Image

from gaze_jax.chat.messages import Message, from_llava
from gaze_jax.corpora import storage
from gaze_jax.data.sample import Frames
from gaze_jax.errors import UserError
from gaze_jax.media.images import (
    check_image,
    check_image_data,
    decode_picture,
    image_size,
    read_picture,
    reading_pictures,
)
from gaze_jax.media.probe import check_file, is_url
from gaze_jax.media.video import Clip, FrameSampling, decode_video, open_frames, open_video, video_size

CAUSES = ("record", "missing", "medium", "conversation", "targets", "length")
"""Why a record cannot be used: it is malformed, a medium is not there or cannot be decoded, the template
refuses the conversation, nothing is to be learnt, or it is too long."""


class RecordError(UserError):
    """A record that cannot be used; ``cause`` is one of :data:`CAUSES`."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # it crosses processes
        return type(self), (self.cause, str(self))


@contextlib.contextmanager
def failing(cause: str, name: str = "") -> Iterator[None]:
    """Context in which a :class:`UserError` becomes a :class:`RecordError` of this cause.

    ``name`` is put before its message; an error whose cause is known already is unchanged.
    """
    try:
        yield
    except RecordError:
        raise
    except UserError as error:
        raise RecordError(cause, f"{name}: {error}" if name else str(error)) from error


@dataclasses.dataclass(frozen=True)
class Medium:
    """An image or a video of a record: a file, a folder of frames, a part of a file, or bytes.

    Attributes:
      name: names it in messages.
      path: the file or folder, or the file that holds it, which may be remote; "" if ``data`` is given.
      offset, size: the part of the file that it is; ``size`` is None for all of it.
      data: its content, if it is no part of a file.
      frames: the contents of the files of a folder of frames, in order.
    """

    name: str
    path: str = ""
    offset: int = 0
    size: int | None = None
    data: bytes | None = None
    frames: tuple[bytes, ...] = ()

    def content(self) -> bytes | None:
        """The bytes of a medium that is no local file of its own; None if it is one.

        Raises:
          UserError: the file that holds it cannot be read or is shorter than it was.
        """
        if self.data is not None or self.frames:
            return self.data
        if self.size is None:
            return storage.read_all(self.path) if storage.is_remote(self.path) else None
        data = storage.read_range(self.path, self.offset, self.size)
        if len(data) < self.size:
            raise UserError(f"{self.path} ends inside of {self.name!r}; it is cut short or was changed.")
        return data

    def fetched(self) -> "Medium":
        """The same medium, in memory if it is remote: what follows reads it once.

        Raises:
          UserError: as :meth:`content`.
        """
        remote = self.data is None and storage.is_remote(self.path)
        return dataclasses.replace(self, data=self.content()) if remote else self

    def image(self) -> PIL.Image.Image:
        """Decode it: upright, of mode RGB.

        Raises:
          UserError: as :func:`gaze_jax.media.images.read_picture`.
        """
        data = self.content()
        return read_picture(self.path) if data is None else decode_picture(data, self.name)

    def check(self) -> None:
        """Refuse an image that :meth:`image` would refuse, in less time.

        Raises:
          UserError: as :func:`gaze_jax.media.images.check_image`.
        """
        data = self.content()
        if data is None:
            check_image(self.path)
        else:
            check_image_data(data, self.name)

    def image_size(self) -> tuple[int, int]:
        """(height, width) of :meth:`image`, mostly without decoding it.

        Raises:
          UserError: as :func:`gaze_jax.media.images.image_size`.
        """
        data = self.content()
        if data is not None:
            return image_size(io.BytesIO(data), self.name)
        check_file(self.path, "Image")
        with reading_pictures(self.path, "Image"), open(self.path, "rb") as file:
            return image_size(file, self.path)

    def video_size(self, sampling: FrameSampling) -> tuple[tuple[int, int], int]:
        """(height, width) of the frames of :meth:`video`, and their number.

        Raises:
          UserError: as :func:`gaze_jax.media.video.open_video`.
        """
        data = None if self.frames else self.content()
        if data is not None:
            return video_size(data, sampling, self.name)
        clip = self.video(sampling)
        assert isinstance(clip, Clip), "files and frames are not decoded yet"
        return clip.size, len(clip)

    def video(self, sampling: FrameSampling) -> Frames:
        """Open it, sampled.

        Raises:
          UserError: as :func:`gaze_jax.media.video.open_video`.
        """
        if self.frames:
            return open_frames(self.frames, sampling, self.name)
        data = self.content()
        if data is None:
            return open_video(self.path, sampling)
        return decode_video(data, sampling, self.name)


Find = Callable[[str, str], Medium]
"""Gives the medium of a name that a record gives; called with that name and the record's own."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """The part of a video that a record is about; None is its beginning or its end.

    Attributes:
      start, end: in seconds.
      start_frame, end_frame: numbers of frames, the last one included. Given instead of seconds.
    """

    start: float | None = None
    end: float | None = None
    start_frame: int | None = None
    end_frame: int | None = None

    def of(self, sampling: FrameSampling) -> FrameSampling:
        """``sampling`` within this part."""
        return dataclasses.replace(
            sampling,
            start=self.start,
            end=self.end,
            start_frame=self.start_frame,
            end_frame=self.end_frame,
        )


@dataclasses.dataclass(frozen=True)
class Record:
    """One example.

    Attributes:
      name: where it stands, for messages, such as "train.jsonl line 3".
      id: its id in the corpus as text, "" if it has none.
      messages: the turns, with ``Image(i)`` and ``Video(i)`` in them.
      images, videos: the media that these stand for.
      cut: the part of its videos that it is about.
    """

    name: str
    id: str
    messages: tuple[Message, ...]
    images: tuple[Medium, ...]
    videos: tuple[Medium, ...]
    cut: Cut


class Corpus(Protocol):
    """Records by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises UserError, naming the record, if it is malformed or names media that it may not."""
        ...

    def fingerprint(self) -> dict[str, object]:
        """What decides the records and their order, JSON-ready."""
        ...


def each(corpus: Corpus) -> Iterator[Record]:
    """Every record in order."""
    return (corpus[index] for index in range(len(corpus)))


def relative(name: str, record: str) -> str:
    """A medium's name that a record gives, as a normal relative path with forward slashes.

    Raises:
      UserError: it is a URL, a command, an absolute path, or leads out of the media root.
    """
    plain = posixpath.normpath(name)
    drive = len(name) > 1 and name[1] == ":" and name[0].isalpha()
    if is_url(name) or "|" in name[:1] or name.startswith("pipe:"):
        raise UserError(f"{record} names {name!r}; media are files below the media root, not addresses.")
    if posixpath.isabs(plain) or drive or "\\" in name or "\0" in name:
        raise UserError(
            f"{record} names {name!r}; give a path relative to the media root, with forward slashes."
        )
    if plain.split("/")[0] == ".." or plain == ".":
        raise UserError(f"{record} names {name!r}, which is not below the media root; keep media there.")
    return plain


@dataclasses.dataclass(frozen=True)
class MediaFolder:
    """Media below a folder; links in it are followed, since only who owns the folder can make them.

    Whether a medium of a remote folder is there shows when it is read: asking first would take as long.
    """

    root: str

    def __call__(self, name: str, record: str) -> Medium:
        """The medium that a record names.

        Raises:
          UserError: it is not there, or not below the folder.
        """
        path = storage.join(self.root, relative(name, record))
        if not storage.is_remote(self.root) and not os.path.exists(path):
            raise RecordError(
                "missing", f"{record} names {name!r}, which is not in {self.root}; check the media root."
            )
        return Medium(name, path)


def read_record(fields: Mapping[str, object], name: str, find: Find, *, prompt: str | None = None) -> Record:
    """The record of fields in LLaVA's form; see :func:`gaze_jax.chat.messages.from_llava`.

    Args:
      fields: "conversations" with "image" and "video"; "id"; "start" and "end" in seconds, or "start_frame"
        and "end_frame". Other keys are ignored.
      name: where the record stands.
      find: gives the medium of a name.
      prompt: for records with a "caption" instead of "conversations": what is asked of the medium.

    Raises:
      UserError: a field is malformed, or a medium is not there.
    """
    identity = fields.get("id")
    if identity is not None and not isinstance(identity, str | int):
        raise UserError(f"{name} has id={identity!r}; give text or a number.")
    where = name if identity in (None, "") else f"{name} (id {str(identity)!r})"
    if prompt is not None and "conversations" not in fields:
        fields = _captioned(fields, where, prompt)
    conversation = from_llava(fields, name=where)
    return Record(
        name,
        "" if identity is None else str(identity),
        conversation.messages,
        tuple(find(file, where) for file in conversation.images),
        tuple(find(file, where) for file in conversation.videos),
        _cut(fields, where) if conversation.videos else Cut(),
    )


def _captioned(fields: Mapping[str, object], name: str, prompt: str) -> dict[str, object]:
    caption = fields.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise UserError(f"{name} has neither conversations nor a caption; give one of them.")
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": caption.strip()}]
    return {**fields, "conversations": turns}


def _cut(fields: Mapping[str, object], name: str) -> Cut:
    found: dict[str, float | int] = {}
    for key in ("start", "end", "start_frame", "end_frame"):
        value = fields.get(key)
        if value is None or value != value:  # a NaN is a missing cell of a table
            continue
        of_frame = key.endswith("frame")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(f"{name} has {key}={value!r}; give a number, 0 or more.")
        if of_frame and value != int(value):
            raise UserError(f"{name} has {key}={value!r}; give the whole number of a frame.")
        found[key] = int(value) if of_frame else float(value)
    seconds, frames = {"start", "end"} & set(found), {"start_frame", "end_frame"} & set(found)
    if seconds and frames:
        raise UserError(f"{name} has {' and '.join(sorted(found))}; give seconds or frames, not both.")
    try:
        FrameSampling(**found)  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return Cut(**found)  # type: ignore[arg-type]
