"""Corpora in ArrayRecord shards, which ``gaze-jax data prepare`` writes: random access to records with media.

A record is one entry of a shard: the length of its JSON (4 bytes, little-endian), the JSON (UTF-8, in LLaVA's
form with a list of media), and the content of the media, one after the other. ``corpus.json`` in the folder
lists the shards with their number of records, size and checksum.
"""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from gaze_jax.chat.messages import Message, kind_of
from gaze_jax.corpora.records import Medium, Record, read_record
from gaze_jax.errors import UserError, first_line
from gaze_jax.media.video import frame_files

FILE = "corpus.json"
FORMAT, VERSION = "gaze_jax.corpus", 1
SUFFIX = ".array_record"

_LENGTH = 4


def packed(record: Record) -> bytes:
    """A record with its media as the entry of a shard.

    Raises:
      UserError: a medium cannot be read.
    """
    media: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for kind in ("image", "video"):
        for number, medium in enumerate(record.images if kind == "image" else record.videos):
            parts = _parts(medium)
            media.append({"kind": kind, "name": f"{number} {medium.name}", "sizes": [*map(len, parts)]})
            media[-1]["frames"] = bool(medium.frames) or os.path.isdir(medium.path)
            blobs += parts
    head = {
        "name": record.name,
        "id": record.id or None,
        "conversations": [_turn(message) for message in record.messages],
        **{name: value for name, value in dataclasses.asdict(record.cut).items() if value is not None},
        "media": media,
    }
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    data = b"".join([len(text).to_bytes(_LENGTH, "little"), text, *blobs])
    again = unpacked(data, record.name)
    if (again.messages, again.id, again.cut) != (record.messages, record.id, record.cut):
        raise ValueError(f"{record.name} is not read as it was written")  # a fault of this module
    return data


def _turn(message: Message) -> dict[str, str]:
    text = "".join(item if isinstance(item, str) else f"<{kind_of(item)}>" for item in message.items)
    return {"role": message.role, "content": text}


def _parts(medium: Medium) -> list[bytes]:
    """The content of a medium; of a folder of frames, of each in order."""
    if medium.frames:
        return list(medium.frames)
    data = medium.content()
    if data is not None:
        return [data]
    try:
        files = frame_files(medium.path) if os.path.isdir(medium.path) else (medium.path,)
        return [Path(file).read_bytes() for file in files]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from error


def unpacked(data: bytes, where: str) -> Record:
    """The record of an entry of a shard; ``where`` names the entry in messages.

    Raises:
      UserError: the entry is not one that :func:`packed` made.
    """
    size = int.from_bytes(data[:_LENGTH], "little")
    try:
        head = json.loads(data[_LENGTH : _LENGTH + size])
        name, listed = str(head["name"]), list(head["media"])
        sizes = [int(length) for medium in listed for length in medium["sizes"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where} is no record of a prepared corpus; prepare it again.") from error
    if _LENGTH + size + sum(sizes) != len(data) or min(sizes, default=0) < 0:
        raise UserError(f"{where} is damaged: it has not the size that it states; prepare it again.")
    ends = _LENGTH + size + np.cumsum([0, *sizes])
    blobs = iter(data[start:end] for start, end in itertools.pairwise(ends))
    media = {}
    for medium in listed:
        parts = tuple(next(blobs) for _ in medium["sizes"])
        shown = f"{medium['name'].partition(' ')[2]} of {name}"
        found = Medium(shown, frames=parts) if medium["frames"] else Medium(shown, data=parts[0])
        media[medium["kind"], medium["name"]] = found
    fields = head | {kind: [name for of, name in media if of == kind] for kind in ("image", "video")}

    def find(file: str, record: str) -> Medium:
        return next(medium for (_, name), medium in media.items() if name == file)

    return dataclasses.replace(read_record(fields, name, find), name=name)


@functools.lru_cache(maxsize=256)
def _reader(path: str) -> ArrayRecordReader:
    try:
        reader = ArrayRecordReader(path)
        complete = reader.ok()
    except Exception as error:  # the library raises RuntimeError and others, with many lines
        raise UserError(f"{path} cannot be read as ArrayRecord ({first_line(error)}).") from error
    if not complete:
        raise UserError(f"{path} is no whole ArrayRecord file; copy or prepare it again.")
    return reader


def read_entry(path: str, index: int) -> bytes:
    """The bytes of one entry of a shard.

    Raises:
      UserError: the shard is damaged.
    """
    try:
        return bytes(_reader(path).read([index])[0])
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} is damaged at record {index} ({first_line(error)}); prepare it again."
        ) from error


def count(path: str) -> int:
    """The number of entries of a shard."""
    return int(_reader(path).num_records())


@dataclasses.dataclass(frozen=True)
class ArrayRecords:
    """The records of a prepared corpus; :func:`open_array_records` makes it.

    Attributes:
      folder: where the shards are.
      shards: names of the shards, in order.
      counts: their numbers of records.
      digest: of what was prepared, and how.
    """

    folder: str
    shards: tuple[str, ...]
    counts: tuple[int, ...]
    digest: str

    @functools.cached_property
    def _firsts(self) -> np.ndarray:
        return np.cumsum([0, *self.counts])

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> Record:
        at = int(np.searchsorted(self._firsts, index, side="right")) - 1
        within = index - int(self._firsts[at])
        path = os.path.join(self.folder, self.shards[at])
        return unpacked(read_entry(path, within), f"{self.shards[at]} record {within}")

    def fingerprint(self) -> dict[str, object]:
        """The digest of what was prepared: it is the same wherever the shards are."""
        return {"corpus": "array_record", "digest": self.digest}


def read_listing(folder: str) -> Mapping[str, Any]:
    """``corpus.json`` of a prepared corpus.

    Raises:
      UserError: it is missing, of another program or of another version.
    """
    path = os.path.join(folder, FILE)
    try:
        listing = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{folder} has no {FILE}, so its preparation has not ended; run gaze-jax data prepare again."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); prepare the corpus again.") from error
    if not isinstance(listing, dict) or listing.get("format") != FORMAT:
        raise UserError(f"{path} is not of a prepared corpus; give another folder.")
    if listing.get("version") != VERSION:
        raise UserError(f"{path} has version {listing.get('version')!r} but this gaze_jax reads {VERSION}.")
    return listing


def open_array_records(folder: str) -> ArrayRecords:
    """Open a prepared corpus.

    Raises:
      UserError: its preparation has not ended, or a shard is missing or was changed.
    """
    listing = read_listing(folder)
    shards: Sequence[Mapping[str, Any]] = listing["shards"]
    for shard in shards:
        path = os.path.join(folder, shard["file"])
        if not os.path.isfile(path) or os.path.getsize(path) != shard["size"]:
            raise UserError(
                f"{path} is missing or has not its {shard['size']} bytes; copy or prepare it again."
            )
    names = tuple(str(shard["file"]) for shard in shards)
    counts = tuple(int(shard["records"]) for shard in shards)
    return ArrayRecords(folder, names, counts, str(listing["digest"]))
