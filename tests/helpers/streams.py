"""Toy streams from a description, so that a test reads like the sequence that it is about.

    row = sample([Text(3), PlacedView(5, 5), Text(2), PlacedView(4, 6), Text(4)], region=(2, 2), context=2)
    streams = batch([pad(row, regions=20, text=16), pad(shuffle(other, seed=1), regions=20, text=16)])

Rows are dictionaries of numpy arrays with the fields of ``Streams`` and no batch axis. Written from the
contract of ``Streams`` and independent of the data pipeline.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from gaze_jax.core.regions import partition
from gaze_jax.core.streams import EMPTY, IGNORE, Kind, Streams

Row = dict[str, np.ndarray]
VISUAL = ("visual_src", "visual_order", "visual_positions", "visual_view")
TEXT_FIELDS = ("tokens", "kind", "text_order", "text_positions", "text_segment", "text_view", "targets")
EMPTY_SLOT = {"visual_src": EMPTY, "visual_order": EMPTY, "visual_positions": 0, "visual_view": EMPTY}
PADDING = {
    "tokens": 0,
    "kind": int(Kind.PAD),
    "text_order": EMPTY,
    "text_positions": 0,
    "text_segment": EMPTY,
    "text_view": EMPTY,
    "targets": IGNORE,
}


@dataclasses.dataclass(frozen=True)
class Text:
    """``length`` random text tokens."""

    length: int


@dataclasses.dataclass(frozen=True)
class Newline:
    """One newline embedding outside of any view."""


@dataclasses.dataclass(frozen=True)
class PlacedView:
    """A ``height`` x ``width`` grid of visual tokens, then its context tokens.

    ``newlines`` puts a newline after each row of the grid; ``region`` overrides the sample's.
    """

    height: int
    width: int
    newlines: bool = False
    region: tuple[int, int] | None = None


Part = Text | Newline | PlacedView


def sample(
    parts: Sequence[Part],
    *,
    region: tuple[int, int] = (2, 2),
    context: int = 2,
    seed: int = 0,
    vocab: int = 64,
) -> Row:
    """One unpadded sample as a row; ``seed`` chooses its text."""
    rng = np.random.default_rng(seed)
    visual: list[np.ndarray] = []  # [4, R, P] per view: the fields of VISUAL
    text: list[tuple[int, int, int, int]] = []  # token, kind, order, view
    order = source = views = 0
    for part in parts:
        if isinstance(part, Text):
            text += [(int(rng.integers(1, vocab)), Kind.TEXT, order + i, EMPTY) for i in range(part.length)]
            order += part.length
        elif isinstance(part, Newline):
            text.append((0, Kind.NEWLINE, order, EMPTY))
            order += 1
        else:
            table = partition(part.height, part.width, part.region or region)
            skipped = table // part.width if part.newlines else 0
            place = np.where(table >= 0, table + skipped + order, EMPTY)
            view = np.where(table >= 0, views, EMPTY)
            visual.append(
                np.stack([np.where(table >= 0, table + source, EMPTY), place, np.maximum(place, 0), view])
            )
            if part.newlines:
                stride = part.width + 1
                text += [(0, Kind.NEWLINE, order + (i + 1) * stride - 1, views) for i in range(part.height)]
            source += part.height * part.width
            order += part.height * (part.width + part.newlines)
            text += [(c, Kind.CONTEXT, order + c, views) for c in range(context)]
            order += context
            views += 1
    return _as_row(visual, sorted(text, key=lambda token: token[2]))


def _as_row(visual: list[np.ndarray], text: list[tuple[int, int, int, int]]) -> Row:
    slots = max((table.shape[2] for table in visual), default=1)
    empty = np.array(list(EMPTY_SLOT.values()))[:, None, None]
    wide = [
        np.concatenate([t, np.broadcast_to(empty, (*t.shape[:2], slots - t.shape[2]))], axis=2)
        for t in visual
    ]
    fields = np.concatenate([np.zeros((4, 0, slots)), *wide], axis=1)
    row = dict(zip(VISUAL, fields, strict=True))
    row["region_segment"] = np.zeros(fields.shape[1])
    tokens, kind, order, view = np.array(text).reshape(-1, 4).T
    row |= {"tokens": tokens, "kind": kind, "text_order": order, "text_positions": order, "text_view": view}
    row["text_segment"] = np.zeros(len(text))
    text = {o: t for t, k, o, _ in text if k == Kind.TEXT}
    row["targets"] = np.array([text.get(o + 1, IGNORE) for o in order])
    return {name: np.asarray(values, np.int32) for name, values in row.items()}


def pad(row: Row, *, regions: int | None = None, slots: int | None = None, text: int | None = None) -> Row:
    """Pad a row to a bucket; an absent size stays as it is."""
    have_regions, have_slots = row["visual_src"].shape
    more_regions = (regions or have_regions) - have_regions
    more_slots = (slots or have_slots) - have_slots
    more_text = (text or len(row["tokens"])) - len(row["tokens"])
    out = dict(row)
    for name, fill in EMPTY_SLOT.items():
        out[name] = np.pad(row[name], ((0, more_regions), (0, more_slots)), constant_values=fill)
    out["region_segment"] = np.pad(row["region_segment"], (0, more_regions), constant_values=EMPTY)
    for name, fill in PADDING.items():
        out[name] = np.pad(row[name], (0, more_text), constant_values=fill)
    return out


def pack(rows: Sequence[Row]) -> Row:
    """Several unpadded samples in one row, one segment each; views and tower tokens are renumbered."""
    slots = max(row["visual_src"].shape[1] for row in rows)
    moved, source, views = [], 0, 0
    for segment, row in enumerate(pad(row, slots=slots) for row in rows):
        shift = {"visual_src": source, "visual_view": views, "text_view": views}
        shift |= {"region_segment": segment, "text_segment": segment}
        moved.append(
            {name: np.where(a >= 0, a + shift[name], a) if name in shift else a for name, a in row.items()}
        )
        source += int((row["visual_src"] >= 0).sum())
        views += int(row["visual_view"].max(initial=EMPTY)) + 1
    return {name: np.concatenate([row[name] for row in moved]) for name in moved[0]}


def shuffle(row: Row, *, seed: int) -> Row:
    """The same row stored otherwise: regions, slots inside each region and text-stream tokens permuted."""
    rng = np.random.default_rng(seed)
    regions, slots = row["visual_src"].shape
    region_order = rng.permutation(regions)
    slot_order = np.argsort(rng.random((regions, slots)), axis=1)
    text_order = rng.permutation(len(row["tokens"]))
    out = {name: np.take_along_axis(row[name][region_order], slot_order, axis=1) for name in VISUAL}
    out["region_segment"] = row["region_segment"][region_order]
    return out | {name: row[name][text_order] for name in TEXT_FIELDS}


def batch(rows: Sequence[Row]) -> Streams:
    """Stack rows, padding them to the largest."""
    regions, slots = np.max([row["visual_src"].shape for row in rows], axis=0)
    text = max(len(row["tokens"]) for row in rows)
    padded = [pad(row, regions=int(regions), slots=int(slots), text=text) for row in rows]
    return Streams(**{name: jnp.asarray(np.stack([row[name] for row in padded])) for name in padded[0]})


def prefix(row: Row, orders: int) -> Row:
    """The first ``orders`` tokens of a sample whose views all lie in them; the rest is cut off."""
    keep = row["text_order"] < orders
    if (row["visual_order"] >= orders).any():
        raise ValueError("A prefix must contain whole views.")
    return row | {name: row[name][keep] for name in TEXT_FIELDS}


def find(row: Row, segment: int = 0) -> np.ndarray:
    """Dense storage indices of a segment's tokens, in order: ``logits[find(row)]`` is storage-free."""
    places = np.flatnonzero((row["text_segment"] == segment) & (row["kind"] != Kind.PAD))
    return places[np.argsort(row["text_order"][places])]
