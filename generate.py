"""Ask a model about images and videos, and see where every token of the answer looked.

python generate.py --checkpoint=ckpt/llava --image=street.jpg --question="What is this?" --out=answer.html
    any multimodal checkpoint: converted, a Hugging Face directory as it is, or a run of train.py. --image,
    --video and --question may be repeated: further questions go on with the conversation. --out may be too:
    .html is the viewer, .png a sheet, .mp4 a clip, .gaze the trace itself (python -m gaze_jax.viewer)

python generate.py --checkpoint=ckpt/llava --questions=questions.jsonl --answers=answers.jsonl --traces=looked
    many questions, a JSON object a line, answered in batches; see gaze_jax/infer/requests.py for its fields
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags

from gaze_jax import cli
from gaze_jax.core.layout import NEWLINES
from gaze_jax.errors import UserError
from gaze_jax.evaluate.run import best_layer_of
from gaze_jax.infer.detokenizer import check_limits
from gaze_jax.infer.gaze_options import GazeOptions
from gaze_jax.infer.prompt import check_questions
from gaze_jax.infer.requests import Request, answer_all, read_requests, record
from gaze_jax.infer.sampler import FRAME_SAMPLING, Sampler, collect_answer, load
from gaze_jax.infer.sampling import check_sampling
from gaze_jax.infer.steer import LookAt
from gaze_jax.infer.trace import Trace
from gaze_jax.infer.trace_file import save
from gaze_jax.media.images import read_image
from gaze_jax.media.video import Clip, open_video
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.viewer.answer_sheet import sheet
from gaze_jax.viewer.html import Entry, index_page, viewer_page
from gaze_jax.viewer.video import need_av, write_clip
from pallas_kernels.spec import SELECT_PER

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A converted checkpoint, a Hugging Face directory, or a run of train.py."
)
_IMAGE = flags.DEFINE_multi_string("image", [], "An image file.")
_VIDEO = flags.DEFINE_multi_string("video", [], "A video file, an animation, or a folder of frames.")
_QUESTION = flags.DEFINE_multi_string("question", [], "What to ask; several are turns of one conversation.")
_QUESTIONS = flags.DEFINE_string("questions", None, "JSON Lines file of many questions.")
_ANSWERS = flags.DEFINE_string("answers", None, "JSON Lines file to write their answers to.")
_TRACES = flags.DEFINE_string("traces", None, "Folder for a trace and a viewer page of each, and an index.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Most questions of the file to answer at once.")
_SYSTEM = flags.DEFINE_string("system", None, "System prompt; default: the one of the model's family.")
_FPS = flags.DEFINE_float("fps", None, "Frames of a video to show per second; default: the family's.")
_MAX_FRAMES = flags.DEFINE_integer(
    "max_frames", None, "Most frames of a video to show; default: the family's."
)
_FOLDER_FPS = flags.DEFINE_float("folder_fps", 1.0, "Frames per second that a folder of frames has.")
_OUT = flags.DEFINE_multi_string(
    "out", [], "Where the last answer looked: a file that ends in .html, .png, .mp4 or .gaze."
)
_TOP_K = flags.DEFINE_integer("top_k", None, "Regions per query; default: what the model is configured for.")
_KEEP = flags.DEFINE_float("keep", None, "The same as a fraction of the regions in sight.")
_DENSE = flags.DEFINE_bool("dense", False, "Attend to everything, whatever the model is configured for.")
_FULL_LAYERS = flags.DEFINE_list("full_layers", [], "Layers that attend to everything, such as 0,1.")
_SELECT_PER = flags.DEFINE_enum(
    "select_per", None, SELECT_PER, "Who selects: each query head, or each kv head's group."
)
_REGION = flags.DEFINE_list("region", None, "Target size of an image's regions in tokens, such as 7,7.")
_VIDEO_REGION = flags.DEFINE_list(
    "video_region", None, "The same of a video, with frames first, such as 2,4,8."
)
_NEWLINES = flags.DEFINE_enum(
    "newlines", None, NEWLINES, "Read all newlines, or route them with their regions."
)
_LOOK_AT = flags.DEFINE_multi_string(
    "look_at", [], "Box x0,y0,x1,y1 in pixels, and perhaps a frame's number: look nowhere else."
)
_LOOK_AT_LAYERS = flags.DEFINE_list("look_at_layers", None, "Layers that --look_at is for; default: all.")
_LOOK_AT_BIAS = flags.DEFINE_float(
    "look_at_bias", None, "Make the boxes likelier by as many logits, in place of looking nowhere else."
)
_VISUAL_DTYPE = flags.DEFINE_enum("visual_dtype", None, ["int8"], "Keep visual keys and values as int8.")
_OFFLOAD = flags.DEFINE_bool(
    "offload", False, "Keep visual keys and values in the host's memory and fetch what is selected."
)
_LAYER = flags.DEFINE_integer(
    "layer", None, "Layer of the pictures; default: all, or the best one of a run's eval.json."
)
_VIEWS = flags.DEFINE_integer("views", 8, "Most views and frames in a PNG or MP4: those looked at most.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "Most tokens to generate for a question.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token, more samples.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the likeliest tokens that reach this probability.")
_STOP = flags.DEFINE_multi_string("stop", [], "End the answer before this string.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
_RESIZE = flags.DEFINE_bool("resize", False, "Squash an image of another size to that of a run's tower.")
_CACHE_TOKENS = flags.DEFINE_integer("cache_tokens", None, "Most tokens in the cache; default: what fits.")
_FSDP = flags.DEFINE_integer("fsdp", 1, "Devices that share one copy of the parameters, with all devices.")
_ALL_DEVICES = flags.DEFINE_bool("all_devices", False, "Split batches over all devices, not one.")
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "gaze_jax"),
    "Folder that keeps compiled programs; empty for none.",
)

_OF_GAZE = {
    "select_per": _SELECT_PER,
    "region": _REGION,
    "video_region": _VIDEO_REGION,
    "newlines": _NEWLINES,
    "visual_dtype": _VISUAL_DTYPE,
}
_OF_VIDEOS = (_FPS, _MAX_FRAMES, _FOLDER_FPS, _VIDEO_REGION)
_OF_REGIONS = (
    *_OF_GAZE.values(),
    _OFFLOAD,
    _TOP_K,
    _KEEP,
    _DENSE,
    _FULL_LAYERS,
    _LOOK_AT,
    _RESIZE,
)
_OF_ONE = (
    _IMAGE,
    _VIDEO,
    _QUESTION,
    _OUT,
    _FPS,
    _MAX_FRAMES,
    _FOLDER_FPS,
    _VIEWS,
    _LOOK_AT_LAYERS,
    _LOOK_AT_BIAS,
)
_OF_MANY = (_ANSWERS, _TRACES, _BATCH_SIZE)
_SUFFIXES = (".html", ".png", ".mp4", ".gaze")


def _numbers(holder: flags.FlagHolder) -> tuple[int, ...] | None:
    """A list flag as integers; None if it was not given."""
    if holder.value is None:
        return None
    if not all(word.isdecimal() for word in holder.value):
        raise UserError(f"--{holder.name}={','.join(holder.value)} must be numbers with commas between them.")
    return tuple(int(word) for word in holder.value)


def _gaze() -> dict[str, Any]:
    """Fields of ``GazeConfig`` that the flags choose."""
    values = {n: _numbers(h) if isinstance(h.value, list) else h.value for n, h in _OF_GAZE.items()}
    chosen = {name: value for name, value in values.items() if value is not None}
    return chosen | ({"decode_implementation": "offload"} if _OFFLOAD.value else {})


def _gaze_options() -> GazeOptions:
    """Which regions queries may select."""
    layers = _numbers(_LOOK_AT_LAYERS)
    if not _LOOK_AT.value:
        cli.refuse_flags((_LOOK_AT_LAYERS, _LOOK_AT_BIAS), "has no effect without --look_at")
    boxes = tuple(LookAt.parse(text, layers=layers, bias=_LOOK_AT_BIAS.value) for text in _LOOK_AT.value)
    full_layers = _numbers(_FULL_LAYERS) or ()
    return GazeOptions(_TOP_K.value, _KEEP.value, _DENSE.value is True, full_layers, boxes)


def _open_videos(style: str) -> list[Clip]:
    """The videos, sampled as models of this style are shown them but for what the flags say."""
    sampling = FRAME_SAMPLING[style]
    if _FPS.value is not None:
        sampling = dataclasses.replace(sampling, fps=_FPS.value)
    if _MAX_FRAMES.value is not None:
        sampling = dataclasses.replace(sampling, max_frames=_MAX_FRAMES.value)
    return [open_video(name, sampling, frames_fps=_FOLDER_FPS.value) for name in _VIDEO.value]


def _check_out() -> None:
    """Refuse a picture that could not be written when the answer is there."""
    for name in _OUT.value:
        if Path(name).suffix not in _SUFFIXES:
            raise UserError(f"--out={name} must end in one of {', '.join(_SUFFIXES)}.")
        cli.check_file("out", name)
        if name.endswith(".mp4"):
            need_av()
    if _VIEWS.value < 1:
        raise UserError(f"--views={_VIEWS.value} must be at least 1.")


def _check_one() -> None:
    """Refuse, before anything is read, what cannot be asked."""
    cli.refuse_flags(_OF_MANY, "is for --questions")
    if not _VIDEO.value:
        cli.refuse_flags(_OF_VIDEOS, "has no effect without --video")
    suffixes = {Path(name).suffix for name in _OUT.value}
    if not suffixes - {".gaze"}:
        cli.refuse_flags((_LAYER,), "has no effect without an --out that shows a layer")
    if not suffixes & {".png", ".mp4"}:
        cli.refuse_flags((_VIEWS,), "has no effect without --out=....png or .mp4")
    if not any(Path(name).is_dir() for name in _VIDEO.value):
        cli.refuse_flags((_FOLDER_FPS,), "has no effect without a --video that is a folder")
    if _TEMPERATURE.value == 0:
        cli.refuse_flags((_TOP_P, _SEED), "has no effect at --temperature=0, which samples nothing")
    if not _IMAGE.value and not _VIDEO.value:
        cli.refuse_flags(_OF_REGIONS, "has no effect without --image or --video")
        if _OUT.value:
            raise UserError("Nothing is shown to the model, so there is nothing to draw; drop --out.")
    if _DENSE.value:
        cli.refuse_flags((_SELECT_PER,), "has no effect with --dense, which selects nothing")
        if drawn := [name for name in _OUT.value if Path(name).suffix in (".png", ".mp4")]:
            raise UserError(
                f"--out={drawn[0]} shows what was selected, and --dense selects nothing; drop one."
            )
    check_questions(_QUESTION.value, len(_IMAGE.value), len(_VIDEO.value))


def _sampler() -> Sampler:
    """The checkpoint, on the devices that the flags say."""
    mesh = make_mesh(MeshConfig(fsdp=_FSDP.value)) if _ALL_DEVICES.value else None
    if mesh is None:
        cli.refuse_flags((_FSDP,), "has no effect without --all_devices")
    sampler = load(_CHECKPOINT.value or "", mesh=mesh, **_gaze())
    if sampler.resize:
        cli.refuse_flags((_RESIZE,), "is for runs of train.py; a checkpoint has its own way with images")
    if sampler.config.gaze.top_k is None and not (_TOP_K.value or _KEEP.value or _QUESTIONS.value):
        cli.refuse_flags((_SELECT_PER,), "has no effect on a checkpoint that attends densely without --top_k")
    depth = sampler.config.decoder.depth
    if _LAYER.value is not None and not 0 <= _LAYER.value < depth:
        raise UserError(f"--layer={_LAYER.value} must be between 0 and {depth - 1}.")
    return dataclasses.replace(
        sampler, resize=sampler.resize or _RESIZE.value is True, cache_tokens=_CACHE_TOKENS.value
    )


def _ask() -> None:
    """Print the answers as they come and, with --out, show where the last one looked."""
    _check_one()
    gaze = _gaze_options()
    images = [read_image(name) for name in _IMAGE.value]
    _open_videos("square")  # what cannot be opened is said before the checkpoint is read
    sampler = _sampler()
    clips = _open_videos(sampler.layout.views.style)
    chat = sampler.chat(system=_SYSTEM.value, gaze=gaze, free_slots=_MAX_TOKENS.value)
    if chat.top_k is None and any(Path(name).suffix in (".png", ".mp4") for name in _OUT.value):
        raise UserError("This checkpoint attends densely, so there is nothing to draw; give --top_k.")
    answer = None
    for turn, question in enumerate(_QUESTION.value, start=1):
        chat.ask(question, images=images if turn == 1 else (), videos=clips if turn == 1 else ())
        steps = chat.stream(
            _MAX_TOKENS.value,
            temperature=_TEMPERATURE.value,
            top_p=_TOP_P.value,
            stop=_STOP.value,
            seed=_SEED.value,
            return_trace=bool(_OUT.value) and turn == len(_QUESTION.value),
        )
        answer = collect_answer(chat, steps, lambda text: print(text, end="", flush=True))
        print(flush=True)
    if answer is not None and answer.trace is not None:
        for name in _OUT.value:
            _show(answer.trace, Path(name))


def _show(trace: Trace, path: Path) -> None:
    """Write a trace in the form that the suffix names."""
    layer = best_layer_of(_CHECKPOINT.value or "") if _LAYER.value is None else _LAYER.value
    if path.suffix == ".gaze":
        save(trace, path)
    elif path.suffix == ".html":
        cli.write_text(path, viewer_page(trace, layer=layer))
    elif path.suffix == ".png":
        picture = sheet(trace, layer=layer, views=_VIEWS.value)
        with cli.writing(path):
            picture.save(path, format="PNG")
    else:
        write_clip(trace, path, layer=layer, views=_VIEWS.value)


def _check_many() -> list[Request]:
    """Read the questions; refuse what could not be written when they are answered."""
    cli.refuse_flags(_OF_ONE, "is for one conversation; write it into the lines of --questions")
    if _ANSWERS.value is None:
        raise UserError("Give --answers, the file to write.")
    cli.check_file("answers", _ANSWERS.value)
    if Path(_ANSWERS.value).resolve() == Path(_QUESTIONS.value or "").resolve():
        raise UserError("--answers is the file of --questions, which it would replace; name another.")
    if _BATCH_SIZE.value < 1:
        raise UserError(f"--batch_size={_BATCH_SIZE.value} must be at least 1.")
    defaults: dict[str, Any] = {
        "system": _SYSTEM.value,
        "max_tokens": _MAX_TOKENS.value,
        "temperature": _TEMPERATURE.value,
        "top_p": _TOP_P.value,
        "stop": tuple(_STOP.value),
        "seed": _SEED.value,
    }
    requests = read_requests(_QUESTIONS.value or "", **defaults)
    if _TRACES.value is None:
        cli.refuse_flags((_LAYER,), "has no effect without --traces")
        return requests
    taken = {"index"}
    for request in requests:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}", request.id):
            raise UserError(
                f"With --traces an id is a file's name; {request.id[:200]!r} must be 1 to 200 of the "
                "characters A-Z a-z 0-9 . _ -."
            )
        if request.id.lower() in taken:  # not every file system tells A from a
            raise UserError(f"With --traces an id is a file's name; {request.id!r} is taken, rename it.")
        taken.add(request.id.lower())
    cli.make_folder("traces", _TRACES.value)
    return requests


def _with_gaze(requests: list[Request], gaze: GazeOptions) -> Iterator[Request]:
    """The questions with what the flags say, where they say nothing themselves."""
    boxes = tuple(_LOOK_AT.value)
    for request in requests:
        if request.dense:
            yield request
            continue
        chosen: dict[str, Any] = {
            "full_layers": request.full_layers or gaze.full_layers,
            "look_at": request.look_at or boxes,
        }
        if request.top_k is None and request.keep is None:
            chosen |= {"top_k": gaze.top_k, "keep": gaze.keep, "dense": gaze.dense}
        try:
            yield dataclasses.replace(request, **chosen)
        except UserError as error:
            raise UserError(f"Question {request.id!r}: {error}") from error


def _ask_many() -> None:
    """Answer a file of questions; every answer is written when it is there."""
    requests = list(_with_gaze(_check_many(), _gaze_options()))
    sampler = _sampler()
    entries = []
    answers = _ANSWERS.value or ""
    with cli.writing(answers):
        file = open(answers, "w", encoding="utf-8")  # noqa: SIM115
    try:
        with file:
            return_trace = _TRACES.value is not None
            for request, answer in answer_all(
                sampler, requests, batch_size=_BATCH_SIZE.value, return_trace=return_trace
            ):
                with cli.writing(answers):
                    file.write(json.dumps(record(request, answer), ensure_ascii=False) + "\n")
                    file.flush()
                if answer.trace is not None and _TRACES.value is not None:
                    page = Path(_TRACES.value, f"{request.id}.html")
                    _show(answer.trace, page.with_name(f"{request.id}.gaze"))
                    _show(answer.trace, page)
                    entries.append(Entry.of(answer.trace, page.name))
    finally:
        if entries:  # of what was answered, whatever came after it
            cli.write_text(Path(_TRACES.value or "", "index.html"), index_page(entries))


def main() -> None:
    """Answer one conversation or a file of questions."""
    if _CHECKPOINT.value is None:
        raise UserError("Give --checkpoint, a converted one, a Hugging Face directory or a run of train.py.")
    if _COMPILATION_CACHE.value:
        jax.config.update("jax_compilation_cache_dir", _COMPILATION_CACHE.value)
    check_limits(_MAX_TOKENS.value, _STOP.value)
    check_sampling(_TEMPERATURE.value, _TOP_P.value, _SEED.value)
    _check_out()
    if _QUESTIONS.value is None:
        _ask()
    else:
        _ask_many()


if __name__ == "__main__":
    cli.run(main)
