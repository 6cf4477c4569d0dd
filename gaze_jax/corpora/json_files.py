"""JSON Lines files, and JSON files that hold one list of objects: records by index.

The place of each record is found once (:mod:`gaze_jax.corpora.index`); then a record is one read and one
parse, and a file of any size opens at once. Blank lines, CRLF and a byte order mark are read as in
:mod:`gaze_jax.media.jsonl`.
"""

import dataclasses
import functools
import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gaze_jax.corpora import storage
from gaze_jax.corpora.index import content_crc, indexed
from gaze_jax.corpora.records import Find, MediaFolder, Record, read_record
from gaze_jax.errors import UserError
from gaze_jax.media.jsonl import parse_object

_CHUNK = 1 << 24
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_OPENING, _CLOSING = b"[{", b"]}"

Spans = dict[str, np.ndarray]
"""int64 [N] each: the first byte of a record, the byte after its last, and its number for messages."""


def _bytes_of(values: bytes) -> np.ndarray:
    """bool [256]: which bytes these are."""
    table = np.zeros(256, bool)
    table[list(values)] = True
    return table


_IS_SPACE, _IS_GAP = _bytes_of(_SPACE), _bytes_of(_SPACE + b",")
_STEP = _bytes_of(_OPENING).astype(np.int64) - _bytes_of(_CLOSING)


def _mapped(path: str) -> np.ndarray:
    """The file's bytes, uint8, read as they are used; of a remote file, those of a copy."""
    if storage.size(path) == 0:
        return np.zeros(0, np.uint8)
    with storage.local_copy(path) as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _first(data: np.ndarray) -> int:
    """Where the text begins: after a byte order mark."""
    return len(_BOM) if data[: len(_BOM)].tobytes() == _BOM else 0


def line_spans(path: str) -> Spans:
    """The lines of a file that are not blank, numbered from 1."""
    data = _mapped(path)
    ends = [np.flatnonzero(data[at : at + _CHUNK] == ord("\n")) + at for at in range(0, len(data), _CHUNK)]
    stops = np.concatenate([*ends, [len(data)]]).astype(np.int64)
    starts = np.concatenate([[_first(data)], stops[:-1] + 1]).astype(np.int64)
    keep = stops > starts
    # Only a line that begins with white space may hold nothing else.
    spaced = np.flatnonzero(keep)
    spaced = spaced[_IS_SPACE[data[starts[spaced]]]]
    for at in spaced:
        keep[at] = not _IS_SPACE[data[starts[at] : stops[at]]].all()
    number = np.arange(1, len(stops) + 1, dtype=np.int64)
    return {"start": starts[keep], "stop": stops[keep], "number": number[keep]}


@dataclasses.dataclass
class _Scan:
    """Where a scan of JSON text is: inside a text or not, how deep, and what it found."""

    inside: bool = False
    depth: int = 0
    starts: list[np.ndarray] = dataclasses.field(default_factory=list)
    stops: list[np.ndarray] = dataclasses.field(default_factory=list)

    def read(self, data: np.ndarray, base: int) -> None:
        """Read the next bytes, which do not end in a backslash; ``base`` is the place of the first."""
        slashes = np.flatnonzero(data == ord("\\"))
        quotes = np.flatnonzero(data == ord('"'))
        if len(slashes):
            # In a run of backslashes every second one is escaped; after an odd run the quote is.
            begins = np.flatnonzero(np.diff(slashes, prepend=-2) > 1)
            lengths = np.diff(begins, append=len(slashes))
            quotes = quotes[~np.isin(quotes, (slashes[begins] + lengths)[lengths % 2 == 1])]
        marks = np.flatnonzero(_STEP[data])
        outside = (np.searchsorted(quotes, marks) + self.inside) % 2 == 0
        marks = marks[outside]
        step = _STEP[data[marks]]
        depth = self.depth + np.cumsum(step)
        self.starts.append(marks[(depth == 2) & (step > 0)] + base)
        self.stops.append(marks[(depth == 1) & (step < 0)] + base + 1)
        self.depth = int(depth[-1]) if len(depth) else self.depth
        self.inside = bool((len(quotes) + self.inside) % 2)


