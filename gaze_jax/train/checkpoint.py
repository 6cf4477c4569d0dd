"""Checkpoints: parameters, optimizer state and config, committed together by Orbax.

One step is ``WORKDIR/checkpoints/STEP`` with the items ``params``, ``train`` (step and optimizer state),
``average`` if the run keeps a moving average of its parameters, and ``meta`` (JSON: format, config, data
fingerprint, tokenizer, and a name, dtype, shape and digest of every leaf). The step says which batch is next.
Orbax writes to a temporary folder and renames it, so a step is complete or absent. It casts silently and does
not notice a flipped bit, so this module checks ``meta``.
"""

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jaxtyping import PyTree

from gaze_jax.config import to_dict
from gaze_jax.core.routing import avalanche
from gaze_jax.data.pipeline import compare_fingerprints
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import NotFiniteError, UserError, first_line
from gaze_jax.stored import NEWEST, check_version, upgrade
from gaze_jax.train import lora
from gaze_jax.train.config import Experiment, parse
from gaze_jax.train.step import TrainState, abstract_state, averaged_params

Array = jax.Array
Leaf = Array | jax.ShapeDtypeStruct

FOLDER = "checkpoints"
UNFINISHED = ".orbax-checkpoint-tmp"
"""How the name of a checkpoint ends that was not written to its end; it is never read."""

MAY_CHANGE = (
    "mesh",
    "checkpoint_every",
    "keep_checkpoints",
    "max_skipped",
    "log_every",
    "eval_every",
    "tensorboard",
    "profile_steps",
    "num_workers",
    "eval",
)
"""Fields of an experiment that a resumed run may change: they do not affect training."""


def open_manager(workdir: str | os.PathLike[str], keep: int | None = None) -> ocp.CheckpointManager:
    """Open the checkpoints of a run; use it as a context manager, which waits for the last write.

    Args:
      workdir: the run's folder.
      keep: how many of the newest checkpoints to keep; None opens them for reading and creates no folder.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None)
    return ocp.CheckpointManager(Path(workdir).resolve() / FOLDER, options=options)  # it takes no ".."


def remove_unfinished(workdir: str | os.PathLike[str]) -> list[str]:
    """Delete what a killed run left of the checkpoints that it was writing; one process calls this.

    Returns:
      Names of the folders.
    """
    found = sorted((Path(workdir) / FOLDER).glob(f"*{UNFINISHED}*"))
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in found]


@jax.jit  # one program for all leaves of a shape: the optimizer's state repeats those of the parameters
def _digest(leaf: Array) -> Array:
    """uint32 sum of the leaf's bits, each mixed with its index: the same on every mesh."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        place = avalanche(place ^ jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis))
    return jnp.sum(avalanche(words ^ place), dtype=jnp.uint32)


@jax.jit
def _digest_and_finite(leaf: Array) -> tuple[Array, Array]:
    return _digest(leaf), jnp.all(jnp.isfinite(leaf))


def _named(tree: PyTree) -> dict[str, Leaf]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _items(state: TrainState) -> dict[str, PyTree]:
    items = {"params": state.params, "train": {"step": state.step, "opt_state": state.opt_state}}
    return items if state.average is None else items | {"average": state.average}


class LeafRecord(TypedDict):
    """What is written about an array, to know it again."""

    dtype: str
    shape: list[int]
    digest: str


class Meta(TypedDict):
    """What a checkpoint says of itself in JSON; ``leaves`` are those of each of its trees, by name."""

    format_version: int
    config: dict[str, object]
    data: dict[str, object]
    tokenizer: str
    leaves: dict[str, dict[str, LeafRecord]]
    window: list[dict[str, float]]
    skipped_in_a_row: int


