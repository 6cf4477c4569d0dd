"""Checkpoints from the Hugging Face Hub, pinned to a commit."""

import re
from pathlib import Path

from gaze_jax.convert.source import KEPT
from gaze_jax.errors import UserError

_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>\w*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve(where: str) -> Path:
    """Return a local directory: ``where`` itself, or the download of that Hub id.

    Args:
      where: a directory, or "organisation/name@commit" if there is no such directory. The commit is the
        full hash: branches and tags move.

    Raises:
      UserError: ``where`` is neither, the revision is not a commit, or the download fails.
    """
    if Path(where).is_dir():
        return Path(where)
    found = _NAME.fullmatch(where)
    if found is None:
        raise UserError(
            f"{where!r} is neither a directory nor a Hub id with its commit, such as Qwen/Qwen3-4B@HASH."
        )
    name, revision = found["name"], found["revision"]
    if revision is None or not _COMMIT.fullmatch(revision):
        raise UserError(
            f"{where!r} is not a directory; to download it from the Hub, write {name}@ and the commit's 40 "
            "hexadecimal digits: a branch may change between two runs."
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("Downloading from the Hub needs: pip install huggingface_hub.") from error
    try:
        directory = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=["*.safetensors", *KEPT]
        )
    except Exception as error:  # requests, offline mode and the hub each raise their own types
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{where} cannot be downloaded ({reason}).") from error
    return Path(directory)
