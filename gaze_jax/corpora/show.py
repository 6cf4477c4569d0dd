"""Show one sample of a corpus as the model gets it: a page in one file, and lines for a terminal."""

import itertools
import operator
import os

from gaze_jax.corpora.check import plain
from gaze_jax.corpora.conversations import Conversations
from gaze_jax.corpora.pages import data_url, filled_page
from gaze_jax.corpora.records import Corpus
from gaze_jax.corpora.shown import VISUAL, Picture, Piece, ShownSample, shown_sample
from gaze_jax.writing import write_text

_FRAME = ", frame "
"""Parts the title of a video's frame."""
_MOST_CHARACTERS = 4000
"""Characters of the sequence on a terminal."""


def show_sample(
    corpus: Corpus, conversations: Conversations, index: int, path: str | os.PathLike[str]
) -> ShownSample:
    """Write a page of the sample of a record; returns the sample, for :func:`sample_lines`.

    Raises:
      RecordError: the record cannot become a sample.
      UserError: there is no such record, or the page cannot be written.
    """
    sample = shown_sample(corpus, conversations, index)
    write_text(path, sample_page(sample))
    return sample


def sample_page(sample: ShownSample) -> str:
    """A page in one file: lengths, the sequence with its targets marked, the pictures with their regions."""
    lengths = sample.lengths
    numbers = [
        ("tokens", lengths.tokens),
        ("text stream", lengths.text),
        ("visual", lengths.visual),
        ("regions", lengths.regions),
        ("images for the tower", lengths.images),
        ("to learn", sample.targets),
    ]
    if sample.left_out:
        numbers.append(("turns left out", sample.left_out))
    firsts: set[int] = set()
    return filled_page(
        "show",
        name=plain(sample.name),
        id=plain(sample.id),
        index=sample.index,
        numbers=[(name, f"{number:,}") for name, number in numbers],
        pieces=[_fields(piece, sample, firsts) for piece in sample.pieces],
        pictures=[_picture_fields(number, one) for number, one in enumerate(sample.pictures)],
    )


def _fields(piece: Piece, sample: ShownSample, firsts: set[int]) -> dict[str, object]:
    """What the page needs of a piece; ``firsts`` are the views that were shown before, to which it adds."""
    where = sample.pictures[piece.view].title if piece.view >= 0 else "the end of a medium"
    text, title = _visible(piece.text), f"token {piece.token}"
    if piece.kind == VISUAL:
        title = f"{_count(piece.count, 'visual token')} of {where}"
        text = str(piece.count) if piece.view in firsts else f"{where}: {piece.count}"
        firsts.add(piece.view)
    elif piece.kind == "newline":
        text, title = "↲", f"newline of {where}"
    elif piece.kind == "context":
        text, title = f"c{piece.token + 1}", f"context token {piece.token + 1} of {where}"
    elif not text:
        text, title = "·", f"token {piece.token}, a part of the character before it"
    return {
        "kind": piece.kind,
        "text": text,
        "title": title,
        "view": piece.view,
        "learnt": piece.learnt,
        "special": piece.special,
    }


def _visible(text: str) -> str:
    """Text in which line ends are seen, and what does not print is escaped."""
    return "\n".join(map(plain, text.split("\n"))).replace("\n", "↵\n")


def _picture_fields(number: int, picture: Picture) -> dict[str, object]:
    """What the page needs of a picture; coordinates are pixels of the tower's input."""
    height, width = picture.pixels.shape[:2]
    areas = picture.areas
    left, top = min(area.x for area in areas), min(area.y for area in areas)
    right = max(area.x + area.width for area in areas)
    bottom = max(area.y + area.height for area in areas)
    return {
        "number": number,
        "title": picture.title[0].upper() + picture.title[1:],
        "medium": plain(picture.medium),
        "about": _about(picture),
        "url": data_url(picture.jpeg(), "jpeg"),
        "width": width,
        "height": height,
        # Everything but what the tokens show: two rectangles, of which the inner one is a hole.
        "unread": f"M0 0H{width}V{height}H0ZM{left:.2f} {top:.2f}V{bottom:.2f}H{right:.2f}V{top:.2f}Z",
        "frame": _FRAME in picture.title,
        "small": width < 300,
        "areas": [
            {
                "region": area.region,
                "x": round(area.x, 2),
                "y": round(area.y, 2),
                "width": round(area.width, 2),
                "height": round(area.height, 2),
                "title": f"region {area.region}: {area.columns}×{area.rows} tokens",
            }
            for area in areas
        ],
    }


def _about(picture: Picture) -> str:
    """Sizes of a picture, width before height, in a line."""
    height, width = picture.size
    parts = [f"{width}×{height} pixels as stored", f"{picture.grid[1]}×{picture.grid[0]} tokens"]
    parts.append(_count(len(picture.areas), "region"))
    if picture.tiles != (1, 1):
        parts.insert(1, f"{picture.tiles[1]}×{picture.tiles[0]} tiles")
    if picture.newlines:
        parts.append(f"{_count(picture.newlines, 'newline')} in its regions")
    return ", ".join(parts)


def sample_lines(sample: ShownSample) -> list[str]:
    """The sample for a terminal: lengths, media, and the sequence with what is to learn between « and »."""
    lengths = sample.lengths
    identity = f" (id {plain(sample.id)!r})" if sample.id else ""
    lines = [
        f"{plain(sample.name)}{identity}",
        f"{lengths.tokens} tokens: {lengths.text} in the text stream, {lengths.visual} visual in "
        f"{_count(lengths.regions, 'region')} of {_count(lengths.images, 'image')}; "
        f"{sample.targets} to learn",
    ]
    if sample.left_out:
        lines.append(f"{_count(sample.left_out, 'turn')} left out, since it is too long")
    for label, group in itertools.groupby(sample.pictures, _label):
        first, *others = group
        frames = f", {_count(len(others) + 1, 'frame')}" if label != first.title else ""
        lines.append(f"{label}{frames} ({plain(first.medium)}): {_about(first)}{' each' if frames else ''}")
    sequence = "".join(
        f"«{text}»" if learnt else text
        for learnt, group in itertools.groupby(sample.pieces, lambda piece: piece.learnt)
        if (text := _as_text(list(group), sample))
    )
    if len(sequence) > _MOST_CHARACTERS:
        sequence = f"{sequence[:_MOST_CHARACTERS]} ... ({len(sequence)} characters in all)"
    return [*lines, "", *map(plain, sequence.split("\n"))]


def _label(picture: Picture) -> str:
    """The title, of a frame that of its video."""
    return picture.title.partition(_FRAME)[0]


def _as_text(pieces: list[Piece], sample: ShownSample) -> str:
    """Pieces as text, with an image's view or a video, its newlines and its context tokens as one mark."""
    text = ""
    for is_text, run_of in itertools.groupby(pieces, lambda piece: piece.kind == "text"):
        group = list(run_of)
        if is_text:
            text += "".join(piece.text for piece in group)
            continue
        labels = [_label(sample.pictures[piece.view]) if piece.view >= 0 else "newline" for piece in group]
        for label, run in itertools.groupby(zip(labels, group), operator.itemgetter(0)):
            text += f"[{label}: {_count(sum(piece.count for _, piece in run), 'token')}]"
    return text


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
