"""A training run that takes seconds: four digits, a narrow model, AdamW (Muon takes long to compile)."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh

from gaze_jax.data.placement import Arrays
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train import checkpoint, evaluation, loop
from gaze_jax.train.config import EvalConfig, Experiment, complete, parse
from gaze_jax.train.pipeline import RunData, open_data
from gaze_jax.train.step import TrainState, abstract_state, compile_step, init_state, put_batch, shardings_of


def tiny(**overrides: Any) -> ml_collections.ConfigDict:
    """The config of the run; ``tiny(steps=3, **{"optimizer.name": "adamw"})`` changes fields by path."""
    config = complete(
        {
            "seed": 3,
            "steps": 6,
            "batch_size": 8,
            "log_every": 2,
            "model": {
                "decoder": {
                    "vocab_size": 144,
                    "width": 32,
                    "depth": 2,
                    "num_heads": 2,
                    "num_kv_heads": 1,
                    "head_dim": 16,
                    "mlp_dim": 48,
                    "tie_embeddings": False,
                },
                "vision": {
                    "image_size": 20,
                    "patch_size": 5,
                    "width": 32,
                    "depth": 1,
                    "num_heads": 2,
                    "mlp_dim": 48,
                },
                "gaze": {"region": (2, 2), "context_tokens": 1, "top_k": 1},
            },
            "data": {"rows": 2, "cols": 2, "reads_per_sample": 2, "train_scenes": 64, "augment": False},
            "optimizer": {"name": "adamw", "warmup_steps": 2},
            "mesh": {"data": -1, "fsdp": 2},
            "eval": {"samples": 6, "batch_size": 4},
        }
    )
    with config.unlocked():
        config.update_from_flattened_dict(overrides)
    return config


def tiny_experiment(**overrides: Any) -> Experiment:
    """:func:`tiny`, parsed."""
    return parse(tiny(**overrides))


def data_of(experiment: Experiment) -> RunData:
    """The data of a run on digit scenes."""
    return open_data(experiment, None, Path("/nowhere"))


def batches_of(experiment: Experiment, count: int = 1, first: int = 0) -> list[Arrays]:
    """``count`` batches of a run on digit scenes, from number ``first`` on."""
    with contextlib.closing(data_of(experiment).batches_from(first)) as batches:
        return [next(batches) for _ in range(count)]


@functools.cache
def _compiled(experiment: Experiment, mesh: Mesh) -> Any:
    (batch,) = batches_of(experiment)
    return compile_step(experiment, mesh, put_batch(batch, mesh))


def compiled(experiment: Experiment, mesh: Mesh, batch: Any = None, teacher: Any = None) -> Any:
    """``compile_step``, once for all experiments that the same program serves."""
    if teacher is not None:
        return compile_step(experiment, mesh, batch, teacher)
    # These change no shape and no number; the mesh is an argument of its own.
    same: dict[str, Any] = {"mesh": MeshConfig(), "checkpoint_every": 0, "log_every": 1, "num_workers": 0}
    same |= {"eval_every": 0, "eval": EvalConfig(), "tensorboard": False, "profile_steps": ""}
    return _compiled(dataclasses.replace(experiment, **same), mesh)


@functools.cache
def _begun(experiment: Experiment) -> Any:
    return jax.device_get(init_state(experiment, make_mesh(MeshConfig(1, 1), jax.devices()[:1])))


def begun(experiment: Experiment, mesh: Mesh, params: Any = None) -> TrainState:
    """``init_state``, compiled once for all meshes and for all experiments that begin alike."""
    if params is not None:
        return init_state(experiment, mesh, params)
    same = {"mesh": MeshConfig(), "checkpoint_every": 0, "log_every": 1, "num_workers": 0, "accumulate": 1}
    same |= {"steps": 1000, "batch_size": 8}
    host = _begun(dataclasses.replace(experiment, **same))
    shardings = shardings_of(abstract_state(experiment, mesh))
    # Copies: what is put may share the memory of what it is put from, and a step gives it away.
    return jax.tree.map(lambda leaf, sharding: jax.device_put(np.array(leaf), sharding), host, shardings)


@contextlib.contextmanager
def whole_arrays() -> Iterator[None]:
    """Orbax writes an array that several devices hold as a whole, without a program for a slice of each.

    That is private to it: where it has moved, nothing changes.
    """
    with pytest.MonkeyPatch.context() as patch:
        handler = ocp.type_handlers.get_type_handler(jax.Array)
        patch.setattr(handler, "_use_replica_parallel", False, raising=False)
        yield


_evaluations: dict[Any, Any] = {}
_compile_evaluation = evaluation._compiled


def _evaluation(function: Callable[..., Any], experiment: Experiment, mesh: Mesh, batch: Any) -> Any:
    """What an evaluation runs, compiled once for each function of it and what that depends on."""
    at = inspect.getclosurevars(function).nonlocals.get("at")  # the queries of a trace
    shapes = tuple((name, leaf.shape) for name, leaf in sorted(batch.items()))
    key = function.__name__, None if at is None else tuple(at.tolist()), experiment, mesh, shapes
    if key not in _evaluations:
        _evaluations[key] = _compile_evaluation(function, experiment, mesh, batch)
    return _evaluations[key]


@contextlib.contextmanager
def reused_programs() -> Iterator[None]:
    """Training runs in this context compile once, and under the promotion that optax needs."""
    standard = jax.numpy_dtype_promotion("standard")
    with pytest.MonkeyPatch.context() as patch, standard, whole_arrays():
        patch.setattr(loop, "compile_step", compiled)
        patch.setattr(loop, "init_state", begun)
        patch.setattr(evaluation, "_compiled", _evaluation)
        yield


def random_state(experiment: Experiment) -> TrainState:
    """A state of step 0 with random parameters, without the seconds of compiling their initialisers."""
    rng = np.random.default_rng(experiment.seed)

    def values(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names = jax.tree_util.keystr(path, simple=True, separator="/")
        new = np.zeros(leaf.shape)
        if names.startswith("params"):
            norm = names.endswith(("scale", "norm/weight"))
            new = np.ones(leaf.shape) if norm else rng.normal(size=leaf.shape) * leaf.shape[-1] ** -0.5
        return jax.device_put(new.astype(leaf.dtype), leaf.sharding)

    abstract = abstract_state(experiment, make_mesh(experiment.mesh))
    return jax.tree_util.tree_map_with_path(values, abstract)


def save_untrained(experiment: Experiment, workdir: Path) -> None:
    """A checkpoint of step 0: what reads checkpoints needs no training."""
    data = data_of(experiment)
    with checkpoint.open_manager(workdir, 1) as manager, whole_arrays():
        state = random_state(experiment)
        checkpoint.save(manager, state, experiment, data.fingerprint, data.tokenizer, [])
