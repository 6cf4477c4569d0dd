"""Folders of media with captions: ``cat.jpg`` and, beside it, ``cat.txt``."""

import dataclasses
import functools
import os
import zlib
from pathlib import Path

from gaze_jax.corpora.records import MediaFolder, Record, read_record
from gaze_jax.corpora.tars import IMAGES, VIDEOS
from gaze_jax.errors import UserError
from gaze_jax.media.video import natural


@dataclasses.dataclass(frozen=True)
class CaptionedFolder:
    """Images and videos below a folder that have a caption file each; :func:`open_folder` makes it.

    Attributes:
      path: the folder.
      prompt: what is asked of each medium.
    """

    path: str
    prompt: str

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        """Relative paths of the media, in natural order."""
        found = []
        for folder, folders, files in os.walk(self.path):
            folders.sort()
            for file in files:
                if os.path.splitext(file)[1][1:].lower() in (*IMAGES, *VIDEOS) and not file.startswith("."):
                    name = os.path.relpath(os.path.join(folder, file), self.path)
                    found.append(name.replace(os.sep, "/"))
        return tuple(sorted(found, key=natural))

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "prompt": self.prompt}

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        name = self._names[index]
        stem, suffix = os.path.splitext(name)
        try:
            caption = Path(self.path, f"{stem}.txt").read_text(encoding="utf-8-sig")
        except FileNotFoundError as error:
            raise UserError(f"{name} has no caption: {stem}.txt is not in {self.path}; write it.") from error
        except OSError as error:
            raise UserError(f"{stem}.txt in {self.path} cannot be read ({error.strerror}).") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{stem}.txt in {self.path} is not UTF-8 text (byte {error.start}).") from error
        kind = "image" if suffix[1:].lower() in IMAGES else "video"
        fields = {"id": stem, kind: name, "caption": caption}
        return read_record(fields, name, MediaFolder(self.path), prompt=self.prompt)

    def fingerprint(self) -> dict[str, object]:
        """A checksum of the names and of the sizes of media and captions, and the prompt."""
        captions = (f"{os.path.splitext(name)[0]}.txt" for name in self._names)
        files = [(name, _size(Path(self.path, name))) for name in (*self._names, *captions)]
        return {"corpus": "folder", "crc32": zlib.crc32(repr(files).encode()), "prompt": self.prompt}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def open_folder(path: str, *, prompt: str) -> CaptionedFolder:
    """Open a folder of captioned media.

    Args:
      path: the folder; folders in it are read too.
      prompt: what is asked of each medium, such as "Describe this picture."

    Raises:
      UserError: there are no media. (One without a caption is a record that cannot be read.)
    """
    records = CaptionedFolder(path, prompt)
    if not len(records):
        raise UserError(f"{path} has no images or videos; give a folder of media with a caption file each.")
    return records
