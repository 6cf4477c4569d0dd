"""Names in files of earlier versions. No other module knows them.

A reader checks a file's version and checksum, then calls :func:`upgrade`, and reads the result as if it were
written today. Writers write the newest version. Parameter names and arrays have never changed.

Version 2 renamed these keys and values; version 1 had the left side. :data:`CHANGES` is the exact table.

* Configuration of a model, in a converted checkpoint's ``manifest.json`` ("manifest"), an export's
  ``gaze.json`` ("export") and a run's ``meta`` ("run"):
  ``gaze.share`` "head", "group" -> ``gaze.select_per`` "head", "kv_head";
  ``gaze.visual_scope`` "unit" -> "view"; ``gaze.newlines`` "dense" -> "text".
* Run only: ``format`` -> ``format_version``; of the data, ``layout.newlines`` "dense" -> "text",
  ``pipeline.bucket.dense`` -> ``pipeline.bucket.text``, and ``source``, the ``repr`` of a class, is plain
  values.
* Trace, in ``meta`` ("trace"): ``share`` -> ``select_per`` with the values above, ``units`` -> ``views``, and
  ``unit`` of each -> ``view``.

Version 3 of a trace added ``prompt`` to ``meta`` and two arrays that may be absent, ``probabilities`` and
``region_keys``. An earlier file has none of them, so its ``prompt`` is empty. ``top_k`` may be a
list since then, a number for each layer.

Version 3 of a run dropped ``data.process_count``, and Orbax's item ``data``, the state of grain's iterator:
the number of the step says which batch is next, on any number of processes and workers.

Version 4 of a run added ``skipped_in_a_row``, steps whose update was left out since the last that was made.
Before, no run went on after one.

Version 3 of a manifest and of an export, and version 5 of a run: ``gaze.decode_implementation`` "xla" ->
"auto". "xla" was the default then, on CPUs too, where there was no other. Who wants it sets it again.

Old names in files that people write are refused in a sentence with the new ones: config files (names and
values of ``gaze`` above, :func:`renamed_setting`) and lines of questions (:data:`QUESTION_FIELDS`).

Files that this project writes and never reads back. They have no version; old ones keep their names:

* Lines of answers: ``finish`` "end", "stop", "length" -> ``finish_reason`` "stop", "stop", "length", and
  ``stop_reason`` names the end token or the stop string; ``top_k`` -> ``gaze_top_k``.
* ``compare.json``: ``model.gaze`` as above; in ``rows``, ``share`` -> ``select_per`` and ``entries_share`` ->
  ``entries_fraction``.
* Results of benchmarks: ``share`` -> ``select_per`` and "group" -> "kv_head", also as a key, in
  "dense / group" and in names of kernels; ``dense``, a number of keys -> ``text_stream``; ``dense_bytes`` ->
  ``text_stream_bytes``; ``newlines_in`` "dense" -> "text". The committed ones were rewritten.
* ``eval.json``, ``metrics.jsonl``, ``clock.json`` and ``gpu_tiles.json`` did not change.
"""

import ast
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gaze_jax.errors import UserError

NEWEST = {"manifest": 3, "export": 3, "run": 5, "trace": 3}
"""Kind of file -> the version that is written. All earlier ones are read."""

_VERSION_KEYS = {"trace": ("version",), "run": ("format_version", "format")}
"""Kind -> names that its version has had, where that is not ``format_version`` alone."""


def check_version(kind: str, content: Mapping[str, Any], where: str) -> int:
    """The version of a file; one that this program does not know is refused.

    Args:
      kind: a key of :data:`NEWEST`.
      content: of the file.
      where: names the file in the message.

    Raises:
      UserError: the version is unknown, or there is none.
    """
    known = range(1, NEWEST[kind] + 1)
    keys = _VERSION_KEYS.get(kind, ("format_version",))
    version = next((content[key] for key in keys if key in content), None)
    if type(version) is not int or version not in known:
        *earlier, newest = map(str, known)
        raise UserError(
            f"{where} has format_version {version!r} but this gaze_jax reads "
            f"{', '.join(earlier)} and {newest}; use the version that wrote it."
        )
    return version


def _words(values: Mapping[str, str]) -> Callable[[Any], Any]:
    """Replace these strings; every other value stays."""
    return lambda value: values.get(value, value) if isinstance(value, str) else value


def _plain(node: ast.expr, name: str | None = None) -> Any:
    """Values in a ``repr``, tuples as lists; with ``name`` the fields of that dataclass.

    Raises:
      ValueError: it is anything else.
    """
    match node:
        case ast.Call(func=ast.Name(id=found), args=[], keywords=fields) if found == name:
            inner = {"config": "DigitsConfig"}
            return {str(field.arg): _plain(field.value, inner.get(str(field.arg))) for field in fields}
        case ast.Tuple(elts=items):
            return [ast.literal_eval(item) for item in items]
    return ast.literal_eval(node)


def _source(text: Any) -> Any:
    """The ``repr`` of a data source as its fingerprint; version 1 had one kind, ``DigitScenes``.

    Raises:
      ValueError: it is something else.
    """
    with contextlib.suppress(SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Call):
            return {"corpus": "digits"} | _plain(call, "DigitScenes")
    raise ValueError(f"data.source={text!r} is not a data source of version 1")


