"""Compile the GPU kernels of gaze_decode to machine code of an H100, without a GPU.

    scripts/gpu_aot.sh [--json=FILE] [--only SUBSTRING]

A row for each real shape: registers, spilled bytes and shared memory of the attention kernel as ptxas reports
them, how many blocks fit a multiprocessor, and registers and spilled bytes of the small kernels beside it. A
row for each routed layer: the kernels that a step launches in every layer, from the queries to what the heads
read, scores and selection included; the layer's number and budget are its arguments, and so are the masks
that the step makes before its layers, which have a row of their own. It measures no time. The exit status is
1 if a kernel spills, if the attention of bfloat16 or int8 lets fewer than two blocks onto a multiprocessor,
or if a routed layer launches more than six kernels. float32 may spill and have one block.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks.routed_layers import queries_of, step_of
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.models.cache import Cache
from gaze_jax.models.decode import DecodeMasks, decode_attention, with_step
from gaze_jax.writing import write_text
from pallas_kernels import dispatch
from pallas_kernels.gaze_decode import api, gpu, shapes

SHARED_MEMORY = 233_472
"""Bytes of shared memory of a multiprocessor of an H100; each block takes 1,024 more than it asks for."""
REGISTERS = 65_536
"""Registers of a multiprocessor."""
THREADS = 128
"""Threads of a block: one warpgroup."""
BLOCKS = 2
"""Fewest blocks that a multiprocessor shall hold: one computes while the other waits for its copies."""
KERNELS = 6
"""Most kernels that a routed layer shall launch."""

# What XLA needs to know of an H100 SXM, as its GpuTargetConfigProto: NVIDIA's figures of the device.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def _device() -> Any:
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
    )
    return topology.devices[0]


@contextlib.contextmanager
def _written() -> Iterator[list[str]]:
    """What the process writes to stdout and stderr, ptxas' report included, which does not pass Python."""
    found: list[str] = []
    sys.stdout.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield found
        finally:
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            found.append(file.read().decode(errors="replace"))


