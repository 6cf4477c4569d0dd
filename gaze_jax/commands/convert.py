"""Convert checkpoints between Hugging Face directories and this project, and verify the result.

gaze-jax convert --from=Qwen2.5-0.5B-Instruct --to=ckpt/qwen --verify
gaze-jax convert --from=llava-onevision-qwen2-7b-ov-hf --to=ckpt/llava
gaze-jax convert --from=Cambrian-S-7B --vision=siglip2-so400m-patch14-384 --to=ckpt/cambrian-s
gaze-jax convert --llm=Qwen3-4B --vision=siglip2-so400m-patch16-384 --to=ckpt/cambrian-4b
gaze-jax convert --from=ckpt/cambrian-4b --to=back --format=hf
"""

import typing
from pathlib import Path

from gaze_jax.commands import cli
from gaze_jax.commands.flags import Flags, Values
from gaze_jax.errors import UserError

if typing.TYPE_CHECKING:
    from gaze_jax.convert.run import Plan
    from gaze_jax.models.config import GazeConfig

DTYPES = ("float32", "bfloat16", "float16")

_OF_NEW_MODELS = ("gaze_region", "gaze_context_tokens", "gaze_top_k", "seed")


def define_flags(flags: Flags) -> None:
    """Flags for the source, the output and a new model."""
    flags.group("What to convert")
    flags.string("from", None, "A directory, or a Hub id as ORGANISATION/NAME@REVISION.", "FOLDER")
    flags.string("llm", None, "A language model to join with --vision into a new model.", "FOLDER")
    flags.string(
        "vision",
        None,
        "An image tower: to join with --llm, or for a --from that lacks its own.",
        "FOLDER",
    )
    flags.integer("feature_layer", -2, "Hidden state of the tower that is read: -1 is after its last layer.")
    flags.group("What to write")
    flags.string("to", None, "A new directory to write.", "FOLDER")
    flags.choice("format", "gaze", ["gaze", "hf"], "gaze: for this project; hf: for transformers.")
    flags.choice("dtype", None, DTYPES, "Change the dtype; default: each tensor's own.")
    flags.boolean("verify", False, "Run both sides afterwards and compare them stage by stage.")
    flags.group("A new model made of --llm and --vision")
    flags.integers("gaze_region", (6, 6), "Target size of a region in tokens.", "6,6")
    flags.integer("gaze_context_tokens", 0, "Context tokens after each image.")
    flags.integer("gaze_top_k", None, "Regions that a query selects; default: attend to all.")
    flags.integer("seed", 0, "Seed of the new parameters.")


def _gaze(values: Values) -> "GazeConfig":
    from gaze_jax.models.config import GazeConfig

    region = values.gaze_region
    if len(region) != 2:
        raise UserError(
            f"--gaze_region={','.join(map(str, region))} must be two numbers of tokens, such as 6,6."
        )
    try:
        return GazeConfig(region, context_tokens=values.gaze_context_tokens, top_k=values.gaze_top_k)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check(values: Values) -> None:
    """Refuse flags that would have no effect."""
    if values.to is None:
        raise UserError("Give --to, a new directory to write.")
    one, joined = values["from"].value is not None, None not in (values.llm, values.vision)
    if (not one and not joined) or (one and values.llm is not None):
        raise UserError("Give either --from, or both --llm and --vision.")
    if one:
        cli.refuse_flags(values, _OF_NEW_MODELS, "is for a new model made of --llm and --vision")
    if values.format == "hf":
        if not one:
            raise UserError("--format=hf writes a model that exists already: name it in --from.")
        cli.refuse_flags(values, ("feature_layer", "vision"), "has no effect with --format=hf")


def _plan(values: Values) -> "Plan":
    from gaze_jax.convert import run as conversion
    from gaze_jax.convert.hub import resolve
    from gaze_jax.models.config import VisionConfig

    dtype, feature_layer = values.dtype, values.feature_layer
    if values.llm is not None:
        return conversion.compose(
            resolve(values.llm),
            resolve(values.vision),
            gaze=_gaze(values),
            dtype=dtype,
            feature_layer=feature_layer,
            seed=values.seed,
        )
    source = resolve(values["from"].value or "")
    vision = None if values.vision is None else resolve(values.vision)
    plan = conversion.plan_directory(source, dtype=dtype, feature_layer=feature_layer, vision=vision)
    if not isinstance(plan.config, VisionConfig):
        cli.refuse_flags(values, ("feature_layer",), "is of an image tower alone, which this is not")
    return plan


def _verify(directory: Path, originals: dict[str, Path], dtype: str | None) -> None:
    from gaze_jax.convert import verify

    stages = verify.verify(directory, originals)
    print(verify.table(stages), flush=True)
    if dtype is None:
        verify.require_equal(stages)
    else:
        print(f"The difference includes rounding to {dtype}.", flush=True)


def main(values: Values) -> None:
    """Check the flags, convert, verify."""
    _check(values)
    from gaze_jax.convert import run as conversion
    from gaze_jax.convert.export import part_directories

    target = Path(values.to)
    if values.format == "gaze":
        plan = _plan(values)
        conversion.save(plan, target)
        if values.verify:
            originals = {part: opened.directory for part, opened in plan.opened.items()}
            _verify(target, originals, values.dtype)
        return
    source = Path(values["from"].value or "")
    conversion.convert_back(source, target, dtype=values.dtype)
    if values.verify:
        _verify(source, part_directories(target), values.dtype)


def run() -> None:
    """The command."""
    cli.run(main, define_flags, __doc__)


if __name__ == "__main__":
    run()
