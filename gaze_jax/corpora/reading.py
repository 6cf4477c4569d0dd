"""Open a corpus, whatever container it is in: the content says which, never the name alone."""

import dataclasses
import functools
import glob
import os
from collections.abc import Sequence

import numpy as np

from gaze_jax.corpora import storage
from gaze_jax.corpora.array_records import FILE, SUFFIX, open_array_records
from gaze_jax.corpora.folders import open_folder
from gaze_jax.corpora.json_files import open_json
from gaze_jax.corpora.parquet import open_parquet
from gaze_jax.corpora.records import Corpus, MediaFolder, Record
from gaze_jax.corpora.tars import MediaTar, open_media_tars, open_webdataset
from gaze_jax.errors import UserError

PROMPT = "Describe this picture."
"""What is asked of a medium with a caption, unless the user says otherwise."""

_SHARDS = (".parquet", ".tar", ".jsonl", ".json")


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several corpora, one after the other."""

    parts: tuple[Corpus, ...]

    @functools.cached_property
    def _firsts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.parts)])

    def __getstate__(self) -> dict[str, object]:
        return {"parts": self.parts}

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> Record:
        at = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self.parts[at][index - int(self._firsts[at])]

    def fingerprint(self) -> dict[str, object]:
        """Those of the parts."""
        return {"corpus": "joined", "parts": [part.fingerprint() for part in self.parts]}


def open_corpus(path: str | os.PathLike[str], *, media: Sequence[str] = (), prompt: str = PROMPT) -> Corpus:
    """Open what a user has.

    * A JSON or JSON Lines file in LLaVA's form, whose media are below its folder or where ``media`` says.
    * A parquet file with the bytes of its images.
    * A webdataset tar.
    * A pattern such as ``shards/*.tar``, or a folder with such files: all of them, in order of their names.
    * A folder of images and videos with a caption file each.
    * A folder that ``gaze-jax data prepare`` wrote.

    All but the last two may be remote, ``gs://bucket/train.jsonl``: see :mod:`gaze_jax.corpora.storage`.

    Args:
      path: the file, pattern or folder.
      media: for JSON: the folder that media are in, or the plain tars that hold them.
      prompt: what is asked of media with captions.

    Raises:
      UserError: there is nothing to read, or what is there is none of these. One sentence.
    """
    name = os.fspath(path)
    if storage.is_remote(name):
        return _opened(_remote_files(name), media, prompt)
    if os.path.isdir(name):
        entries = os.listdir(name)
        if FILE in entries or any(entry.endswith(SUFFIX) for entry in entries):
            if media:
                raise UserError(f"{name} is prepared and holds its media itself; leave the media root out.")
            return open_array_records(name)
        files = sorted(entry for entry in entries if entry.lower().endswith(_SHARDS))
        if not files:
            return open_folder(name, prompt=prompt)
        return _opened([os.path.join(name, file) for file in files], media, prompt)
    if os.path.exists(name):
        return _opened([name], media, prompt)
    files = sorted(glob.glob(name, recursive=True))
    if not files:
        raise UserError(f"{name} is not there; give a file, a folder or a pattern such as 'shards/*.tar'.")
    return _opened(files, media, prompt)


def _remote_files(name: str) -> list[str]:
    """The files of a remote corpus: of a folder or a pattern those that hold records."""
    if any(mark in name for mark in "*?["):
        if files := storage.matches(name):
            return files
        raise UserError(f"{name} is not there; give a file, a folder or a pattern such as 'gs://b/*.tar'.")
    entries = storage.names(name)
    if entries is None:
        return [name]
    if FILE in entries or any(entry.endswith(SUFFIX) for entry in entries):
        raise UserError(f"{name} is a prepared corpus, which is read from local disks; copy it to one.")
    if files := [storage.join(name, entry) for entry in entries if entry.lower().endswith(_SHARDS)]:
        return files
    raise UserError(
        f"{name} has no JSON, parquet or tar files; captioned media are read from local folders: copy them."
    )


def _opened(files: Sequence[str], media: Sequence[str], prompt: str) -> Corpus:
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"{files[0]} and the {len(files) - 1} files with it are of different kinds "
            f"({', '.join(sorted(kinds))}); give one kind at a time."
        )
    (kind,) = kinds
    if media and kind != "JSON":
        raise UserError(f"{files[0]} is {kind} and holds its media itself; leave the media root out.")
    if kind == "parquet":
        return open_parquet(tuple(files))
    if kind == "tar":
        return open_webdataset(tuple(files), prompt=prompt)
    parts = tuple(open_json(file, find=_found_in(media)) for file in files)
    return parts[0] if len(parts) == 1 else Joined(parts)


def _found_in(media: Sequence[str]) -> MediaFolder | MediaTar | None:
    """Where media are: a folder, or tars; None if nothing is said."""
    if not media:
        return None
    if len(media) == 1 and _is_folder(media[0]):
        return MediaFolder(media[0])
    for path in media:
        if not storage.is_remote(path) and not os.path.isfile(path):
            raise UserError(f"The media root {path!r} is neither a folder nor a tar; check the path.")
    return open_media_tars(tuple(media))


def _is_folder(path: str) -> bool:
    return storage.names(path) is not None if storage.is_remote(path) else os.path.isdir(path)


def _kind(path: str) -> str:
    """What a file holds, by its first bytes."""
    head = storage.read_range(path, 0, 512)
    if head[:4] == b"PAR1":
        return "parquet"
    named = path.lower().endswith((".tar", ".tgz", ".tar.gz"))  # one without members has no mark
    if head[257:262] == b"ustar" or (named and head.strip()[:1] not in (b"[", b"{")):
        return "tar"
    return "JSON"
