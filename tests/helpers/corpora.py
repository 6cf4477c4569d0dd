"""Small corpora: JSON Lines beside a folder of generated pictures, and a tokenizer for any text."""

import dataclasses
import html.parser
import json
import os
import time

import numpy as np
from PIL import Image as Pillow

from gaze_jax.chat.template import CHATML
from gaze_jax.core.layout import VisualLayout
from gaze_jax.corpora.config import CorpusConfig
from gaze_jax.corpora.conversations import Conversations
from gaze_jax.corpora.records import Corpus, Medium
from gaze_jax.corpora.stand_in import byte_tokenizer
from tests.helpers.views import tiny_onevision

SQUARE = VisualLayout(24, 4, region=(3, 2), context_tokens=2)
"""6 x 6 tokens, 2 x 3 regions, 2 context tokens."""
LAYOUTS = {"square": SQUARE, "llava_onevision": tiny_onevision(9)}


def conversations(layout: VisualLayout = SQUARE, config: CorpusConfig | None = None) -> Conversations:
    """For a model of this layout, with the bytes as tokens."""
    return Conversations.of(config or CorpusConfig(path="x"), layout, byte_tokenizer(), CHATML)


def turns(*texts: str) -> list[dict[str, str]]:
    """Question, answer, question, answer ..."""
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def write_picture(path, height: int = 20, width: int = 30, number: int = 0) -> None:
    """Noise of this size, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(256, size=(height, width, 3), dtype=np.uint8)
    Pillow.fromarray(pixels).save(path)


def write_lines(folder, records: list[dict]) -> str:
    """The path of a JSON Lines file of these records."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "all.jsonl").write_text(text, encoding="utf-8")
    return str(folder / "all.jsonl")


def write_corpus(folder, count: int) -> str:
    """The path of ``count`` records, each of a picture of another size."""
    for number in range(count):
        write_picture(folder / f"{number}.png", 20 + number, 30, number)
    return write_lines(folder, [captioned(f"{number}.png", f"n{number}") for number in range(count)])


def captioned(image: str, identity: str, answer: str = "Noise.") -> dict:
    """A record of an image with one question."""
    return {"id": identity, "image": image, "conversations": turns("<image>\nWhat is this?", answer)}


@dataclasses.dataclass(frozen=True)
class _Fatal(Medium):
    """An image at whose decoding its process hangs or dies."""

    hang: bool = False

    def check(self) -> None:
        if self.hang:
            time.sleep(600)
        os._exit(9)


@dataclasses.dataclass(frozen=True)
class Fatal:
    """A corpus in which the images of some records hang or end the process that decodes them.

    Those of ``lost`` do so when they are read.
    """

    corpus: Corpus
    hang: tuple[int, ...] = ()
    die: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, index: int):
        if index in self.lost:
            os._exit(9)
        record = self.corpus[index]
        if index not in self.hang + self.die:
            return record
        fatal = tuple(_Fatal(one.name, one.path, hang=index in self.hang) for one in record.images)
        return dataclasses.replace(record, images=fatal)

    def fingerprint(self) -> dict[str, object]:
        return self.corpus.fingerprint()


def write_animation(path, frames: int = 4, height: int = 20, width: int = 30) -> None:
    """A GIF, which needs no FFmpeg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(frames)
    first, *rest = (
        Pillow.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8)) for _ in range(frames)
    )
    first.save(path, save_all=True, append_images=rest, duration=100)


class _Elements(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[list[str]] = []

    def handle_starttag(self, tag, attributes):
        text: list[str] = []
        self.found.append((tag, {name: value or "" for name, value in attributes}, text))
        if tag not in ("meta", "link", "input", "img", "image", "path", "line"):
            self.open.append(text)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, {name: value or "" for name, value in attributes}, []))

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        for text in self.open:
            text.append(data)


def elements(page: str) -> list[tuple[str, dict[str, str], str]]:
    """Every element of a page: its tag, attributes and text, in the order of their beginnings."""
    parser = _Elements()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return [(tag, attributes, "".join(text)) for tag, attributes, text in parser.found]


def assert_inert(page: str) -> None:
    """Nothing in the page can run or fetch: no script, no handler, no address but its own."""
    for tag, attributes, _ in elements(page):
        assert tag not in ("script", "img", "iframe", "object", "form", "base"), tag
        assert not any(name.startswith("on") or name == "style" for name in attributes), attributes
        for name in ("href", "src"):
            assert attributes.get(name, "#").startswith(("#", "data:,", "data:image/jpeg;base64,"))
    (policy,) = [a["content"] for _, a, _ in elements(page) if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
