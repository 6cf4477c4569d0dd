"""Many questions: batches of unequal samples, and JSON Lines files of requests."""

import collections
import dataclasses
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from typing import Any, Self

import numpy as np

from gaze_jax.data.sample import Frames
from gaze_jax.errors import UserError, renamed
from gaze_jax.infer.answer import Answer, DecodeOptions, PendingAnswer, Question, decode_answers
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.gaze_options import Budget, GazeOptions, check, join
from gaze_jax.infer.programs import free_slots_for
from gaze_jax.infer.progress import progress_bar
from gaze_jax.infer.prompt import ProcessedPrompt, user_turn
from gaze_jax.infer.sampler import Sampler
from gaze_jax.infer.steer import LookAt
from gaze_jax.media.jsonl import media_path, parse_object, read_lines
from gaze_jax.stored import QUESTION_FIELDS

GAZE_FIELDS = {name: f"gaze_{name}" for name in ("top_k", "keep", "dense", "full_layers")}
"""Field of ``GazeOptions`` -> field of :class:`Request`."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One question. A line of a file is a JSON object with these fields; only "question" is required.

    Attributes:
      question: text, with one tag per medium or with none (media come first).
      id: identifies the request in answers and file names; by default the line's number, from 1.
      images, videos: paths of files.
      system, max_tokens, temperature, sample_top_k, top_p, stop, seed: as in ``Sampler.generate``.
      gaze_top_k, gaze_keep, gaze_dense, gaze_full_layers: ``top_k``, ``keep``, ``dense``, ``full_layers`` of
        :class:`gaze_jax.infer.gaze_options.GazeOptions`; of ``top_k`` one number or a list.
      look_at: boxes, each "x0,y0,x1,y1" or "x0,y0,x1,y1,frame", in pixels.

    Raises:
      UserError: a number is out of range.
    """

    question: str
    id: str = ""
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    system: str | None = None
    max_tokens: int = 64
    temperature: float = 0.0
    sample_top_k: int | None = None
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    gaze_top_k: int | tuple[int, ...] | None = None
    gaze_keep: float | None = None
    gaze_dense: bool = False
    gaze_full_layers: tuple[int, ...] = ()
    look_at: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _ = self.options
        user_turn(self.question, range(len(self.images)), range(len(self.videos)))
        _ = self.gaze

    @property
    def options(self) -> DecodeOptions:
        """How the answer is decoded."""
        return DecodeOptions(
            self.max_tokens, self.temperature, self.sample_top_k, self.top_p, self.stop, self.seed
        )

    @property
    def gaze(self) -> GazeOptions:
        """Which regions queries may select."""
        boxes = tuple(LookAt.parse(text) for text in self.look_at)
        with renamed(GAZE_FIELDS):
            return GazeOptions(self.gaze_top_k, self.gaze_keep, self.gaze_dense, self.gaze_full_layers, boxes)

    @classmethod
    def parse(cls, line: str, name: str, **defaults: Any) -> Self:
        """Parse a line of JSON.

        Args:
          line: a JSON object.
          name: names the line in messages.
          **defaults: values of fields that the line omits.

        Raises:
          UserError: the line is not an object with these fields and types, or a number is out of range.
        """
        record = parse_object(line, name)
        known = {field.name: field for field in dataclasses.fields(cls)}
        for key, value in record.items():
            if key in QUESTION_FIELDS:
                raise UserError(f"{name} has the field {key!r}, which is now {QUESTION_FIELDS[key]}.")
            if key not in known:
                raise UserError(f"{name} has an unknown field {key!r}; known are {', '.join(known)}.")
            kind = str(known[key].type)
            if not _fits(value, kind):
                raise UserError(f"{name} has {key}={value!r}, which should be {_KINDS[kind]}.")
        if "question" not in record:
            raise UserError(f"{name} has no question; ask something.")
        fields = {key: tuple(v) if isinstance(v, list) else v for key, v in record.items()}
        try:
            return cls(**(defaults | fields))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error


_KINDS = {
    "<class 'str'>": "text",
    "<class 'int'>": "an integer",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "str | None": "text or null",
    "int | None": "an integer or null",
    "float | None": "a number or null",
    "tuple[str, ...]": "a list of texts",
    "tuple[int, ...]": "a list of integers",
    "int | tuple[int, ...] | None": "an integer, a list of integers, or null",
}


def _fits(value: object, kind: str) -> bool:
    if value is None:
        return kind.endswith("| None")
    if "tuple" in kind and isinstance(value, list):
        return all(type(v) is (str if "str" in kind else int) for v in value)
    if kind.startswith("tuple"):
        return False
    if "float" in kind:
        return type(value) in (int, float)
    return type(value) is (bool if "bool" in kind else int if "int" in kind else str)


