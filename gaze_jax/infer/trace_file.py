"""The gaze trace's file: a NumPy .npz, checked before memory is allocated for its contents.

docs/viewer.md describes the format. Axes as in ``gaze_jax.infer.trace``.
"""

import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import IO, Any, get_args

import numpy as np

from gaze_jax.data.placement import PlacedView
from gaze_jax.errors import UserError
from gaze_jax.infer.trace import Picture, Trace
from gaze_jax.stored import NEWEST, check_version, upgrade
from gaze_jax.writing import replacing

FORMAT = "gaze_jax.trace"
MAX_BYTES = 2 << 30
"""Maximum size of a trace, in bytes after decompression."""

_MAX_META = 64 << 20
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # these decompress no more than asked for

# The arrays of the file: allowed dtypes, as .npy writes them, and axes.
_STORED = {
    "selected": (("<i2", "<i4"), ("T", "L", "Hs", "J")),
    "scores": (("<f4",), ("T", "L", "Hs", "J")),
    "attention": (("<f2",), ("T", "L", "H", "J")),
    "dense": (("<f2",), ("T", "L", "H", "R")),
    "entries": (("<f4",), ("T", "L", "4")),
    "visual_tokens": (("<i4",), ("T",)),
    "probabilities": (("<f4",), ("T",)),
    "region_keys": (("<i4",), ("R",)),
    "grids": (("<i2", "<i4"), ("grids",)),
    "jpegs": (("|u1",), ("jpegs",)),
}
_OPTIONAL = ("probabilities", "region_keys")
_AXES = ("T", "L", "Hs", "J", "H", "R")
_HEADER = re.compile(
    rb"\{'descr': '([<|][a-z]\d)', 'fortran_order': False, 'shape': \(([\d, ]{0,200})\), \} *\n"
)
_FIELDS = tuple(name for name in _STORED if name not in ("grids", "jpegs"))
_VIEW = {"view": int, "video": bool, "index": int, "frame": int, "corners": list, "grid": list}
_PICTURE = {
    "video": bool,
    "index": int,
    "frame": int,
    "seconds": float | None,
    "size": list,
    "bytes": int,
}
_META = {
    "question": str,
    "answer": str,
    "tokens": list,
    "model": str,
    "top_k": int | list | None,
    "select_per": str,
    "shape": dict,
    "views": list,
    "pictures": list,
    "prompt": list,
}


def rounded_down(shares: np.ndarray) -> np.ndarray:
    """Round float32 in [0, 1] to float16 towards 0, so that the sum of shares never grows.

    The relative error is below 2**-10; for values below 2**-14 the absolute error is below 2**-24.
    """
    near = shares.astype(np.float16)
    over = near.astype(np.float32) > shares
    return np.where(over, np.nextafter(near, np.float16(0)), near)


def save(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace with ``numpy.savez_compressed``; equal traces write equal bytes.

    ``attention`` and ``dense`` are :func:`rounded_down` to float16; everything else is stored exactly.
    Loading and saving again changes nothing.

    Raises:
      UserError: the file cannot be written, or the trace is larger than :data:`MAX_BYTES`.
    """
    ids = np.int16 if trace.regions <= np.iinfo(np.int16).max else np.int32
    sizes = (*trace.selected.shape, trace.heads, trace.regions)
    meta = {
        "format": FORMAT,
        "version": NEWEST["trace"],
        **{
            name: getattr(trace, name)
            for name in ("question", "answer", "tokens", "model", "top_k", "select_per", "prompt")
        },
        "shape": dict(zip(_AXES, sizes, strict=True)),
        "views": [
            {name: getattr(view, name) for name in ("view", "video", "index", "frame", "corners")}
            | {"grid": view.regions.shape}
            for view in trace.views
        ],
        "pictures": [
            {name: getattr(picture, name) for name in ("video", "index", "frame", "seconds", "size")}
            | {"bytes": len(picture.jpeg)}
            for picture in trace.pictures
        ],
    }
    arrays = {name: getattr(trace, name) for name in _FIELDS if getattr(trace, name) is not None}
    arrays["selected"] = trace.selected.astype(ids)
    arrays["attention"], arrays["dense"] = rounded_down(trace.attention), rounded_down(trace.dense)
    arrays["grids"] = np.concatenate([view.regions.ravel() for view in trace.views]).astype(ids)
    arrays["jpegs"] = np.frombuffer(b"".join(picture.jpeg for picture in trace.pictures), np.uint8)
    text = json.dumps(meta, allow_nan=False, default=_plain).encode()
    held = len(text) + sum(array.nbytes for array in arrays.values())
    if held > MAX_BYTES:
        raise UserError(
            f"Trace {os.fspath(path)!r} would hold {held} bytes, more than the limit of {MAX_BYTES}; "
            "trace fewer tokens."
        )
    with replacing(path, "Trace ") as part, open(part, "wb") as file:  # given a path, savez would add .npz
        np.savez_compressed(file, meta=np.frombuffer(text, np.uint8), **arrays)


def _plain(value: object) -> object:
    """Convert NumPy scalars, which a view may hold, to Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} cannot be written as JSON.")


