"""Checkpoints from the Hugging Face Hub, pinned to a commit."""

import re
from pathlib import Path
from typing import Any

from gaze_jax.convert.source import COMMIT, KEPT
from gaze_jax.errors import UserError

_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def resolve(where: str) -> Path:
    """Return a local directory: ``where`` itself, or the download of that Hub id.

    Args:
      where: a directory, or "organisation/name" or "organisation/name@revision" if there is no such
        directory. The revision is a commit, a branch or a tag, by default the branch "main". A branch or tag
        is resolved to its commit first, so that all files are of one commit.

    Raises:
      UserError: ``where`` is neither, or the download fails.
    """
    if Path(where).is_dir():
        return Path(where)
    found = _NAME.fullmatch(where)
    if found is None or where.startswith((".", "/")):
        raise UserError(f"{where} is not a directory; give a checkpoint, or a Hub id such as Qwen/Qwen3-4B.")
    name, revision = found["name"], found["revision"] or "main"
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{where!r} is no directory; downloading it from the Hub needs: pip install huggingface_hub"
        ) from error
    try:
        commit = revision if COMMIT.fullmatch(revision) else _commit(huggingface_hub, name, revision)
        directory = huggingface_hub.snapshot_download(
            name, revision=commit, allow_patterns=["*.safetensors", *KEPT]
        )
    except Exception as error:  # requests, offline mode and the hub each raise their own types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{where!r} is no directory here, and cannot be downloaded from the Hub ({reason})."
        ) from error
    return Path(directory)


def _commit(hub: Any, name: str, revision: str) -> str:
    """The commit of a branch or tag: as the Hub says, or without network as when last downloaded."""
    try:
        return str(hub.HfApi().model_info(name, revision=revision).sha)
    except Exception:
        try:
            return Path(hub.snapshot_download(name, revision=revision, local_files_only=True)).name
        except Exception:  # nothing is there: what the Hub said is the better reason
            pass
        raise
