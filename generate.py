"""Ask a trained model about an image and draw where every token of the answer looked.

python generate.py --workdir=runs/digits --image=runs/digits/scene.png \\
    --question="Which digit is in row 2, column 3?" --out=answer.png
"""

from pathlib import Path

from absl import flags

from gaze_jax import cli
from gaze_jax.data.images import read_image
from gaze_jax.errors import UserError
from gaze_jax.evaluate.run import load, routing_layer
from gaze_jax.infer.answer import ask
from gaze_jax.viewer.answer_sheet import answer_sheet

_WORKDIR = flags.DEFINE_string("workdir", None, "The workdir of a run of train.py.", required=True)
_IMAGE = flags.DEFINE_string("image", None, "An image file.", required=True)
_QUESTION = flags.DEFINE_string("question", None, "What to ask.", required=True)
_OUT = flags.DEFINE_string("out", None, "Write the picture to this PNG file.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Regions per query; default: what the run was trained with.")
_LAYER = flags.DEFINE_integer("layer", None, "Layer of the picture; default: the best of eval.json.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "Most tokens to generate.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token, more samples.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
_RESIZE = flags.DEFINE_bool("resize", False, "Squash an image of another size to the tower's.")


def main() -> None:
    """Print the answer and, with --out, draw it."""
    trained = load(_WORKDIR.value)
    model = trained.experiment.model
    layout = model.layout
    top_k = model.gaze.top_k if _TOP_K.value is None else _TOP_K.value
    out = _OUT.value
    if out is not None and top_k is None:
        raise UserError("This run attends densely, so there is nothing to draw; drop --out or give --top_k.")
    layer = 0 if out is None else routing_layer(_WORKDIR.value, _LAYER.value, model.decoder.depth)
    image = read_image(_IMAGE.value)
    answer = ask(
        model,
        trained.params,
        trained.tokenizer,
        layout,
        image,
        _QUESTION.value,
        top_k=top_k,
        max_tokens=_MAX_TOKENS.value,
        temperature=_TEMPERATURE.value,
        seed=_SEED.value,
        resize=_RESIZE.value,
    )
    print(answer.text)
    if out is not None and answer.selected is not None:
        title = f"{_QUESTION.value}\n{top_k} of {layout.regions} regions, layer {layer}"
        sheet = answer_sheet(image, answer.pieces, answer.selected[:, layer], layout, title=title)
        sheet.save(Path(out), format="PNG")


if __name__ == "__main__":
    cli.run_door(main)
