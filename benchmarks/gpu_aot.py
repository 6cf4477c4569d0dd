"""Compile the GPU kernel of gaze_decode to machine code of an H100, without a GPU.

    scripts/gpu_aot.sh [--json=FILE] [--only SUBSTRING]

A row for the kernel at each of its real shapes: registers, spilled bytes and shared memory as ptxas reports
them, and how many blocks fit a multiprocessor. A row for each routed layer: the kernels that it launches,
scores and selection included. It measures no time. The exit status is 1 if anything is spilled, or if a
kernel of bfloat16 or int8 lets fewer than two blocks onto a multiprocessor.
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

from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.models import GazeConfig
from gaze_jax.models.attention import RoutedQueries
from gaze_jax.models.cache import Cache
from gaze_jax.models.decode import DecodeMasks, decode_attention
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


def figures(report: str) -> dict[str, int]:
    """Registers, spilled bytes and shared memory of the kernel in a report of ptxas.

    Raises:
      ValueError: the report is not of exactly one kernel.
    """
    used = re.findall(r"Used (\d+) registers", report)
    spilled = re.findall(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if len(used) != 1 or len(spilled) != 1:
        raise ValueError(f"ptxas reported {len(used)} kernels, not one: {report[-500:]!r}")
    stores, loads = map(int, spilled[0])
    return {"registers": int(used[0]), "spilled_bytes": stores + loads}


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
            found.append(f"{made[1]} {target[1] if target else made[2]}")
    return found


def decode_rows(only: str) -> Iterator[dict[str, Any]]:
    """The kernel at every real shape, and one of them in float32; layers change nothing in it."""
    reported: dict[str, dict[str, int]] = {}
    for shape in shapes.real():
        also = shape.tokens == 9_216 and shape.batch == 1
        for dtype in ("bfloat16", "float32") if also else ("bfloat16",):
            kind = shape.visual_dtype or dtype
            name = f"gaze_decode {shape.heads} {shape.tokens} B{shape.batch} {shape.select_per} {kind}"
            if only in name:
                yield {"program": name, "dtype": kind} | _kernel(shape, dtype, reported)


def _kernel(shape: shapes.Shape, dtype: str, reported: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Figures of one shape; ``reported`` has those of kernels that this process has compiled before."""

    def run(*arguments: Any) -> jax.Array:
        return api.gaze_decode(*arguments, spec=shape.spec, implementation="gpu")

    def cast(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, dtype if a.dtype == jnp.bfloat16 else a.dtype)

    with target() as where:
        arguments = jax.tree.map(cast, shape.arguments("gpu"))
        text, report = compile_one(run, arguments, where)
        visual = arguments[1]
        dtypes = (arguments[0].dtype, visual.k.dtype, arguments[2].dtype)
        tiles, rows, shared = gpu.fitted(shape.spec, visual.slots, visual.k.shape[-1], dtypes)
    name = re.findall(r"kernel_hash = \"(.*?)\", module", text)
    assert len(name) == 1, "a program has one Mosaic kernel"
    if name[0] not in reported:  # an equal kernel is not compiled again
        reported[name[0]] = figures(report)
    found = reported[name[0]]
    return found | {
        "shared_bytes": shared,
        "blocks": blocks_of(found["registers"], shared),
        "tile": {"pieces": tiles.pieces, "rows": rows, "stages": tiles.stages},
        "kernels": kernels(text),
    }


def layer_rows(only: str) -> Iterator[dict[str, Any]]:
    """A routed layer of Qwen3-4B: scores, selection and attention over 9,216 visual tokens."""
    for select_per in ("kv_head", "head"):
        shape = shapes.Shape("qwen3-4b", 9_216, 1, select_per, layers=2)
        name = f"routed layer {shape.name}"
        if only in name:
            with target() as where:
                text, _ = compile_one(*_layer(shape), where)
            yield {"program": name, "kernels": kernels(text)}


def _layer(shape: shapes.Shape) -> tuple[Callable[..., Any], Any]:
    """decode_attention over a shape, and its abstract arguments."""
    _, kv_heads, group, dim = shapes.HEADS[shape.heads]
    regions, top_k = shapes.SCENES[shape.tokens]
    gaze = GazeConfig(select_per=shape.select_per, decode_implementation="gpu")
    _, packed, text, *_ = shape.arguments("gpu")

    def array(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shape.batch, *sizes), dtype)

    lead = (shape.layers, shape.batch, kv_heads)
    cache = Cache(
        visual=packed,
        descriptors=jax.ShapeDtypeStruct((*lead, regions, dim), jnp.bfloat16),
        text_k=text,
        text_v=text,
        visual_order=array(jnp.int32, regions, shapes.SLOTS),
        text_order=array(jnp.int32, shapes.TEXT),
    )
    one = array(jnp.int32, 1)
    masks = DecodeMasks(
        visual=array(jnp.bool_, regions, shapes.SLOTS),
        text=array(jnp.bool_, shapes.TEXT),
        routed=RoutedQueries(
            visible=array(jnp.bool_, 1, regions),
            count=one,
            order=one,
            sample=one,
            first=array(jnp.int32, regions),
            permutation=array(jnp.int32, regions),
        ),
    )

    def run(q: Any, cache: Cache, masks: DecodeMasks, budget: Any, layer: Any) -> Any:
        spec = SelectionSpec(capacity=top_k)
        return decode_attention(q, cache, masks, Selection(budget), spec, gaze=gaze, layer=layer)[0]

    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    return run, (array(jnp.bfloat16, 1, kv_heads * group, dim), cache, masks, scalar, scalar)


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row, as text. float32, which takes six products for one, may have one block."""
    if "registers" not in row or row["dtype"] == "float32":
        return []
    found = []
    if row["spilled_bytes"]:
        found.append(f"{row['spilled_bytes']} bytes are spilled")
    if row["blocks"] < BLOCKS:
        found.append(f"a multiprocessor holds {row['blocks']} blocks, not {BLOCKS}")
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
    for row in itertools.chain(decode_rows(flags.only), layer_rows(flags.only)):
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
