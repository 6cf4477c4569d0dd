"""Answers: the one path from decoded tokens to text, finish reason and trace, for a chat and for a batch."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from gaze_jax.data.placement import PlacedView
from gaze_jax.data.sample import Frames
from gaze_jax.errors import UserError
from gaze_jax.infer.detokenizer import Detokenizer, check_limits
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.gaze_options import counted, most
from gaze_jax.infer.loaded import LoadedModel
from gaze_jax.infer.sampling import SamplingParams, check_sampling
from gaze_jax.infer.token_trace import TokenTrace, pictures_of, trace_of
from gaze_jax.infer.trace import Trace


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """How one answer is decoded.

    Attributes:
      max_tokens: most tokens to generate; the answer is cut there.
      temperature, top_p, seed: of :class:`gaze_jax.infer.sampling.SamplingParams`.
      sample_top_k: its ``top_k``; None is 0, all tokens.
      stop: strings that end the answer before them.

    Raises:
      UserError: a number is out of range, or ``stop`` is no list of strings.
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
    """What an answer is about.

    Attributes:
      text: as it was asked.
      images, videos: that the views show.
      views: what has been shown so far.
      regions: R of it.
      budget: regions per query, or a fraction of those in sight; None is dense attention.
    """

    text: str
    images: Sequence[np.ndarray]
    videos: Sequence[Frames]
    views: tuple[PlacedView, ...]
    regions: int
    budget: int | float | None

    @property
    def top_k(self) -> int | float | None:
        """The budget, a count being at most all regions."""
        return limited(self.budget, self.regions)


def limited(budget: int | float | None, regions: int) -> int | float | None:
    """A budget whose count is at most all regions; where nothing is shown it stays as it is."""
    return min(budget, regions) if isinstance(budget, int) and regions else budget


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What a model answered.

    Attributes:
      text: the answer, without an end token or a stop string.
      tokens: what was generated, as text, the end token last if it came.
      finish_reason: why it ended: "stop" (an end token or a stop string) or "length" (``max_tokens``).
      stop_reason: the end token or the stop string that ended it, as text; None if neither did.
      regions, top_k: R of what was shown, and how many (or which fraction) a query selected; None: dense.
      trace: where every token looked, if the answer was traced.
    """

    text: str
    tokens: tuple[str, ...]
    finish_reason: str
    stop_reason: str | None
    regions: int
    top_k: int | float | None
    trace: Trace | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class StreamChunk:
    """One step of an answer.

    Attributes:
      text: what can be shown now; empty while a character or a stop string is incomplete, and for the token
        that ends it all.
      token: the token as text.
      token_trace: where the query looked that emitted it, if the answer is traced.
    """

    text: str
    token: str
    token_trace: TokenTrace | None


class PendingAnswer:
    """An answer while it is decoded.

    Args:
      sampler: who answers.
      question: what it is about.
      options: how it is decoded.
    """

    def __init__(self, sampler: LoadedModel, question: Question, options: DecodeOptions) -> None:
        self._sampler = sampler
        self.question, self.options = question, options
        self._detokenizer = Detokenizer(sampler.tokenizer, sampler.end_ids, options.stop, options.max_tokens)
        self._token_traces: list[TokenTrace] = []

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._detokenizer.finish_reason is not None

    def add(self, found: dict[str, np.ndarray], step: int, row: int) -> StreamChunk:
        """Take one step of one row of what :meth:`gaze_jax.infer.engine.Engine.decode` yields."""
        text = self._detokenizer.add(int(found["tokens"][step, row]))
        token_trace = None
        if "attention" in found and self.question.views:
            token_trace = TokenTrace.of(found, step, row, self.question.regions)
            self._token_traces.append(token_trace)
        return StreamChunk(text, self._detokenizer.pieces[-1], token_trace)

    def result(self) -> Answer:
        """The finished answer.

        Raises:
          UserError: it has not ended.
        """
        detokenizer, question = self._detokenizer, self.question
        if detokenizer.finish_reason is None:
            raise UserError("The answer has not ended; take it to its end.")
        return Answer(
            detokenizer.text,
            tuple(detokenizer.pieces),
            detokenizer.finish_reason,
            detokenizer.stop_reason,
            question.regions,
            question.top_k,
            self._trace() if self._token_traces else None,
        )

    def _trace(self) -> Trace:
        question, budget = self.question, self.question.budget
        return trace_of(
            self._token_traces,
            question=question.text,
            answer=self._detokenizer.text,
            tokens=self._detokenizer.pieces,
            model=self._sampler.name,
            top_k=None if budget is None else counted(budget, question.regions),
            select_per=self._sampler.config.gaze.select_per,
            views=question.views,
            pictures=pictures_of(question.views, question.images, question.videos),
        )


def decode_answers(
    sampler: LoadedModel,
    engine: Engine,
    answers: Sequence[PendingAnswer],
    *,
    return_trace: bool,
    chunked: bool,
) -> Iterator[tuple[int, StreamChunk]]:
    """Decode one answer for each row of an engine, to their ends.

    Args:
      sampler: who answers.
      engine: whose rows have been asked.
      answers: of the rows; all their budgets are counts, or fractions, or None.
      return_trace: record where each token looked.
      chunked: compute several tokens at once, where no stop string could end an answer in between.

    Yields:
      The row, and one step of its answer.
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
        capacity=most(budgets or None, engine.capacity),
        stopped=lambda: [answer.done for answer in answers],
    )
    for out in found:
        for step in range(len(out["tokens"])):
            for row, answer in enumerate(answers):
                if not answer.done:
                    yield row, answer.add(out, step, row)
