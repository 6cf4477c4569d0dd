"""The gaze trace: where a model looked for each token of one answer.

Axes: T generated tokens, L layers, H query heads, Hs selectors (the H query heads with ``select_per="head"``,
the K kv heads with ``select_per="kv_head"``), J capacity of a selection, R regions. ``trace_file`` saves and
loads it.
"""

import dataclasses
import io

import numpy as np
import PIL.Image

from gaze_jax.data.placement import PlacedView
from gaze_jax.errors import UserError
from pallas_kernels.spec import SELECT_PER

LONGEST = 640
"""Longest side of a picture's copy in pixels."""

_QUALITY = 85
_PADDED = 8  # times a picture's longest side: limit for a view's size, padding included
_SLACK = 1e-3  # softmax shares are sums of many float32 numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A copy of an image or of a sampled video frame; :func:`picture` makes one.

    Attributes:
      video, index, frame: as in :class:`gaze_jax.data.placement.PlacedView`.
      seconds: time of the frame in its video; None for an image.
      size: (height, width) of the original in pixels, the pixels of ``PlacedView.corners``.
      jpeg: the copy as a JPEG file, its longest side at most :data:`LONGEST` pixels.

    Raises:
      ValueError: a field is not as described.
    """

    video: bool
    index: int
    frame: int
    seconds: float | None
    size: tuple[int, int]
    jpeg: bytes

    def __post_init__(self) -> None:
        what = f"The picture of {'video' if self.video else 'image'} {self.index}, frame {self.frame},"
        if (self.seconds is not None) != self.video:
            raise ValueError(f"{what} has seconds={self.seconds}; a frame has a time and an image has none.")
        if self.seconds is not None and not np.isfinite(self.seconds):
            raise ValueError(f"{what} has seconds={self.seconds}; give a number.")
        if min(self.size) < 1:
            raise ValueError(f"{what} has size={self.size}; both sides must be at least 1.")
        try:
            with PIL.Image.open(io.BytesIO(self.jpeg), formats=("JPEG",)) as image:
                sides = image.size
                if max(sides) <= LONGEST:
                    image.load()
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            raise ValueError(f"{what} is not a JPEG file of at most {LONGEST} pixels a side.") from error
        if max(sides) > LONGEST:
            raise ValueError(f"{what} is a copy of {sides[0]}x{sides[1]} pixels; at most {LONGEST} a side.")

    @property
    def key(self) -> tuple[bool, int, int]:
        """The fields that identify this picture in its views."""
        return self.video, self.index, self.frame

    def pixels(self) -> np.ndarray:
        """The decoded copy: uint8 [height, width, 3]."""
        with PIL.Image.open(io.BytesIO(self.jpeg), formats=("JPEG",)) as image:
            return np.asarray(image.convert("RGB"))


def picture(
    pixels: np.ndarray,
    *,
    video: bool = False,
    index: int = 0,
    frame: int = 0,
    seconds: float | None = None,
    longest: int = LONGEST,
) -> Picture:
    """Make a :class:`Picture` of uint8 [height, width, 3], its copy at most ``longest`` pixels per side."""
    height, width = pixels.shape[:2]
    image = PIL.Image.fromarray(pixels)
    image.thumbnail((longest, longest), PIL.Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY)
    return Picture(video, index, frame, seconds, (height, width), file.getvalue())


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Where a model looked for each token of an answer.

    Attributes:
      question, answer: the question and the answer.
      tokens: the T generated tokens as text.
      model: the model's name, for headings.
      top_k: regions per query, for headings, or a tuple of L such numbers; None for a dense run.
      select_per: "head" or "kv_head"; query head h uses selector h // (H // Hs).
      views: the regions of each view and frame.
      pictures: one for each (video, index, frame) of the views.
      selected: int32 [T, L, Hs, J], selected regions, highest score first; -1 in unused slots, which come
        last. J is 0 if and only if the run is dense.
      scores: float32 [T, L, Hs, J], scores of the selected regions; 0 in unused slots.
      attention: float32 [T, L, H, J], the share of the head's softmax on ``selected[..., j]``; 0 in unused
        slots. The rest of the softmax is on newlines, context tokens and text.
      dense: float32 [T, L, H, R], the share of each region under dense attention of the same query.
      entries: float32 [T, L, 4], keys attended per query, mean over heads: visual, newline, context, text.
      visual_tokens: int32 [T], visual keys visible to the query.
      prompt: what the model read before the answer, in order: a text token as text; a view as its number
        (``PlacedView.view``). Empty if it was not recorded.
      probabilities: float32 [T], the probability that the model gave to each generated token: of its softmax
        at temperature 1, before top-k and top-p. None if they were not recorded.
      region_keys: int32 [R], the keys of each region. None if they were not recorded.

    Raises:
      ValueError: shapes, types or values are not as described.
    """

    question: str
    answer: str
    tokens: tuple[str, ...]
    model: str
    top_k: int | tuple[int, ...] | None
    select_per: str
    views: tuple[PlacedView, ...]
    pictures: tuple[Picture, ...]
    selected: np.ndarray
    scores: np.ndarray
    attention: np.ndarray
    dense: np.ndarray
    entries: np.ndarray
    visual_tokens: np.ndarray
    prompt: tuple[str | int, ...] = ()
    probabilities: np.ndarray | None = None
    region_keys: np.ndarray | None = None

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_pictures(self)
        _check_prompt(self)
        _check_selection(self)
        _check_shares(self)

    @property
    def layers(self) -> int:
        """L, the number of layers."""
        return self.dense.shape[1]

    @property
    def heads(self) -> int:
        """H, the number of query heads."""
        return self.dense.shape[2]

    @property
    def regions(self) -> int:
        """R, the number of regions."""
        return self.dense.shape[3]

    def picture_of(self, view: PlacedView) -> Picture:
        """The image or frame that a view was made from."""
        return next(p for p in self.pictures if p.key == (view.video, view.index, view.frame))

    def mask(self) -> np.ndarray:
        """bool [T, L, Hs, R]: whether a selector chose a region."""
        chosen = np.zeros((*self.selected.shape[:3], self.regions + 1), bool)
        np.put_along_axis(chosen, self.selected, True, axis=-1)  # -1 is the extra last column, cut off below
        return chosen[..., :-1]


