"""A sample as the model gets it, read off the arrays of training: its sequence, its pictures with regions.

Nothing is rendered or tokenised a second time, so what is shown cannot differ from what is trained on.
"""

import dataclasses
import io
from collections.abc import Iterator, Sequence

import numpy as np
import PIL.Image

from gaze_jax.core.layout import VisualLayout
from gaze_jax.core.streams import NEWLINE, Kind
from gaze_jax.corpora.conversations import Conversations
from gaze_jax.corpora.measure import read
from gaze_jax.corpora.records import Corpus, Record, failing
from gaze_jax.data.lengths import Lengths
from gaze_jax.data.pixels import size_of
from gaze_jax.data.placement import Arrays, PlacedView
from gaze_jax.data.processor import Processor, process_with_views
from gaze_jax.data.sample import Frames, Image, Sample
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError
from gaze_jax.media.video import Clip

VISUAL = "visual"
_REPLACEMENT = "\ufffd"
_MOST_BYTES = 8
"""Tokens that may make up one character."""
_MOST_SIDE = 1152
"""Pixels of the longer side of a stored picture; the tower may read more."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A token of the text stream, or a run of visual tokens of one view, in the order of the sequence.

    Attributes:
      kind: "text", "newline", "context" or "visual".
      text: of a text token; "" for one that completes the character of the token before it.
      count: number of tokens.
      view: the view that it is of, -1 for none.
      learnt: the token is a target of training.
      special: a text token that is a special token of the tokenizer.
      token: the token's id; of a context token, its number.
    """

    kind: str
    text: str = ""
    count: int = 1
    view: int = -1
    learnt: bool = False
    special: bool = False
    token: int = -1


