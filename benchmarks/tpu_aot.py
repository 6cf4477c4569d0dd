"""Compile every TPU kernel at its real shapes for TPUs, without a TPU.

    scripts/tpu_aot.sh [--json=FILE] [--chips v5e v5p v6e] [--only SUBSTRING]

It checks that the kernels compile, that no operation of a decode step copies as much as one layer's visual
cache, the peak memory of each program and, for a cache in host memory, how much of it the device holds at
once. It does not measure times.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks import routed_layers
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.families import DECODERS
from gaze_jax.models import MLLM, DecodePosition, GazeConfig, MLLMConfig
from gaze_jax.models.cache import Cache
from gaze_jax.models.parameters import boxed_params
from pallas_kernels import dispatch
from pallas_kernels.gaze_decode import api as decode_api
from pallas_kernels.gaze_decode import shapes as decode_shapes
from pallas_kernels.gaze_prefill import shapes as prefill_shapes

CHIPS = {"v5e": ("v5e:2x2", 15.75e9), "v5p": ("v5p:2x2x1", 95e9), "v6e": ("v6e:2x2", 31.25e9)}
"""Chip -> (topology, bytes of HBM that a program may use)."""

ITEMSIZE = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "s8": 1, "u8": 1, "pred": 1}


@contextlib.contextmanager
def target(chip: str) -> Iterator[jax.sharding.NamedSharding]:
    """Trace for one device of ``chip``; yields the sharding of the arguments."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0]).devices[0]
    mesh = jax.sharding.Mesh([device], ("one",), axis_types=(jax.sharding.AxisType.Auto,))
    with dispatch.compile_for("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield jax.sharding.NamedSharding(mesh, jax.P())


def largest_operation(text: str) -> tuple[int, str]:
    """Bytes and line of the largest array that an operation in an optimised HLO text writes.

    Arguments, views, tuples and in-place updates do not count; arrays inside a fusion are not written.
    """
    free = re.compile(
        r"\b(parameter|bitcast|get-tuple-element|tuple|while|conditional|dynamic-update-slice)\("
    )
    fused = set(re.findall(r"calls=(%[\w.\-]+)", text))
    found, inside = (0, ""), ""
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?(%[\w.\-]+) \(", line)
        inside = header[1] if header else inside
        made = re.match(r"\s+(?:ROOT )?%\S+ = \(?(\w+)\[([\d,]*)\]", line)
        if made is None or inside in fused or free.search(line) or made[1] not in ITEMSIZE:
            continue
        size = ITEMSIZE[made[1]] * math.prod(int(n) for n in made[2].split(",") if n)
        found = max(found, (size, line.strip()[:200]))
    return found


def compile_one(
    function: Callable[..., Any],
    arguments: Any,
    where: jax.sharding.NamedSharding,
    donate: tuple[int, ...] = (),
) -> tuple[dict[str, Any], str]:
    """Compile for the target; return figures and the optimised HLO."""

    def place(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return a if a.sharding is not None else jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)

    start = time.perf_counter()
    compiled = (
        jax.jit(function, donate_argnums=donate).trace(*jax.tree.map(place, arguments)).lower().compile()
    )
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    kernels = text.count('custom_call_target="tpu_custom_call"')
    figures = {
        "compile_seconds": round(seconds, 2),
        "argument_bytes": memory.argument_size_in_bytes,
        "host_argument_bytes": memory.host_argument_size_in_bytes,
        "written_in_place_bytes": memory.alias_size_in_bytes + memory.host_alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "kernels": kernels,
    }
    return figures, text


def decode_rows(chip: str, only: str) -> Iterator[dict[str, Any]]:
    """Compile gaze_decode at every shape of which at least one layer fits the chip."""
    for wanted in decode_shapes.real():
        shape = wanted.fitting(int(0.9 * CHIPS[chip][1]))
        name = f"gaze_decode {(shape or wanted).name}"
        if only not in name:
            continue
        row: dict[str, Any] = {"chip": chip, "kernel": name}
        if shape is None:
            yield row | {"skipped": f"a layer's cache takes {wanted.layer_bytes / 1e9:.1f} GB"}
            continue
        with target(chip) as where:

            def run(*arguments: Any, spec: Any = shape.spec) -> jax.Array:
                return decode_api.gaze_decode(*arguments, spec=spec, implementation="tpu")

            figures, text = compile_one(run, shape.arguments("tpu"), where)
        size, line = largest_operation(text)
        yield (
            row
            | figures
            | {
                "layer_bytes": shape.layer_bytes,
                "largest_operation_bytes": size,
                "largest_operation": line,
            }
        )


def layer_rows(chip: str, only: str) -> Iterator[dict[str, Any]]:
    """Compile routed layers, scores and selection included, at every shape; two of Qwen3-4B in int8 too."""
    int8 = [decode_shapes.Shape("qwen3-4b", 9_216, 1, per, "int8") for per in routed_layers.LIMITS]
    for wanted in (*decode_shapes.real(), *int8):
        shape = wanted.fitting(int(0.8 * CHIPS[chip][1]))
        name = f"routed layer {(shape or wanted).name}"
        if only not in name or shape is None:
            continue
        with target(chip) as where:
            figures, text = compile_one(*routed_layers.routed_layers(shape, "tpu"), where)
        size, line = largest_operation(text)
        each, once = routed_layers.operations(text)
        yield (
            {"chip": chip, "kernel": name}
            | figures
            | {
                "layer_bytes": shape.layer_bytes,
                "largest_operation_bytes": size,
                "largest_operation": line,
                "select_per": shape.select_per,
                "operations": len(each),
                "operations_once": len(once),
                "operation_names": each,
            }
        )


STEPS = ("qwen3-4b", "qwen2.5-0.5b")
"""Decoders whose whole decoding step is compiled."""


def abstract_cache(config: MLLMConfig, shape: decode_shapes.Shape) -> Cache:
    """A cache of the decoder over ``shape``'s regions, as arrays without values."""
    decoder, regions = config.decoder, decode_shapes.SCENES[shape.tokens][0]
    _, packed, text, *_ = shape.arguments(config.gaze.decode_implementation)

    def integers(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shape.batch, *sizes), jnp.int32)

    kv = (decoder.depth, shape.batch, decoder.num_kv_heads)
    return Cache(
        visual=packed,
        descriptors=jax.ShapeDtypeStruct((*kv, regions, decoder.head_dim), jnp.bfloat16),
        text_k=text,
        text_v=text,
        visual_order=integers(regions, decode_shapes.SLOTS),
        text_order=integers(decode_shapes.TEXT),
    )


def _decode_step(
    config: MLLMConfig,
    variables: Any,
    cache: Cache,
    tokens: Any,
    positions: Any,
    step: DecodePosition,
    top_k: Any,
) -> Any:
    logits, cache, _ = MLLM(config).apply(
        variables,
        tokens,
        positions,
        cache,
        step,
        Selection(top_k),
        SelectionSpec(capacity=40),
        method="decode",
    )
    return logits, cache  # an answer without a trace; nobody reads which regions were selected


def on_host(tree: Any, where: jax.sharding.NamedSharding) -> Any:
    """The arrays of a tree, without values, in pinned host memory."""
    host = where.with_memory_kind("pinned_host")
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=host), tree)


