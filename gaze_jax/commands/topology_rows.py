"""Rows of the table of ``gaze-jax topology``: a program compiled for a topology, and what it takes."""

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from jax.stages import Traced

from gaze_jax.commands.topology_programs import CALLS, Program, chip_bytes
from gaze_jax.errors import UserError
from gaze_jax.parallel import rules
from gaze_jax.parallel.costs import collective_traffic, count_flops, roofline
from gaze_jax.parallel.topology import Chip, needed_bytes
from gaze_jax.train.config import Experiment
from gaze_jax.train.step import abstract_state
from pallas_kernels import dispatch

Row = dict[str, Any]

_LARGEST = 5
"""Buffers that a row names."""


@contextlib.contextmanager
def _on(mesh: Mesh) -> Iterator[None]:
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.flax_rules()), dispatch.compile_for("tpu"):
        yield


def measure(
    experiment: Experiment, mesh: Mesh, chip: Chip, program: Program, *, effort: float, name_buffers: bool
) -> Row:
    """Compile a program of an experiment and say what it takes.

    Args:
      experiment: from :func:`read_experiment`.
      mesh: from :func:`mesh_of`.
      chip: figures of its chips.
      program: which.
      effort: how much time the compiler spends, from -1 to 1.
      name_buffers: list the largest buffers.

    Returns:
      JSON-ready: bytes and FLOPs are of one run of the program; "peak_bytes", "argument_bytes",
      "temporary_bytes", "memory_bytes" and "collective_bytes" of one chip, "flops" of all chips. What is only
      known of a program that was compiled is None if it does not fit.
    """
    start = time.perf_counter()
    call = CALLS[program](experiment, mesh)
    with _on(mesh):
        traced = call.function.trace(*call.arguments, **call.options)
        flops = count_flops(traced.jaxpr)
        try:
            found = _compiled(traced, effort, name_buffers)
        except jax.errors.JaxRuntimeError as error:
            if (needed := needed_bytes(str(error))) is None:
                raise
            found = _NOT_COMPILED | {"peak_bytes": needed, "argument_bytes": _used(traced, call.arguments)}
    row = _described(experiment, chip, dict(mesh.shape)) | found
    row |= {
        "program": program,
        "memory_bytes": call.memory_bytes,
        "effort": effort,
        "flops": flops.total,
        "flops_left_out": list(flops.left_out),
        "compile_seconds": round(time.perf_counter() - start, 1),
        "fits": row["peak_bytes"] <= chip.hbm_bytes,
    }
    if row["collective_bytes"] is None:
        return row
    bound = roofline(
        chip,
        flops=flops.total / mesh.size,
        memory_bytes=call.memory_bytes,
        sent_bytes=row["collective_bytes"],
    )
    return row | {"bound_seconds": bound.seconds, "bound_by": bound.by, "bound_parts": dict(bound.parts)}


def _used(traced: Traced, arguments: tuple[Any, ...]) -> int:
    """Bytes that a chip holds of the arguments that a program uses."""
    shapes = [leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.ShapeDtypeStruct)]
    jaxpr = traced.jaxpr.jaxpr
    read = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    read |= {id(variable) for variable in jaxpr.outvars}
    return chip_bytes([shape for shape, own in zip(shapes, jaxpr.invars, strict=True) if id(own) in read])


_NOT_COMPILED: Row = {
    "peak_bytes": None,
    "argument_bytes": None,
    "temporary_bytes": None,
    "collective_bytes": None,
    "collective_bytes_by_kind": None,
    "collectives_left_out": None,
    "largest_buffers": [],
    "bound_seconds": None,
    "bound_by": None,
    "bound_parts": None,
}


def _described(experiment: Experiment, chip: Chip, mesh: dict[str, int]) -> Row:
    """What a row says before anything is compiled."""
    return {
        "mesh": mesh,
        "dense": experiment.model.gaze.top_k is None,
        "remat": experiment.model.remat,
        "remat_policy": experiment.model.remat_policy,
        "batch_size": experiment.batch_size,
        "hbm_bytes": chip.hbm_bytes,
    }


def refused(experiment: Experiment, chip: Chip, reason: str, needed: int | None = None) -> Row:
    """The row of a training step that is not compiled.

    Args:
      experiment: its run, whose mesh has no -1.
      chip: figures of the chips.
      reason: why, in words.
      needed: bytes that a chip would need at least, if they are known.
    """
    row = _described(experiment, chip, dataclasses.asdict(experiment.mesh)) | _NOT_COMPILED
    return row | {
        "program": "train",
        "memory_bytes": None,
        "effort": None,
        "flops": None,
        "flops_left_out": None,
        "compile_seconds": None,
        "fits": False,
        "peak_bytes": needed,
        "refused": reason,
    }


def state_bytes(experiment: Experiment, mesh: Mesh) -> int:
    """Bytes that a chip holds of the parameters and the optimizer's state."""
    return chip_bytes(abstract_state(experiment, mesh))


def effort_options(effort: float) -> dict[str, Any]:
    """The compiler's option for what it spends, which is a number or, in newer versions of JAX, a level.

    Raises:
      UserError: this version has levels, and the number is between two.
    """
    if hasattr(jax.config, "jax_exec_time_optimization_effort"):
        return {"exec_time_optimization_effort": effort}
    levels: dict[float, dict[str, Any]] = {
        -1.0: {"optimization_level": "O0"},
        0.0: {},
        1.0: {"optimization_level": "O3"},
    }
    if effort not in levels:
        raise UserError(f"--effort={effort:g} must be -1, 0 or 1 with jax {jax.__version__}.")
    return levels[effort]


def _compiled(traced: Traced, effort: float, name_buffers: bool) -> Row:
    """What the compiled program tells."""
    options = effort_options(effort)
    with tempfile.TemporaryDirectory(prefix="gaze-jax-") as folder:
        if name_buffers:
            options["xla_dump_to"] = folder
        compiled = traced.lower().compile(compiler_options=options)
        reports = sorted(Path(folder).glob("*memory-usage-report.txt"))
        report = reports[-1].read_text(encoding="utf-8") if reports else ""
    memory = compiled.memory_analysis()
    assert memory is not None, "libtpu tells the memory of what it compiles"
    traffic = collective_traffic(compiled.as_text() or "")
    return {
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collective_bytes": traffic.total,
        "collective_bytes_by_kind": dict(traffic.by_kind),
        "collectives_left_out": list(traffic.left_out),
        "largest_buffers": largest_buffers(report),
    }


_BUFFER = re.compile(
    r"^\s*[\d.]+[KMGT]?i?B\(\s*\d+%\);\s*([\d.]+)([KMGT]?)i?B;\s*\d+;\s*\d+;\s*(\S.*)$", re.MULTILINE
)


def largest_buffers(report: str) -> list[Row]:
    """The largest buffers in HBM, from the compiler's memory-usage report; [] if it is not in the known form.

    Returns:
      "bytes" of each, rounded as in the report, and "arrays", what is in it, at different times.
    """
    space = report.partition("Memory Space: ")[2].partition("Memory Space: ")[0]
    if not space.startswith("default"):
        return []
    return [
        {"bytes": int(float(size) * 1024 ** (" KMGT".index(prefix or " "))), "arrays": arrays.strip()}
        for size, prefix, arrays in _BUFFER.findall(space)[:_LARGEST]
    ]
