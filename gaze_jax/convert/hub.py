"""Checkpoints by the name that they have on the Hugging Face Hub, at a revision that cannot move."""

import re
from pathlib import Path

from gaze_jax.convert.source import KEPT
from gaze_jax.errors import UserError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve(where: str, revision: str | None) -> Path:
    """A directory of this machine: ``where`` itself, or the download of that Hub id.

    Args:
      where: a directory, or "organisation/name" if there is no such directory.
      revision: full commit hash of the Hub's repository; branches and tags move.

    Raises:
      UserError: ``where`` is neither, the revision is not a commit, or the download fails.
    """
    if Path(where).is_dir():
        if revision is not None:
            raise UserError(f"{where} is a directory, so --revision={revision} has no meaning; drop it.")
        return Path(where)
    if not _NAME.fullmatch(where):
        raise UserError(f"{where!r} is neither a directory nor a Hub id such as Qwen/Qwen3-4B.")
    if revision is None or not _COMMIT.fullmatch(revision):
        raise UserError(
            f"{where!r} is not a directory; to download it from the Hub, name the commit with "
            "--revision=HASH (40 hexadecimal digits): a branch may change between two runs."
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("Downloading from the Hub needs: pip install huggingface_hub.") from error
    try:
        found = huggingface_hub.snapshot_download(
            where, revision=revision, allow_patterns=["*.safetensors", *KEPT]
        )
    except Exception as error:  # requests, offline mode and the hub each raise their own kinds
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{where} at {revision} cannot be downloaded ({reason}).") from error
    return Path(found)
