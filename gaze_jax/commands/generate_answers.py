"""One conversation of generate.py, and what both kinds of call share: the sampler and the pictures."""

import dataclasses
from pathlib import Path

from gaze_jax.commands.devices import mesh_of
from gaze_jax.commands.generate_groups import GAZE_FLAGS
from gaze_jax.commands.generate_options import GenerateOptions
from gaze_jax.errors import renamed
from gaze_jax.evaluate.run import best_layer_of
from gaze_jax.families import get_family
from gaze_jax.infer.sampler import Sampler, collect_answer, load
from gaze_jax.infer.trace import Trace
from gaze_jax.media.images import read_image
from gaze_jax.media.video import Clip, open_video
from gaze_jax.parallel import together
from gaze_jax.viewer.files import write_trace


def _open_videos(options: GenerateOptions, style: str) -> list[Clip]:
    """The videos, sampled as for models of this style unless the options differ."""
    shown = options.shown
    chosen = {name: getattr(shown, name) for name in ("fps", "max_frames")}
    given = {name: value for name, value in chosen.items() if value is not None}
    sampling = dataclasses.replace(get_family(style).frames, **given)
    return [open_video(name, sampling, frames_fps=options.value("folder_fps")) for name in shown.video]


def make_sampler(options: GenerateOptions) -> Sampler:
    """The checkpoint, loaded on the devices that the options name."""
    devices = options.devices
    with together.agreed(), renamed({"mesh.tensor": "--tensor"}):
        mesh = mesh_of(devices.all_devices, devices.sizes)
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
    with together.agreed():
        images = [read_image(name) for name in shown.image]
        _open_videos(options, "square")  # report unreadable videos before loading the checkpoint
    sampler = make_sampler(options)
    clips = _open_videos(options, sampler.layout.views.style)
    max_tokens = options.sampling.max_tokens
    chat = sampler.chat(system=shown.system, gaze=options.selection.options, free_slots=max_tokens)
    answer = None
    for turn, question in enumerate(shown.question, start=1):
        with renamed(GAZE_FLAGS):
            chat.ask(question, images=images if turn == 1 else (), videos=clips if turn == 1 else ())
        return_trace = bool(files) and turn == len(shown.question)
        steps = chat.stream(max_tokens, return_trace=return_trace, **options.sampling.drawn)
        answer = collect_answer(chat, steps, _print)
        _print("\n")
    if answer is None or answer.trace is None:
        return
    trace = answer.trace

    def show() -> None:
        for name in files:
            show_trace(trace, Path(name), options)

    together.by_first(show)


def _print(text: str) -> None:
    if together.is_first():
        print(text, end="", flush=True)


def show_trace(trace: Trace, path: Path, options: GenerateOptions) -> None:
    """Write a trace in the format given by the suffix."""
    layer = options.output.layer
    if layer is None:
        layer = best_layer_of(options.checkpoint or "")
    write_trace(trace, path, layer=layer, views=options.value("views"))