def budget_text(trace: Trace, layer: int | None = None) -> str:
    """Regions per query as a heading has them: of one layer, or of all, "8", or "4 to 8" if they differ."""
    if not isinstance(trace.top_k, tuple):
        return str(trace.top_k)
    counts = trace.top_k if layer is None else (trace.top_k[layer],)
    least, most = min(counts), max(counts)
    return str(most) if least == most else f"{least} to {most}"


def check_layer(trace: Trace, layer: int | None) -> None:
    """Check that a trace has a layer.

    Raises:
      UserError: ``layer`` is neither None nor a layer of the trace.
    """
    if layer is not None and not 0 <= layer < trace.layers:
        raise UserError(f"layer={layer} must be between 0 and {trace.layers - 1}, the layers of the trace.")


def most_concentrated(trace: Trace) -> int:
    """The layer whose selection, or in a dense run whose attention, is most concentrated.

    For each token the heads of a layer spread over the regions: p(r) is the fraction of what they selected
    that is region r. The sum of p(r)**2 over r, a mean over the tokens, is 1 / J if all heads select the same
    J regions, and less the more they differ. Among equal layers the first one is taken in which attention is
    most concentrated by the same measure.
    """

    def spread(weights: np.ndarray) -> float:
        """Of float [T, R]; a token without any weight counts as 0."""
        sums = weights.sum(axis=-1, keepdims=True)
        shares = np.divide(weights, sums, out=np.zeros_like(weights), where=sums > 0)
        return round(float((shares**2).sum(axis=-1).mean()), 6)

    def of_layer(layer: int) -> tuple[float, float]:
        if trace.top_k is None:
            return spread(trace.dense[:, layer].astype(np.float64).sum(axis=1)), 0.0
        selected = trace.selected[:, layer]
        chosen, attention = (np.zeros((len(trace.tokens), trace.regions + 1)) for _ in range(2))
        each = np.arange(len(trace.tokens))[:, None, None]
        np.add.at(chosen, (each, selected), 1)  # -1 is the extra last column, cut off below
        by_head = np.repeat(selected, trace.heads // selected.shape[1], axis=1)
        np.add.at(attention, (each, by_head), trace.attention[:, layer])
        return spread(chosen[:, :-1]), spread(attention[:, :-1])

    ranks = [of_layer(layer) for layer in range(trace.layers)]
    return ranks.index(max(ranks))


def _check_shapes(trace: Trace) -> None:
    read = (token for token in trace.prompt if isinstance(token, str))
    for text in (trace.question, trace.answer, trace.model, *trace.tokens, *read):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{text!r} has half a surrogate pair, which UTF-8 cannot store.") from error
    if trace.select_per not in SELECT_PER:
        raise ValueError(f"select_per={trace.select_per!r} must be one of {', '.join(SELECT_PER)}.")
    counts = trace.top_k if isinstance(trace.top_k, tuple) else (1 if trace.top_k is None else trace.top_k,)
    if not all(count >= 1 for count in counts):
        raise ValueError(f"top_k={trace.top_k} must be at least 1, or None for a dense run.")
    if trace.dense.ndim != 4 or trace.selected.ndim != 4 or 0 in trace.dense.shape:
        raise ValueError(
            f"dense must be [T, L, H, R] and selected [T, L, Hs, J], got {list(trace.dense.shape)} and "
            f"{list(trace.selected.shape)}."
        )
    tokens, layers, heads, _ = trace.dense.shape
    selectors, slots = trace.selected.shape[2:]
    if isinstance(trace.top_k, tuple) and len(trace.top_k) != layers:
        raise ValueError(f"top_k has {len(trace.top_k)} numbers for {layers} layers; give one for each.")
    if len(trace.tokens) != tokens:
        raise ValueError(f"dense has {tokens} tokens but tokens has {len(trace.tokens)}.")
    if selectors < 1 or heads % selectors or (trace.select_per == "head" and selectors != heads):
        raise ValueError(
            f"select_per={trace.select_per!r} does not fit {selectors} selectors of {heads} heads."
        )
    if (trace.top_k is None) != (slots == 0):
        raise ValueError(f"top_k={trace.top_k} but J={slots}; top_k must be None if J is 0, and only then.")
    wanted = {
        "selected": ((tokens, layers, selectors, slots), np.int32),
        "scores": ((tokens, layers, selectors, slots), np.float32),
        "attention": ((tokens, layers, heads, slots), np.float32),
        "dense": (trace.dense.shape, np.float32),
        "entries": ((tokens, layers, 4), np.float32),
        "visual_tokens": ((tokens,), np.int32),
    }
    added = {
        "probabilities": ((tokens,), np.float32),
        "region_keys": ((trace.regions,), np.int32),
    }
    wanted |= {name: what for name, what in added.items() if getattr(trace, name) is not None}
    for name, (shape, dtype) in wanted.items():
        array = getattr(trace, name)
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{name} must be {np.dtype(dtype)} {list(shape)}, got {array.dtype} {list(array.shape)}."
            )


