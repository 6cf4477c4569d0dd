"""Corpora and runs for the benchmarks of the data pipeline: photographs, videos, and what trains on them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import PIL.Image

from gaze_jax.chat.template import CHATML
from gaze_jax.corpora import bundled
from gaze_jax.corpora.config import CorpusConfig
from gaze_jax.corpora.stand_in import byte_tokenizer
from gaze_jax.models.config import GazeConfig, VisionConfig
from gaze_jax.models.dummy import DUMMY
from gaze_jax.train.config import Experiment
from gaze_jax.train.corpus import TrainingCorpus, open_training_corpus
from gaze_jax.train.start import Start

QUESTION = "What is shown in this picture?"
ANSWER = "A photograph, cut and resized at random: number {}."
QUALITY = 90
"""Of the JPEG files."""


def photographs() -> list[np.ndarray]:
    """scikit-learn's two photographs, uint8 [427, 640, 3] each."""
    return list(map(bundled.photo, bundled.PHOTOS))


def picture(rng: np.random.Generator, sources: list[np.ndarray], size: tuple[int, int]) -> PIL.Image.Image:
    """A random part of a random photograph, three fifths or more of each side, as (width, height)."""
    source = PIL.Image.fromarray(sources[rng.integers(len(sources))])
    part = [round(side * rng.uniform(0.6, 1.0)) for side in source.size]
    left, top = (int(rng.integers(whole - side + 1)) for whole, side in zip(source.size, part))
    box = (left, top, left + part[0], top + part[1])
    return source.resize(size, PIL.Image.Resampling.BICUBIC, box=box)


def write_images(folder: Path, count: int, sides: tuple[int, int], *, records: int | None = None) -> Path:
    """JPEG files whose sides are between two numbers, and records that ask about one each.

    Returns:
      The path of the JSON Lines; ``records`` of them, one for each file if None.
    """
    rng, sources = np.random.default_rng(0), photographs()
    folder.mkdir()
    for number in range(count):
        width, height = (int(side) for side in rng.integers(sides[0], sides[1] + 1, 2))
        picture(rng, sources, (width, height)).save(folder / f"{number}.jpg", quality=QUALITY)
    lines = [_line(number, {"image": f"{number % count}.jpg"}) for number in range(records or count)]
    return _written(folder, lines)


def _line(number: int, medium: dict[str, str]) -> str:
    (kind,) = medium
    turns = [
        {"from": "human", "value": f"<{kind}>\n{QUESTION}"},
        {"from": "gpt", "value": ANSWER.format(number)},
    ]
    return json.dumps({"id": str(number), **medium, "conversations": turns})


def _written(folder: Path, lines: list[str]) -> Path:
    path = folder / "all.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_videos(folder: Path, count: int, frames: int, size: tuple[int, int]) -> Path:
    """MP4 files in H.264 of 25 frames per second in which a photograph moves, and a record for each."""
    import av

    rng, sources = np.random.default_rng(1), photographs()
    folder.mkdir()
    width, height = size
    for number in range(count):
        scene = np.asarray(picture(rng, sources, (width + frames, height + frames)))
        with av.open(str(folder / f"{number}.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate=25, options={"g": "48", "preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for at in range(frames):
                pixels = np.ascontiguousarray(scene[at : at + height, at : at + width])
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            file.mux(stream.encode())
    return _written(folder, [_line(number, {"video": f"{number}.mp4"}) for number in range(count)])


def opened(
    path: Path,
    *,
    image_size: int = 384,
    batch_size: int = 8,
    pack: bool = True,
    max_frames: int | None = None,
) -> TrainingCorpus:
    """A corpus as a run of the square family would train on it; its tokens are bytes.

    Images are resized to ``image_size`` and cut into patches of 16, regions of 6 x 6, and 4 context tokens.
    """
    tower = VisionConfig(image_size=image_size, patch_size=16, width=24, depth=2, num_heads=3, mlp_dim=40)
    model = dataclasses.replace(
        DUMMY,
        decoder=dataclasses.replace(DUMMY.decoder, vocab_size=300),
        vision=tower,
        gaze=GazeConfig((6, 6), context_tokens=4, top_k=2),
    )
    config = CorpusConfig(str(path), pack=pack, max_frames=max_frames)
    start = Start("benchmark", model, byte_tokenizer(), CHATML, lambda mesh: {}, lambda out: None)
    run = Experiment(model, config, init_from="benchmark", batch_size=batch_size, seed=0, steps=1)
    return open_training_corpus(run, start)
