"""From the engine's output to a gaze trace."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gaze_jax.data.placement import PlacedView
from gaze_jax.data.sample import Frames
from gaze_jax.infer.trace import Picture, Trace, picture
from gaze_jax.media.video import Clip


@dataclasses.dataclass(frozen=True, eq=False)
class TokenTrace:
    """Where the query that emitted one token looked.

    Attributes:
      selected: bool [L, Hs, R]; None under dense attention.
      scores: float32 [L, Hs, R]; None under dense attention.
      attention: float32 [L, H, R], the share of each head's softmax on each region.
      dense: float32 [L, H, R], the same share under dense attention.
      entries: float32 [L, 4], attended visual, newline, context and text keys, a mean over heads.
      visual_tokens: visual keys visible to the query.
      probability: that the model gave to the token, at temperature 1, before top-k and top-p.
    """

    selected: np.ndarray | None
    scores: np.ndarray | None
    attention: np.ndarray
    dense: np.ndarray
    entries: np.ndarray
    visual_tokens: int
    probability: float

    @classmethod
    def of(cls, found: dict[str, np.ndarray], step: int, row: int, regions: int) -> "TokenTrace":
        """One step of one row from :meth:`gaze_jax.infer.engine.Engine.decode`, cut to the row's regions."""

        def part(name: str) -> np.ndarray | None:
            return found[name][step, :, row, :, :regions] if name in found else None

        attention, dense = part("attention"), part("dense")
        assert attention is not None and dense is not None, "the answer is traced"
        entries, tokens = found["entries"][step, :, row], int(found["visual_tokens"][step, row])
        probability = float(found["probability"][step, row])
        return cls(part("selected"), part("scores"), attention, dense, entries, tokens, probability)


def pictures_of(
    views: Sequence[PlacedView], images: Sequence[np.ndarray], videos: Sequence[Frames]
) -> tuple[Picture, ...]:
    """Copies of the images and frames that the views were made from; each video is read once."""
    found = [picture(images[index], index=index) for index in sorted({u.index for u in views if not u.video})]
    for index in sorted({view.index for view in views if view.video}):
        shown = {view.frame for view in views if view.video and view.index == index}
        video = videos[index]
        for number, frame in enumerate(video):
            if number in shown:
                seconds = float(video.times[number]) if isinstance(video, Clip) else float(number)
                copy = picture(np.asarray(frame), video=True, index=index, frame=number, seconds=seconds)
                found.append(copy)
    return tuple(found)


def trace_of(
    token_traces: Sequence[TokenTrace],
    *,
    question: str,
    answer: str,
    tokens: Sequence[str],
    model: str,
    top_k: int | tuple[int, ...] | None,
    select_per: str,
    views: Sequence[PlacedView],
    pictures: Sequence[Picture],
    prompt: Sequence[str | int],
    region_keys: np.ndarray,
) -> Trace:
    """Join the traces of an answer's tokens into a :class:`gaze_jax.infer.trace.Trace`.

    Args:
      token_traces: one per generated token, T in all.
      question, answer, tokens, model, top_k, select_per, views, pictures, prompt, region_keys: as in
        :class:`gaze_jax.infer.trace.Trace`.
    """
    dense = np.stack([token_trace.dense for token_trace in token_traces])
    attention = np.stack([token_trace.attention for token_trace in token_traces])
    chosen = [token_trace.selected for token_trace in token_traces if token_trace.selected is not None]
    scores = [token_trace.scores for token_trace in token_traces if token_trace.scores is not None]
    heads = dense.shape[2]
    if chosen:
        mask = np.stack(chosen)
        slots = max(int(mask.sum(axis=-1).max()), 1)
        ranked = np.where(mask, np.stack(scores), -np.inf)
        selected = np.argsort(-ranked, axis=-1, kind="stable")[..., :slots].astype(np.int32)
        used = np.arange(slots) < mask.sum(axis=-1, keepdims=True)
        kept = np.where(used, np.take_along_axis(np.stack(scores), selected, axis=-1), 0)
        by_head = np.repeat(selected, heads // selected.shape[2], axis=2)
        shares = np.take_along_axis(attention, by_head, axis=-1)
        shares = np.where(np.repeat(used, heads // selected.shape[2], axis=2), shares, 0)
        selected = np.where(used, selected, -1)
    else:
        selected = np.zeros((*dense.shape[:3], 0), np.int32)
        kept = shares = np.zeros(selected.shape, np.float32)
    return Trace(
        question=question,
        answer=answer,
        tokens=tuple(tokens),
        model=model,
        top_k=top_k if chosen else None,
        select_per=select_per if chosen else "head",
        views=tuple(views),
        pictures=tuple(pictures),
        selected=selected.astype(np.int32),
        scores=kept.astype(np.float32),
        attention=shares.astype(np.float32),
        dense=dense,
        entries=np.stack([token_trace.entries for token_trace in token_traces]).astype(np.float32),
        visual_tokens=np.asarray([token_trace.visual_tokens for token_trace in token_traces], np.int32),
        prompt=tuple(prompt),
        # exp of a rounded logarithm may exceed 1 by a rounding.
        probabilities=np.minimum(
            np.asarray([token_trace.probability for token_trace in token_traces], np.float32), 1
        ),
        region_keys=region_keys,
    )