def load(path: str | os.PathLike[str]) -> Trace:
    """Read a trace that :func:`save` wrote.

    Every size that the file declares is checked before memory is allocated for it.

    Raises:
      UserError: the file is missing, not a trace, damaged, of an unknown version, or larger than
        :data:`MAX_BYTES`. The message is one sentence that names the file.
    """
    name = os.fspath(path)
    try:
        with zipfile.ZipFile(name) as file:
            return _read(file, name)
    except UserError:
        raise
    except zipfile.BadZipFile as error:
        raise UserError(f"Trace {name!r} is damaged, cut short or not a trace; write it again.") from error
    except OSError as error:
        raise UserError(f"Trace {name!r} cannot be read ({error.strerror}).") from error
    # RuntimeError: encrypted.
    except (ValueError, EOFError, OverflowError, zlib.error, RuntimeError) as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"Trace {name!r} is damaged ({why}); write it again.") from error


def _read(file: zipfile.ZipFile, name: str) -> Trace:
    entries = {info.filename: info for info in file.infolist()}
    if any(info.compress_type not in _PACKED for info in entries.values()):
        raise ValueError("it is compressed in a way that NumPy does not use")
    if "meta.npy" not in entries:
        raise UserError(f"File {name!r} is not a trace: it has no entry 'meta'; give a trace file.")
    meta = _read_meta(file, entries["meta.npy"], name)
    wanted = {"meta.npy", *(f"{array}.npy" for array in _STORED)}
    missing = wanted - set(entries) - {f"{array}.npy" for array in _OPTIONAL}
    if missing or set(entries) - wanted or len(entries) < len(file.infolist()):
        raise ValueError(f"its entries must be {', '.join(sorted(wanted))}")
    declared = sum(info.file_size for info in entries.values())
    if declared > MAX_BYTES:
        raise UserError(
            f"Trace {name!r} holds {declared} bytes, more than the limit of {MAX_BYTES}; trace fewer tokens."
        )
    lengths = meta["shape"] | {
        "4": 4,
        "grids": sum(h * w for h, w in (view["grid"] for view in meta["views"])),
        "jpegs": sum(picture["bytes"] for picture in meta["pictures"]),
    }
    arrays = {}
    for array, (types, axes) in _STORED.items():
        if f"{array}.npy" not in entries:
            continue
        with file.open(entries[f"{array}.npy"]) as entry:
            shape = tuple(lengths[axis] for axis in axes)
            arrays[array] = _read_array(entry, array, entries[f"{array}.npy"].file_size, types, shape)
    for array in ("selected", "grids"):
        arrays[array] = arrays[array].astype(np.int32)
    for array in ("attention", "dense"):
        arrays[array] = arrays[array].astype(np.float32)
    fields: dict[str, Any] = {name: meta[name] for name in ("question", "answer", "model", "select_per")} | {
        array: arrays.get(array) for array in _FIELDS
    }
    top_k = meta["top_k"]
    return Trace(
        top_k=tuple(top_k) if isinstance(top_k, list) else top_k,
        tokens=tuple(meta["tokens"]),
        views=_views(meta["views"], arrays["grids"]),
        pictures=_pictures(meta["pictures"], arrays["jpegs"].tobytes()),
        prompt=tuple(meta["prompt"]),
        **fields,
    )


