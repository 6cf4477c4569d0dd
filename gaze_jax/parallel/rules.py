"""One strict table from the logical axes of the models to the mesh axes."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from gaze_jax.errors import UserError

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "images": ("data", "fsdp", "context"),
    "embed": ("fsdp", "context"),
    "tokens": ("context",),
    "regions": ("context",),
    "width": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "norm": (),
    "layers": (),
}
"""Logical axis -> the mesh axes that it is split over, in order; () does not split it."""

REPLICATED_BYTES = 2**20
"""Largest parameter that every device may hold in full if the mesh divides none of its axes."""


def flax_rules() -> list[tuple[str, tuple[str, ...] | None]]:
    """The table in the format of ``nn.logical_axis_rules``, for constraints on activations."""
    return [(name, axes or None) for name, axes in RULES.items()]


def partition_spec(names: Sequence[str | None], label: str = "array") -> PartitionSpec:
    """Make the partition spec of one array.

    Args:
      names: a logical name per axis; None does not split the axis.
      label: names the array in error messages.

    Raises:
      ValueError: an unknown logical name, or two axes of the array use the same mesh axis.
    """
    used: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = []
    for name in names:
        if name is not None and name not in RULES:
            raise ValueError(
                f"Logical axis {name!r} of {label} is not in the table; known are {', '.join(RULES)}."
            )
        axes = () if name is None else RULES[name]
        for axis in axes:
            if axis in used:
                raise ValueError(
                    f"Axes {used[axis]!r} and {name!r} of {label} are both split over mesh axis {axis!r}; "
                    "an array can be split over a mesh axis only once."
                )
            used[axis] = str(name)
        entries.append(axes or None)
    return PartitionSpec(*entries)


def fitted_spec(
    mesh: Mesh, shape: Sequence[int], names: Sequence[str | None], itemsize: int, label: str
) -> PartitionSpec:
    """The partition spec of a parameter by the table, moved to where the mesh divides the array.

    If a mesh axis does not divide the axis that the table names, it splits the largest other one that it
    divides; the axis of layers comes last, since layers are used one after the other. If there is none, an
    array of at most :data:`REPLICATED_BYTES` is replicated.

    Args:
      mesh: the run's mesh.
      shape, names: its shape, and a logical name per axis.
      itemsize: bytes of an element.
      label: names the array in error messages.

    Raises:
      ValueError: see :func:`partition_spec`.
      UserError: a larger array cannot be split.
    """
    spec = _by_table(mesh, names, label)
    for dim, axes in enumerate(spec):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if not shape[dim] % parts:
            continue
        spec[dim] = ()
        free = [at for at in range(len(shape)) if not spec[at] and not shape[at] % parts]
        size = math.prod(shape) * itemsize
        if free:
            spec[max(free, key=lambda at: (names[at] != "layers", shape[at]))] = axes
        elif size > REPLICATED_BYTES:
            raise UserError(
                f"Axis {dim} of {label} has size {shape[dim]}, which mesh.{' * mesh.'.join(axes)} = {parts} "
                f"does not divide, nor any other of {list(shape)}: each device would hold all {size:,} "
                "bytes; choose mesh sizes that divide one."
            )
    return PartitionSpec(*(axes or None for axes in spec))


def _by_table(mesh: Mesh, names: Sequence[str | None], label: str = "array") -> list[tuple[str, ...]]:
    """The mesh axes of more than one device that split each axis of an array, by the table."""
    # PartitionSpec replaces a tuple of one name by the name.
    spec = [(e,) if isinstance(e, str) else e or () for e in partition_spec(names, label)]
    return [tuple(axis for axis in axes if mesh.shape[axis] > 1) for axes in spec]


def moved(mesh: Mesh, abstract_boxed: PyTree) -> list[str]:
    """A line for every parameter that :func:`fitted_spec` splits otherwise than the table says."""
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_boxed, is_leaf=_is_boxed):
        shape = leaf.value.shape
        spec = fitted_spec(mesh, shape, leaf.names, leaf.value.dtype.itemsize, _name(path))
        if spec != PartitionSpec(*(axes or None for axes in _by_table(mesh, leaf.names))):
            where = [f"{entry} over axis {dim}" for dim, entry in enumerate(spec) if entry]
            lines.append(f"{_name(path)} {list(shape)}: {' and '.join(where) or 'replicated'}")
    return lines


def _is_boxed(leaf: object) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _name(path: KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_shardings(mesh: Mesh, abstract_boxed: PyTree) -> PyTree:
    """Return the sharding of every parameter.

    Args:
      mesh: the run's mesh.
      abstract_boxed: ``jax.eval_shape`` of a linen ``init``; every leaf is boxed with its logical names.

    Returns:
      The same tree without boxes, of ``NamedSharding``.

    Raises:
      ValueError: a parameter has no logical names, or the table rejects them.
      UserError: a mesh axis divides no axis of a large parameter; see :func:`fitted_spec`.
    """

    def sharding(path: KeyPath, leaf: object) -> NamedSharding:
        label = f"parameter {_name(path)}"
        if not isinstance(leaf, nn.LogicallyPartitioned):
            raise ValueError(f"{label.capitalize()} has no logical axis names; add them where it is created.")
        value = leaf.value
        return NamedSharding(mesh, fitted_spec(mesh, value.shape, leaf.names, value.dtype.itemsize, label))

    return jax.tree_util.tree_map_with_path(sharding, abstract_boxed, is_leaf=_is_boxed)


def split_sizes(mesh: Mesh | AbstractMesh, name: str) -> tuple[tuple[str, ...], int]:
    """The mesh axes that split a logical axis, and into how many parts; a mesh without them has one."""
    axes = tuple(axis for axis in RULES[name] if axis in mesh.shape)
    return axes, math.prod(mesh.shape[axis] for axis in axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays with a leading axis of rows, which is split over devices with different rows."""
    return NamedSharding(mesh, partition_spec(("batch",)))