def compile_step(
    chip: str, implementation: str, shape: decode_shapes.Shape
) -> tuple[dict[str, Any], str, dict[str, int]]:
    """Compile a decoding step of a whole model: layers scanned, cache donated, 40 regions per query.

    Returns:
      Figures and optimised HLO from :func:`compile_one`, and the bytes of the cache's parts.
    """
    gaze = GazeConfig(select_per=shape.select_per, context_tokens=0, decode_implementation=implementation)
    config = MLLMConfig(DECODERS[shape.heads], None, gaze, dtype="bfloat16", param_dtype="bfloat16")
    integers = jax.ShapeDtypeStruct((1,), jnp.int32)
    with target(chip) as where:
        step = DecodePosition(
            order=integers, write_index=jax.ShapeDtypeStruct((), jnp.int32), sample=integers
        )
        variables = {"params": nn.meta.unbox(boxed_params(config))}
        cache = abstract_cache(config, shape)
        if implementation == "offload":
            cache = dataclasses.replace(cache, visual=on_host(cache.visual, where))
        run = functools.partial(_decode_step, config)
        arguments = (variables, cache, integers, integers, step, jax.ShapeDtypeStruct((), jnp.int32))
        figures, text = compile_one(run, arguments, where, donate=(1,))

    def size(*trees: Any) -> int:
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(trees))

    parts = {
        "visual": size(cache.visual),
        "descriptors": size(cache.descriptors),
        "text": size(cache.text_k, cache.text_v),
    }
    return figures, text, parts


