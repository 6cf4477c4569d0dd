"""Compile the programs of a config for TPUs, without a TPU: do they fit, and what bounds their speed?

gaze-jax topology --config=cambrian_video:4b --topology=v5p:4x4x8 --config.batch_size=128 \
    --config.mesh.fsdp=128
gaze-jax topology --config=cambrian_video:4b --topology=v5e:16x16 --config.batch_size=256 --sweep

No data and no parameter is read. The exit status is 0 if every program fits the chips' memory, and 1 if not;
with --sweep, 0 if one does. It needs the extra tpu-aot, and a minute or more for each program. Times are
bounds from the chips' peak figures, not predictions.
"""

import dataclasses
import datetime
import json
import math
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from gaze_jax.commands import cli
from gaze_jax.commands.flags import Flags, Values
from gaze_jax.commands.train import config_of, define_config
from gaze_jax.errors import UserError
from gaze_jax.parallel import topology
from gaze_jax.writing import write_text

if typing.TYPE_CHECKING:
    import jax

    from gaze_jax.commands.topology_programs import Program
    from gaze_jax.commands.topology_rows import Row
    from gaze_jax.train.config import Experiment

TOO_LARGE = 1
"""Exit status if a program does not fit."""

OFF = "off"
REMAT = ("nothing", "dots", OFF)
"""What --sweep_remat takes: the policies of gaze_jax.models.config, and no remat."""


def define_flags(flags: Flags) -> None:
    """The flags; every field of the config is a flag too."""
    flags.group("What is compiled")
    define_config(flags)
    flags.string("topology", None, f"Chips to compile for, such as {topology.EXAMPLES}.", "CHIP:AxB")
    programs = ("train", "prefill", "decode")
    flags.choice("program", "train", programs, "A training step, the prefill of prompts, or a decoding step.")
    flags.boolean("dense_row", True, "Compile dense attention too, with the same context tokens.")
    flags.boolean("sweep", False, "Compare every mesh of the axes data and fsdp, with each policy of remat.")
    flags.choices("sweep_remat", REMAT, "Policies of remat that --sweep compares; off is no remat.")
    text = "Batch sizes that --sweep compares; the config's batch_size by default."
    flags.integers("sweep_batch_sizes", None, text, "128,256")
    flags.number("effort", -1.0, "What the compiler spends, -1 to 1; -1 takes a fifth of the time of 0.")
    flags.group("What is written")
    flags.string("json", None, "Write the rows here, after each of them.", "FILE")


def main(values: Values) -> None:
    """Compile, print and write the rows."""
    _check(values)
    topology.prepare()
    devices = topology.load_devices(values.topology)
    from ml_collections import config_flags

    from gaze_jax.commands.topology_programs import dense_of, read_experiment

    experiment = read_experiment(config_of(values))
    experiments = [experiment]
    if values.sweep:
        experiments = list(swept(experiment, len(devices), values.sweep_remat, values.sweep_batch_sizes))
    elif values.dense_row and (dense := dense_of(experiment)) is not None:
        experiments.append(dense)
    name = config_name(config_flags.get_config_filename(values["config"]))
    hbm = topology.chip_of(values.topology).hbm_bytes / 1e9
    print(
        f"{name} {values.program} on {values.topology}: {len(devices)} chips with {hbm:.2f} GB of HBM for a "
        f"program; batch {experiment.batch_size}, effort {values.effort:g}"
    )
    print(_line([heading for heading, _ in _COLUMNS]), flush=True)
    rows: list[Row] = []
    for number, each in enumerate(experiments, start=1):
        _progress(each, number, len(experiments))
        rows.append({"config": name, "topology": values.topology} | _row(each, devices, values))
        print(_line(cells(rows[-1])), flush=True)
        if values.json is not None:  # after every row, so that an interrupted run keeps its results
            write_text(values.json, json.dumps(_report(rows), indent=1) + "\n")
    print("\n".join(notes(rows, sweep=values.sweep)))
    fitting = [row["fits"] for row in rows]
    if not (any(fitting) if values.sweep else all(fitting)):
        sys.exit(TOO_LARGE)


