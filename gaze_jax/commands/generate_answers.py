"""What generate.py does with its options: one conversation, or a file of questions."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gaze_jax.commands import cli
from gaze_jax.commands.generate_groups import GAZE_FLAGS
from gaze_jax.commands.generate_options import GenerateOptions
from gaze_jax.errors import UserError, renamed
from gaze_jax.evaluate.run import best_layer_of
from gaze_jax.families import get_family
from gaze_jax.infer.requests import Request, answer_all, read_requests, record
from gaze_jax.infer.sampler import Sampler, collect_answer, load
from gaze_jax.infer.trace import Trace
from gaze_jax.infer.trace_file import save
from gaze_jax.media.images import read_image
from gaze_jax.media.video import Clip, open_video
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.viewer.answer_sheet import sheet
from gaze_jax.viewer.html import Entry, index_page, viewer_page
from gaze_jax.viewer.video import write_clip


def _open_videos(options: GenerateOptions, style: str) -> list[Clip]:
    """The videos, sampled as for models of this style unless the options differ."""
    shown = options.shown
    chosen = {name: getattr(shown, name) for name in ("fps", "max_frames")}
    given = {name: value for name, value in chosen.items() if value is not None}
    sampling = dataclasses.replace(get_family(style).frames, **given)
    return [open_video(name, sampling, frames_fps=options.value("folder_fps")) for name in shown.video]


def _sampler(options: GenerateOptions) -> Sampler:
    """The checkpoint, loaded on the devices that the options name."""
    devices = options.devices
    mesh = make_mesh(MeshConfig(fsdp=options.value("fsdp"))) if devices.all_devices else None
    sampler = load(options.checkpoint or "", mesh=mesh, **options.selection.config)
    config = sampler.config
    options.check_checkpoint(top_k=config.gaze.top_k, depth=config.decoder.depth, resizes=sampler.resize)
    return dataclasses.replace(
        sampler, resize=sampler.resize or options.shown.resize, cache_tokens=devices.cache_tokens
    )


def ask(options: GenerateOptions) -> None:
    """Print the answers as they are generated and, with --out, show where the last one looked.

    Raises:
      UserError: media, the checkpoint or a question cannot be read, or a file cannot be written.
    """
    shown, files = options.shown, options.output.out
    images = [read_image(name) for name in shown.image]
    _open_videos(options, "square")  # report unreadable videos before loading the checkpoint
    sampler = _sampler(options)
    clips = _open_videos(options, sampler.layout.views.style)
    max_tokens = options.sampling.max_tokens
    chat = sampler.chat(system=shown.system, gaze=options.selection.options, free_slots=max_tokens)
    answer = None
    for turn, question in enumerate(shown.question, start=1):
        with renamed(GAZE_FLAGS):
            chat.ask(question, images=images if turn == 1 else (), videos=clips if turn == 1 else ())
        return_trace = bool(files) and turn == len(shown.question)
        steps = chat.stream(max_tokens, return_trace=return_trace, **options.sampling.drawn)
        answer = collect_answer(chat, steps, lambda text: print(text, end="", flush=True))
        print(flush=True)
    if answer is not None and answer.trace is not None:
        for name in files:
            _show(answer.trace, Path(name), options)


def _show(trace: Trace, path: Path, options: GenerateOptions) -> None:
    """Write a trace in the format given by the suffix."""
    layer, views = options.output.layer, options.value("views")
    if layer is None:
        layer = best_layer_of(options.checkpoint or "")
    if path.suffix == ".gaze":
        save(trace, path)
    elif path.suffix == ".html":
        cli.write_text(path, viewer_page(trace, layer=layer))
    elif path.suffix == ".png":
        picture = sheet(trace, layer=layer, views=views)
        with cli.writing(path):
            picture.save(path, format="PNG")
    else:
        write_clip(trace, path, layer=layer, views=views)


def _read(options: GenerateOptions) -> list[Request]:
    """The questions with the options applied; refuses output paths that could not be written later."""
    defaults = options.sampling.drawn | {
        "max_tokens": options.sampling.max_tokens,
        "system": options.shown.system,
    }
    requests = read_requests(options.batch.questions or "", **defaults)
    if options.batch.traces is not None:
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
        cli.make_folder("traces", options.batch.traces)
    return list(_with_gaze(requests, options))


def _with_gaze(requests: list[Request], options: GenerateOptions) -> Iterator[Request]:
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
            raise UserError(f"Question {request.id!r}: {error}") from error


def ask_many(options: GenerateOptions) -> None:
    """Answer a file of questions; each answer is written as soon as it is complete.

    Raises:
      UserError: a line, its media or the checkpoint cannot be read, or a file cannot be written.
    """
    requests = _read(options)
    sampler = _sampler(options)
    batch, entries = options.batch, []
    answers = batch.answers or ""
    with cli.writing(answers):
        file = open(answers, "w", encoding="utf-8")  # noqa: SIM115
    try:
        with file:
            return_trace = batch.traces is not None
            for request, answer in answer_all(
                sampler, requests, batch_size=options.value("batch_size"), return_trace=return_trace
            ):
                with cli.writing(answers):
                    file.write(json.dumps(record(request, answer), ensure_ascii=False) + "\n")
                    file.flush()
                if answer.trace is not None and batch.traces is not None:
                    page = Path(batch.traces, f"{request.id}.html")
                    _show(answer.trace, page.with_name(f"{request.id}.gaze"), options)
                    _show(answer.trace, page, options)
                    entries.append(Entry.of(answer.trace, page.name))
    finally:
        if entries:  # index the finished answers even after an error
            cli.write_text(Path(batch.traces or "", "index.html"), index_page(entries))
