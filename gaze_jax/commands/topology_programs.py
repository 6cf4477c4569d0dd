"""The programs of a config, compiled for a TPU topology, and what each of them takes.

Nothing is read but the config, and nothing is computed: every array is a shape.
"""

import contextlib
import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.stages import Traced

from gaze_jax.convert.origin import open_start
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import POOL_FIELDS, Streams
from gaze_jax.corpora.config import CorpusConfig
from gaze_jax.corpora.digits import sequence_lengths
from gaze_jax.corpora.phrases import build_tokenizer
from gaze_jax.data.padding import PADDING
from gaze_jax.errors import UserError, first_line
from gaze_jax.families import MODELS, get_family
from gaze_jax.infer.gaze_options import selection_capacity
from gaze_jax.infer.programs import free_slots_for, prefill_step
from gaze_jax.models import MLLM, Cache, DecodePosition, MLLMConfig
from gaze_jax.models.cache import constrained
from gaze_jax.models.parameters import abstract_params, with_shardings
from gaze_jax.parallel import rules
from gaze_jax.parallel.costs import collective_traffic, count_flops, roofline
from gaze_jax.parallel.mesh import AXES, make_mesh
from gaze_jax.parallel.topology import Chip, needed_bytes
from gaze_jax.train.config import Experiment, parse, resolve
from gaze_jax.train.step import BATCH_FIELDS, abstract_state, shardings_of, step_function
from pallas_kernels import dispatch
from pallas_kernels.gaze_decode import api

Program = Literal["train", "prefill", "decode"]
Row = dict[str, Any]

_STEPS = 1000
"""Steps of a run that leaves their number to its corpus; a constant in the program, which changes no size."""

_LARGEST = 5
"""Buffers that a row names."""


def read_experiment(config: Mapping[str, Any]) -> Experiment:
    """The experiment of a config, without its data and without a parameter of its checkpoint.

    Raises:
      UserError: the config is wrong, or changes the model of a checkpoint that is not here.
    """
    named, values = config.get("init_from"), dict(config.items())
    if "decoder" in config.get("model", {}):
        # A run on a corpus needs a checkpoint for its tokenizer, which no shape depends on.
        experiment = parse(values | {"init_from": named or "none"})
    elif not named:
        raise UserError(
            "model has no decoder; name its checkpoint in --config.init_from, a folder or a published model "
            f"({', '.join(MODELS)})."
        )
    else:
        experiment = parse(values, _model_of(named))
    if experiment.steps:
        return experiment
    return dataclasses.replace(experiment, steps=max(_STEPS, 2 * experiment.optimizer.warmup_steps))


def _model_of(named: str) -> MLLMConfig:
    if named in MODELS:
        return MODELS[named]
    if not Path(named).is_dir():
        raise UserError(
            f"init_from={named} is neither a folder nor a published model; the models are "
            f"{', '.join(MODELS)}."
        )
    return open_start(named).config


def dense_of(experiment: Experiment) -> Experiment | None:
    """The same experiment with dense attention and the same context tokens; None if it is dense already."""
    if experiment.model.gaze.top_k is None:
        return None
    return resolve(dataclasses.replace(experiment, arm="dense_context"))


def _row_sizes(experiment: Experiment) -> tuple[int, int, int]:
    """S, R and the number of images of a row."""
    layout = experiment.model.layout
    if not isinstance(experiment.data, CorpusConfig):
        longest = sequence_lengths(experiment.data, build_tokenizer()).sample
        return longest + layout.context_tokens, layout.regions, 1
    row = experiment.data.row
    if not row.text:
        raise UserError(
            "data.row.text=0 leaves the size of a row to the corpus, which is not read; give data.row.text, "
            "data.row.regions and data.row.images."
        )
    if bool(row.regions) != bool(row.images):
        raise UserError(
            f"data.row.regions={row.regions} and data.row.images={row.images} must both be given, or both be "
            "0 for text alone."
        )
    return row.text, row.regions, row.images