def describe(tree: PyTree, *, finite: bool = False) -> dict[str, LeafRecord]:
    """Name -> dtype, shape and digest of every leaf, JSON-ready.

    Raises:
      NotFiniteError: a leaf has a value that is not finite, and ``finite`` asks for it.
    """
    found: dict[str, LeafRecord] = {}
    # One after the other, waiting for each: a CPU mesh stalls when many small collectives run at once.
    for name, leaf in _named(tree).items():
        digest, sound = jax.device_get(_digest_and_finite(leaf))
        if finite and not sound:
            raise NotFiniteError(name)
        found[name] = {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "digest": f"{int(digest):08x}"}
    return found


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    experiment: Experiment,
    fingerprint: Mapping[str, object],
    tokenizer: Tokenizer,
    window: list[dict[str, float]],
    skipped_in_a_row: int = 0,
) -> None:
    """Commit the state after a step, in the background; every process must call it.

    Args:
      manager: from :func:`open_manager`.
      state: the run's state; it may be donated as soon as this returns.
      experiment, fingerprint, tokenizer: saved as ``meta``, to interpret the state.
      window: metrics of the steps since the last row of metrics.jsonl.
      skipped_in_a_row: steps whose update was left out since the last that was made.

    Raises:
      NotFiniteError: the state has a value that is not finite; nothing is written.
    """
    items = _items(state)
    try:
        leaves = {name: describe(item, finite=True) for name, item in items.items()}
    except NotFiniteError as error:
        raise NotFiniteError(
            f"After step {int(state.step)} {error} is not finite, so it is not saved; the checkpoints in "
            f"{manager.directory} are sound, but starting again comes to the same: in a new workdir, lower "
            "optimizer.learning_rate, set optimizer.clip_norm, or lengthen optimizer.warmup_steps."
        ) from None
    meta: Meta = {
        "format_version": NEWEST["run"],
        "config": to_dict(experiment),
        "data": dict(fingerprint),
        "tokenizer": tokenizer.json,
        "leaves": leaves,
        "window": window,
        "skipped_in_a_row": skipped_in_a_row,
    }
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            **{name: ocp.args.StandardSave(item) for name, item in items.items()},
            meta=ocp.args.JsonSave(meta),
        ),
    )


def _reason(error: BaseException) -> str:
    """Which array an error of Orbax is about, and why, from what TensorStore says in many lines."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).partition(" [tensorstore_spec")[0]
        if arrays := re.findall(r'(?:Error reading|Metadata at) "([\w.]+)/[\w.]*"', text):
            files = re.findall(r'local file "([^"]+[^/"])"', text)
            where = f", file {Path(files[-1]).name}" if files else ""
            return f"array {arrays[-1].replace('.', '/')}{where}: {text.split(': ')[-1]}"
        cause = cause.__cause__ or cause.__context__
    return first_line(error) if isinstance(error, Exception) else str(error)


def _read(manager: ocp.CheckpointManager, step: int, item: str, args: ocp.args.CheckpointArgs) -> Any:
    """Restore an item; any error about a damaged file becomes a one-sentence UserError that names it."""
    try:
        return manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
    except Exception as error:  # Orbax and TensorStore each raise their own types
        raise UserError(
            f"Checkpoint {manager.directory / str(step)} cannot be read ({item}: {_reason(error)}); it is "
            "damaged or not of this program: move it away to continue from the one before it."
        ) from error


def _meta(manager: ocp.CheckpointManager, step: int) -> Meta:
    """What the checkpoint says of itself, under today's names."""
    meta = _read(manager, step, "meta", ocp.args.JsonRestore())
    where = f"Checkpoint {manager.directory / str(step)}"
    version = check_version("run", meta, where)
    try:
        return cast(Meta, upgrade("run", meta, version))
    except ValueError as error:
        raise UserError(
            f"{where} is damaged: {error}; move it away to continue from the one before it."
        ) from error


def _check_leaves(saved: Mapping[str, LeafRecord], wanted: PyTree, where: str) -> None:
    """Check names, shapes and dtypes before anything is read: Orbax would cast a dtype silently."""
    named = _named(wanted)
    for name in sorted({*saved, *named}):
        if name not in saved or name not in named:
            kind = "lacks" if name not in saved else "has an unknown"
            raise UserError(
                f"{where} {kind} array {name}; it was written by another version of the program or of optax."
            )
        have = f"{saved[name]['dtype']}{saved[name]['shape']}"
        want = f"{named[name].dtype}{list(named[name].shape)}"
        if have != want:
            raise UserError(
                f"{where} has {name} as {have} but the model wants {want}; use the config that wrote it."
            )


def _read_trees(
    manager: ocp.CheckpointManager, step: int, meta: Meta, abstract: dict[str, PyTree]
) -> dict[str, PyTree]:
    where = f"Checkpoint {manager.directory / str(step)}"
    for item, tree in abstract.items():
        _check_leaves(meta["leaves"][item], tree, where)
    restored = {
        item: _read(manager, step, item, ocp.args.StandardRestore(tree)) for item, tree in abstract.items()
    }
    for item, tree in restored.items():
        for name, leaf in describe(tree).items():
            if leaf["digest"] != meta["leaves"][item][name]["digest"]:
                raise UserError(
                    f"{where} is damaged: {name} is not what was saved; move it away to continue from the "
                    "one before it."
                )
    return restored


