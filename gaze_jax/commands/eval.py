"""Evaluate a model.

gaze-jax eval --workdir=runs/digits [--samples=1024]
    the newest checkpoint of a run: accuracy, visual entries and routing, against dense attention

gaze-jax eval --checkpoint=ckpt/model --compare=dense [--prompts=prompts.jsonl]
    any checkpoint, without training: how far Gaze changes its dense answers, by top_k, select_per and
    descriptor, on one device
"""

import dataclasses
import json

from gaze_jax.commands import cli
from gaze_jax.commands.devices import (
    SIZES,
    check_sizes,
    define_mesh,
    define_processes,
    mesh_of,
    start_processes,
)
from gaze_jax.commands.flags import Flags, Values
from gaze_jax.errors import UserError
from gaze_jax.parallel import together
from gaze_jax.writing import write_text

SELECT_PER = ("head", "kv_head")
DESCRIPTORS = ("mean", "minmax")

_OF_RUNS = ("workdir", "samples", "all_devices", *SIZES)
_OF_COMPARISONS = (
    "checkpoint",
    "check",
    "prompts",
    "gaze_top_ks",
    "gaze_select_per",
    "gaze_descriptors",
    "max_tokens",
    "out",
)


def define_flags(flags: Flags) -> None:
    """Flags for evaluating a run and for a comparison."""
    flags.group("A run of train.py")
    flags.string("workdir", None, "The workdir of the run.", "FOLDER")
    flags.integer("samples", None, "Questions of each family; default: the config's.")
    define_mesh(flags)
    define_processes(flags)
    flags.group("A checkpoint, compared with dense attention")
    flags.choice("compare", None, ["dense"], "Compare Gaze with this way to attend.")
    flags.string("checkpoint", None, "A converted checkpoint, or a Hugging Face directory.", "FOLDER")
    flags.boolean("check", True, "Compare the checkpoint's files with their checksums first.")
    flags.string("prompts", None, "JSONL of image and question; default: two bundled photos.", "FILE")
    flags.integers("gaze_top_ks", None, "Regions per query; default: powers of two, and all.", "1,2,4")
    flags.choices("gaze_select_per", SELECT_PER, "Select per query head, or per kv head's group.")
    flags.choices("gaze_descriptors", DESCRIPTORS, "How a region is described.")
    flags.integer("max_tokens", 32, "Most tokens of a dense answer.")
    flags.string("out", "compare", "Folder for compare.json and compare.png.", "FOLDER")


def _compare(values: Values) -> None:
    """Compare, print the table, write JSON and a plot."""
    from gaze_jax.evaluate import compare
    from gaze_jax.evaluate.prompts import default_prompts, read_prompts
    from gaze_jax.infer.sampler import Sampler

    compare.require_matplotlib()
    if values.checkpoint is None:
        raise UserError("--compare needs a model: name it with --checkpoint.")
    prompts = default_prompts() if values.prompts is None else read_prompts(values.prompts)
    out = cli.make_folder("out", values.out)  # before minutes of computing
    for name in ("compare.json", "compare.png"):
        cli.check_writable("out", str(out / name))
    sampler = Sampler.load(values.checkpoint, check=values.check)
    report = compare.compare(
        dataclasses.replace(sampler, resize=True),
        prompts,
        top_ks=values.gaze_top_ks,
        select_per=values.gaze_select_per,
        descriptors=values.gaze_descriptors,
        max_tokens=values.max_tokens,
    )
    report["command"] = cli.command_line()
    print(compare.table(report), flush=True)
    write_text(out / "compare.json", json.dumps(report, indent=2) + "\n")
    compare.plot(report, out / "compare.png")
    print(f"{out / 'compare.json'} and {out / 'compare.png'} hold the same.", flush=True)


def main(values: Values) -> None:
    """Print the table and write JSON and the picture; of several processes the first does."""
    start_processes(values, saves=False)
    with together.agreed():
        sizes = _check(values)
    if values.compare is not None:
        _compare(values)
        return
    from gaze_jax.evaluate.run import run as evaluate

    evaluate(values.workdir, values.samples, mesh_of(values.all_devices, sizes))


def _check(values: Values) -> dict[str, int | None]:
    """Check the flags; returns the sizes of the mesh.

    Raises:
      UserError: a flag has no effect, is missing, or is out of range.
    """
    sizes = {name: values[name].value for name in SIZES}
    if values.compare is not None:
        cli.refuse_flags(values, _OF_RUNS, "is of a run's evaluation, not of --compare")
        if together.several():
            raise UserError("--compare computes on one device; start one process.")
        return sizes
    cli.refuse_flags(values, _OF_COMPARISONS, "has no effect without --compare=dense")
    if values.workdir is None:
        raise UserError("Name a run with --workdir, or a model with --checkpoint and --compare=dense.")
    if values.samples is not None and values.samples < 2:
        raise UserError(
            f"--samples={values.samples} must be at least 2: one half chooses the layer to report."
        )
    if not values.all_devices:
        cli.refuse_flags(values, SIZES, "has no effect without --all_devices")
    check_sizes(values.all_devices, sizes)
    return sizes


def run() -> None:
    """The command."""
    cli.run(main, define_flags, __doc__)


if __name__ == "__main__":
    run()