def list_spans(path: str) -> Spans:
    """The elements of a JSON file that is one list of objects, numbered from 0.

    Raises:
      UserError: it is no list, ends too early, or has an element that is no object.
    """
    data = _mapped(path)
    scan, at = _Scan(), _first(data)
    while at < len(data):
        end = min(at + _CHUNK, len(data))
        while end < len(data) and data[end - 1] == ord("\\"):
            end += 1
        scan.read(data[at:end], at)
        at = end
    if scan.inside or scan.depth:
        raise UserError(f"{path} ends inside of its list; it is cut short.")
    starts, stops = np.concatenate([[], *scan.starts]), np.concatenate([[], *scan.stops])
    starts, stops = starts.astype(np.int64), stops.astype(np.int64)
    # Between objects there is one comma; before the first and after the last a bracket.
    left, right = np.concatenate([[_first(data)], stops]), np.concatenate([starts, [len(data)]])
    for number, gap in _odd_gaps(data, left, right):
        ends = b"[" * (number == 0) + b"]" * (number == len(starts))
        if gap.translate(None, _SPACE) != (ends or b","):
            raise UserError(
                f"{path} must be a list of JSON objects, or hold one object per line; what stands around "
                f"element {number} is neither ({gap.strip()[:40].decode(errors='replace')!r})."
            )
    return {"start": starts, "stop": stops, "number": np.arange(len(starts), dtype=np.int64)}


def _odd_gaps(data: np.ndarray, left: np.ndarray, right: np.ndarray) -> list[tuple[int, bytes]]:
    """The first and the last gap, and each that is not a comma and white space; with their numbers."""
    found = {0, len(left) - 1}
    sizes = right - left
    for size in np.unique(sizes):
        (same,) = np.nonzero(sizes == size)
        for part in np.array_split(same, max(1, len(same) * int(size) // _CHUNK)):
            bytes_ = data[left[part, None] + np.arange(size)]
            fine = _IS_GAP[bytes_].all(axis=1) & ((bytes_ == ord(",")).sum(axis=1) == 1)
            found.update(part[~fine].tolist())
    return [(number, data[left[number] : right[number]].tobytes()) for number in sorted(found)]


@dataclasses.dataclass(frozen=True)
class JsonRecords:
    """The records of a JSON or JSON Lines file; :func:`open_json` makes it.

    It pickles without the index, which other processes read from the cache.

    Attributes:
      path: the file.
      find: gives the medium that a record names.
      listed: whether the file is one list; otherwise it holds one object per line.
    """

    path: str
    find: Find
    listed: bool

    @functools.cached_property
    def _spans(self) -> Mapping[str, np.ndarray]:
        build = list_spans if self.listed else line_spans
        return indexed(self.path, "list" if self.listed else "lines", build)

    def __getstate__(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __len__(self) -> int:
        return len(self._spans["start"])

    def fields(self, index: int) -> tuple[str, dict[str, object]]:
        """Where a record stands, and its JSON.

        Raises:
          UserError: it is no JSON object, or the file was changed since it was opened.
        """
        start, stop = int(self._spans["start"][index]), int(self._spans["stop"][index])
        what = "element" if self.listed else "line"
        name = f"{Path(self.path).name} {what} {int(self._spans['number'][index])}"
        data = storage.read_range(self.path, start, stop - start)
        if len(data) < stop - start:
            raise UserError(f"{self.path} became shorter while it was read; start again.")
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
        return name, parse_object(text, name)

    def __getitem__(self, index: int) -> Record:
        name, fields = self.fields(index)
        return read_record(fields, name, self.find)

    def fingerprint(self) -> dict[str, object]:
        """The file's name and the checksum of its content."""
        return {"corpus": "json", "file": Path(self.path).name, "crc32": content_crc(self.path)}


def open_json(path: str, *, find: Find | None = None) -> JsonRecords:
    """Open a JSON file with one list of objects, or a JSON Lines file; which it is, its first character says.

    Args:
      path: the file.
      find: gives the medium that a record names; None looks in the folder of the file.

    Raises:
      UserError: the file cannot be read, is empty, or is neither.
    """
    with storage.reading(path), storage.open_binary(path) as file:
        head = b""
        while not head and (block := file.read(4096)):
            head = block.removeprefix(_BOM).lstrip(_SPACE)
    if not head:
        raise UserError(f"{path} is empty; give a file with at least one record.")
    if head[:1] not in (b"[", b"{"):
        raise UserError(
            f"{path} is no JSON; give a list of JSON objects, or a file with one JSON object per line."
        )
    find = MediaFolder(storage.parent(path)) if find is None else find
    records = JsonRecords(path, find, head[:1] == b"[")
    if not len(records):
        raise UserError(f"{path} is an empty list; give a file with at least one record.")
    return records
