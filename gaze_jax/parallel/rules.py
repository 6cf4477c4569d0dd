"""One strict table from the logical axes of the models to the mesh axes."""

import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from gaze_jax.errors import UserError

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "tokens": (),
    "width": (),
    "heads": (),
    "kv_heads": (),
    "mlp": (),
    "vocab": (),
    "norm": (),
    "layers": (),
}
"""Logical axis -> the mesh axes that it is split over, in order; () does not split it."""


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


def _check_divides(mesh: Mesh, shape: Sequence[int], spec: PartitionSpec, label: str) -> None:
    for dim, (size, entry) in enumerate(zip(shape, spec, strict=True)):
        # PartitionSpec replaces a tuple of one name by the name.
        axes = (entry,) if isinstance(entry, str) else entry or ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise UserError(
                f"Axis {dim} of {label} has size {size}, which mesh.{' * mesh.'.join(axes)} = {parts} does "
                "not divide; choose mesh sizes that divide it."
            )


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
      UserError: a mesh axis does not divide a parameter (it is not silently replicated).
    """

    def sharding(path: KeyPath, leaf: object) -> NamedSharding:
        label = f"parameter {_name(path)}"
        if not isinstance(leaf, nn.LogicallyPartitioned):
            raise ValueError(f"{label.capitalize()} has no logical axis names; add them where it is created.")
        spec = partition_spec(leaf.names, label)
        _check_divides(mesh, leaf.value.shape, spec, label)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(
        sharding, abstract_boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of batch arrays: the first axis over all devices, the others not split."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that puts the same values on every device."""
    return NamedSharding(mesh, PartitionSpec())


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
