"""A file of questions of generate.py: every line is checked first, and no answer is lost once it is there.

The answers' file has a line for each question: the answer, or in "error" the reason why there is none. It is
replaced when its first new line is ready, not before.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gaze_jax.commands import cli
from gaze_jax.commands.generate_answers import make_sampler, show_trace
from gaze_jax.commands.generate_options import GenerateOptions
from gaze_jax.errors import UserError
from gaze_jax.infer import trace_file
from gaze_jax.infer.answer import Answer
from gaze_jax.infer.requests import Request, answer_all, read_requests, record
from gaze_jax.media.images import check_image
from gaze_jax.media.video import FrameSampling, open_video
from gaze_jax.parallel import together
from gaze_jax.viewer.html import Entry, index_page
from gaze_jax.writing import write_text


def ask_many(options: GenerateOptions) -> int:
    """Answer a file of questions.

    Returns:
      The number of lines without an answer; each is named on stderr and in the answers' file.

    Raises:
      UserError: no line can be answered, the checkpoint cannot be read, or a file cannot be written.
    """
    path = options.batch.answers or ""
    wrong: dict[str, str] = {}
    with together.agreed():
        if together.is_first():
            cli.check_writable("answers", path)
        requests = _read(options, wrong)
        kept = _kept_answers(path, requests) if options.batch.resume and together.is_first() else {}
    kept = json.loads(together.exchanged(json.dumps(kept))[0])
    asked = [request for request in requests if request.id not in kept]
    for unreadable in together.exchanged(json.dumps(_unreadable(asked))):
        wrong |= json.loads(unreadable)
    todo = [request for request in asked if request.id not in wrong]
    if not todo and not kept:
        first, *others = wrong.values()
        raise UserError(
            f"{first} None of the other {len(others)} lines can be answered." if others else first
        )
    for message in wrong.values():
        _complain(message)
    answers = _AnswersFile(path, kept)
    # Loads the checkpoint, before anything is written.
    found = _answer(options, todo, answers) if todo else _nothing()
    with answers, contextlib.closing(found):  # closed at once, or a progress bar stays
        for name, message in wrong.items():
            answers.write({"id": name, "error": message})
        for request, answer in found:
            together.by_first(functools.partial(_show, options, request, answer))
            answers.write(record(request, answer))
    traces = options.batch.traces
    if traces is not None:
        together.by_first(lambda: _write_index(Path(traces), requests))
    return answers.errors


def _show(options: GenerateOptions, request: Request, answer: Answer) -> None:
    """Write the trace and the page of an answer, if the options ask for them."""
    if answer.trace is not None and options.batch.traces is not None:
        page = Path(options.batch.traces, f"{request.id}.html")
        show_trace(answer.trace, page.with_suffix(".gaze"), options)
        show_trace(answer.trace, page, options)


def _complain(message: str) -> None:
    if together.is_first():
        print(message, file=sys.stderr)


_Answers = Generator[tuple[Request, Answer]]


def _nothing() -> _Answers:
    yield from ()


def _answer(options: GenerateOptions, todo: Sequence[Request], answers: "_AnswersFile") -> _Answers:
    """Answer readable questions; a refused one is written to the answers."""

    def failed(request: Request, message: str) -> None:
        _complain(f"Question {request.id!r}: {message}")
        answers.write({"id": request.id, "question": request.question, "error": message})

    return answer_all(
        make_sampler(options),
        todo,
        batch_size=options.value("batch_size"),
        return_trace=options.batch.traces is not None,
        failed=failed,
        progress=together.is_first() and not answers.streamed,
    )


def _write_index(folder: Path, requests: Sequence[Request]) -> None:
    """The index of all traces in the folder that belong to the questions, of earlier runs too."""
    files = [folder / f"{request.id}.gaze" for request in requests]
    entries = [Entry.of(trace_file.load(file), f"{file.stem}.html") for file in files if file.is_file()]
    if entries:
        write_text(folder / "index.html", index_page(entries))


class _AnswersFile:
    """The file of answers, replaced when its first line is written; the first process writes it.

    Args:
      path: the file.
      kept: lines of an earlier run, by id, to begin with.
    """

    def __init__(self, path: str, kept: Mapping[str, str]) -> None:
        self._path, self._kept = path, kept
        self._file: io.FileIO | None = None
        self.streamed = os.path.exists(path) and not os.path.isfile(path)  # a pipe or a terminal
        self.errors = 0

    def __enter__(self) -> "_AnswersFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with cli.writing(self._path):
                self._file.close()

    def write(self, line: Mapping[str, object]) -> None:
        """Add a line, and hand it to the operating system at once; what has no room is not there in part."""
        self.errors += "error" in line
        together.by_first(lambda: self._write(line))

    def _write(self, line: Mapping[str, object]) -> None:
        text = json.dumps(line, ensure_ascii=False) + "\n"
        with cli.writing(self._path):
            # Without a buffer, whose rest would be written when the file is closed.
            if self._file is None and self.streamed:
                self._file = io.FileIO(self._path, "w")
            elif self._file is None:
                write_text(self._path, "".join(f"{kept}\n" for kept in self._kept.values()) + text)
                self._file = io.FileIO(self._path, "a")
                return
            self._append(self._file, text.encode())

    def _append(self, file: io.FileIO, line: bytes) -> None:
        end = None if self.streamed else os.fstat(file.fileno()).st_size
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            if end is not None:
                with contextlib.suppress(OSError):
                    file.truncate(end)
            raise


def _kept_answers(path: str, requests: Sequence[Request]) -> dict[str, str]:
    """The lines of an earlier run's answers by id, without errors and without a last line that was cut.

    Raises:
      UserError: a line is not an answer to one of the questions.
    """
    if not os.path.exists(path):
        return {}
    questions = {request.id: request.question for request in requests}
    found = {}
    try:
        with open(path, encoding="utf-8", newline="\n", errors="replace") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise UserError(f"{path!r} cannot be read ({error.strerror}).") from error
    for number, line in enumerate(lines[:-1], start=1):  # behind the last line feed: a line that was cut
        try:
            answer = json.loads(line)
            name, question = answer["id"], answer.get("question")
            done = "error" not in answer
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"Line {number} of {path} is no answer of an earlier run, with which --resume could go on."
            ) from error
        if done and questions.get(name) != question:
            raise UserError(
                f"Line {number} of {path} answers another question than {name!r} is now; name another file "
                "with --answers."
            )
        if done:
            found[name] = line
    return found


def _unreadable(requests: Sequence[Request]) -> dict[str, str]:
    """Why the media of some requests cannot be read, by id; every image is read to its end."""

    def check(request: Request) -> str | None:
        try:
            for file in request.images:
                check_image(file)
            for file in request.videos:
                open_video(file, FrameSampling(max_frames=1))
        except UserError as error:
            return f"Question {request.id!r}: {error}"
        return None

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        messages = pool.map(check, requests)
        return {
            request.id: message
            for request, message in zip(requests, messages, strict=True)
            if message is not None
        }


def _read(options: GenerateOptions, wrong: dict[str, str]) -> list[Request]:
    """The questions with the options applied; ``wrong`` takes the lines that are none."""
    defaults = options.sampling.drawn | {
        "max_tokens": options.sampling.max_tokens,
        "system": options.shown.system,
    }
    requests = read_requests(options.batch.questions or "", wrong, **defaults)
    if options.batch.traces is not None:
        _check_names(requests)
        if together.is_first():
            cli.make_folder("traces", options.batch.traces)
    return list(_with_gaze(requests, options, wrong))


def _check_names(requests: Sequence[Request]) -> None:
    """Refuse ids that cannot be names of files."""
    taken = {"index"}
    for request in requests:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}", request.id):
            raise UserError(
                f"With --traces an id is a file's name; {request.id[:200]!r} must be 1 to 200 of the "
                "characters A-Z a-z 0-9 . _ -."
            )
        if request.id.lower() in taken:  # some file systems ignore case
            raise UserError(f"With --traces an id is a file's name; {request.id!r} is taken, rename it.")
        taken.add(request.id.lower())


def _with_gaze(
    requests: Sequence[Request], options: GenerateOptions, wrong: dict[str, str]
) -> Iterator[Request]:
    """The questions, with the options as defaults of their gaze settings."""
    selection = options.selection
    for request in requests:
        if request.gaze_dense:
            yield request
            continue
        chosen: dict[str, Any] = {
            "gaze_full_layers": request.gaze_full_layers or selection.gaze_full_layers or (),
            "look_at": request.look_at or selection.look_at,
        }
        if request.gaze_top_k is None and request.gaze_keep is None:
            budget = ("gaze_top_k", "gaze_keep", "gaze_dense")
            chosen |= {name: getattr(selection, name) for name in budget}
        try:
            yield dataclasses.replace(request, **chosen)
        except UserError as error:
            wrong[request.id] = f"Question {request.id!r}: {error}"