def read_requests(
    path: str | os.PathLike[str], failures: dict[str, str] | None = None, **defaults: Any
) -> list[Request]:
    """Read the requests of a JSON Lines file; paths of media in it are relative to it.

    Args:
      path: the file.
      failures: takes an id, or a line's number, and the message for each line that is wrong; None raises it.
      **defaults: values of fields that a line omits.

    Raises:
      UserError: the file cannot be read, a line is wrong and ``failures`` is None, or two have one id.
    """
    found: list[Request] = []
    for number, line in read_lines(path):
        name = f"Line {number} of {os.fspath(path)}"
        try:
            request = Request.parse(line, name, **defaults)
        except UserError as error:
            if failures is None:
                raise
            failures[str(number)] = str(error)
            continue
        images, videos = (
            tuple(media_path(path, file) for file in files) for files in (request.images, request.videos)
        )
        name = request.id or str(number)
        found.append(dataclasses.replace(request, id=name, images=images, videos=videos))
    ids = collections.Counter([*(request.id for request in found), *(failures or ())])
    if twice := [name for name, count in ids.items() if count > 1]:
        raise UserError(
            f"{os.fspath(path)} has id {min(twice)!r} more than once; answers could not be told apart."
        )
    return found


def record(request: Request, answer: Answer) -> dict[str, object]:
    """A line of the answers' file."""
    return {
        "id": request.id,
        "question": request.question,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "tokens": len(answer.tokens),
        "regions": answer.regions,
        "gaze_top_k": answer.top_k,
        **({} if answer.keep is None else {"gaze_keep": answer.keep}),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class _Row:
    """A request with its media and its prompt."""

    request: Request
    images: list[np.ndarray]
    videos: list[Frames]
    prompt: ProcessedPrompt
    budget: Budget | None

    @property
    def kind(self) -> tuple[bool, tuple[int, ...]]:
        """Only rows with equal values can share a batch."""
        return self.budget is None, self.request.gaze_full_layers


def _row(sampler: Sampler, request: Request) -> _Row:
    images, videos = sampler.read_images(request.images), sampler.read_videos(request.videos)
    prompt = sampler.prompts.question(request.question, images, videos, system=request.system)
    with renamed(GAZE_FIELDS):
        budget = request.gaze.budget(sampler.config.gaze.top_k)
        check(request.gaze, prompt.views, sampler.config.decoder.depth, regions=prompt.regions)
    return _Row(request, images, videos, prompt, budget)


def answer_all(
    sampler: Sampler,
    requests: Iterable[Request],
    *,
    batch_size: int = 8,
    return_trace: bool = False,
    failed: Callable[[Request, str], None] | None = None,
    progress: bool = True,
) -> Generator[tuple[Request, Answer]]:
    """Answer questions in batches, in order.

    An answer does not depend on what else is in its batch. A new batch starts where attention becomes dense
    or selective, or the full layers change.

    Args:
      sampler: the model.
      requests: the questions.
      batch_size: maximum number of rows in a batch.
      return_trace: record where each token looked.
      failed: called with each request whose media or prompt are refused, and why; the others are answered.
        None raises it.
      progress: show a bar on stderr, if that is a terminal.

    Yields:
      Each request with its answer.

    Raises:
      UserError: a request is refused and ``failed`` is None, or a batch does not fit memory.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1.")
    waiting: list[_Row] = []
    total = len(requests) if isinstance(requests, Sized) else None
    with progress_bar("questions", total, shown=progress) as advance:
        for request in requests:
            try:
                row = _row(sampler, request)
            except (UserError, ValueError) as error:
                if failed is None:
                    raise UserError(f"Question {request.id or request.question!r}: {error}") from error
                failed(request, str(error))
                advance(1)
                continue
            if waiting and (len(waiting) == batch_size or waiting[0].kind != row.kind):
                yield from _answer(sampler, waiting, return_trace, advance)
                waiting = []
            waiting.append(row)
        if waiting:
            yield from _answer(sampler, waiting, return_trace, advance)


def _answer(
    sampler: Sampler, rows: Sequence[_Row], return_trace: bool, done: Callable[[int], None]
) -> Iterator[tuple[Request, Answer]]:
    """Answer one batch; ``done`` takes the number of its questions when all are answered."""
    length = max(row.request.max_tokens for row in rows)
    arrays = [row.prompt.arrays for row in rows]
    sampler.check_memory(arrays, length)
    gaze_options = [row.request.gaze for row in rows]
    budgets = None if rows[0].budget is None else [row.budget for row in rows if row.budget is not None]
    views, layers = [row.prompt.views for row in rows], sampler.config.decoder.depth
    engine = Engine(
        sampler.model,
        sampler.params,
        arrays,
        free_slots=free_slots_for(length),
        selection=lambda engine: join(engine, gaze_options, budgets, views, layers),
        mesh=sampler.mesh,
    )
    answers = [
        PendingAnswer(
            sampler,
            Question(
                row.request.question,
                row.images,
                row.videos,
                row.prompt.views,
                row.prompt.regions,
                row.budget,
                row.prompt.tokens(sampler.tokenizer),
                row.prompt.region_keys,
            ),
            row.request.options,
        )
        for row in rows
    ]
    for _ in decode_answers(sampler, engine, answers, return_trace=return_trace, chunked=True):
        pass
    done(len(rows))
    for row, answer in zip(rows, answers, strict=True):
        yield row.request, answer.result()
