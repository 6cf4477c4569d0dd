"""The train state and the training step."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from gaze_jax.core.streams import POOL_FIELDS, Streams
from gaze_jax.data.dealing import dealt_batch, field_sharding
from gaze_jax.errors import UserError
from gaze_jax.models import MLLMConfig
from gaze_jax.models.parameters import boxed_params, init_variables, with_shardings
from gaze_jax.parallel import rules
from gaze_jax.train import lora
from gaze_jax.train.config import Experiment
from gaze_jax.train.losses import (
    ROW_LOSSES,
    Batch,
    Metrics,
    count_supervised,
    distillation_loss,
    next_token_loss,
)
from gaze_jax.train.optimizer import make_optimizer
from gaze_jax.train.skipping import kept, updates_done, verdict
from gaze_jax.train.teacher import Teacher

Array = jax.Array

BATCH_FIELDS = (*(field.name for field in dataclasses.fields(Streams)), "images", "sample_id")
"""Batch fields that a step reads, plus ``streams.POOL_FIELDS`` if present; a batch may hold more."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that training updates.

    Attributes:
      step: int32 scalar, number of steps done.
      params: the model's parameters, and those of its adapters if the run has any.
      opt_state: the optimizer's state.
      average: float32 moving average of the trained parts of ``params``; None if the run keeps none.
    """

    step: Array
    params: PyTree
    opt_state: PyTree
    average: PyTree | None = None


def _optimizer(experiment: Experiment) -> tuple[optax.GradientTransformation, optax.Schedule]:
    return make_optimizer(experiment.optimizer, experiment.steps, experiment.frozen)


def _begin(experiment: Experiment, params: PyTree) -> TrainState:
    optimizer, _ = _optimizer(experiment)
    params = lora.with_new(params, experiment.lora, experiment.seed)
    average = None
    if experiment.average_decay is not None:
        average = _in_float32(_trained(experiment, params))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def _init(experiment: Experiment, seed: Array) -> TrainState:
    return _begin(experiment, nn.meta.unbox(init_variables(experiment.model, jax.random.key(seed))))


def averaged_params(params: PyTree, average: PyTree | None) -> PyTree:
    """The parameters that a run is read with: ``params``, the averaged parts replaced, each in its dtype."""
    if average is None:
        return params
    in_dtype = {
        part: jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, params[part])
        for part, tree in average.items()
    }
    return params | in_dtype


def _trained(experiment: Experiment, params: PyTree) -> PyTree:
    """The parts of a model that are not frozen."""
    return {part: tree for part, tree in params.items() if part not in experiment.frozen}


def _in_float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _averaged(experiment: Experiment, state: TrainState, params: PyTree) -> PyTree | None:
    """The moving average after a step.

    Its decay grows with the steps, as (1 + n) / (10 + n), so that it forgets where the run began.
    """
    if experiment.average_decay is None:
        return None
    done = state.step.astype(jnp.float32) + 1.0
    decay = jnp.minimum(jnp.float32(experiment.average_decay), (1.0 + done) / (10.0 + done))
    new = _in_float32(_trained(experiment, params))
    return optax.incremental_update(new, state.average, 1.0 - decay)


def abstract_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """The shapes, dtypes and shardings of the state, without computing it.

    Raises:
      UserError: a parameter is not divisible over the mesh.
    """
    model = nn.meta.unbox(boxed_params(experiment.model))
    shapes = jax.eval_shape(lambda params: _begin(experiment, params), model)
    params = shardings_of(lora.abstract_params(experiment.model, experiment.lora, mesh))
    optimizer, _ = _optimizer(experiment)
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
    average = None if shapes.average is None else _trained(experiment, params)
    shardings: PyTree = TrainState(whole, params, opt_state, average)  # type: ignore[arg-type]
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
        start = jax.jit(lambda params: _begin(experiment, params), out_shardings=shardings, donate_argnums=0)
        return start(params)
    make = jax.jit(lambda seed: _init(experiment, seed), out_shardings=shardings)
    return make(np.uint32(experiment.seed))


def check_mesh(experiment: Experiment, mesh: Mesh) -> None:
    """Check that the devices of a mesh can share the rows of a batch and the heads of the model.

    Raises:
      UserError: they cannot, or they split sequences and the objective cannot.
    """
    check_heads(experiment.model, mesh)
    _, ranks = rules.split_sizes(mesh, "tokens")
    if ranks > 1 and experiment.objective.name == "distill":
        raise UserError(
            f"mesh.context={ranks} splits sequences, and objective.name='distill' compares whole ones; use "
            "mesh.fsdp or mesh.tensor to share memory."
        )
    _, devices = rules.split_sizes(mesh, "batch")
    rows = experiment.batch_size // experiment.accumulate
    if rows % devices:
        parts = f" / accumulate={experiment.accumulate}" if experiment.accumulate > 1 else ""
        raise UserError(
            f"batch_size={experiment.batch_size}{parts} must be a multiple of the {devices} devices that "
            "share the rows (mesh.data * mesh.fsdp)."
        )


def check_heads(model: MLLMConfig, mesh: Mesh) -> None:
    """Check that ``mesh.tensor`` devices can share the heads of a model.

    Raises:
      UserError: they cannot; the message names the sizes that can.
    """
    _, parts = rules.split_sizes(mesh, "kv_heads")
    heads = {"decoder.num_kv_heads": model.decoder.num_kv_heads}
    if model.vision is not None:
        heads["vision.num_heads"] = model.vision.num_heads
    for name, count in heads.items():
        if count % parts:
            common = math.gcd(*heads.values())
            fitting = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
            raise UserError(
                f"mesh.tensor={parts} does not divide {name}={count}, which the devices share; it can be "
                f"{fitting}."
            )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Put this process's rows of a batch onto the mesh; fields that a step does not read are dropped.

    Where the devices of several processes share rows, each of these processes has all of them.
    """
    _, ranks = rules.split_sizes(mesh, "tokens")
    _, groups = rules.rows_of_process(mesh)
    arrays = dealt_batch({name: np.asarray(batch[name]) for name in BATCH_FIELDS if name in batch}, ranks)

    def put(name: str) -> Array:
        values = arrays[name]
        sharding = field_sharding(mesh, name)
        shape = (values.shape[0] * groups, *values.shape[1:])
        return jax.make_array_from_process_local_data(sharding, values, shape)

    return {name: put(name) for name in BATCH_FIELDS if name in batch or name not in POOL_FIELDS}


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


