"""Samples to arrays: tokenisation, region-major placement, targets.

The sequence of a sample is its parts in order. A text adds its tokens to the text stream. An image adds the
visual tokens of each of its views (``data.views``) in raster order, with a newline after each row if the
model uses them, then C context tokens in the text stream; a video does the same for each frame. ``order``
and ``positions`` count the tokens of both streams. With a 2x2 grid, regions of 1x2, C = 1 and a sample
Image, Text("Q\\n"), supervised Text("7<|im_end|>")::

    visual   region    0        0     1     1
             order     0        1     2     3
    text     order     4        5     6     7     8
             token     context  Q     \\n    7     end
             target    -100     -100  7     end   -100

The fields are those of ``core.streams.Streams``, without the batch axis.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from gaze_jax.core.layout import VisualLayout
from gaze_jax.core.streams import EMPTY, IGNORE, Kind
from gaze_jax.data.padding import PADDING
from gaze_jax.data.pixels import normalise, size_of
from gaze_jax.data.placement import Arrays, Cursor, PlacedView, Placement, join, place_views
from gaze_jax.data.sample import Image, Sample, Text, Video
from gaze_jax.data.tokenizer import END, Tokenizer
from gaze_jax.data.views import MediaViews, View, ViewStyle, check_style, image_views, video_views
from gaze_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Processor:
    """Turns a :class:`Sample` into arrays; ``processor(sample)`` is :func:`process`.

    Attributes:
      layout: the model's visual layout.
      tokenizer: the language model's tokenizer.
      families: names of question families; a family's id is its index.
      views: how the model's family makes views; its name must be ``layout.views.style``.
      resize: for views with ``tower_tokens``: resize images to the tower's square with bicubic filtering, as
        SigLIP does, and scale boxes with them. Otherwise an image of another size is an error.
      supervise: text of tokens that are targets wherever they occur, supervised or not
        (``Supervision.tokens``), except if no text-stream token directly precedes them: at the start, and
        after an image without context tokens.
      float_images: images become float32 in [-1, 1]. Otherwise they stay uint8, a quarter of the bytes, and
        the model normalises them on the device.

    Raises:
      UserError: an entry of ``supervise`` is not a single token, or ``layout.views`` sets a field that its
        style would ignore.
      ValueError: ``views`` and ``layout.views`` differ in style.
    """

    layout: VisualLayout
    tokenizer: Tokenizer
    families: tuple[str, ...]
    views: ViewStyle
    resize: bool = False
    supervise: tuple[str, ...] = ()
    float_images: bool = True

    def __post_init__(self) -> None:
        check_style(self.views, self.layout.views)
        _token_ids(self.tokenizer, self.supervise)

    def __call__(self, sample: Sample, out: np.ndarray | None = None) -> Arrays:
        return process(self, sample, out)


@functools.lru_cache(maxsize=8)
def _token_ids(tokenizer: Tokenizer, tokens: tuple[str, ...]) -> tuple[int, ...]:
    """Ids of tokens given as text."""
    encoded = {token: tokenizer.encode(token)[0] for token in tokens}
    for token, ids in encoded.items():
        if len(ids) != 1:
            raise UserError(
                f"supervise names {token!r}, which is {len(ids)} tokens here; name single tokens."
            )
    return tuple(ids[0] for ids in encoded.values())


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Tokens of one text: ids int32 [n], boxes float32 [n, 4] and their views int32 [n] (-1: none).

    ``supervised``, bool [n] or one for all, marks tokens that must be targets; ``extra`` marks tokens that
    are targets if they have a predecessor in the text stream.
    """

    ids: np.ndarray
    boxes: np.ndarray
    views: np.ndarray
    supervised: np.ndarray | bool = False
    extra: np.ndarray | bool = False


def _views(processor: Processor, sample: Sample, part: Image | Video) -> MediaViews:
    """The views of an image or a video of the sample."""
    style, layout, size = processor.views, processor.layout, processor.layout.image_size
    if isinstance(part, Video):
        if part.stop == part.start:
            return MediaViews((), part.ends and style.video_end_newline)
        frames = itertools.islice(sample.videos[part.index], part.start, part.stop)
        views = video_views(style, layout, frames)
        return views if part.ends else dataclasses.replace(views, end_newline=False)
    image = sample.images[part.index]
    height, width = size_of(image)
    if style.tower_tokens and (height, width) != (size, size) and not processor.resize:
        raise UserError(
            f"Image {part.index} of sample {sample.id} is {height}x{width} pixels but the "
            f"tower takes {size}x{size}; resize it, or set resize=True (--resize) to squash it to that size."
        )
    return image_views(style, layout, image, alone=sum(isinstance(p, Image) for p in sample.parts) == 1)