def step_rows(chip: str, only: str) -> Iterator[dict[str, Any]]:
    """Compile a decoding step of whole models, 40 of 256 regions."""
    for name in STEPS:
        for select_per in ("head", "kv_head"):
            shape = decode_shapes.Shape(name, 9_216, 1, select_per, layers=decode_shapes.HEADS[name][0])
            label = f"decode step {shape.name}"
            if only not in label:
                continue
            figures, text, _ = compile_step(chip, "tpu", shape)
            size, line = largest_operation(text)
            yield (
                {"chip": chip, "kernel": label}
                | figures
                | {
                    "layer_bytes": shape.layer_bytes,
                    "largest_operation_bytes": size,
                    "largest_operation": line,
                }
            )


LIMITS = {"kv_head": 0.03, "head": 0.06}
"""Limit on device memory for an offloaded visual cache, as a fraction of its size, by ``select_per``."""


def host_results(text: str) -> list[int]:
    """Bytes of each array that host computations pass to the device, per call in the HLO text."""
    sizes = []
    for start in re.findall(r"(%[\w.\-]+) = .*custom_call_target=\"HostExecute\"", text):
        done = re.search(rf"= (.*) custom-call-done\({re.escape(start)}\)", text)
        made = done[1] if done else re.search(rf"{re.escape(start)} = (.*) custom-call\(", text)[1]
        sizes += [
            ITEMSIZE[dtype] * math.prod(int(n) for n in shape.split(",") if n)
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", made)
        ]
    return sizes


def other_host_operations(text: str) -> list[str]:
    """Lines that use host memory and are not arguments, views, loops or host calls."""
    free = re.compile(r"\b(parameter|bitcast|get-tuple-element|tuple|while|conditional)\(|HostExecute")
    body = (line.strip() for line in text.splitlines() if re.match(r"\s+(?:ROOT )?%", line))
    return [line[:200] for line in body if "S(5)" in line and not free.search(line)]


def offload_rows(chip: str, only: str) -> Iterator[dict[str, Any]]:
    """A decoding step of Qwen3-4B whose visual cache is in host memory, 40 of 256 regions.

    The part of the visual cache on the device is counted as the descriptors, which are an argument, plus
    *all* temporaries of the step, including those unrelated to the cache.
    """
    for select_per, limit in LIMITS.items():
        layers, kv_heads, group, dim = decode_shapes.HEADS["qwen3-4b"]
        shape = decode_shapes.Shape("qwen3-4b", 9_216, 1, select_per, layers=layers)
        label = f"offload step {shape.name}"
        if only not in label:
            continue
        figures, text, parts = compile_step(chip, "offload", shape)
        resident, _, whole = compile_step(chip, "tpu", shape)
        size, line = largest_operation(text)
        lists = kv_heads * (group if select_per == "head" else 1)
        visual = parts["descriptors"] + figures["temporary_bytes"]
        yield (
            {"chip": chip, "kernel": label}
            | figures
            | {
                "layer_bytes": shape.layer_bytes,
                "largest_operation_bytes": size,
                "largest_operation": line,
                "resident_visual_bytes": whole["visual"],
                "resident_argument_bytes": resident["argument_bytes"],
                "resident_temporary_bytes": resident["temporary_bytes"],
                "descriptor_bytes": parts["descriptors"],
                "text_stream_bytes": parts["text"],
                "fetched_bytes": host_results(text),
                "selected_bytes": lists * 40 * decode_shapes.SLOTS * dim * 2 * 2,
                "other_host_operations": other_host_operations(text),
                "visual_on_device": visual / whole["visual"],
                "visual_limit": limit,
                "kv_on_device": (visual + parts["text"]) / (whole["visual"] + parts["text"]),
            }
        )