@dataclasses.dataclass(frozen=True)
class Renamed:
    """A key with another name or other values than before.

    Attributes:
      old: path of the key, a dot between names; ``*`` is every element of a list.
      new: last name of the path now.
      value: makes the new value of the old one.
    """

    old: str
    new: str
    value: Callable[[Any], Any] = lambda value: value


@dataclasses.dataclass(frozen=True)
class Added:
    """A key that earlier files lack.

    Attributes:
      key: its name, at the top.
      value: makes what an earlier file means by lacking it.
    """

    key: str
    value: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A key that later files lack.

    Attributes:
      path: of the key, a dot between names.
    """

    path: str


_SELECT_PER = _words({"group": "kv_head"})
_NEWLINES = _words({"dense": "text"})


def _gaze(prefix: str) -> tuple[Renamed, ...]:
    """Changes of a ``GazeConfig`` at a path."""
    return (
        Renamed(f"{prefix}gaze.share", "select_per", _SELECT_PER),
        Renamed(f"{prefix}gaze.visual_scope", "visual_scope", _words({"unit": "view"})),
        Renamed(f"{prefix}gaze.newlines", "newlines", _NEWLINES),
    )


def _decoding(prefix: str) -> tuple[Renamed, ...]:
    """The default implementation got a name of its own."""
    name = "decode_implementation"
    return (Renamed(f"{prefix}gaze.{name}", name, _words({"xla": "auto"})),)


CHANGES: Mapping[str, Mapping[int, tuple[Renamed | Added | Dropped, ...]]] = {
    "manifest": {2: _gaze("model."), 3: _decoding("model.")},
    "export": {2: _gaze("model."), 3: _decoding("model.")},
    "run": {
        2: (
            *_gaze("config.model."),
            Renamed("format", "format_version"),
            Renamed("data.layout.newlines", "newlines", _NEWLINES),
            Renamed("data.pipeline.bucket.dense", "text"),
            Renamed("data.source", "source", _source),
        ),
        3: (Dropped("data.process_count"),),
        4: (Added("skipped_in_a_row", int),),
        5: _decoding("config.model."),
    },
    "trace": {
        2: (
            Renamed("share", "select_per", _SELECT_PER),
            Renamed("units.*.unit", "view"),
            Renamed("units", "views"),
        ),
        3: (Added("prompt", list),),
    },
}
"""Kind of file -> version -> what it renamed, added or dropped, in the order in which it is applied."""


def _apply(change: Renamed, node: Any, path: list[str]) -> Any:
    """``node`` with the change made at ``path``; what is not there, the reader will miss."""
    name, *rest = path
    if name == "*":
        return [_apply(change, item, rest) for item in node] if isinstance(node, list) else node
    if not isinstance(node, dict):
        return node
    if not rest and change.new != name and change.new in node:
        raise ValueError(f"{change.new!r} has no place in a file of that version, which has {name!r}")
    if name not in node:
        return node
    renamed = _apply(change, node[name], rest) if rest else change.value(node[name])
    return {
        (name if rest else change.new) if key == name else key: renamed if key == name else value
        for key, value in node.items()
    }


def _without(node: Any, path: list[str]) -> Any:
    """``node`` without what is at ``path``, if it is there."""
    name, *rest = path
    if not isinstance(node, dict) or name not in node:
        return node
    if not rest:
        return {key: value for key, value in node.items() if key != name}
    return node | {name: _without(node[name], rest)}


def upgrade(kind: str, content: dict[str, Any], version: int) -> dict[str, Any]:
    """What a file of an earlier version says, under today's names.

    Args:
      kind: a key of :data:`CHANGES`.
      content: of the file, as JSON gives it; it stays as it is.
      version: of the file, after :func:`check_version`.

    Raises:
      ValueError: a key of a later version is in it, or a value cannot be read.
    """
    for later in range(version + 1, NEWEST[kind] + 1):
        for change in CHANGES[kind][later]:
            if isinstance(change, Renamed):
                content = _apply(change, content, change.old.split("."))
            elif isinstance(change, Dropped):
                content = _without(content, change.path.split("."))
            elif change.key in content:
                raise ValueError(f"{change.key!r} has no place in a file of version {version}")
            else:
                content = content | {change.key: change.value()}
    return content


QUESTION_FIELDS = {
    "top_k": "gaze_top_k (regions per query) or sample_top_k (tokens to draw from)",
    "keep": "gaze_keep",
    "dense": "gaze_dense",
    "dense_layers": "gaze_full_layers",
    "full_layers": "gaze_full_layers",
}
"""Former name of a field of a question -> what to write now."""


def renamed_setting(path: str, value: Any) -> str | None:
    """What to write now for a setting of a config file, such as "model.gaze.select_per='kv_head'".

    Args:
      path: of the setting, a dot between names.
      value: that it was given.

    Returns:
      None if neither its name nor its value was renamed.
    """
    for change in _gaze(""):
        if f".{path}".endswith(f".{change.old}"):
            now = change.value(value)
            name = path.removesuffix(change.old.rpartition(".")[2]) + change.new
            return None if (name, now) == (path, value) else f"{name}={now!r}"
    return None
