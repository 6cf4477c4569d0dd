"""Parquet files with the bytes of their images, as data sets on the Hugging Face Hub have them.

A row is read with its row group, so an order that jumps between groups reads much more than it uses; the last
groups are kept. Needs pyarrow, from the ``data`` extra.
"""

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gaze_jax.corpora import storage
from gaze_jax.corpora.records import Medium, Record, read_record
from gaze_jax.errors import UserError

_KEPT = 2
"""Row groups kept in memory."""
_END = 1 << 20
_MEDIA = {"image": "image", "images": "image", "video": "video", "videos": "video"}


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet files need pyarrow: pip install 'gaze_jax[data]'.") from error
    return pyarrow


@functools.lru_cache(maxsize=64)
def _open(path: str) -> Any:
    arrow = _pyarrow()
    try:
        with storage.reading(path):
            return arrow.parquet.ParquetFile(storage.open_binary(path) if storage.is_remote(path) else path)
    except arrow.ArrowInvalid as error:
        raise UserError(f"{path} is no whole parquet file ({error}); write it again.") from error


@functools.lru_cache(maxsize=_KEPT)
def _group(path: str, group: int) -> Any:
    try:
        with storage.reading(path) if storage.is_remote(path) else contextlib.nullcontext():
            return _open(path).read_row_group(group)
    except (OSError, _pyarrow().ArrowException) as error:
        raise UserError(f"{path} is damaged in row group {group} ({error}); write it again.") from error


@dataclasses.dataclass(frozen=True)
class ParquetRecords:
    """The rows of parquet files; :func:`open_parquet` makes it.

    Columns: "conversations", "id", and media in "image", "images", "video" or "videos": a struct
    of "bytes" and "path", or a list of them.

    Attributes:
      paths: the files, in order.
    """

    paths: tuple[str, ...]

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        """int64 [G + 1]: the number of rows before each row group of all files."""
        counts = [_open(path).metadata.row_group(g).num_rows for path, g in self._groups]
        return np.cumsum([0, *counts])

    @functools.cached_property
    def _groups(self) -> tuple[tuple[str, int], ...]:
        return tuple((path, group) for path in self.paths for group in range(_open(path).num_row_groups))

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths}

    def __len__(self) -> int:
        return int(self._rows[-1])

    def __getitem__(self, index: int) -> Record:
        at = int(np.searchsorted(self._rows, index, side="right")) - 1
        path, group = self._groups[at]
        first = int(self._rows[self._groups.index((path, 0))])
        row = _group(path, group).slice(index - int(self._rows[at]), 1).to_pylist()[0]
        return _record(row, f"{Path(path).name} row {index - first}")

    def fingerprint(self) -> dict[str, object]:
        """The files' names and sizes, and checksums of their ends, which describe every column's data."""
        files = [[Path(path).name, storage.size(path), _end_crc(path)] for path in self.paths]
        return {"corpus": "parquet", "files": files}


def _end_crc(path: str) -> int:
    size = min(_END, total := storage.size(path))
    return zlib.crc32(storage.read_range(path, total - size, size))


def _record(row: Mapping[str, object], name: str) -> Record:
    media: dict[str, Medium] = {}
    fields: dict[str, object] = {"id": row.get("id"), "conversations": row.get("conversations")}
    for key in ("start", "end", "start_frame", "end_frame"):
        fields[key] = row.get(key)
    for column, kind in _MEDIA.items():
        for medium in _media(row.get(column), name, column):
            media[medium.name] = medium
            listed = fields.setdefault(kind, [])
            assert isinstance(listed, list)
            listed.append(medium.name)

    def find(file: str, record: str) -> Medium:
        return media[file]

    return read_record(fields, name, find)


def _media(value: object, name: str, column: str) -> list[Medium]:
    if value is None:
        return []
    found = []
    cells: Sequence[object] = value if isinstance(value, list) else [value]
    for number, cell in enumerate(cells):
        data = cell.get("bytes") if isinstance(cell, Mapping) else cell
        if data is None and len(cells) == 1:
            continue  # a row of text in a table of pictures
        if not isinstance(data, bytes):
            raise UserError(
                f"{name} has no bytes in column {column!r}; give a struct of bytes and path, as "
                "Hugging Face's datasets write images."
            )
        path = cell.get("path") if isinstance(cell, Mapping) else None
        found.append(Medium(f"{column}[{number}] of {name}" + (f" ({path})" if path else ""), data=data))
    return found


def open_parquet(paths: tuple[str, ...]) -> ParquetRecords:
    """Open parquet files.

    Raises:
      UserError: pyarrow is missing, a file cannot be read or lacks "conversations", or they have no rows.
    """
    for path in paths:
        names = _open(path).schema_arrow.names
        if "conversations" not in names:
            raise UserError(f"{path} has the columns {', '.join(names)}; it needs 'conversations'.")
    records = ParquetRecords(paths)
    if not len(records):
        raise UserError(f"{', '.join(paths)} have no rows; give files with at least one.")
    return records