def append_rows(chip: str, only: str) -> Iterator[dict[str, Any]]:
    """Append 8 regions to a donated cache of 256."""
    for implementation in ("tpu", "xla", "offload"):
        for visual_dtype in (None, "int8"):
            shape = decode_shapes.Shape("qwen3-4b", 9_216, visual_dtype=visual_dtype, layers=36)
            label = f"append {implementation} {shape.name}"
            if only not in label:
                continue
            with target(chip) as where:
                packed = shape.arguments(implementation)[1]
                packed = on_host(packed, where) if implementation == "offload" else packed
                new = jax.ShapeDtypeStruct((36, 1, 8, 8, decode_shapes.SLOTS, 128), jnp.bfloat16)
                run = functools.partial(decode_api.append, spec=shape.spec, implementation=implementation)
                start = jax.ShapeDtypeStruct((), jnp.int32)
                figures, _ = compile_one(run, (packed, new, new, start), where, donate=(0,))
            cache = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(packed))
            yield {"chip": chip, "kernel": label} | figures | {"cache_bytes": cache}


def prefill_rows(chip: str, only: str) -> Iterator[dict[str, Any]]:
    """Compile gaze_prefill, forward and backward."""
    for name, build in prefill_shapes.PROGRAMS:
        label = f"gaze_prefill {name}"
        if only in label:
            with target(chip) as where:
                figures, _ = compile_one(*build(), where)
            yield {"chip": chip, "kernel": label} | figures


PARTS = (decode_rows, layer_rows, step_rows, offload_rows, append_rows, prefill_rows)


def problems(row: dict[str, Any]) -> list[str]:
    """The problems of a row, as text."""
    if "skipped" in row:
        return []
    found = []
    if "cache_bytes" in row:
        if row["written_in_place_bytes"] < row["cache_bytes"]:
            found.append("the cache is not written in place")
        if row["temporary_bytes"] > row["cache_bytes"] / 10:
            found.append(f"temporaries of {row['temporary_bytes']} bytes for a few regions")
    elif "visual_on_device" in row:
        if row["visual_on_device"] > row["visual_limit"]:
            found.append(f"{row['visual_on_device']:.4f} of the visual cache is on the device")
        if sum(row["fetched_bytes"]) != row["selected_bytes"]:
            found.append(f"{row['fetched_bytes']} bytes come from the host, not {row['selected_bytes']}")
        found += [f"host memory is used by {line}" for line in row["other_host_operations"]]
    elif not row["kernels"]:
        found.append("no kernel is in the program")
    if "layer_bytes" in row and row["largest_operation_bytes"] >= row["layer_bytes"]:
        found.append(f"an operation makes a layer's cache anew: {row['largest_operation']}")
    if "operations" in row:
        limit = routed_layers.LIMITS[row["select_per"]]
        if row["operations"] > limit:
            found.append(f"a layer executes {row['operations']} operations, more than {limit}")
        if row["select_per"] == "kv_head" and any(name.endswith(" sort") for name in row["operation_names"]):
            found.append("a layer sorts")
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the log here")
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    flags = parser.parse_args(argv)
    rows, wrong = [], []
    log = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "libtpu": metadata.version("libtpu"),
        "command": " ".join(["scripts/tpu_aot.sh", *argv]),
    }
    for chip in flags.chips:
        for row in itertools.chain.from_iterable(part(chip, flags.only) for part in PARTS):
            rows.append(row)
            complaints = problems(row)
            wrong += [f"{chip} {row['kernel']}: {complaint}" for complaint in complaints]
            told = row.get("skipped") or (
                f"{row['compile_seconds']:6.1f} s  peak {row['peak_bytes'] / 1e9:6.2f} GB  "
                f"temporary {row['temporary_bytes'] / 1e6:8.2f} MB"
            )
            print(f"{chip}  {row['kernel']:60} {told}", *complaints, flush=True)
            if flags.json is not None:  # after every row, so that an interrupted run keeps its results
                flags.json.write_text(json.dumps(log | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