@dataclasses.dataclass(frozen=True)
class Area:
    """A region in a picture: its number, its rectangle in pixels, and its rows and columns of tokens."""

    region: int
    x: float
    y: float
    width: float
    height: float
    rows: int
    columns: int


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A view as the tower reads it.

    Attributes:
      title: such as "image 1, view 2 of 2".
      medium: name of the image or video.
      size: (height, width) of the image or frame in the corpus.
      pixels: uint8 [height, width, 3], the tower's input; tiles are joined.
      tiles: (rows, columns) of tiles.
      grid: (rows, columns) of tokens.
      areas: its regions.
      newlines: newline tokens that are in its regions.
    """

    title: str
    medium: str
    size: tuple[int, int]
    pixels: np.ndarray
    tiles: tuple[int, int]
    grid: tuple[int, int]
    areas: tuple[Area, ...]
    newlines: int

    def jpeg(self) -> bytes:
        """The pixels, made smaller if there are many."""
        image = PIL.Image.fromarray(self.pixels)
        image.thumbnail((_MOST_SIDE, _MOST_SIDE))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=88)
        return file.getvalue()


@dataclasses.dataclass(frozen=True, eq=False)
class ShownSample:
    """A sample of a corpus.

    Attributes:
      index: of its record.
      name, id: of its record.
      lengths: what it needs in a row.
      targets: tokens to learn.
      left_out: turns that truncation left out.
      pieces: the sequence.
      pictures: its views, by number.
    """

    index: int
    name: str
    id: str
    lengths: Lengths
    targets: int
    left_out: int
    pieces: tuple[Piece, ...]
    pictures: tuple[Picture, ...]


def shown_sample(corpus: Corpus, conversations: Conversations, index: int) -> ShownSample:
    """The sample of a record.

    Raises:
      RecordError: the record cannot become a sample.
      UserError: there is no such record.
    """
    if not 0 <= index < len(corpus):
        raise UserError(f"There is no record {index}; the corpus has {len(corpus)}, numbered from 0.")
    record = read(corpus, index)
    measured = conversations.measure(record)
    sample = conversations.sample(record, index)
    with failing("medium", record.name):  # frames of a video are decoded here
        arrays, views = process_with_views(conversations.processor, sample)
    lengths = Lengths(
        text=len(arrays["tokens"]),
        regions=len(arrays["region_segment"]),
        images=len(arrays["images"]),
        slots=arrays["visual_src"].shape[1] if views else 0,
        visual=int((arrays["visual_src"] >= 0).sum()),
    )
    return ShownSample(
        index,
        record.name,
        record.id,
        lengths,
        int((arrays["targets"] >= 0).sum()),
        measured.left_out,
        tuple(_pieces(conversations.tokenizer, arrays)),
        tuple(_pictures(conversations.processor, record, sample, arrays, views)),
    )


def _pieces(tokenizer: Tokenizer, arrays: Arrays) -> Iterator[Piece]:
    """Both streams merged by order."""
    present = arrays["visual_src"] >= 0
    visual = dict(zip(arrays["visual_order"][present].tolist(), arrays["visual_view"][present].tolist()))
    text = {order: at for at, order in enumerate(arrays["text_order"].tolist())}
    learnt = _learnt(arrays, text)
    texts = _texts(tokenizer, arrays)
    run = 0
    for order in range(len(visual) + len(text)):
        if order in visual:
            run += 1
            if visual.get(order + 1) != visual[order]:
                yield Piece(VISUAL, count=run, view=visual[order])
                run = 0
            continue
        at = text[order]
        token, view = int(arrays["tokens"][at]), int(arrays["text_view"][at])
        kind = Kind(int(arrays["kind"][at]))
        special = kind is Kind.TEXT and bool(texts[at]) and not tokenizer.decode([token], skip_special=True)
        yield Piece(kind.name.lower(), texts[at], 1, view, order in learnt, special, token)


def _learnt(arrays: Arrays, text: dict[int, int]) -> set[int]:
    """Orders of the tokens that are targets; each is that of the token before it."""
    found = set()
    for at in np.flatnonzero(arrays["targets"] >= 0):
        order = int(arrays["text_order"][at]) + 1
        if order not in text or arrays["tokens"][text[order]] != arrays["targets"][at]:
            raise ValueError(f"The target at order {order - 1} is not the token after it.")
        found.add(order)
    return found


def _texts(tokenizer: Tokenizer, arrays: Arrays) -> list[str]:
    """The text of every token of the text stream; "" for newlines and context tokens."""
    texts = [""] * len(arrays["tokens"])
    places = np.flatnonzero(arrays["kind"] == Kind.TEXT)
    breaks = np.flatnonzero(np.diff(arrays["text_order"][places]) != 1) + 1
    for run in np.split(places, breaks):
        for at, text in zip(run, token_texts(tokenizer, arrays["tokens"][run].tolist())):
            texts[at] = text
    return texts


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token; of tokens that are parts of one character, the first has it, the others ""."""
    texts: list[str] = []
    while (at := len(texts)) < len(ids):
        # Some decoders drop a space at the beginning, so that a token is decoded behind its neighbour.
        first = max(0, at - 1)
        before = len(tokenizer.decode(ids[first:at]))
        stops = range(at + 1, min(at + _MOST_BYTES, len(ids)) + 1)
        decoded = ((stop, tokenizer.decode(ids[first:stop])[before:]) for stop in stops)
        # Bytes that complete no character are shown alone, as what stands for them.
        stop, text = next(
            ((stop, text) for stop, text in decoded if _REPLACEMENT not in text), (at + 1, _REPLACEMENT)
        )
        texts += [text] + [""] * (stop - at - 1)
    return texts