def _differences(saved: Mapping[str, object], now: Mapping[str, object], prefix: str = "") -> list[str]:
    out = []
    for name in sorted({*saved, *now}):
        old, new = saved.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            out += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            out.append(f"{prefix}{name} was {old!r} and is {new!r}")
    return out


@dataclasses.dataclass(frozen=True)
class Restored:
    """A run to continue: its state, and what :func:`save` was given beside it."""

    state: TrainState
    window: list[dict[str, float]]
    skipped_in_a_row: int


def restore(
    manager: ocp.CheckpointManager,
    experiment: Experiment,
    mesh: Mesh,
    fingerprint: Mapping[str, object],
) -> Restored | None:
    """Restore the newest checkpoint onto ``mesh``, whatever mesh wrote it; None if there is none.

    Args:
      manager: from :func:`open_manager`.
      experiment: this run's experiment; it may differ from the saved one only in :data:`MAY_CHANGE`.
      mesh: this run's mesh.
      fingerprint: the fingerprint of this run's data.

    Raises:
      UserError: the checkpoint is damaged, or belongs to another experiment or other data.
    """
    step = manager.latest_step()
    if step is None:
        return None
    meta = _meta(manager, step)

    def fixed(config: Mapping[str, object]) -> dict[str, object]:
        return {name: value for name, value in config.items() if name not in MAY_CHANGE}

    saved = to_dict(parse(meta["config"]))  # fields added after the checkpoint was written get their defaults
    changed = _differences(fixed(saved), fixed(to_dict(experiment)))
    if changed:
        raise UserError(
            f"Checkpoint {manager.directory / str(step)} is of another config: {'; '.join(changed)}; restore "
            "the old value, or start in a new workdir."
        )
    compare_fingerprints(meta["data"], fingerprint)
    trees = _read_trees(manager, step, meta, _items(abstract_state(experiment, mesh)))
    train = trees["train"]
    state = TrainState(train["step"], trees["params"], train["opt_state"], trees.get("average"))
    return Restored(state, meta["window"], meta["skipped_in_a_row"])


@dataclasses.dataclass(frozen=True)
class Trained:
    """The results of a run that inference needs.

    Attributes:
      experiment: the run's experiment.
      params: the model's parameters; of a run that keeps a moving average, that, in the parameters' dtype.
        Adapters are added to their kernels.
      tokenizer: the tokenizer that the model was trained with.
      step: number of steps done.
    """

    experiment: Experiment
    params: PyTree
    tokenizer: Tokenizer
    step: int


def has_checkpoint(workdir: str | os.PathLike[str]) -> bool:
    """Whether a run has a checkpoint."""
    if not (Path(workdir) / FOLDER).is_dir():
        return False
    with open_manager(workdir) as manager:
        return manager.latest_step() is not None


@contextlib.contextmanager
def _newest(workdir: str | os.PathLike[str]) -> Iterator[tuple[ocp.CheckpointManager, int, Meta]]:
    """The checkpoints of a run, the newest step, and what that says of itself."""
    folder = Path(workdir) / FOLDER
    if not folder.is_dir():
        raise UserError(f"{workdir} holds no checkpoint; give the --workdir of a run of train.py.")
    with open_manager(workdir) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{folder} holds no finished checkpoint; run train.py until it writes one.")
        yield manager, step, _meta(manager, step)


def read_run(workdir: str | os.PathLike[str]) -> tuple[Experiment, Tokenizer]:
    """The experiment and the tokenizer of a run's newest checkpoint, without its parameters.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    with _newest(workdir) as (_, _, meta):
        return parse(meta["config"]), Tokenizer(meta["tokenizer"])


def load_for_inference(workdir: str | os.PathLike[str], mesh: Mesh) -> Trained:
    """Load parameters, config and tokenizer of the newest checkpoint of a run.

    Args:
      workdir: the run's folder.
      mesh: the mesh to put the parameters on.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    with _newest(workdir) as (manager, step, meta):
        experiment = parse(meta["config"])
        abstract = {"params": lora.abstract_params(experiment.model, experiment.lora, mesh)}
        if experiment.average_decay is not None:
            abstract["average"] = abstract_state(experiment, mesh).average
        trees = _read_trees(manager, step, meta, abstract)
    params = averaged_params(trees["params"], trees.get("average"))
    return Trained(experiment, lora.merged(params, experiment.lora), Tokenizer(meta["tokenizer"]), step)
