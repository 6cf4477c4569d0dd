"""The programs of a config, with the shapes to compile them for.

Nothing is read but the config, and nothing is computed: every array is a shape.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from gaze_jax.convert.origin import open_start
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import POOL_FIELDS, Streams
from gaze_jax.corpora.config import CorpusConfig
from gaze_jax.corpora.digits import sequence_lengths
from gaze_jax.corpora.phrases import build_tokenizer
from gaze_jax.data.dealing import field_sharding, up
from gaze_jax.data.padding import PADDING
from gaze_jax.errors import UserError
from gaze_jax.families import MODELS, get_family
from gaze_jax.infer.gaze_options import selection_capacity
from gaze_jax.infer.programs import free_slots_for, prefill_step
from gaze_jax.models import MLLM, Cache, DecodePosition, MLLMConfig
from gaze_jax.models.cache import by_axes, constrained
from gaze_jax.models.parameters import abstract_params, with_shardings
from gaze_jax.parallel import rules
from gaze_jax.parallel.mesh import make_mesh
from gaze_jax.train.config import Experiment, parse, resolve
from gaze_jax.train.step import BATCH_FIELDS, abstract_state, check_mesh, shardings_of, step_function
from gaze_jax.train.teacher import abstract_teacher
from pallas_kernels import dispatch

Program = Literal["train", "prefill", "decode"]

_STEPS = 1000
"""Steps of a run that leaves their number to its corpus; a constant in the program, which changes no size."""


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
    # Dense attention scores no region.
    objective = dataclasses.replace(experiment.objective, region_weight=0.0)
    return resolve(dataclasses.replace(experiment, arm="dense_context", objective=objective))


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
    check_mesh(experiment, mesh)
    _, ranks = rules.split_sizes(mesh, "tokens")
    text, regions = up(text, ranks), up(regions, ranks)
    batch = experiment.batch_size
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
    # Digit scenes are drawn as floats; the pixels of files stay bytes.
    pixels = jnp.uint8 if isinstance(experiment.data, CorpusConfig) else jnp.float32
    dtypes = {"images": pixels, "pool_weights": jnp.float32}
    return {
        name: jax.ShapeDtypeStruct(
            (batch, *shapes[name]), dtypes.get(name, jnp.int32), sharding=field_sharding(mesh, name)
        )
        for name in BATCH_FIELDS
        if name not in POOL_FIELDS or not views.tower_tokens
    }


@dataclasses.dataclass(frozen=True)
class _Call:
    """A jitted function and the shapes to compile it for.

    Attributes:
      function, arguments, options: what is called.
      memory_bytes: bytes that each chip must read and write at least: parameters, optimizer state and cache
        once. Activations and the embedding table of a model that only looks up rows of it are left out.
    """

    function: Any
    arguments: tuple[Any, ...]
    memory_bytes: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def chip_bytes(tree: Any) -> int:
    """Bytes that a chip holds of a tree of sharded shapes."""
    return sum(rules.bytes_per_device(tree, shardings_of(tree)).values())


def _read_bytes(experiment: Experiment, params: Any) -> int:
    """Bytes of parameters that a forward pass reads as a whole."""
    decoder = params["decoder"]
    table = 0 if experiment.model.decoder.tie_embeddings else chip_bytes({"": decoder["embedding"]})
    return chip_bytes(params) - table


def _train(experiment: Experiment, mesh: Mesh) -> _Call:
    state = abstract_state(experiment, mesh)
    step = jax.jit(
        step_function(experiment),
        donate_argnums=0,
        out_shardings=(shardings_of(state), rules.replicated(mesh)),
    )
    distills = experiment.objective.name == "distill"
    frozen = experiment.frozen
    trained = {part: tree for part, tree in state.params.items() if part not in frozen}
    read = _read_bytes(experiment, state.params) if "decoder" in frozen else chip_bytes(state.params)
    memory = read + chip_bytes(trained) + 2 * chip_bytes((state.opt_state, state.average))
    taught = abstract_teacher(experiment, _model_of(str(experiment.init_from)), mesh) if distills else None
    if taught is not None:  # an objective reads its teacher once, forward
        memory += chip_bytes(taught.params)
    return _Call(step, (state, abstract_batch(experiment, mesh), taught), memory)


def _scalar(mesh: Mesh) -> Any:
    return jax.ShapeDtypeStruct((), jnp.int32, sharding=rules.replicated(mesh))


def _prefill(experiment: Experiment, mesh: Mesh) -> _Call:
    # Only training takes a batch in parts.
    batch: dict[str, Any] = {**abstract_batch(dataclasses.replace(experiment, accumulate=1), mesh)}
    model = experiment.model
    budget: Any = None if model.gaze.top_k is None else _scalar(mesh)
    streams = Streams(**{name: a for name, a in batch.items() if name not in ("images", "sample_id")})
    images = batch["images"] if batch["images"].shape[1] else None
    params = abstract_params(model, mesh)
    arguments = (MLLM(model), params, images, streams, batch["sample_id"], Selection(budget))
    options = {"spec": SelectionSpec(), "free_slots": free_slots_for(0)}
    return _Call(prefill_step, arguments, _read_bytes(experiment, params), options)


def _decode(experiment: Experiment, mesh: Mesh) -> _Call:
    prefill = _prefill(experiment, mesh)
    model, params, _, _, sample, selection = prefill.arguments
    with dispatch.compile_for("tpu"):
        cache = _sharded(prefill.function.eval_shape(*prefill.arguments, **prefill.options), mesh)
    top_k, regions = model.config.gaze.top_k, cache.visual_order.shape[1]
    # As in training, a query over several images selects of each as many as of one.
    keep = 1.0 if top_k is None else min(top_k / model.config.layout.regions, 1.0)
    spec = SelectionSpec(capacity=None if top_k is None else selection_capacity([keep], regions))

    def decode(params: Any, cache: Cache, tokens: Any, position: DecodePosition, selection: Selection) -> Any:
        logits, cache, _ = model.apply(
            {"params": params}, tokens, position.order, cache, position, selection, spec, method="decode"
        )
        return logits, constrained(cache)

    position = DecodePosition(order=sample, write_index=_scalar(mesh), sample=sample)
    # Of the regions, each kv head reads those that at least one of its queries selects.
    visual = int(keep * chip_bytes(cache.visual))
    text = chip_bytes({"k": cache.text_k, "v": cache.text_v})
    memory = _read_bytes(experiment, {"decoder": params["decoder"]}) + visual + text
    arguments = (params, cache, sample, position, selection)
    return _Call(jax.jit(decode, donate_argnums=1), arguments, memory)


def _sharded(cache: Cache, mesh: Mesh) -> Cache:
    """A cache of shapes, sharded as :func:`gaze_jax.models.cache.constrained` shards it."""

    def split(tree: Any, names: Sequence[str | None]) -> Any:
        sharding = NamedSharding(mesh, rules.partition_spec(names, "the cache"))
        return with_shardings(tree, jax.tree.map(lambda _: sharding, tree))

    return by_axes(cache, split)


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
    if program != "train" and any(sizes[name] not in (1, -1) for name in ("fsdp", "tensor")):
        raise UserError(
            f"--program={program} splits batches over the axis data and sequences over context; leave out "
            "--config.mesh.fsdp and --config.mesh.tensor."
        )
    try:
        return make_mesh(experiment.mesh, devices)
    except NotImplementedError as error:
        written = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"JAX cannot arrange the mesh {written} on {topology}; choose sizes that are products of its "
            "sides."
        ) from error
