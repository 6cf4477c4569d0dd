"""Ask a model about images and videos, and draw where every token of the answer looked.

python generate.py --checkpoint=ckpt/llava --image=street.jpg --question="What is this?" --out=answer.png
    a multimodal checkpoint: converted, or a Hugging Face directory as it is. --image, --video and --question
    may be repeated: further questions go on with the conversation

python generate.py --workdir=runs/digits --image=runs/digits/scene.png \\
    --question="Which digit is in row 2, column 3?" --out=answer.png
    a model trained here, which reads one image and one question
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from absl import flags

from gaze_jax import cli
from gaze_jax.core.layout import NEWLINES
from gaze_jax.data.images import read_image
from gaze_jax.data.video import Clip, open_video
from gaze_jax.errors import UserError
from gaze_jax.evaluate.run import load, routing_layer
from gaze_jax.infer.answer import ask
from gaze_jax.infer.chat import SAMPLING, Assistant, Said, Talk, check_questions
from gaze_jax.infer.session import check_sampling
from gaze_jax.viewer.answer_sheet import answer_sheet, most_looked_at, pictures_of, title_of, unit_sheets
from pallas_kernels.spec import SHARES

_WORKDIR = flags.DEFINE_string("workdir", None, "The workdir of a run of train.py.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A converted checkpoint, or a Hugging Face directory.")
_IMAGE = flags.DEFINE_multi_string("image", [], "An image file.")
_VIDEO = flags.DEFINE_multi_string("video", [], "A video file, an animation, or a folder of frames.")
_QUESTION = flags.DEFINE_multi_string("question", [], "What to ask; several are turns of one conversation.")
_SYSTEM = flags.DEFINE_string("system", None, "System prompt; default: the one of the model's family.")
_FPS = flags.DEFINE_float("fps", None, "Frames of a video to show per second; default: the family's.")
_MAX_FRAMES = flags.DEFINE_integer(
    "max_frames", None, "Most frames of a video to show; default: the family's."
)
_FOLDER_FPS = flags.DEFINE_float("folder_fps", 1.0, "Frames per second that a folder of frames has.")
_OUT = flags.DEFINE_string("out", None, "Write the picture to this PNG file.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Regions per query; default: what the model is configured for.")
_DENSE = flags.DEFINE_bool("dense", False, "Attend to everything, whatever the model is configured for.")
_SHARE = flags.DEFINE_enum("share", None, SHARES, "Who selects: each query head, or each kv head's group.")
_REGION = flags.DEFINE_list("region", None, "Target size of an image's regions in tokens, such as 7,7.")
_VIDEO_REGION = flags.DEFINE_list(
    "video_region", None, "The same of a video, with frames first, such as 2,4,8."
)
_NEWLINES = flags.DEFINE_enum(
    "newlines", None, NEWLINES, "Read all newlines, or route them with their regions."
)
_LAYER = flags.DEFINE_integer(
    "layer", None, "Layer of the picture; default: the best of eval.json, or all of a checkpoint."
)
_UNITS = flags.DEFINE_integer("units", 8, "Most views and frames in the picture: those looked at most.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "Most tokens to generate for a question.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token, more samples.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
_RESIZE = flags.DEFINE_bool("resize", False, "Squash an image of another size to the tower's.")

_OF_GAZE = {"share": _SHARE, "region": _REGION, "video_region": _VIDEO_REGION, "newlines": _NEWLINES}
_OF_VIDEOS = (_FPS, _MAX_FRAMES, _FOLDER_FPS, _VIDEO_REGION)
_OF_PICTURES = (_LAYER, _UNITS)
_OF_CHECKPOINTS = (_VIDEO, _SYSTEM, _FPS, _MAX_FRAMES, _FOLDER_FPS, _UNITS, _DENSE, *_OF_GAZE.values())


def _ask_run(workdir: str) -> None:
    """Print the answer of a model trained here and, with --out, draw it."""
    cli.refuse_flags(_OF_CHECKPOINTS, "is for --checkpoint")
    if len(_IMAGE.value) != 1 or len(_QUESTION.value) != 1:
        raise UserError("A model trained here reads one image and one question; give one of each.")
    image, question = read_image(_IMAGE.value[0]), _QUESTION.value[0]
    trained = load(workdir)
    model = trained.experiment.model
    layout = model.layout
    top_k = model.gaze.top_k if _TOP_K.value is None else _TOP_K.value
    out = _OUT.value
    if out is not None and top_k is None:
        raise UserError("This run attends densely, so there is nothing to draw; drop --out or give --top_k.")
    layer = 0 if out is None else routing_layer(workdir, _LAYER.value, model.decoder.depth)
    answer = ask(
        model,
        trained.params,
        trained.tokenizer,
        layout,
        image,
        question,
        top_k=top_k,
        max_tokens=_MAX_TOKENS.value,
        temperature=_TEMPERATURE.value,
        seed=_SEED.value,
        resize=_RESIZE.value,
    )
    print(answer.text)
    if out is not None and answer.selected is not None:
        title = f"{question}\n{top_k} of {layout.regions} regions, layer {layer}"
        sheet = answer_sheet(image, answer.pieces, answer.selected[:, layer], layout, title=title)
        sheet.save(Path(out), format="PNG")


def _open_videos(style: str) -> list[Clip]:
    """The videos, sampled as models of this style are shown them but for what the flags say."""
    sampling = SAMPLING[style]
    if _FPS.value is not None:
        sampling = dataclasses.replace(sampling, fps=_FPS.value)
    if _MAX_FRAMES.value is not None:
        sampling = dataclasses.replace(sampling, max_frames=_MAX_FRAMES.value)
    return [open_video(name, sampling, frames_fps=_FOLDER_FPS.value) for name in _VIDEO.value]


def _gaze() -> dict[str, Any]:
    """Fields of ``GazeConfig`` that the flags choose."""
    chosen: dict[str, Any] = {}
    for name, holder in _OF_GAZE.items():
        value: Any = holder.value
        if isinstance(value, list):
            if not all(side.isdecimal() for side in value):
                raise UserError(f"--{name}={','.join(value)} must be numbers with commas between them.")
            value = tuple(int(side) for side in value)
        if value is not None:
            chosen[name] = value
    return chosen


def _check_chat() -> dict[str, Any]:
    """Refuse, before anything is read, what cannot be asked; returns the chosen fields of ``GazeConfig``."""
    cli.refuse_flags((_RESIZE,), "is for --workdir; a checkpoint has its own way with images")
    if not _VIDEO.value:
        cli.refuse_flags(_OF_VIDEOS, "has no effect without --video")
    if _OUT.value is None:
        cli.refuse_flags(_OF_PICTURES, "has no effect without --out")
    elif not _IMAGE.value and not _VIDEO.value:
        raise UserError("Nothing is shown to the model, so there is nothing to draw; drop --out.")
    if _DENSE.value:
        cli.refuse_flags((_TOP_K, _SHARE, _OUT), "has no effect with --dense, which selects nothing")
    check_questions(_QUESTION.value, len(_IMAGE.value), len(_VIDEO.value))
    check_sampling(_MAX_TOKENS.value, _TEMPERATURE.value, _SEED.value)
    if _TOP_K.value is not None and _TOP_K.value < 1:
        raise UserError(f"--top_k={_TOP_K.value} must be at least 1; --dense attends to everything.")
    if _UNITS.value < 1:
        raise UserError(f"--units={_UNITS.value} must be at least 1.")
    return _gaze()


def _check_out() -> None:
    """Refuse a picture that could not be written when the answer is there."""
    if _OUT.value is not None and not Path(_OUT.value).absolute().parent.is_dir():
        raise UserError(f"--out={_OUT.value} lies in a folder that does not exist; make it first.")


def _chat(checkpoint: str) -> None:
    """Print the answers as they come and, with --out, draw them."""
    gaze = _check_chat()
    images = [read_image(name) for name in _IMAGE.value]
    _open_videos("square")  # what cannot be opened is said before the checkpoint is read
    assistant = Assistant.load(Path(checkpoint)).looking(**gaze)
    clips = _open_videos(assistant.layout.views.style)
    if _TOP_K.value is None and assistant.config.gaze.top_k is None:
        if _OUT.value is not None:
            raise UserError("This checkpoint attends densely, so there is nothing to draw; give --top_k.")
        cli.refuse_flags((_SHARE,), "has no effect on a checkpoint that attends densely without --top_k")
    depth = assistant.config.decoder.depth
    if _LAYER.value is not None and not 0 <= _LAYER.value < depth:
        raise UserError(f"--layer={_LAYER.value} must be between 0 and {depth - 1}.")
    talk = Talk(
        assistant,
        _QUESTION.value[0],
        images=images,
        videos=clips,
        system=_SYSTEM.value,
        top_k=_TOP_K.value,
        dense=_DENSE.value is True,
    )
    said: list[Said] = []
    for turn, question in enumerate(_QUESTION.value):
        if turn:
            talk.ask(question)
        for step in talk.answer(_MAX_TOKENS.value, temperature=_TEMPERATURE.value, seed=_SEED.value):
            print(step.text, end="", flush=True)
            said.append(step)
        print(flush=True)
    if _OUT.value is not None:
        sheet = _drawn(talk, said, images, clips, f"{talk.top_k} of {talk.regions} regions")
        sheet.save(Path(_OUT.value), format="PNG")


def _drawn(
    talk: Talk, said: Sequence[Said], images: Sequence[np.ndarray], clips: Sequence[Clip], budget: str
) -> PIL.Image.Image:
    """The picture: the answers over the views and frames that they looked at most."""
    selected = np.stack([step.selected for step in said if step.selected is not None])
    if _LAYER.value is None:
        # All layers' heads side by side.
        selected, layer = selected.reshape(len(selected), -1, selected.shape[-1]), "all layers"
    else:
        selected, layer = selected[:, _LAYER.value], f"layer {_LAYER.value}"
    units = most_looked_at(talk.units, selected, _UNITS.value)
    titles = [title_of(unit, talk.units, [clip.times for clip in clips]) for unit in units]
    titles[0] = f"{_QUESTION.value[0]}\n{budget}, {layer}. {titles[0]}"
    pictures = pictures_of(units, images, clips)
    return unit_sheets(pictures, units, [step.token for step in said], selected, titles=titles)


def main() -> None:
    """Answer with a run of train.py or with a checkpoint."""
    if (_WORKDIR.value is None) == (_CHECKPOINT.value is None):
        raise UserError("Give either --workdir, a run of train.py, or --checkpoint.")
    _check_out()
    if _WORKDIR.value is not None:
        _ask_run(_WORKDIR.value)
    else:
        _chat(_CHECKPOINT.value or "")


if __name__ == "__main__":
    cli.run_door(main)