def step_function(experiment: Experiment) -> Callable[..., tuple[TrainState, Metrics]]:
    """Make the optimizer step, to be jitted: (state, batch, teacher=None) -> (state, metrics).

    Metrics are float32 scalars: those of the objective (:mod:`gaze_jax.train.losses`), "grad_norm" before
    clipping, "param_norm" after the update (finite if and only if the new parameters are), "lr", and
    "skipped": 0, or the loss or the gradient was not finite, and nothing of the state changed but the number
    of the step (:func:`gaze_jax.train.skipping.verdict`).
    """
    optimizer, schedule = _optimizer(experiment)

    def step(state: TrainState, batch: Batch, teacher: Teacher | None = None) -> tuple[TrainState, Metrics]:
        keep = keep_fraction(experiment, state.step)
        count = count_supervised(batch)

        trained = _trained(experiment, state.params)

        def loss(trained: PyTree, part: Batch) -> tuple[Array, Metrics]:
            params = lora.joined(state.params | trained, experiment.lora)
            if teacher is None:
                return next_token_loss(params, part, keep, experiment.model, count)
            return distillation_loss(
                params, part, keep, experiment.model, teacher, experiment.objective.region_weight, count
            )

        grads, metrics = _accumulated(jax.grad(loss, has_aux=True), trained, batch, experiment.accumulate)
        # The optimizer wants a leaf for each parameter; of frozen parts it reads none.
        none = {
            part: jax.tree.map(jnp.zeros_like, tree)
            for part, tree in state.params.items()
            if part in experiment.frozen
        }
        grad_norm = optax.tree.norm(grads)
        skipped = verdict(metrics["loss"], grad_norm, metrics.pop(ROW_LOSSES))
        good = skipped == 0
        updates, opt_state = optimizer.update(none | grads, state.opt_state, state.params)
        updates = _trained(experiment, updates)
        # Decided by the gradient alone, so that the new values take the place of the old ones.
        params = state.params | kept(good, optax.apply_updates(trained, updates), trained)
        opt_state = kept(good, opt_state, state.opt_state)
        average = kept(good, _averaged(experiment, state, params), state.average)
        metrics |= {
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "lr": jnp.asarray(schedule(updates_done(state.opt_state)), jnp.float32),
            "skipped": skipped,
        }
        return TrainState(state.step + 1, params, opt_state, average), metrics

    return step


def _accumulated(
    gradient: Callable[[PyTree, Batch], tuple[PyTree, Metrics]], params: PyTree, batch: Batch, parts: int
) -> tuple[PyTree, Metrics]:
    """The sum of ``gradient`` over ``parts`` parts of a batch, one after the other."""
    if parts == 1:
        return gradient(params, batch)

    def split(a: Array) -> Array:
        # Part p has rows p, parts + p, ...: of each device's rows as many as of every other's.
        return jnp.moveaxis(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 1, 0)

    def add(total: tuple[PyTree, Metrics], part: Batch) -> tuple[tuple[PyTree, Metrics], None]:
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda a: split(a)[0], batch))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, jax.tree.map(split, dict(batch)))[0]


def compile_step(
    experiment: Experiment, mesh: Mesh, batch: Batch, teacher: Teacher | None = None
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
        compiled = step.lower(abstract, batch, teacher).compile()
    wanted = {name: (array.shape, array.dtype) for name, array in batch.items()}

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        for name, (shape, dtype) in wanted.items():
            array = batch[name]
            if (array.shape, array.dtype) != (shape, dtype):
                raise ValueError(
                    f"Batch field {name} is {array.dtype}{list(array.shape)} but the step was compiled for "
                    f"{dtype}{list(shape)}; pad every batch to the same sizes."
                )
        return compiled(state, batch, teacher)

    return run
