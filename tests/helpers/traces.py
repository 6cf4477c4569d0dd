"""Gaze traces made up of whole cloth: any shape, several kinds of media, plausible numbers."""

import numpy as np

from gaze_jax.data.placement import PlacedView
from gaze_jax.infer.trace import Trace, picture

WORDS = ("A", " street", ",", " two", " cars", ".\n", "\n", " It", " rains", " a", " lot", ".")


def grid(height, width, region, first):
    """int32 [height, width]: square regions of ``region`` tokens a side, numbered from ``first``."""
    rows, columns = np.arange(height) // region, np.arange(width) // region
    return (first + rows[:, None] * (-(-width // region)) + columns).astype(np.int32)


def make_media(rng, *, views=1, frames=0, slab=1, size=(48, 64)):
    """Views and pictures of an image with ``views`` views and of a video of ``frames`` frames.

    Later views are the right half of the image, cut finer; the regions of a video join ``slab`` frames.
    """
    placed, pictures, first = [], [], 0
    height, width = size
    if views:
        pictures.append(picture(rng.integers(60, 250, (*size, 3), dtype=np.uint8)))
    for view in range(views):
        left = 0.0 if view == 0 else width / 2
        regions = grid(4 + 2 * view, 4, 2, first)
        placed.append(PlacedView(len(placed), False, 0, 0, (left, 0.0, float(width), float(height)), regions))
        first = int(regions.max()) + 1
    for frame in range(frames):
        pixels = rng.integers(60, 250, (*size, 3), dtype=np.uint8)
        pictures.append(picture(pixels, video=True, frame=frame, seconds=frame / 2))
        regions = grid(4, 4, 2, first)
        # A square frame padded at the top and bottom, as some families show them.
        corners = (0.0, (height - width) / 2, float(width), (height + width) / 2)
        placed.append(PlacedView(len(placed), True, 0, frame, corners, regions))
        if (frame + 1) % slab == 0 or frame + 1 == frames:
            first = int(regions.max()) + 1
    return tuple(placed), tuple(pictures)


def make_trace(
    *,
    tokens=WORDS[:5],
    layers=3,
    heads=4,
    selectors=None,
    top_k=2,
    seed=0,
    media=None,
    question="What is this?",
):
    """A trace of random numbers; ``selectors`` other than ``heads`` share by group; ``top_k=None`` is dense.

    A tuple for ``top_k`` has a number for each layer. Every view precedes the question. The last slot of the
    first token's first selector is unused.
    """
    rng = np.random.default_rng(seed)
    views, pictures = media if media is not None else make_media(rng)
    regions = 1 + max(int(view.regions.max()) for view in views)
    selectors = selectors or heads
    counts = np.broadcast_to(0 if top_k is None else top_k, layers)
    slots = int(counts.max())
    count = len(tokens)
    scores = rng.normal(size=(count, layers, selectors, regions)).astype(np.float32)
    selected = np.argsort(-scores, axis=-1)[..., :slots].astype(np.int32)
    best = np.take_along_axis(scores, selected, axis=-1)
    each = np.exp(rng.normal(size=(count, layers, heads, regions)) * 1.5)
    dense = (each / each.sum(-1, keepdims=True) * 0.7).astype(np.float32)
    per_head = np.repeat(selected, heads // selectors, axis=2)
    attention = np.take_along_axis(dense, per_head, axis=-1)
    beyond = np.arange(slots) >= counts[:, None, None]
    unused = np.broadcast_to(beyond, selected.shape)
    selected[unused], best[unused] = -1, 0
    attention[np.broadcast_to(beyond, attention.shape)] = 0
    if slots > 1:
        selected[0, 0, 0, -1], best[0, 0, 0, -1] = -1, 0
        attention[0, 0, : heads // selectors, -1] = 0
    keys = sum(np.bincount(view.regions.ravel(), minlength=regions) for view in views).astype(np.int32)
    total = int(keys.sum())
    read = np.where(selected >= 0, keys[selected], 0).sum(-1).mean(-1)
    kinds = [
        read if slots else np.full((count, layers), total),
        np.full((count, layers), 4),
        np.broadcast_to(2 + np.arange(layers), (count, layers)),
        np.broadcast_to(30 + np.arange(count)[:, None], (count, layers)),
    ]
    entries = np.stack(kinds, axis=-1).astype(np.float32)
    return Trace(
        question,
        "".join(tokens),
        tuple(tokens),
        "tests/made-up",
        top_k,
        "head" if selectors == heads else "kv_head",
        views,
        pictures,
        selected,
        best.astype(np.float32),
        attention,
        dense,
        entries,
        np.full(count, total, np.int32),
        ("<|user|>", *range(len(views)), *question.split(), "\n"),
        rng.uniform(0.01, 1, count).astype(np.float32),
        keys,
    )
