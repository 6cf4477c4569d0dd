"""Tar files, read in place: nothing is extracted, and nothing in them is executed or unpickled.

A webdataset tar holds each example as members with one name and different suffixes: ``0001.json`` with the
record, ``0001.jpg`` with its medium. A plain tar holds media, which records elsewhere name by their path in
the tar.
"""

import dataclasses
import functools
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gaze_jax.corpora import storage
from gaze_jax.corpora.index import indexed
from gaze_jax.corpora.records import Medium, Record, RecordError, read_record, relative
from gaze_jax.errors import UserError
from gaze_jax.media.jsonl import parse_object

MAX_MEMBERS = 50_000_000
"""Maximum number of members of a tar."""
MAX_RECORD = 64 << 20
"""Maximum size of a record's JSON in bytes."""

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
VIDEOS = ("mp4", "mov", "mkv", "webm", "avi")


def members(path: str) -> dict[str, np.ndarray]:
    """The files in a tar, sorted by name: "name" str [N], "offset" and "size" int64 [N].

    Raises:
      UserError: it is no plain tar or cut short; a member is a link or a device, is compressed, has a name
        that leads out of the tar, or comes twice; or there are too many.
    """
    with storage.reading(path):
        return _members(path)


def _members(path: str) -> dict[str, np.ndarray]:
    found: dict[str, tuple[int, int]] = {}
    try:
        with storage.open_binary(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                where = f"{path} has a member that"
                if not member.isreg() or member.issparse():
                    raise UserError(f"{where} is no plain file ({member.name!r}); leave it out of the tar.")
                name = relative(member.name, where)
                if name in found:
                    raise UserError(f"{path} has the member {name!r} twice; write it once.")
                found[name] = (member.offset_data, member.size)
                vars(tar)["members"].clear()  # it would keep every header
                if len(found) > MAX_MEMBERS:
                    raise UserError(f"{path} has more than {MAX_MEMBERS} members; split it.")
            end = tar.offset
    except tarfile.ReadError as error:
        what = "is compressed, but its members are read in place; unpack it to a plain .tar"
        what = what if _compressed(path) else f"is no whole tar ({error}); write it again"
        raise UserError(f"{path} {what}.") from error
    if found and max(offset + size for offset, size in found.values()) > storage.size(path):
        raise UserError(f"{path} ends inside of its last member; it is cut short.")
    _check_end(path, end)
    names = sorted(found)
    return {
        "name": np.array(names, dtype=np.str_),
        "offset": np.array([found[name][0] for name in names], np.int64),
        "size": np.array([found[name][1] for name in names], np.int64),
    }


def _check_end(path: str, end: int) -> None:
    """Check that a tar ends in blocks of zeros, and in nothing else; a reader would not miss what is lost."""
    if storage.size(path) < end + tarfile.BLOCKSIZE:
        raise UserError(f"{path} has no end mark; it is cut short.")
    with storage.reading(path), storage.open_binary(path) as file:
        file.seek(end)
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise UserError(
                    f"{path} goes on behind its end, as tars that were joined do; make one tar of them."
                )


def _compressed(path: str) -> bool:
    return storage.read_range(path, 0, 6).startswith(
        (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
    )


@dataclasses.dataclass(frozen=True)
class MediaTar:
    """Media in one or several plain tars, by their paths in them.

    Attributes:
      paths: the tars.
    """

    paths: tuple[str, ...]

    @functools.cached_property
    def _indexes(self) -> tuple[Mapping[str, np.ndarray], ...]:
        return tuple(_index(path) for path in self.paths)

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths}

    def __call__(self, name: str, record: str) -> Medium:
        """The medium that a record names.

        Raises:
          UserError: it is in none of the tars.
        """
        plain = relative(name, record)
        for path, index in zip(self.paths, self._indexes, strict=True):
            at = int(np.searchsorted(index["name"], plain))
            if at < len(index["name"]) and index["name"][at] == plain:
                return Medium(name, path, int(index["offset"][at]), int(index["size"][at]))
        raise RecordError("missing", f"{record} names {name!r}, which is in none of {', '.join(self.paths)}.")


def open_media_tars(paths: tuple[str, ...]) -> MediaTar:
    """Open plain tars of media.

    Raises:
      UserError: one cannot be read in place.
    """
    for path in paths:  # at once: later it would be the fault of every record
        _index(path)
    return MediaTar(paths)


@functools.lru_cache(maxsize=64)
def _index(path: str) -> Mapping[str, np.ndarray]:
    return indexed(path, "tar", members)


@dataclasses.dataclass(frozen=True)
class WebDataset:
    """The examples of webdataset tars; :func:`open_webdataset` makes it.

    An example is what has one name up to the first dot of its last part; they are in that order. Its
    record is the ``.json`` member, or a ``.txt`` member with a caption. A medium that a record names is the
    member of that name; if it names none of them, the example's images or its video are its media.

    Attributes:
      paths: the tars, in order.
      prompt: what is asked of a medium with a caption; None refuses captions.
    """

    paths: tuple[str, ...]
    prompt: str | None = None

    @functools.cached_property
    def _examples(self) -> tuple[list[np.ndarray], ...]:
        """For each tar its examples, sorted by key: the places of their members in its index."""
        return tuple(_grouped(_index(path)["name"]) for path in self.paths)

    @functools.cached_property
    def _firsts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self._examples)])

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths, "prompt": self.prompt}

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> Record:
        tar = int(np.searchsorted(self._firsts, index, side="right")) - 1
        path, found = self.paths[tar], _index(self.paths[tar])
        parts = {}
        for member in self._examples[tar][index - int(self._firsts[tar])]:
            name = str(found["name"][member])
            parts[name] = Medium(name, path, int(found["offset"][member]), int(found["size"][member]))
        key = _key(next(iter(parts)))[0]
        return _example(parts, f"{Path(path).name} example {key}", key, self.prompt)

    def fingerprint(self) -> dict[str, object]:
        """The tars' names, checksums of the names, places and sizes of their members, and the prompt."""
        files = [[Path(path).name, _members_crc(_index(path))] for path in self.paths]
        return {"corpus": "webdataset", "files": files, "prompt": self.prompt}


