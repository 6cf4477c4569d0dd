"""From decoded tokens to text, finish reason and trace; chats and batches share this path."""

import dataclasses
import html
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gaze_jax.data.placement import PlacedView
from gaze_jax.data.sample import Frames
from gaze_jax.errors import UserError
from gaze_jax.infer.detokenizer import Detokenizer, check_limits
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.gaze_options import Budget, budget_count, selection_capacity
from gaze_jax.infer.loaded import LoadedModel
from gaze_jax.infer.sampling import SamplingParams, check_sampling
from gaze_jax.infer.token_trace import TokenTrace, pictures_of, trace_of
from gaze_jax.infer.trace import Trace

WRITERS: dict[str, Callable[..., Any]] = {}
"""How answers save and show themselves; filled by :mod:`gaze_jax.viewer.files`, a package above this one."""


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """How one answer is decoded.

    Attributes:
      max_tokens: maximum number of tokens to generate.
      temperature, top_p, seed: see :class:`gaze_jax.infer.sampling.SamplingParams`.
      sample_top_k: its ``top_k``; None means 0, all tokens.
      stop: strings that end the answer; they are not part of its text.

    Raises:
      UserError: a number is out of range, or ``stop`` is not a list of strings.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    sample_top_k: int | None = None
    top_p: float = 1.0
    stop: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_limits(self.max_tokens, self.stop)
        check_sampling(self.temperature, self.top_p, self.seed, self.sample_top_k)


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A question and the media that have been shown when it is answered.

    Attributes:
      text: the question as the user wrote it.
      images, videos: the media that the views were made from.
      views: all views shown so far.
      regions: R, the number of regions in those views.
      budget: regions per query, one number or one for each layer, or a fraction of the visible regions; None
        means dense attention.
      prompt: what the model has read, as in :class:`gaze_jax.infer.trace.Trace`.
      region_keys: int32 [R], the keys of each region.
    """

    text: str
    images: Sequence[np.ndarray]
    videos: Sequence[Frames]
    views: tuple[PlacedView, ...]
    regions: int
    budget: Budget | None
    prompt: tuple[str | int, ...]
    region_keys: np.ndarray

    @property
    def top_k(self) -> Budget | None:
        """The budget; counts are limited to the number of regions."""
        return cap_budget(self.budget, self.regions)


