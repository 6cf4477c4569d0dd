"""Small corpora: JSON Lines beside a folder of generated pictures, and a tokenizer for any text."""

import dataclasses
import html.parser
import io
import json
import os
import struct
import time
import zlib

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


UPRIGHT = np.stack(
    [np.add.outer(np.arange(64) * 2, np.arange(96)), *np.indices((64, 96)) * 2], axis=-1
).astype(np.uint8)
"""A smooth picture, which JPEG changes little."""
NOISE = np.random.default_rng(0).integers(256, size=(12, 48, 64, 3), dtype=np.uint8)


@dataclasses.dataclass(frozen=True)
class Case:
    """A record of the corpus.

    Attributes:
      fields: the record without its id, which is the case's name.
      files: its media, by the names that it gives.
      when, cause, message: "measured", "decoded" or "checked", why, and a part of what is told; "" if good.
      line: instead of ``fields``.
    """

    fields: dict
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    when: str = ""
    cause: str = ""
    message: str = ""
    line: bytes | None = None


def encoded(kind, image=UPRIGHT, **options):
    file = io.BytesIO()
    image = Pillow.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **options)
    return file.getvalue()


def large_png(width, height):
    """A whole PNG of so many black pixels, a bit each."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(9), bytes(1 + width // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def damaged(data, at=0.5, size=200, value=0):
    """The data with some bytes in their middle replaced."""
    first = int(len(data) * at)
    return data[:first] + bytes([value]) * size + data[first + size :]


def shown(kind, *files, tags=None):
    tags = f"<{kind}>" * len(files) if tags is None else tags
    listed = files[0] if len(files) == 1 else list(files)
    return {kind: listed, "conversations": turns(f"{tags}\nWhat is this?", "?")}


def medium(kind, file, data, *fault):
    return Case(shown(kind, file), {file: data}, *fault)


def image(file, data, *fault):
    return medium("image", file, data, *fault)


def video(file, data, *fault):
    return medium("video", file, data, *fault)


def plain(*fault, texts=("Why?", "?"), **fields):
    return Case({"conversations": turns(*texts), **fields}, {}, *fault)


def good_cases(film):
    turned, palette = Pillow.Exif(), Pillow.fromarray(UPRIGHT).quantize(256)
    turned[0x112] = 6
    return {
        "first": image("first.jpg", encoded("JPEG")),
        "progressive": image("progressive.jpg", encoded("JPEG", progressive=True)),
        "several": Case(
            shown("image", "a.png", "b.webp"), {"a.png": encoded("PNG"), "b.webp": encoded("WEBP")}
        ),
        "named as another": image("png.jpg", encoded("PNG")),
        "gif": image("picture.gif", encoded("GIF")),
        "cmyk": image("cmyk.jpg", encoded("JPEG", Pillow.fromarray(UPRIGHT).convert("CMYK"))),
        "16 bits": image("deep.png", encoded("PNG", UPRIGHT[..., 0].astype(np.uint16) * 257)),
        "palette": image("palette.png", encoded("PNG", palette, transparency=palette.getpixel((0, 0)))),
        "turned": image("turned.jpg", encoded("JPEG", np.rot90(UPRIGHT), exif=turned)),
        "mp4": video("film.mp4", film["mp4"]),
        "mkv": video("film.mkv", film["mkv"]),
        "animation": video("walk.gif", film["gif"]),
    }


UNSEEN = ("altered jpeg", "ended jpeg", "altered webm")
"""Media whose pixels are not what they were: they decode, so nothing finds them."""


def unseen_cases(film):
    jpeg = encoded("JPEG", NOISE[0])
    data = (damaged(jpeg), jpeg[: len(jpeg) // 2] + b"\xff\xd9", damaged(film["webm"], value=255))
    files = zip(
        UNSEEN, ("image", "image", "video"), ("altered.jpg", "ended.jpg", "altered.webm"), data, strict=True
    )
    return {name: medium(kind, file, content) for name, kind, file, content in files}


def media_faults(film):
    """Files that are refused wherever their bytes are."""
    jpeg, png = encoded("JPEG"), encoded("PNG")
    no_format = ("measured", "medium", "is none of JPEG, PNG, WEBP, GIF, BMP")
    no_video = ("measured", "medium", "is none of MP4, MOV, MKV, WEBM, AVI, GIF, WEBP")
    cut = ("measured", "medium", "is cut short")
    pixels = ("decoded", "medium", "image file is truncated")
    checksum = ("decoded", "medium", "a checksum of its pixels is wrong")
    broken = ("decoded", "medium", "broken data stream")
    large = large_png(20000, 20000)
    assert len(large) < 1 << 20
    return {
        "cut jpeg": image("cut.jpg", jpeg[: len(jpeg) * 2 // 3], *pixels),
        "cut progressive": image("cut_p.jpg", encoded("JPEG", progressive=True)[:-30], *pixels),
        "cut png": image("cut.png", png[: len(png) // 2], *pixels),
        "cut gif": image("cut.gif", (gif := encoded("GIF"))[: len(gif) // 2], *pixels),
        "cut bmp": image("cut.bmp", encoded("BMP")[:-500], *pixels),
        "altered png": image("altered.png", png[:-13] + bytes([png[-13] ^ 1]) + png[-12:], *checksum),
        "unreadable png": image("broken.png", damaged(png, 0.5, 40, 255), *broken),
        "huge": image("huge.png", large, "measured", "medium", "more pixels than the limit"),
        "cut in its head": image("head.jpg", jpeg[:200], "measured", "medium", "Truncated File Read"),
        "empty": image("empty.png", b"", "measured", "medium", "is empty (0 bytes)"),
        "text as picture": image("text.jpg", b"404: there is no picture.\n", *no_format),
        "video as picture": image("mp4.jpg", film["mp4"], "measured", "medium", "is a video"),
        "picture as video": video("jpeg.mp4", jpeg, "measured", "medium", "is an image"),
        "one frame": video("one.webp", encoded("WEBP", save_all=True), "measured", "medium", "is an image"
        ),
        "empty video": video("empty.mp4", b"", "measured", "medium", "is empty (0 bytes)"),
        "text as video": video("text.mp4", b"404: there is no video.\n", *no_video),
        "cut stream": video("cut.ts", film["ts"][: 188 * 9 + 77], *no_video),
        "stream": video("film.ts", film["ts"], *no_video),
        "cut mp4": video("cut.mp4", film["mp4"][: len(film["mp4"]) * 2 // 3], *cut),
        "cut mkv": video("cut.mkv", film["mkv"][: len(film["mkv"]) * 2 // 3], *cut),
        "cut animation": video("cut_a.gif", film["gif"][: len(film["gif"]) * 2 // 3], *cut),
        "altered mp4": video("altered.mp4", damaged(film["mp4"]), "decoded", "medium", "decoding ends after"),
        "sound": video("sound.mp4", film["sound"], "measured", "medium", "has no video stream"),
        "after its end": Case(
            shown("video", "late.mp4") | {"start": 100}, {"late.mp4": film["mp4"]},
            "measured", "medium", "is after its end",
        ),
    }  # fmt: skip


def record_faults():
    """What is wrong with a record of JSON Lines, or with the names that it gives."""

    def of_record(message, **fields):
        return plain("measured", "record", message, **fields)

    def line(data, message):
        return Case({}, {}, "measured", "record", message, data)

    address = "media are files below the media root, not addresses"
    tags = "write one tag for each, or none at all"
    answer = ("measured", "conversation")
    missing = ("measured", "missing", "which is not in")
    return {
        "gone": plain(*missing, image="gone.png"),
        "dead link": plain(*missing, image="dead.png"),
        "folder": plain("measured", "medium", "is not a file", image="folder.png"),
        "tag without image": of_record(tags, texts=("<image>Why?", "?")),
        "image without tag": of_record(tags, image=["first.jpg"] * 2, texts=("<image>Why?", "?")),
        "tag in an answer": of_record("has a tag in an answer", image="first.jpg", texts=("Why?", "<image>")),
        "up": of_record("is not below the media root", image="../outside.png"),
        "absolute": of_record("give a path relative to the media root", image="/etc/passwd"),
        "address": of_record(address, image="https://example.org/a.png"),
        "bucket": of_record(address, image="gs://bucket/a.png"),
        "command": of_record(address, image="pipe:cat /etc/passwd"),
        "no turns": Case({}, {}, "measured", "record", "has no list of turns"),
        "answer first": Case(
            {"conversations": [{"from": "gpt", "value": "So."}]}, {},
            "measured", "record", "does not begin with a turn of the user",
        ),
        "no text": of_record("is not understood", texts=(None,)),
        "no answer": plain(*answer, "has no answer to learn from", texts=("Why?",)),
        "empty answer": plain(*answer, "is empty; leave its turn out", texts=("Why?", " ")),
        "half a character": plain(*answer, "cannot be tokenised", texts=("\ud800", "?")),
        "cut line": line(b'{"conversations": [{"from": "human", "val', "is not valid JSON"),
        "key twice": line(b'{"id": 1, "id": 2}', "is not valid JSON"),
        "deep": line(b'{"id": ' + b"[" * 100_000, "is not valid JSON"),
        "list": line(b"[1]", "must be a JSON object"),
        "cut character": line(b'{"conversations": "caf\xc3"}', "is not UTF-8 text"),
    }  # fmt: skip


def odd_records():
    """What looks wrong and is good."""
    return {
        "link out": plain(image="link.png"),
        "no tag": plain(image="first.jpg"),
        "none": plain(image="none"),
        "a missing cell": plain(image=float("nan")),
        "a question without words": plain(texts=("", "?")),
        "text": plain(),
    }


def numbered(cases):
    """The records in order, each with an answer of its own, and the cases' names."""
    records = []
    for number, (name, case) in enumerate(cases.items()):
        fields = json.loads(json.dumps(case.fields))
        for turn in fields.get("conversations", ()):
            if turn["value"] == "?":
                turn["value"] = f"It is number {number}."
        records.append({"id": name} | fields)
    return records