@functools.lru_cache(maxsize=8)  # every batch asks
def rows_of_process(mesh: Mesh) -> tuple[int, int]:
    """Which part of a batch's rows this process reads, and into how many parts the processes divide them.

    Processes whose devices share rows, because the mesh splits heads or sequences over them, read the same.

    Raises:
      UserError: the processes' rows overlap only in part.
    """
    _, blocks = split_sizes(mesh, "batch")
    by_process: dict[int, set[int]] = {}
    for place, device in enumerate(mesh.devices.reshape(blocks, -1)):
        for each in device:
            by_process.setdefault(each.process_index, set()).add(place)
    parts = sorted({tuple(sorted(found)) for found in by_process.values()})
    each = len(parts[0])
    if [place for part in parts for place in part] != list(range(blocks)) or blocks != each * len(parts):
        raise UserError(
            f"The mesh {dict(mesh.shape)} gives processes rows that overlap in part; choose mesh.data and "
            "mesh.fsdp so that each process has as many rows as every other, or the same."
        )
    return parts.index(tuple(sorted(by_process[jax.process_index()]))), len(parts)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that puts the same values on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Put a tree of arrays onto a mesh, whose processes each have the whole values."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place(leaf: np.ndarray | jax.Array) -> jax.Array:
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)

    return jax.tree.map(place, tree)


def fetch(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """The whole values of a tree of arrays on a mesh, in NumPy, in each of its processes."""
    if mesh is not None and mesh.is_multi_process:
        tree = _everywhere(mesh)(tree)
    return jax.device_get(tree)


@functools.lru_cache(maxsize=8)  # a new function is a new program
def _everywhere(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def bytes_per_device(abstract: PyTree, shardings: PyTree) -> dict[str, int]:
    """Bytes that one device holds of each leaf, by name, largest first.

    Args:
      abstract: a tree of arrays or ``jax.ShapeDtypeStruct``.
      shardings: a tree of shardings with the same structure.
    """

    def size(leaf: jax.Array | jax.ShapeDtypeStruct, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    sizes = jax.tree.map(size, abstract, shardings)
    named = {_name(path): count for path, count in jax.tree_util.tree_leaves_with_path(sizes)}
    return dict(sorted(named.items(), key=lambda item: -item[1]))