@functools.lru_cache(maxsize=16)
def _encoded(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [n] and the characters of each, [n, 2]; most samples of a corpus begin with the same text."""
    ids, offsets = tokenizer.encode(text)
    return np.asarray(ids, np.int32), np.asarray(offsets).reshape(-1, 2)


def _tokenise(processor: Processor, sample: Sample, text: Text, views: dict[int, int]) -> _Tokens:
    """Tokenise ``text``; a token takes the box of the characters it overlaps.

    ``views`` maps an image of the sample to the view that last showed it.
    """
    ids, spans = _encoded(processor.tokenizer, text.text)
    boxes = np.full((len(ids), 4), -1, np.float32)
    box_views = np.full(len(ids), EMPTY, np.int32)
    for box in text.boxes:
        inside = (spans[:, 0] < box.end) & (spans[:, 1] > box.start)
        if (clash := inside & (box_views >= 0)).any():
            start, end = spans[int(np.argmax(clash))]
            raise ValueError(
                f"Token {text.text[start:end]!r} of sample {sample.id} overlaps two boxes; box characters "
                "that the tokenizer keeps apart."
            )
        height, width = size_of(sample.images[box.image])
        scale = np.ones(4)
        if processor.views.tower_tokens:
            scale = np.array([processor.layout.image_size / side for side in (width, height)] * 2)
        boxes[inside] = np.array(box.corners) * scale
        box_views[inside] = views[box.image]
    supervised = _supervised(text, spans)
    extra = bool(processor.supervise) and np.isin(ids, _token_ids(processor.tokenizer, processor.supervise))
    return _Tokens(ids, boxes, box_views, supervised, extra)


def count_text(processor: Processor, text: Text) -> tuple[int, int]:
    """Tokens of a text without boxes, and how many of them are targets for sure."""
    ids, offsets = processor.tokenizer.encode(text.text)
    return len(ids), int(np.count_nonzero(_supervised(text, np.asarray(offsets).reshape(-1, 2))))


def _supervised(text: Text, spans: np.ndarray) -> np.ndarray:
    """Which tokens must be targets, bool [n]; ``spans`` [n, 2] are the characters of each."""
    supervised = np.full(len(spans), text.supervised)
    # White space that the offsets leave out belongs to the next token.
    starts = np.minimum(spans[:, 0], np.concatenate([[0], spans[:, 1]])[:-1])
    for start, end in text.targets:
        supervised |= (starts < end) & (spans[:, 1] > start)
    return supervised


def _concatenate(pieces: list[np.ndarray], shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Concatenate on axis 0; ``shape`` is the result for no pieces."""
    return np.concatenate(pieces) if pieces else np.zeros(shape, dtype)


def _text_arrays(pieces: list[Arrays]) -> Arrays:
    """Text-stream fields of pieces of the sequence, each with the fields of :func:`_piece`."""

    def join(name: str, shape: tuple[int, ...] = (0,), dtype: type = np.int32) -> np.ndarray:
        return _concatenate([piece[name] for piece in pieces], shape, dtype)

    ids, order = join("ids"), join("order")
    supervised, extra = join("supervised", dtype=bool), join("extra", dtype=bool)
    boxes, box_views = join("boxes", (0, 4), np.float32), join("views")
    size = len(ids)
    targets = np.full(size, IGNORE, np.int32)
    target_box = np.full((size, 4), -1, np.float32)
    target_view = np.full(size, EMPTY, np.int32)
    # Pieces are in order, so the next text-stream token is the next token of the sequence, unless an image
    # comes between.
    follows = order[1:] == order[:-1] + 1
    (at,) = np.nonzero((supervised | extra)[1:] & follows)
    targets[at] = ids[at + 1]
    target_box[at] = boxes[at + 1]
    target_view[at] = box_views[at + 1]
    if (supervised[1:] & follows).sum() != supervised.sum():
        raise ValueError(
            "Supervised text starts the sample or directly follows an image without context tokens, so no "
            "text position can predict its first token; put unsupervised text before it."
        )
    return {
        "tokens": ids,
        "kind": join("kind"),
        "text_order": order,
        "text_positions": order.copy(),
        "text_segment": np.zeros(size, np.int32),
        "text_view": join("view"),
        "targets": targets,
        "target_box": target_box,
        "target_view": target_view,
    }


def _piece(tokens: _Tokens, start: int, kind: Kind, *, view: int = EMPTY) -> Arrays:
    size = len(tokens.ids)
    return {
        "ids": tokens.ids,
        "boxes": tokens.boxes,
        "views": tokens.views,
        "kind": np.full(size, kind, np.int32),
        "order": np.arange(start, start + size, dtype=np.int32),
        "view": np.full(size, view, np.int32),
        "supervised": np.full(size, tokens.supervised),
        "extra": np.full(size, tokens.extra),
    }


def _special(ids: np.ndarray) -> _Tokens:
    """Tokens without boxes: newlines and context tokens."""
    size = len(ids)
    return _Tokens(ids.astype(np.int32), np.full((size, 4), -1, np.float32), np.full(size, EMPTY, np.int32))


def _view_pieces(layout: VisualLayout, placed: Placement, first: int) -> list[Arrays]:
    """Newlines and context tokens of views; views are numbered from ``first``."""
    pieces = []
    context = _special(np.arange(layout.context_tokens))
    for view, (newlines, end) in enumerate(zip(placed.newlines, placed.ends), start=first):
        if len(newlines):
            rows = _piece(_special(np.zeros(len(newlines))), 0, Kind.NEWLINE, view=view)
            pieces.append(rows | {"order": newlines})
        if len(context.ids):
            pieces.append(_piece(context, int(end), Kind.CONTEXT, view=view))
    return pieces


@functools.lru_cache(maxsize=64)
def _placed_alone(
    layout: VisualLayout, shape: tuple[int, int], newlines: bool, region: tuple[int, int, int], at: Cursor
) -> tuple[Placement, Arrays]:
    """Where one image without pooling goes, and :func:`join` of it; samples that begin alike share both."""
    pool = np.zeros((*shape, 4), np.int32)
    view = View(np.zeros((1, 0, 0, 3), np.uint8), pool, pool.astype(np.float32), newlines, (0, 0, 0, 0))
    found = place_views(layout, (view,), region, at)
    found.grids.setflags(write=False)  # shared by every caller; other arrays are copied
    return found, join(layout, [found], pooled=False)


def _process_parts(
    processor: Processor,
    sample: Sample,
    parts: Sequence[Image | Video | Text],
    order: int = 0,
    out: np.ndarray | None = None,
) -> tuple[Arrays, dict[int, int], tuple[PlacedView, ...]]:
    """Arrays of ``parts``, the last view of each image, and all views."""
    layout = processor.layout
    at = Cursor(order=order)
    images: list[np.ndarray] = []
    pieces: list[Arrays] = []
    placed: list[Placement] = []
    joined: Arrays | None = None
    shows: dict[int, int] = {}
    views: list[PlacedView] = []
    for part in parts:
        if isinstance(part, Text):
            tokens = _tokenise(processor, sample, part, shows)
            pieces.append(_piece(tokens, at.order, Kind.TEXT))
            at = dataclasses.replace(at, order=at.order + len(tokens.ids))
            continue
        shown = _views(processor, sample, part)
        video = isinstance(part, Video)
        # A region may span several frames, but never several views of an image.
        groups = [shown.views] * bool(shown.views) if video else [(view,) for view in shown.views]
        first = part.start if isinstance(part, Video) else 0
        for group in groups:
            region = layout.frame_region if video else (1, *layout.region)
            if len(group) == 1 and processor.views.tower_tokens:
                grid = group[0].pool_indices.shape[:2]
                found, joined = _placed_alone(layout, grid, group[0].newlines, region, at)
            else:
                found, joined = place_views(layout, group, region, at), None
            placed.append(found)
            pieces += _view_pieces(layout, found, at.view)
            images += [view.images for view in group]
            for i, (view, grid) in enumerate(zip(group, found.grids)):
                views.append(PlacedView(at.view + i, video, part.index, first + i, view.corners, grid))
            at = found.next
        if not video:
            shows[part.index] = at.view - 1
        if shown.end_newline:
            pieces.append(_piece(_special(np.zeros(1)), at.order, Kind.NEWLINE))
            at = dataclasses.replace(at, order=at.order + 1)
    if sample.family not in processor.families:
        raise ValueError(
            f"Family {sample.family!r} of sample {sample.id} is not one of processor.families="
            f"{processor.families}."
        )
    size = layout.image_size
    if joined is not None and len(placed) == 1:
        visual = {name: values.copy() for name, values in joined.items()}
    else:
        visual = join(layout, placed, pooled=not processor.views.tower_tokens)
    arrays = visual | _text_arrays(pieces)
    if out is not None and len(out) == sum(map(len, images)) > 0:
        pixels = np.concatenate(images, out=out)
    else:
        pixels = images[0] if len(images) == 1 else _concatenate(images, (0, size, size, 3), np.uint8)
    arrays["images"] = normalise(pixels) if processor.float_images else pixels
    arrays["sample_id"] = np.asarray(sample.id, np.int32)
    arrays["family"] = np.asarray(processor.families.index(sample.family), np.int32)
    return arrays, shows, tuple(views)


def process_with_views(
    processor: Processor, sample: Sample, *, since: int = 0, order: int = 0
) -> tuple[Arrays, tuple[PlacedView, ...]]:
    """:func:`process`, and where every view was placed.

    Args:
      processor, sample: as in :func:`process`.
      since: index of the first part to process; earlier parts are in the cache already.
      order: order of the first token of these parts. Regions, views and images are still numbered from 0.
    """
    arrays, _, views = _process_parts(processor, sample, sample.parts[since:], order)
    return arrays, views


def process(processor: Processor, sample: Sample, out: np.ndarray | None = None) -> Arrays:
    """Arrays of one sample, unpadded.

    Args:
      processor, sample: the settings, and the sample.
      out: uint8 [images, image_size, image_size, 3], where uint8 images are put if it has as many; they are
        large, and a batch has a place for them.

    Returns:
      The fields of ``Streams`` without their batch axis; ``images`` float32
      [images, image_size, image_size, 3] in [-1, 1], the tower's inputs: whole images, tiles, frames;
      ``target_box`` float32 [S, 4], the (x0, y0, x1, y1) that the *target* token refers to, in pixels of the
      tower's input (views with ``tower_tokens``) or of the image (others), and ``target_view`` int32 [S], the
      last view of that image, both -1 without a box; ``sample_id`` and ``family``, int32 scalars.

    Raises:
      ValueError: an image does not fit the tower, text cannot be tokenised, a token overlaps two
        boxes, supervised text has no predecessor, or the family is unknown.
    """
    return _process_parts(processor, sample, sample.parts, out=out)[0]


def prompt(processor: Processor, sample: Sample) -> Arrays:
    """Arrays for free-running evaluation: everything before the first answer, and that answer.

    Returns:
      What :func:`process` returns for everything before the first supervised token, without targets (not
      even those of ``processor.supervise``); ``answer`` int32 [A], the answer's tokens including the end
      token; ``answer_box`` float32 [A, 4] and ``answer_view`` int32 [A], the boxes they refer to and their
      views, -1 without a box.

    Raises:
      ValueError: the sample has no answer, its answer does not end in the end token, or an error of
        :func:`process`.
    """
    processor = dataclasses.replace(processor, supervise=())
    answered = [isinstance(part, Text) and (part.supervised or part.targets != ()) for part in sample.parts]
    if True not in answered:
        raise ValueError(f"Sample {sample.id} has no supervised text, so there is no answer to wait for.")
    first = answered.index(True)
    texts: list[Text] = []
    for part in sample.parts[first:]:
        if not isinstance(part, Text):
            break
        texts.append(part)
    unlabelled = dataclasses.replace(texts[0], supervised=False, targets=())
    arrays, shows, _ = _process_parts(processor, sample, (*sample.parts[:first], unlabelled))
    tokens = [_tokenise(processor, sample, text, shows) for text in texts]
    supervised = np.concatenate([of_text.supervised for of_text in tokens])
    start = int(np.argmax(supervised))
    end = start + int(np.argmin([*supervised[start:], False]))
    # An answer may begin inside a text: the prompt includes only the part of the text before it.
    read = len(arrays["tokens"]) - len(tokens[0].ids) + start
    arrays |= {name: arrays[name][:read] for name, (axis, _) in PADDING.items() if axis == "text"}
    arrays["answer"] = np.concatenate([of_text.ids for of_text in tokens])[start:end]
    arrays["answer_box"] = np.concatenate([of_text.boxes for of_text in tokens])[start:end]
    arrays["answer_view"] = np.concatenate([of_text.views for of_text in tokens])[start:end]
    if arrays["answer"][-1:].tolist() != [processor.tokenizer.end_id]:
        raise ValueError(f"The first answer of sample {sample.id} must end in {END}; write it into the text.")
    return arrays