def _read_array(
    entry: IO[bytes], name: str, size: int, types: tuple[str, ...], shape: tuple[int, ...] | None
) -> np.ndarray:
    """Read one array after checking its header.

    Args:
      entry: the opened .npy.
      name: the array's name.
      size: bytes of the entry, header included, as the zip declares them.
      types: the allowed dtypes.
      shape: the required shape; None means one axis of any length.

    Raises:
      ValueError: the header or the length is not as required.
    """
    # NumPy's reader evaluates the header as Python and allocates memory before it has read the data.
    start = entry.read(10)
    header = entry.read(int.from_bytes(start[8:], "little"))
    match = _HEADER.fullmatch(header)
    if not start.startswith(b"\x93NUMPY\x01\x00") or match is None:
        raise ValueError(f"{name} is no array")
    dtype = match[1].decode()
    found = tuple(int(side) for side in match[2].replace(b",", b" ").split())
    if dtype not in types or (len(found) != 1 if shape is None else found != shape):
        raise ValueError(f"{name} is {dtype} {list(found)}, which does not match its meta")
    length = math.prod(found) * np.dtype(dtype).itemsize
    if length + len(start) + len(header) != size:
        raise ValueError(f"{name} does not have the length that it declares")
    values = entry.read(length)
    if len(values) < length or entry.read(1):  # reading to the end also checks the checksum
        raise ValueError(f"{name} does not have the length that it declares")
    return np.frombuffer(values, dtype).reshape(found)


def _read_meta(file: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> dict[str, Any]:
    """The file's JSON, with every field checked against :data:`_META`."""
    if info.file_size > _MAX_META:
        raise ValueError(f"its meta has {info.file_size} bytes, more than {_MAX_META}")
    with file.open(info) as entry:
        text = _read_array(entry, "meta", info.file_size, ("|u1",), None).tobytes()
    try:
        meta = json.loads(text)
    except RecursionError as error:
        raise ValueError("its meta is nested too deeply") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"File {name!r} is not a trace: its meta does not say format {FORMAT!r}.")
    meta = upgrade("trace", meta, check_version("trace", meta, f"Trace {name!r}"))
    _check_fields("meta", {k: v for k, v in meta.items() if k not in ("format", "version")}, _META)
    if not all(isinstance(token, str) for token in meta["tokens"]):
        raise ValueError("tokens must be strings")
    if isinstance(meta["top_k"], list):
        _check_numbers("top_k", meta["top_k"], len(meta["top_k"]))
    _check_fields("shape", meta["shape"], dict.fromkeys(_AXES, int))
    _check_numbers("shape", list(meta["shape"].values()), len(_AXES))
    for view in meta["views"]:
        _check_fields("a view", view, _VIEW)
        _check_numbers("grid", view["grid"], 2)
        corners = view["corners"]
        if len(corners) != 4 or not all(type(edge) in (int, float) for edge in corners):
            raise ValueError("corners must be four numbers")
    for picture in meta["pictures"]:
        _check_fields("a picture", picture, _PICTURE)
        _check_numbers("size", picture["size"], 2)
        _check_numbers("index, frame and bytes", [picture[name] for name in ("index", "frame", "bytes")], 3)
    return meta


def _check_fields(what: str, fields: object, types: Mapping[str, object]) -> None:
    """Raise a ValueError unless ``fields`` has exactly these names and types."""
    if not isinstance(fields, dict) or set(fields) != set(types):
        raise ValueError(f"{what} must have the fields {', '.join(types)}")
    for name, wanted in types.items():
        allowed = get_args(wanted) or (wanted,)
        if float in allowed:
            allowed = (*allowed, int)
        if type(fields[name]) not in allowed:  # not isinstance: True is an int
            raise ValueError(f"{name} of {what} is {type(fields[name]).__name__}")


def _check_numbers(what: str, numbers: Sequence[object], count: int) -> None:
    if len(numbers) != count or not all(type(n) is int and 0 <= n < 1 << 31 for n in numbers):
        raise ValueError(f"{what} must be {count} whole numbers, 0 or more")


def _views(stored: list[dict[str, Any]], grids: np.ndarray) -> tuple[PlacedView, ...]:
    views, at = [], 0
    for view in stored:
        height, width = view["grid"]
        regions = grids[at : at + height * width].reshape(height, width)
        at += height * width
        x0, y0, x1, y1 = map(float, view["corners"])
        views.append(
            PlacedView(view["view"], view["video"], view["index"], view["frame"], (x0, y0, x1, y1), regions)
        )
    return tuple(views)


def _pictures(stored: list[dict[str, Any]], jpegs: bytes) -> tuple[Picture, ...]:
    pictures, at = [], 0
    for one in stored:
        jpeg = jpegs[at : at + one["bytes"]]
        at += one["bytes"]
        height, width = one["size"]
        seconds = None if one["seconds"] is None else float(one["seconds"])
        pictures.append(Picture(one["video"], one["index"], one["frame"], seconds, (height, width), jpeg))
    return tuple(pictures)