def _pictures(
    processor: Processor, record: Record, sample: Sample, arrays: Arrays, views: Sequence[PlacedView]
) -> Iterator[Picture]:
    """The views with their pixels and regions."""
    layout, style = processor.layout, processor.views
    alone = sum(isinstance(part, Image) for part in sample.parts) == 1
    side, image = layout.image_size, 0
    for number, placed in enumerate(views):
        if placed.video:
            size = _frame_size(sample.videos[placed.index])
            grids = [style.frame_grid(layout, size)]
            count, media = len(sample.videos[placed.index]), record.videos
        else:
            size = size_of(sample.images[placed.index])
            grids = style.image_grids(layout, size, alone)[0]
            count, media = len(grids), record.images
        # The views of an image follow each other, so this one's number among them is how many precede it.
        which = (
            placed.frame if placed.video else sum(_same(placed, other) for other in views[:number]) % count
        )
        rows, columns = (length // side for length in grids[0 if placed.video else which].canvas)
        tiles = arrays["images"][image : image + rows * columns]
        kind, part = ("video", "frame") if placed.video else ("image", "view")
        grid, newlines = _centres(layout, arrays, placed, image, columns)
        yield Picture(
            f"{kind} {placed.index + 1}, {part} {which + 1} of {count}",
            media[placed.index].name,
            (int(size[0]), int(size[1])),
            tiles.reshape(rows, columns, side, side, 3)
            .swapaxes(1, 2)
            .reshape(rows * side, columns * side, 3),
            (rows, columns),
            (placed.regions.shape[0], placed.regions.shape[1]),
            tuple(_areas(placed.regions, *grid)),
            newlines,
        )
        image += rows * columns
    if image != len(arrays["images"]):
        raise ValueError(f"The views have {image} images and the arrays {len(arrays['images'])}.")


def _same(one: PlacedView, other: PlacedView) -> bool:
    return (one.video, one.index) == (other.video, other.index)


def _frame_size(frames: Frames) -> tuple[int, int]:
    """(height, width) of a video's frames."""
    if isinstance(frames, Clip):
        return frames.size
    assert isinstance(frames, np.ndarray), "a medium is a clip, or decoded"
    return frames.shape[1], frames.shape[2]


def _centres(
    layout: VisualLayout, arrays: Arrays, placed: PlacedView, image: int, columns: int
) -> tuple[tuple[np.ndarray, np.ndarray], int]:
    """Edges of a view's rows [h + 1] and columns [w + 1] of tokens, in pixels, and its routed newlines.

    ``image`` is the first of its images, ``columns`` how many of them stand side by side.
    """
    of_view = (arrays["visual_view"] == placed.view) & (arrays["visual_src"] >= 0)
    order = np.argsort(arrays["visual_order"][of_view])
    height, width = placed.regions.shape
    newlines = 0
    if "pool_indices" in arrays:
        indices, weights = (arrays[name][of_view][order] for name in ("pool_indices", "pool_weights"))
        shown = indices[:, 0] != NEWLINE
        newlines = int((~shown).sum())
        indices, weights = indices[shown] - image * layout.tokens, weights[shown]
    else:
        indices, weights = np.arange(layout.tokens)[:, None], np.ones((layout.tokens, 1))
    tile, within = np.divmod(np.where(weights > 0, indices, 0), layout.tokens)
    row, column = np.divmod(within, layout.grid)

    def pixels(tiles: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        at = tiles * layout.image_size + (tokens + 0.5) * layout.patch_size
        return (at * weights).sum(-1).reshape(height, width)

    rows, across = tile // columns, tile % columns
    y, x = pixels(rows, row)[:, 0], pixels(across, column)[0]
    return (_edges(y, layout.patch_size), _edges(x, layout.patch_size)), newlines


def _edges(centres: np.ndarray, patch: int) -> np.ndarray:
    """Edges [n + 1] of cells with these centres, which need not be equally far from each other."""
    between = (centres[1:] + centres[:-1]) / 2
    first, last = (centres[1] - centres[0], centres[-1] - centres[-2]) if len(centres) > 1 else (patch, patch)
    return np.concatenate([[max(0.0, centres[0] - first / 2)], between, [centres[-1] + last / 2]])


def _areas(regions: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> Iterator[Area]:
    """The rectangle of each region of a view; ``rows`` and ``columns`` are the edges of its tokens."""
    for region in np.unique(regions):
        y, x = np.nonzero(regions == region)
        (y0, y1), (x0, x1) = (y.min(), y.max() + 1), (x.min(), x.max() + 1)
        if len(y) != (y1 - y0) * (x1 - x0):
            raise ValueError(f"Region {region} is no rectangle.")
        top, left = float(rows[y0]), float(columns[x0])
        width, height = float(columns[x1]) - left, float(rows[y1]) - top
        yield Area(int(region), left, top, width, height, int(y1 - y0), int(x1 - x0))