def abstract_batch(experiment: Experiment, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes, dtypes and shardings of a batch, as :func:`gaze_jax.train.step.put_batch` makes it.

    Regions have as many slots as those of one whole square image.

    Raises:
      UserError: the config leaves sizes to its corpus, or the devices do not divide the batch.
    """
    text, regions, images = _row_sizes(experiment)
    sharding, batch = rules.batch_sharding(mesh), experiment.batch_size
    parts = math.prod(mesh.shape[axis] for axis in rules.RULES["batch"])
    if batch % parts:
        written = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
        raise UserError(
            f"batch_size={batch} cannot be split into {parts} parts over the mesh {written}; give "
            "--config.batch_size a multiple."
        )
    layout = experiment.model.layout
    views = get_family(layout.views.style).views
    shapes: dict[str, tuple[int, ...]] = {
        "images": (images, layout.image_size, layout.image_size, 3),
        "sample_id": (),
        "region_segment": (regions,),
        "pool_indices": (regions, layout.slots, 4),
        "pool_weights": (regions, layout.slots, 4),
    }
    for name in BATCH_FIELDS:
        axis = PADDING[name][0] if name in PADDING else ""
        shapes.setdefault(name, (text,) if axis == "text" else (regions, layout.slots))
    dtypes = {"images": jnp.uint8, "pool_weights": jnp.float32}
    return {
        name: jax.ShapeDtypeStruct((batch, *shapes[name]), dtypes.get(name, jnp.int32), sharding=sharding)
        for name in BATCH_FIELDS
        if name not in POOL_FIELDS or not views.tower_tokens
    }


@dataclasses.dataclass(frozen=True)
class _Call:
    """A jitted function and the shapes to compile it for."""

    function: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _train(experiment: Experiment, mesh: Mesh) -> _Call:
    state = abstract_state(experiment, mesh)
    step = jax.jit(
        step_function(experiment),
        donate_argnums=0,
        out_shardings=(shardings_of(state), rules.replicated(mesh)),
    )
    return _Call(step, (state, abstract_batch(experiment, mesh)))


def _scalar(mesh: Mesh) -> Any:
    return jax.ShapeDtypeStruct((), jnp.int32, sharding=rules.replicated(mesh))


def _prefill(experiment: Experiment, mesh: Mesh) -> _Call:
    batch: dict[str, Any] = {**abstract_batch(experiment, mesh)}
    model = experiment.model
    budget: Any = None if model.gaze.top_k is None else _scalar(mesh)
    streams = Streams(**{name: a for name, a in batch.items() if name not in ("images", "sample_id")})
    images = batch["images"] if batch["images"].shape[1] else None
    arguments = (MLLM(model), abstract_params(model, mesh), images, streams)
    options = {"spec": SelectionSpec(), "free_slots": free_slots_for(0)}
    return _Call(prefill_step, (*arguments, batch["sample_id"], Selection(budget)), options)


def _decode(experiment: Experiment, mesh: Mesh) -> _Call:
    prefill = _prefill(experiment, mesh)
    model, params, _, _, sample, selection = prefill.arguments
    with dispatch.compile_for("tpu"):
        cache = _sharded(prefill.function.eval_shape(*prefill.arguments, **prefill.options), mesh)
    top_k, regions = model.config.gaze.top_k, cache.visual_order.shape[1]
    capacity = None
    if top_k is not None:
        # As in training, a query over several images selects of each as many as of one.
        capacity = selection_capacity([min(top_k / model.config.layout.regions, 1.0)], regions)
    spec = SelectionSpec(capacity=capacity)

    def decode(params: Any, cache: Cache, tokens: Any, position: DecodePosition, selection: Selection) -> Any:
        logits, cache, _ = model.apply(
            {"params": params}, tokens, position.order, cache, position, selection, spec, method="decode"
        )
        return logits, constrained(cache)

    position = DecodePosition(order=sample, write_index=_scalar(mesh), sample=sample)
    return _Call(jax.jit(decode, donate_argnums=1), (params, cache, sample, position, selection))


def _sharded(cache: Cache, mesh: Mesh) -> Cache:
    """A cache of shapes, sharded as :func:`gaze_jax.models.cache.constrained` shards it."""

    def split(tree: Any, names: tuple[str | None, ...]) -> Any:
        sharding = NamedSharding(mesh, rules.partition_spec(names, "the cache"))
        return with_shardings(tree, jax.tree.map(lambda _: sharding, tree))

    stack = ("layers", "batch", "kv_heads")
    return Cache(
        visual=split(cache.visual, api.cache_axes(cache.visual)),
        descriptors=split(cache.descriptors, stack),
        text_k=split(cache.text_k, stack),
        text_v=split(cache.text_v, stack),
        visual_order=split(cache.visual_order, ("batch",)),
        text_order=split(cache.text_order, ("batch",)),
    )


CALLS: Mapping[str, Callable[[Experiment, Mesh], _Call]] = {
    "train": _train,
    "prefill": _prefill,
    "decode": _decode,
}
"""Program -> what is compiled."""


def mesh_of(experiment: Experiment, devices: Any, topology: str, program: Program) -> Mesh:
    """The mesh of an experiment over the devices of a topology.

    Raises:
      UserError: its sizes do not fit them, or the chips cannot be arranged so.
    """
    sizes = dataclasses.asdict(experiment.mesh)
    if program != "train" and any(sizes[name] not in (1, -1) for name in AXES if name != "data"):
        raise UserError(
            f"--program={program} splits only sequences, over the axis data; leave out --config.mesh.fsdp."
        )
    try:
        return make_mesh(experiment.mesh, devices)
    except NotImplementedError as error:
        written = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"JAX cannot arrange the mesh {written} on {topology} ({first_line(error)}); choose sizes that "
            "are products of its sides."
        ) from error


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
      "temporary_bytes" and "collective_bytes" of one chip, "flops" of all chips. What is only known of a
      program that was compiled is None if it does not fit.
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
            found = _NOT_COMPILED | {"peak_bytes": needed}
    row = _described(experiment, chip, dict(mesh.shape)) | found
    row |= {
        "program": program,
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
        memory_bytes=row["argument_bytes"] + row["output_bytes"],
        sent_bytes=row["collective_bytes"],
    )
    return row | {"bound_seconds": bound.seconds, "bound_by": bound.by, "bound_parts": dict(bound.parts)}


_NOT_COMPILED: Row = {
    "peak_bytes": None,
    "argument_bytes": None,
    "temporary_bytes": None,
    "output_bytes": None,
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
    state = abstract_state(experiment, mesh)
    return sum(rules.bytes_per_device(state, shardings_of(state)).values())


def _compiled(traced: Traced, effort: float, name_buffers: bool) -> Row:
    """What the compiled program tells."""
    options: dict[str, Any] = {"exec_time_optimization_effort": effort}
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
        "output_bytes": memory.output_size_in_bytes,
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
        {"bytes": int(float(size) * 1024 ** (" KMGT".index(unit or " "))), "arrays": arrays.strip()}
        for size, unit, arrays in _BUFFER.findall(space)[:_LARGEST]
    ]