def cap_budget(budget: Budget | None, regions: int) -> Budget | None:
    """Limit counts to ``regions``; fractions and None, and any budget if ``regions`` is 0, are unchanged."""
    return budget_count(budget, regions) if isinstance(budget, int | tuple) and regions else budget


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """A complete answer.

    Attributes:
      text: the answer, without the end token or stop string.
      tokens: the generated tokens as text, including the end token if there was one.
      finish_reason: "stop" (an end token or a stop string) or "length" (``max_tokens`` was reached).
      stop_reason: the end token or stop string, as text; None if neither ended the answer.
      regions: R, the number of regions shown.
      top_k: regions that each query selected, or a tuple of them, one for each layer, if the budget was one;
        None if the budget was a fraction or attention was dense.
      trace: where each token looked, if the answer was traced.
      keep: the fraction of the visible regions that each query selected; None if the budget was a number.
    """

    text: str
    tokens: tuple[str, ...]
    finish_reason: str
    stop_reason: str | None
    regions: int
    top_k: int | tuple[int, ...] | None
    trace: Trace | None = None
    keep: float | None = None

    def __repr__(self) -> str:
        shown = self.text if len(self.text) <= 60 else f"{self.text[:57]}..."
        traced = "" if self.trace is None else ", traced"
        return f"Answer({shown!r}, {len(self.tokens)} tokens, finish_reason={self.finish_reason!r}{traced})"

    def save(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write where the answer looked: a .html page, a .png sheet, an .mp4 clip, or a .gaze trace.

        Args:
          path: the file.
          **options: ``layer`` and ``views`` of :func:`gaze_jax.viewer.files.write_trace`.

        Raises:
          UserError: the answer was not traced, or the file cannot be written.
        """
        if self.trace is None:
            raise UserError("The answer has no trace to save; generate it with return_trace=True.")
        WRITERS["file"](self.trace, path, **options)

    def _repr_html_(self) -> str:
        """The text and, if the answer was traced, the viewer, in a notebook."""
        text = f"<p>{html.escape(self.text)}</p>"
        return text if self.trace is None else text + WRITERS["notebook"](self.trace)


@dataclasses.dataclass(frozen=True, eq=False)
class StreamChunk:
    """One step of an answer.

    Attributes:
      text: the text that can be shown now; empty for the end token, and while a character or a possible stop
        string is incomplete.
      token: the token as text.
      token_trace: where the query that emitted the token looked, if the answer is traced.
    """

    text: str
    token: str
    token_trace: TokenTrace | None


class PendingAnswer:
    """An answer that is being decoded.

    Args:
      sampler: the model.
      question: the question it answers.
      options: how it is decoded.
    """

    def __init__(self, sampler: LoadedModel, question: Question, options: DecodeOptions) -> None:
        self._sampler = sampler
        self.question, self.options = question, options
        self._detokenizer = Detokenizer(sampler.tokenizer, sampler.end_ids, options.stop, options.max_tokens)
        self._token_traces: list[TokenTrace] = []

    @property
    def done(self) -> bool:
        """Whether the answer is complete."""
        return self._detokenizer.finish_reason is not None

    @property
    def read(self) -> tuple[str, ...]:
        """The tokens that the model reads before a further question: all but an end token."""
        return tuple(self._detokenizer.pieces[: len(self._detokenizer.ids)])

    def add(self, found: dict[str, np.ndarray], step: int, row: int) -> StreamChunk:
        """Add one step of one row from the output of :meth:`gaze_jax.infer.engine.Engine.decode`."""
        text = self._detokenizer.add(int(found["tokens"][step, row]))
        token_trace = None
        if "attention" in found and self.question.views:
            token_trace = TokenTrace.of(found, step, row, self.question.regions)
            self._token_traces.append(token_trace)
        return StreamChunk(text, self._detokenizer.pieces[-1], token_trace)

    def result(self) -> Answer:
        """The complete answer.

        Raises:
          UserError: decoding has not finished.
        """
        detokenizer, question = self._detokenizer, self.question
        if detokenizer.finish_reason is None:
            raise UserError("The answer is not complete; consume its whole stream first.")
        budget = question.top_k
        return Answer(
            detokenizer.text,
            tuple(detokenizer.pieces),
            detokenizer.finish_reason,
            detokenizer.stop_reason,
            question.regions,
            budget if isinstance(budget, int | tuple) else None,
            self._trace() if self._token_traces else None,
            budget if isinstance(budget, float) else None,
        )

    def _trace(self) -> Trace:
        question, budget = self.question, self.question.budget
        return trace_of(
            self._token_traces,
            question=question.text,
            answer=self._detokenizer.text,
            tokens=self._detokenizer.pieces,
            model=self._sampler.name,
            top_k=None if budget is None else budget_count(budget, question.regions),
            select_per=self._sampler.config.gaze.select_per,
            views=question.views,
            pictures=pictures_of(question.views, question.images, question.videos),
            prompt=question.prompt,
            region_keys=question.region_keys,
        )


def decode_answers(
    sampler: LoadedModel,
    engine: Engine,
    answers: Sequence[PendingAnswer],
    *,
    return_trace: bool,
    chunked: bool,
) -> Iterator[tuple[int, StreamChunk]]:
    """Decode one answer per row of an engine until all are complete.

    Args:
      sampler: the model.
      engine: its rows have been prefilled with the questions.
      answers: one per row; the budgets of all or of none are None.
      return_trace: record where each token looked.
      chunked: compute several tokens per call; ignored if any answer has stop strings.

    Yields:
      The row's index and one step of its answer.
    """
    options = [answer.options for answer in answers]
    budgets = [answer.question.budget for answer in answers if answer.question.budget is not None]
    found = engine.decode(
        max(option.max_tokens for option in options),
        ends=sampler.end_ids,
        sampling=SamplingParams.of(
            [option.temperature for option in options],
            [option.top_p for option in options],
            [option.seed for option in options],
            [option.sample_top_k for option in options],
        ),
        returns="trace" if return_trace and engine.regions > 0 else "tokens",
        chunked=chunked and not any(option.stop for option in options),
        capacity=selection_capacity(budgets or None, engine.capacity),
        stopped=lambda: [answer.done for answer in answers],
    )
    for out in found:
        for step in range(len(out["tokens"])):
            for row, answer in enumerate(answers):
                if not answer.done:
                    yield row, answer.add(out, step, row)
