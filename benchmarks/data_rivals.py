"""What the data pipeline is compared with: loops that only decode and resize, and torch's DataLoader."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tokenizers

from gaze_jax.media.images import read_image

BICUBIC = PIL.Image.Resampling.BICUBIC


def read_images(paths: Sequence[Path], side: int) -> None:
    """Decode and resize images, one after the other."""
    for path in paths:
        np.asarray(PIL.Image.fromarray(read_image(path)).resize((side, side), BICUBIC))


def read_frames(paths: Sequence[Path], wanted: Sequence[int], side: int) -> None:
    """Decode videos up to the last of the ``wanted`` frames; convert and resize these."""
    import av

    for path in paths:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            stream.thread_type = "AUTO"
            for index, frame in enumerate(file.decode(stream)):
                if index in wanted:
                    pixels = frame.to_ndarray(format="rgb24")
                    np.asarray(PIL.Image.fromarray(pixels).resize((side, side), BICUBIC))
                if index == wanted[-1]:
                    break


@dataclasses.dataclass(frozen=True)
class Files:
    """Images and their texts as a data set for torch, in an endless random order.

    Attributes:
      paths: the images.
      texts: the conversation of each, in the model's template.
      tokenizer: content of a tokenizer.json.
      side: of the resized images.
    """

    paths: tuple[Path, ...]
    texts: tuple[str, ...]
    tokenizer: str
    side: int

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> tuple[np.ndarray, list[int]]:
        at = index * 7919 % len(self.paths)
        with PIL.Image.open(self.paths[at]) as image:
            pixels = np.asarray(image.convert("RGB").resize((self.side, self.side), BICUBIC))
        return pixels, _tokenizer(self.tokenizer).encode(self.texts[at], add_special_tokens=False).ids


_loaded: dict[int, tokenizers.Tokenizer] = {}
"""The tokenizer of this process."""


def _tokenizer(content: str) -> tokenizers.Tokenizer:
    if not _loaded:
        _loaded[0] = tokenizers.Tokenizer.from_str(content)
    return _loaded[0]


def collate(samples: list[tuple[np.ndarray, list[int]]]) -> tuple[Any, Any]:
    """A batch: uint8 [n, side, side, 3], and int64 tokens [n, longest], padded with 0."""
    import torch

    images = torch.stack([torch.tensor(pixels) for pixels, _ in samples])
    tokens = torch.zeros((len(samples), max(len(ids) for _, ids in samples)), dtype=torch.int64)
    for row, (_, ids) in zip(tokens, samples):
        row[: len(ids)] = torch.tensor(ids)
    return images, tokens


def torch_batches(files: Files, batch_size: int, workers: int) -> Iterator[Any]:
    """Batches of a DataLoader. Its workers are spawned, since a process with JAX should not fork."""
    import torch.utils.data

    loader = torch.utils.data.DataLoader(
        files,  # type: ignore[arg-type]
        batch_size,
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context="spawn",
    )
    return iter(loader)
