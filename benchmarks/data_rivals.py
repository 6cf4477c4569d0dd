"""What the data pipeline is compared with: loops that only decode and resize, and torch's DataLoader."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tokenizers

from gaze_jax.chat.template import ChatTemplate
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
    """Records of one image each as a data set for torch, in an endless random order.

    It is written as trainers usually are: lines of JSON in memory, one rendering, targets by a search for the
    answer, and nothing is checked.

    Attributes:
      folder: of the images.
      lines: the records.
      template: the model's chat template.
      system: messages before each conversation.
      tokenizer: content of a tokenizer.json.
      side: of the resized images.
    """

    folder: Path
    lines: tuple[str, ...]
    template: ChatTemplate
    system: tuple[dict[str, str], ...]
    tokenizer: str
    side: int

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> tuple[np.ndarray, list[int], list[int]]:
        record = json.loads(self.lines[index * 7919 % len(self.lines)])
        with PIL.Image.open(self.folder / record["image"]) as image:
            pixels = np.asarray(image.convert("RGB").resize((self.side, self.side), BICUBIC))
        question, answer = (turn["value"] for turn in record["conversations"])
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = self.template.render([*self.system, *turns], add_generation_prompt=False)
        found = _tokenizer(self.tokenizer).encode(text, add_special_tokens=False)
        start = text.rindex(answer)
        targets = [id if at >= start else -100 for id, (at, _) in zip(found.ids, found.offsets)]
        return pixels, found.ids, targets


_loaded: dict[int, tokenizers.Tokenizer] = {}
"""The tokenizer of this process."""


def _tokenizer(content: str) -> tokenizers.Tokenizer:
    if not _loaded:
        _loaded[0] = tokenizers.Tokenizer.from_str(content)
    return _loaded[0]


def collate(samples: list[tuple[np.ndarray, list[int], list[int]]]) -> tuple[Any, Any, Any]:
    """A batch: uint8 [n, side, side, 3], and int64 tokens and targets [n, longest], padded."""
    import torch

    images = torch.from_numpy(np.stack([pixels for pixels, _, _ in samples]))
    tokens = torch.zeros((len(samples), max(len(ids) for _, ids, _ in samples)), dtype=torch.int64)
    targets = torch.full_like(tokens, -100)
    for number, (_, ids, wanted) in enumerate(samples):
        tokens[number, : len(ids)] = torch.tensor(ids)
        targets[number, : len(ids)] = torch.tensor(wanted)
    return images, tokens, targets


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