def _check(values: Values) -> None:
    """Refuse what cannot be compiled before the libraries are loaded."""
    if not values["config"].present:
        raise UserError("Give --config, a file or the name of a shipped config, such as cambrian_video:4b.")
    if values.topology is None:
        raise UserError(f"Give --topology, the chips to compile for, such as {topology.EXAMPLES}.")
    if not -1 <= values.effort <= 1:
        raise UserError(f"--effort={values.effort:g} must be between -1 and 1.")
    if values.sweep and values.program != "train":
        raise UserError(f"--sweep compares training steps; drop it, or --program={values.program}.")
    if values.sweep:
        cli.refuse_flags(values, ["dense_row"], "has no effect with --sweep, which compares meshes")
    else:
        cli.refuse_flags(values, ["sweep_remat", "sweep_batch_sizes"], "has no effect without --sweep")
    if any(size < 1 for size in values.sweep_batch_sizes or ()):
        raise UserError("--sweep_batch_sizes must be at least 1.")
    if values.json is not None:
        cli.check_writable("json", values.json)


def config_name(file: str) -> str:
    """The name of a config in results, of ``FILE[:ARGUMENT]``: cambrian_4b_video of cambrian_video.py:4b."""
    path, _, argument = file.partition(".py:")
    family, _, rest = Path(path).stem.partition("_")
    if family == "cambrian":
        argument = argument or "4b"  # their default
    return "_".join(part for part in (family, argument, rest) if part)


def swept(
    experiment: "Experiment",
    devices: int,
    remat: Sequence[str] = REMAT,
    batch_sizes: "Sequence[int] | None" = None,
) -> "Iterator[Experiment]":
    """The experiment on every mesh of data times fsdp; other axes stay as they are.

    Args:
      experiment: the run; what it says of data, fsdp and remat is ignored.
      devices: how many there are.
      remat: policies, or "off".
      batch_sizes: rows of a step; the run's by default.
    """
    others = dataclasses.asdict(experiment.mesh)
    for name, size in others.items():
        if name not in ("data", "fsdp"):
            devices //= max(size, 1)
    for fsdp in (size for size in range(devices, 0, -1) if devices % size == 0):
        mesh = dataclasses.replace(experiment.mesh, data=devices // fsdp, fsdp=fsdp)
        for batch_size in batch_sizes or (experiment.batch_size,):
            for policy in remat:
                # A policy without remat is no config.
                kept = "nothing" if policy == OFF else policy
                model = dataclasses.replace(experiment.model, remat=policy != OFF, remat_policy=kept)
                yield dataclasses.replace(experiment, mesh=mesh, batch_size=batch_size, model=model)


def _row(experiment: "Experiment", devices: "Sequence[jax.Device]", values: Values) -> "Row":
    """Compile one program; with --sweep, one that cannot be is a row that says why."""
    from gaze_jax.commands.topology_programs import mesh_of
    from gaze_jax.commands.topology_rows import measure, refused, state_bytes

    chip, program = topology.chip_of(values.topology), typing.cast("Program", values.program)
    if not values.sweep:
        mesh = mesh_of(experiment, devices, values.topology, program)
        return measure(experiment, mesh, chip, program, effort=values.effort, name_buffers=True)
    try:
        mesh = mesh_of(experiment, devices, values.topology, program)
        needed = state_bytes(experiment, mesh)
        if needed > chip.hbm_bytes:  # saves the time of a compilation that must fail
            return refused(experiment, chip, "the state alone is too large", needed)
        return measure(experiment, mesh, chip, program, effort=values.effort, name_buffers=False)
    except UserError as error:
        return refused(experiment, chip, str(error))


def _progress(experiment: "Experiment", number: int, total: int) -> None:
    sizes = " ".join(_sizes(dataclasses.asdict(experiment.mesh)))
    kind = "dense" if experiment.model.gaze.top_k is None else "gaze"
    remat = _remat(experiment.model.remat, experiment.model.remat_policy)
    text = f"compiling {number} of {total}: {kind} {sizes} batch {experiment.batch_size} remat {remat}"
    print(text, file=sys.stderr, flush=True)


def _remat(remat: bool, policy: str) -> str:
    """How a row names it: the policy that keeps nothing is what "on" means."""
    return OFF if not remat else "on" if policy == "nothing" else policy


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "flax")}


def _report(rows: "list[Row]") -> dict[str, object]:
    return {
        "date": datetime.date.today().isoformat(),
        "command": cli.command_line(),
        "versions": _versions(),
        "rows": rows,
    }