def _check_prompt(trace: Trace) -> None:
    numbers = {view.view for view in trace.views}
    shown = [token for token in trace.prompt if not isinstance(token, str)]
    if any(type(number) is not int or number not in numbers for number in shown):
        raise ValueError("prompt must hold text and numbers of views, and no other.")


def _check_pictures(trace: Trace) -> None:
    sizes = {picture.key: picture.size for picture in trace.pictures}
    if len(sizes) < len(trace.pictures) or set(sizes) != {(u.video, u.index, u.frame) for u in trace.views}:
        raise ValueError(
            "pictures must hold one picture for each image and frame of the views, and no other."
        )
    if not trace.views:
        raise ValueError("views is empty: without a view or frame there is nothing to look at.")
    for view in trace.views:
        if view.regions.ndim != 2 or not view.regions.size:
            raise ValueError(f"view {view.view} must have regions [h, w], got {list(view.regions.shape)}.")
        if view.regions.min() < 0 or view.regions.max() >= trace.regions:
            raise ValueError(f"view {view.view} names a region outside of 0 to {trace.regions - 1}.")
        left, top, right, bottom = view.corners
        if not (np.isfinite(view.corners).all() and left < right and top < bottom):
            raise ValueError(f"view {view.view} has corners={view.corners}, which are no rectangle.")
        # Drawing a view takes memory for its size, so limit that, with a margin for padding.
        longest, sides = max(sizes[view.video, view.index, view.frame]), (right - left, bottom - top)
        if max(sides) > _PADDED * longest or max(map(abs, view.corners)) > 2 * _PADDED * longest:
            raise ValueError(f"view {view.view} has corners={view.corners}, far outside of its picture.")


def _check_selection(trace: Trace) -> None:
    selected, unused = trace.selected, trace.selected < 0
    if selected.size == 0:
        return
    if selected.min() < -1 or selected.max() >= trace.regions:
        raise ValueError(f"selected must be between -1 and {trace.regions - 1}.")
    if (unused[..., :-1] & ~unused[..., 1:]).any():
        raise ValueError("selected has an unused slot, -1, before a used one.")
    ordered = np.sort(selected, axis=-1)
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        raise ValueError("selected holds a region twice for one query.")
    if not np.isfinite(trace.scores).all() or trace.scores[unused].any():
        raise ValueError("scores must be finite, and 0 in unused slots.")
    if trace.attention[np.repeat(unused, trace.heads // selected.shape[2], axis=2)].any():
        raise ValueError("attention must be 0 in unused slots.")


def _check_shares(trace: Trace) -> None:
    for name in ("attention", "dense"):
        shares = getattr(trace, name)
        # A NaN fails both comparisons.
        if not (shares >= 0).all() or not (shares.sum(axis=-1) <= 1 + _SLACK).all():
            raise ValueError(f"{name} must hold shares of a softmax: at least 0, with a sum of at most 1.")
    if not (np.isfinite(trace.entries) & (trace.entries >= 0)).all() or (trace.visual_tokens < 0).any():
        raise ValueError("entries and visual_tokens must be numbers of keys, at least 0.")
    if (trace.entries[..., 0] > trace.visual_tokens[:, None] * (1 + _SLACK)).any():
        raise ValueError("entries count more visual keys than visual_tokens says there were.")
    # A NaN fails both comparisons.
    if trace.probabilities is not None and not (
        (trace.probabilities >= 0).all() and (trace.probabilities <= 1).all()
    ):
        raise ValueError("probabilities must be between 0 and 1.")
    if trace.region_keys is not None and (trace.region_keys < 0).any():
        raise ValueError("region_keys must be numbers of keys, at least 0.")