@contextlib.contextmanager
def target() -> Iterator[jax.sharding.NamedSharding]:
    """Trace for an H100; yields the sharding of the arguments."""
    mesh = jax.sharding.Mesh([_device()], ("one",), axis_types=(jax.sharding.AxisType.Auto,))
    with dispatch.compile_for("gpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield jax.sharding.NamedSharding(mesh, jax.P())


def compile_one(
    function: Callable[..., Any], arguments: Any, where: jax.sharding.NamedSharding
) -> tuple[str, str]:
    """The optimised HLO of a program for the GPU, and what ptxas said of its Mosaic kernels."""

    def place(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)

    lowered = jax.jit(function).trace(*jax.tree.map(place, arguments)).lower(lowering_platforms=("cuda",))
    with _written() as report:
        compiled = lowered.compile()
    return compiled.as_text(), report[0]


def figures(report: str) -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of each kernel in a report of ptxas, by name."""
    found = {}
    for part in report.split("Compiling entry function")[1:]:
        name = re.match(r" '(\w+?)(?:_mosaic_gpu_kernel)?'", part)
        used = re.search(r"Used (\d+) registers", part)
        spilled = re.search(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if name and used and spilled:
            stores, loads = map(int, spilled.groups())
            found[name[1]] = {"registers": int(used[1]), "spilled_bytes": stores + loads}
    return found


def mosaic(text: str, report: str, before: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """The figures of a program's Mosaic kernels, by name.

    ``before`` has those of kernels that this process has compiled, by their hash: an equal kernel is not
    compiled again.

    Raises:
      KeyError: ptxas did not report a kernel that is new.
    """
    reported, found = figures(report), {}
    for line in text.splitlines():
        key = re.search(r"kernel_hash = \"(.*?)\", module", line)
        if key:
            name = _name(line)
            before[key[1]] = found[name] = before.get(key[1]) or reported[name]
    return found


def _name(line: str) -> str:
    """The name of a Mosaic kernel, from the line of an HLO text that calls it."""
    found = re.search(r'op_name="(?:[^"]*/)?(\w+)/mpmd_map"', line)
    return found[1] if found else "unnamed"


def blocks_of(registers: int, shared: int) -> int:
    """How many blocks of a kernel fit a multiprocessor."""
    by_warp = -(-registers * 32 // 256) * 256  # registers are given to warps in units of 256
    return min(REGISTERS // (by_warp * THREADS // 32), SHARED_MEMORY // (shared + 1024))


def kernels(text: str) -> list[str]:
    """The operations of an optimised HLO text that launch a kernel or copy memory, by name."""
    free = r"parameter|constant|bitcast|get-tuple-element|tuple|while|conditional|call|after-all|partition-id"
    fused = set(re.findall(r"(?:calls|to_apply)=(%[\w.\-]+)", text))
    graphs = set(re.findall(r" call\(.*to_apply=(%[\w.\-]+)", text))
    found, inside = [], ""
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?(%[\w.\-]+) \(", line)
        inside = header[1] if header else inside
        made = re.match(r"\s+(?:ROOT )?(%[\w.\-]+) = .*? ([\w\-]+)\(", line)
        if made and (inside not in fused or inside in graphs) and not re.fullmatch(free, made[2]):
            target = re.search(r'custom_call_target="([^"]+)"', line)
            what = target[1] if target else made[2]
            found.append(f"{made[1]} {_name(line) if what.startswith('mosaic') else what}")
    return found


def decode_rows(only: str, before: dict[str, dict[str, int]]) -> Iterator[dict[str, Any]]:
    """The op at every real shape, and one of them in float32; layers change nothing in it."""
    for shape in shapes.real():
        also = shape.tokens == 9_216 and shape.batch == 1
        for dtype in ("bfloat16", "float32") if also else ("bfloat16",):
            kind = shape.visual_dtype or dtype
            name = f"gaze_decode {shape.heads} {shape.tokens} B{shape.batch} {shape.select_per} {kind}"
            if only in name:
                yield {"program": name, "dtype": kind} | _kernel(shape, dtype, before)


def _kernel(shape: shapes.Shape, dtype: str, before: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Figures of one shape."""
    options = {"spec": shape.spec, "implementation": "gpu"}

    def run(step: Any, *arguments: Any) -> jax.Array:
        return api.gaze_decode(*arguments, step=step, **options)

    def cast(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, dtype if a.dtype == jnp.bfloat16 else a.dtype)

    with target() as where:
        arguments = jax.tree.map(cast, shape.arguments("gpu"))
        visual = arguments[1]
        step = jax.eval_shape(functools.partial(api.masks, **options), visual, *arguments[-2:])
        text, report = compile_one(run, (step, *arguments), where)
        dtypes = (arguments[0].dtype, visual.k.dtype, arguments[2].dtype)
        tiles, rows, shared = gpu.fitted(shape.spec, visual.slots, visual.k.shape[-1], dtypes)
    found = mosaic(text, report, before)
    attention = found.pop("gaze_attention")
    return attention | {
        "shared_bytes": shared,
        "blocks": blocks_of(attention["registers"], shared),
        "tile": {"pieces": tiles.pieces, "rows": rows, "stages": tiles.stages},
        "beside": found,
        "kernels": kernels(text),
    }


ROUTED = [
    ("qwen3-4b", 9_216, 1),
    ("qwen3-4b", 9_216, 8),
    ("qwen2.5-0.5b", 9_216, 1),
    ("qwen3-4b", 1_048_576, 1),
]
"""Heads, visual tokens and B of the routed layers that are compiled."""


def layer_rows(only: str, before: dict[str, dict[str, int]]) -> Iterator[dict[str, Any]]:
    """Routed layers with each selection and kind of cache, and the masks of a step."""
    for (heads, tokens, batch), visual_dtype in itertools.product(ROUTED, (None, "int8")):
        for select_per in ("kv_head", "head"):
            shape = shapes.Shape(heads, tokens, batch, select_per, visual_dtype, layers=2)
            name = f"routed layer {shape.name}"
            if only in name:
                with target() as where:
                    text, report = compile_one(*_layer(shape), where)
                found = {"kernels": kernels(text), "beside": mosaic(text, report, before)}
                yield {"program": name, "dtype": visual_dtype or "bfloat16"} | found
    shape = shapes.Shape("qwen3-4b", 9_216, 1, "head", layers=2)
    name = f"masks of a step {shape.name}"
    if only in name:
        with target() as where:
            text, _ = compile_one(*_masks(shape), where)
        yield {"program": name, "kernels": kernels(text)}


def _masks(shape: shapes.Shape) -> tuple[Callable[..., Any], Any]:
    """What a step makes of its masks, once for all layers, and its abstract arguments."""
    gaze, cache, masks = step_of(shape, "gpu")

    def run(masks: DecodeMasks, cache: Cache) -> Any:
        return with_step(masks, cache, gaze).step

    return run, (masks, cache)


def _layer(shape: shapes.Shape) -> tuple[Callable[..., Any], Any]:
    """decode_attention over a shape, and its abstract arguments."""
    gaze, cache, masks = step_of(shape, "gpu")
    masks = jax.eval_shape(functools.partial(with_step, gaze=gaze), masks, cache)

    def run(q: Any, cache: Cache, masks: DecodeMasks, budget: Any, layer: Any) -> Any:
        spec = SelectionSpec(capacity=shapes.SCENES[shape.tokens][1])
        return decode_attention(q, cache, masks, Selection(budget), spec, gaze=gaze, layer=layer)[0]

    number = jax.ShapeDtypeStruct((), jnp.int32)
    budget = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return run, (queries_of(shape), cache, masks, budget, number)


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row, as text. float32, which takes six products for one, may have one block."""
    found = []
    for name, kernel in row.get("beside", {}).items():
        if kernel["spilled_bytes"] and row["dtype"] != "float32":
            found.append(f"{kernel['spilled_bytes']} bytes of {name} are spilled")
    if "registers" in row and row["dtype"] != "float32":
        if row["spilled_bytes"]:
            found.append(f"{row['spilled_bytes']} bytes are spilled")
        if row["blocks"] < BLOCKS:
            found.append(f"a multiprocessor holds {row['blocks']} blocks, not {BLOCKS}")
    if row["program"].startswith("routed layer") and len(row["kernels"]) > KERNELS:
        found.append(f"a routed layer launches {len(row['kernels'])} kernels, not at most {KERNELS}")
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--only", default="", help="programs whose name contains this")
    flags = parser.parse_args(argv)
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    rows, wrong = [], []
    log = {
        "date": datetime.date.today().isoformat(),
        "target": "sm_90a, NVIDIA H100 80GB HBM3",
        "versions": {
            name: metadata.version(name) for name in ("jax", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
        },
        "command": " ".join(["scripts/gpu_aot.sh", *argv]),
    }
    before: dict[str, dict[str, int]] = {}
    for row in itertools.chain(decode_rows(flags.only, before), layer_rows(flags.only, before)):
        rows.append(row)
        complaints = problems(row)
        wrong += [f"{row['program']}: {complaint}" for complaint in complaints]
        told = f"{len(row['kernels']):3} kernels"
        if "registers" in row:
            told += f"  {row['registers']} registers  {row['spilled_bytes']:5} bytes spilled"
            told += f"  {row['shared_bytes'] / 1e3:5.1f} KB shared  {row['blocks']} blocks"
        print(f"{row['program']:58} {told}", *complaints, flush=True)
        if flags.json is not None:  # after every row, so that an interrupted run keeps its results
            write_text(flags.json, json.dumps(log | {"rows": rows}, indent=1) + "\n")
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
