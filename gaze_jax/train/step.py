"""The train state, the loss and the training step."""

import dataclasses
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from gaze_jax.core.budget import budget_from_keep
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import IGNORE, POOL_FIELDS, Streams
from gaze_jax.models import MLLM, MLLMConfig
from gaze_jax.models.attention import make_metadata
from gaze_jax.models.parameters import abstract_params, init_variables, with_shardings
from gaze_jax.parallel import rules
from gaze_jax.train.config import Experiment
from gaze_jax.train.optimizer import make_optimizer, without_frozen

Array = jax.Array
Batch = Mapping[str, Array]
Metrics = dict[str, Array]

BATCH_FIELDS = (*(field.name for field in dataclasses.fields(Streams)), "images", "sample_id")
"""Batch fields that a step reads, plus ``streams.POOL_FIELDS`` if present; a batch may hold more."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that training updates.

    Attributes:
      step: int32 scalar, number of steps done.
      params: the model's parameters.
      opt_state: the optimizer's state.
    """

    step: Array
    params: PyTree
    opt_state: PyTree


def _init(experiment: Experiment, seed: Array) -> TrainState:
    params = nn.meta.unbox(init_variables(experiment.model, jax.random.key(seed)))
    optimizer, _ = make_optimizer(experiment.optimizer, experiment.steps)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """The shapes, dtypes and shardings of the state, without computing it.

    Raises:
      UserError: a parameter is not divisible over the mesh.
    """
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    shapes = jax.eval_shape(lambda seed: _init(experiment, seed), seed)
    params = shardings_of(abstract_params(experiment.model, mesh))
    optimizer, _ = make_optimizer(experiment.optimizer, experiment.steps)
    whole = rules.replicated(mesh)
    # Moments are sharded like their parameters; counters are replicated. Muon masks what it leaves to Adam.
    opt_state = optax.tree_map_params(
        optimizer,
        lambda leaf, sharding: leaf if isinstance(leaf, optax.MaskedNode) else sharding,
        shapes.opt_state,
        params,
        transform_non_params=lambda _: whole,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    shardings: PyTree = TrainState(whole, params, opt_state)  # type: ignore[arg-type]  # of shardings
    return with_shardings(shapes, shardings)


def shardings_of(abstract: PyTree) -> PyTree:
    """Return the shardings of a tree of arrays or abstract arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def init_state(experiment: Experiment, mesh: Mesh, params: PyTree | None = None) -> TrainState:
    """Make a fresh state, sharded from the start: no device ever holds a full sharded parameter.

    Args:
      experiment: the run.
      mesh: its mesh.
      params: parameters to start with, which are donated; None initialises them.
    """
    shardings = shardings_of(abstract_state(experiment, mesh))
    if params is not None:
        optimizer, _ = make_optimizer(experiment.optimizer, experiment.steps)
        start = jax.jit(
            lambda params: TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params)),
            out_shardings=shardings,
            donate_argnums=0,
        )
        return start(params)
    make = jax.jit(lambda seed: _init(experiment, seed), out_shardings=shardings)
    return make(np.uint32(experiment.seed))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Put this process's rows of a batch onto the mesh; fields that a step does not read are dropped."""
    sharding = rules.batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(batch[name]))
        for name in BATCH_FIELDS
        if name in batch or name not in POOL_FIELDS
    }


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean of ``values`` where ``mask`` is True, in float32; 0 if it is nowhere True."""
    total = jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0.0))
    return total / jnp.maximum(jnp.sum(mask, dtype=jnp.int32), 1).astype(jnp.float32)


def loss_and_metrics(
    params: PyTree, batch: Batch, keep: Array | None, config: MLLMConfig
) -> tuple[Array, Metrics]:
    """Teacher-forced cross entropy, averaged over the supervised tokens of the whole batch.

    Args:
      params: the model's parameters.
      batch: fields :data:`BATCH_FIELDS`, the streams int32, images float32 or uint8
        [B, N, height, width, 3].
      keep: float32 scalar, fraction of the visible regions that a query selects; None is dense attention.
      config: the model's config.

    Returns:
      float32 loss and metrics, averaged over supervised queries: "loss", "accuracy", "top_k" (regions that
      a query selects) and "visual_entries" (visual keys that it attends to, mean over layers and heads).
    """
    streams = Streams.from_batch(batch)
    sample = batch["sample_id"]
    visible = make_metadata(streams, config.gaze, sample).routed.visible
    top_k = None if keep is None else budget_from_keep(keep, visible)
    logits, out = MLLM(config).apply(
        {"params": params},
        batch["images"],
        streams,
        Selection(top_k),
        SelectionSpec(return_trace=True),
        sample_id=sample,
    )
    supervised = streams.targets != IGNORE
    targets = jnp.where(supervised, streams.targets, 0)
    loss = masked_mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets), supervised)
    # [L, B, S, Hs, R]; if no query is routed, every visible key is attended to.
    chosen = out.get("selected", visible[None, :, :, None])
    fraction = jnp.mean(chosen.astype(jnp.float32), axis=(0, 3))
    region_tokens = jnp.sum(streams.visual_valid, axis=-1, dtype=jnp.int32).astype(jnp.float32)
    visible_regions = jnp.sum(visible, axis=-1, dtype=jnp.int32)
    return loss, {
        "loss": loss,
        "accuracy": masked_mean(jnp.argmax(logits, axis=-1) == targets, supervised),
        "top_k": masked_mean(
            visible_regions if top_k is None else jnp.minimum(top_k, visible_regions), supervised
        ),
        "visual_entries": masked_mean(jnp.einsum("BSR,BR->BS", fraction, region_tokens), supervised),
    }


def keep_fraction(experiment: Experiment, step: Array) -> Array | None:
    """Fraction of the visible regions that a query selects at ``step``; None for dense arms.

    It ends at ``top_k`` over the regions of one image, so that a sample with several images keeps
    proportionally more.
    """
    top_k = experiment.model.gaze.top_k
    if top_k is None:
        return None
    progress = step.astype(jnp.float32) / jnp.float32(max(experiment.steps - 1, 1))
    final = min(top_k / experiment.model.layout.regions, 1.0)
    return experiment.schedule.keep(progress, final)


def step_function(experiment: Experiment) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Make the optimizer step, to be jitted: (state, batch) -> (state, metrics).

    Metrics are float32 scalars: those of :func:`loss_and_metrics`, "grad_norm" before clipping,
    "param_norm" after the update (finite if and only if the new parameters are), and "lr".
    """
    optimizer, schedule = make_optimizer(experiment.optimizer, experiment.steps)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        keep = keep_fraction(experiment, state.step)

        def loss(params: PyTree) -> tuple[Array, Metrics]:
            params = without_frozen(params, experiment.optimizer)
            return loss_and_metrics(params, batch, keep, experiment.model)

        grads, metrics = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def compile_step(
    experiment: Experiment, mesh: Mesh, batch: Batch
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compile :func:`step_function` once, for batches with the shapes of ``batch``.

    Everything that changes during a run is traced, so one program serves the whole run. A call donates the
    state it is given.

    Returns:
      The compiled step; a batch of other shapes raises a ValueError instead of compiling again.
    """
    abstract = abstract_state(experiment, mesh)
    step = jax.jit(
        step_function(experiment),
        donate_argnums=0,
        out_shardings=(shardings_of(abstract), rules.replicated(mesh)),
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.flax_rules()):
        compiled = step.lower(abstract, batch).compile()
    wanted = {name: (array.shape, array.dtype) for name, array in batch.items()}

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        for name, (shape, dtype) in wanted.items():
            array = batch[name]
            if (array.shape, array.dtype) != (shape, dtype):
                raise ValueError(
                    f"Batch field {name} is {array.dtype}{list(array.shape)} but the step was compiled for "
                    f"{dtype}{list(shape)}; pad every batch to the same sizes."
                )
        return compiled(state, batch)

    return run