def _members_crc(index: Mapping[str, np.ndarray]) -> int:
    listed = zip(index["name"].tolist(), index["offset"].tolist(), index["size"].tolist(), strict=True)
    return zlib.crc32(repr(list(listed)).encode())


def _grouped(names: np.ndarray) -> list[np.ndarray]:
    """The places of names with one key, for each key in order."""
    keys = np.array([_key(str(name))[0] for name in names], dtype=np.str_)
    order = np.argsort(keys, kind="stable")
    changes = np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1
    return np.split(order, changes) if len(order) else []


def _key(name: str) -> tuple[str, str]:
    """(key, suffix in lower case) of a member: its name up to the first dot of its last part, and after."""
    folder, _, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def _example(parts: Mapping[str, Medium], name: str, key: str, prompt: str | None) -> Record:
    by_suffix = {_key(member)[1]: medium for member, medium in parts.items()}
    images = [medium for suffix, medium in by_suffix.items() if suffix.split(".")[-1] in IMAGES]
    videos = [medium for suffix, medium in by_suffix.items() if suffix.split(".")[-1] in VIDEOS]
    fields: dict[str, object] = {"id": key}
    if "json" in by_suffix:
        fields |= parse_object(_text(by_suffix["json"], name), name)
    elif "txt" in by_suffix:
        fields["caption"] = _text(by_suffix["txt"], name)
    else:
        raise UserError(f"{name} has neither a .json nor a .txt member; give it one.")
    named = {file for key in ("image", "video") for file in _listed(fields.get(key))}
    if not named & set(parts):  # the record names its media by other names, or not at all
        fields["image"], fields["video"] = [m.name for m in images], [m.name for m in videos]

    def find(file: str, record: str) -> Medium:
        plain = relative(file, record)
        if plain not in parts:
            raise RecordError("missing", f"{record} names {file!r}, but its example has {', '.join(parts)}.")
        return parts[plain]

    return read_record(fields, name, find, prompt=prompt)


def _listed(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str)]


def _text(medium: Medium, name: str) -> str:
    if (medium.size or 0) > MAX_RECORD:
        raise UserError(f"{name} has {medium.size} bytes of text in {medium.name!r}, more than {MAX_RECORD}.")
    data = medium.content() or b""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{medium.name!r} of {name} is not UTF-8 text (byte {error.start}).") from error


def open_webdataset(paths: tuple[str, ...], *, prompt: str | None = None) -> WebDataset:
    """Open webdataset tars.

    Args:
      paths: the tars, in order.
      prompt: what is asked of a medium that has a caption.

    Raises:
      UserError: a tar cannot be read in place, or they hold no example.
    """
    records = WebDataset(paths, prompt)
    if not len(records):
        raise UserError(f"{', '.join(paths)} hold no files; give tars with at least one example.")
    return records
