"""JSON Lines files, read by one rule wherever a command takes one.

A line ends at a line feed, with or without a carriage return; a byte order mark and blank lines are
skipped. Characters such as U+2028 do not end a line: JSON texts may contain them. Paths of media in a file
are relative to that file.
"""

import json
import os
from typing import Any

from gaze_jax.errors import UserError
from gaze_jax.media.probe import is_url


def read_lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, each with its number from 1.

    Raises:
      UserError: the file cannot be read, is not UTF-8, or has only blank lines.
    """
    name = os.fspath(path)
    try:
        with open(name, encoding="utf-8-sig", newline="\n") as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); give a JSON Lines file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"{name} is empty; write one JSON object per line.")
    return lines


def parse_object(line: str, name: str) -> dict[str, Any]:
    """The JSON object of a line; ``name`` names the line in messages.

    Raises:
      UserError: it is not a JSON object, or has a key twice.
    """
    try:
        value = json.loads(line, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not valid JSON ({error.msg} at character {error.pos + 1}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{name} must be a JSON object, not {type(value).__name__}.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def media_path(file: str | os.PathLike[str], name: str) -> str:
    """The path of a medium that a line of ``file`` names; a URL stays as it is, for its reader to refuse."""
    return name if is_url(name) else os.path.join(os.path.dirname(os.fspath(file)), name)