_COLUMNS = (
    ("attention", 9),
    ("mesh", 18),
    ("batch", 5),
    ("remat", 5),
    ("peak GB", 8),
    ("args. GB", 8),
    ("temp. GB", 8),
    ("PFLOP", 8),
    ("per chip", 8),
    ("sent GB", 8),
    ("bound s", 8),
    ("by", 12),
    ("compiled", 8),
    ("", 0),
)
"""Heading and width of each column; FLOP of all chips and of one, bytes of one chip."""


def _line(words: Sequence[str]) -> str:
    padded = [
        word.ljust(width) if number < 2 or number > 10 else word.rjust(width)
        for number, (word, (_, width)) in enumerate(zip(words, _COLUMNS, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _number(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value / scale:.3g}" if value < scale else f"{value / scale:.2f}"


def _sizes(mesh: Mapping[str, int]) -> list[str]:
    """The sizes of a mesh; those of data and fsdp, and of other axes that have more than one device."""
    return [f"{name}={size}" for name, size in mesh.items() if name in ("data", "fsdp") or size > 1]


def cells(row: "Row") -> list[str]:
    """A row of the table, in the order of its columns."""
    size, flops = math.prod(row["mesh"].values()), row["flops"]
    reason = row.get("refused") or ("" if row["fits"] else "does not fit")
    return [
        "dense" if row["dense"] else "gaze",
        " ".join(_sizes(row["mesh"])),
        str(row["batch_size"]),
        _remat(row["remat"], row["remat_policy"]),
        _number(row["peak_bytes"], 1e9),
        _number(row["argument_bytes"], 1e9),
        _number(row["temporary_bytes"], 1e9),
        _number(flops, 1e15),
        _number(None if flops is None else flops / size, 1e15),
        _number(row["collective_bytes"], 1e9),
        _number(row["bound_seconds"], 1.0),
        row["bound_by"] or "-",
        "-" if row["compile_seconds"] is None else f"{row['compile_seconds']:.0f} s",
        reason,
    ]


def notes(rows: "list[Row]", *, sweep: bool) -> list[str]:
    """What is to be known of the rows, below the table."""
    lines = [
        "Bound: the least seconds that the chips' peak figures allow, for products, memory or interconnect; "
        "the real time is longer."
    ]
    for key, what in (("flops_left_out", "FLOP"), ("collectives_left_out", "Bytes sent")):
        missing = sorted({each for row in rows for each in row[key] or ()})
        if missing:
            lines.append(f"{what} leave out {', '.join(missing)}.")
    for row in rows:
        if row["largest_buffers"]:
            lines.append(f"Largest buffers, {'dense' if row['dense'] else 'gaze'}:")
            lines += [
                f"  {_number(each['bytes'], 1e9)} GB  {_shortened(each['arrays'])}"
                for each in row["largest_buffers"]
            ]
    if sweep:
        lines.append(_suggestion(rows))
    return lines


def _shortened(text: str, length: int = 90) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _suggestion(rows: "list[Row]") -> str:
    """The row that fits with the lowest bound of a sample; of equal ones, that whose other bounds are low."""
    fitting = [row for row in rows if row["fits"]]
    if not fitting:
        return "No mesh fits; use more chips, a smaller batch_size, or smaller rows (data.row)."

    def cost(row: "Row") -> tuple[float, float]:
        each = row["batch_size"]
        return row["bound_seconds"] / each, sum(row["bound_parts"].values()) / each

    best = min(fitting, key=cost)
    words = [f"--config.mesh.{size}" for size in _sizes(best["mesh"])]
    if len({row["batch_size"] for row in rows}) > 1:
        words.append(f"--config.batch_size={best['batch_size']}")
    words.append(f"--config.model.remat={best['remat']}")
    if best["remat_policy"] != "nothing":
        words.append(f"--config.model.remat_policy={best['remat_policy']}")
    return (
        f"The lowest bound that fits: {' '.join(words)} "
        f"({best['bound_seconds']:.3g} s, {_number(best['peak_bytes'], 1e9)} GB)."
    )


def run() -> None:
    """The command."""
    topology.prepare()  # before a config imports jax
    cli.run(main, define_flags, __doc__)


if __name__ == "__main__":
    run()
