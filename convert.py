"""Convert checkpoints between Hugging Face directories and this project, and prove them equal.

python convert.py --from=Qwen2.5-0.5B-Instruct --to=ckpt/qwen --verify
python convert.py --from=llava-onevision-qwen2-7b-ov-hf --to=ckpt/llava
python convert.py --from=Cambrian-S-7B --vision=siglip2-so400m-patch14-384 --to=ckpt/cambrian-s
python convert.py --llm=Qwen3-4B --vision=siglip2-so400m-patch16-384 --to=ckpt/cambrian-4b
python convert.py --from=ckpt/cambrian-4b --to=back --format=hf
"""

from pathlib import Path

from absl import flags

from gaze_jax import cli
from gaze_jax.convert import run, verify
from gaze_jax.convert.export import part_directories
from gaze_jax.convert.hub import resolve
from gaze_jax.errors import UserError
from gaze_jax.models.config import PARAM_DTYPES, GazeConfig, VisionConfig

_FROM = flags.DEFINE_string("from", None, "What to convert: a directory, or a Hub id as NAME@COMMIT.")
_LLM = flags.DEFINE_string("llm", None, "A language model to join with --vision into a new model.")
_VISION = flags.DEFINE_string(
    "vision", None, "An image tower: to join with --llm, or of a --from that came without its own."
)
_TO = flags.DEFINE_string("to", None, "A new directory to write.", required=True)
_FORMAT = flags.DEFINE_enum("format", "gaze", ["gaze", "hf"], "gaze: of this project; hf: for transformers.")
_VERIFY = flags.DEFINE_bool("verify", False, "Run both sides afterwards and compare them stage by stage.")
_DTYPE = flags.DEFINE_enum("dtype", None, list(PARAM_DTYPES), "Change the dtype; default: each tensor's own.")
_FEATURE_LAYER = flags.DEFINE_integer(
    "feature_layer", -2, "Hidden state of the tower that is read: -1 is after its last layer."
)
_REGION = flags.DEFINE_list("region", ["6", "6"], "With --llm: target size of a region in tokens.")
_CONTEXT = flags.DEFINE_integer("context_tokens", 0, "With --llm: context tokens after each image.")
_TOP_K = flags.DEFINE_integer("top_k", None, "With --llm: regions per query; default: attend to all.")
_SEED = flags.DEFINE_integer("seed", 0, "With --llm: of the new parameters.")


def _gaze() -> GazeConfig:
    sides = _REGION.value
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise UserError(f"--region={','.join(sides)} must be two numbers of tokens, such as 6,6.")
    try:
        region = (int(sides[0]), int(sides[1]))
        return GazeConfig(region, context_tokens=_CONTEXT.value, top_k=_TOP_K.value)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_flags() -> None:
    """Refuse what would have no effect."""
    joined = _LLM.value is not None and _VISION.value is not None
    if (_FROM.value is None and not joined) or (_FROM.value is not None and _LLM.value is not None):
        raise UserError("Give either --from, or both --llm and --vision.")
    if _FROM.value is not None:
        cli.refuse_flags((_REGION, _CONTEXT, _TOP_K, _SEED), "is for a new model made of --llm and --vision")
    if _FORMAT.value == "hf":
        if _FROM.value is None:
            raise UserError("--format=hf writes a model that exists already: name it in --from.")
        cli.refuse_flags((_FEATURE_LAYER, _VISION), "has no effect with --format=hf")


def _plan() -> run.Plan:
    dtype, feature_layer = _DTYPE.value, _FEATURE_LAYER.value
    if _LLM.value is not None and _VISION.value is not None:
        return run.compose(
            resolve(_LLM.value),
            resolve(_VISION.value),
            gaze=_gaze(),
            dtype=dtype,
            feature_layer=feature_layer,
            seed=_SEED.value,
        )
    source = resolve(_FROM.value or "")
    vision = None if _VISION.value is None else resolve(_VISION.value)
    plan = run.plan_directory(source, dtype=dtype, feature_layer=feature_layer, vision=vision)
    if not isinstance(plan.config, VisionConfig):
        cli.refuse_flags((_FEATURE_LAYER,), "is of an image tower alone, which this is not")
    return plan


def _verify(directory: Path, originals: dict[str, Path]) -> None:
    stages = verify.verify(directory, originals)
    print(verify.table(stages), flush=True)
    if _DTYPE.value is None:
        verify.require_equal(stages)
    else:
        print(f"The difference includes rounding to {_DTYPE.value}.", flush=True)


def main() -> None:
    """Check the flags, convert, verify."""
    _check_flags()
    target = Path(_TO.value or "")
    if _FORMAT.value == "gaze":
        plan = _plan()
        run.save(plan, target)
        if _VERIFY.value:
            _verify(target, {part: opened.directory for part, opened in plan.opened.items()})
        return
    source = Path(_FROM.value or "")
    run.convert_back(source, target, dtype=_DTYPE.value)
    if _VERIFY.value:
        _verify(source, part_directories(target))


if __name__ == "__main__":
    cli.run(main)
