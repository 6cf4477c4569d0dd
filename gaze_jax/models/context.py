"""Sequences that are split over devices: the mesh axis "context", whose devices are called ranks.

A rank holds a part of the regions and of the text stream, dealt to the ranks in turn, in training, in prefill
and in the cache. No key or value ever leaves its rank. Queries are sent to all ranks, each attends to its own
keys, and the results are joined by the log-sum-exp of their logits. What is selected is decided from the
scores of all ranks, so it is the same as on one device.

Arrays of N tokens hold, rank after rank, its visual and then its text-stream tokens, so that every rank's
tokens are one block. With one rank these are the visual tokens, then the text stream.

Functions whose names end in ``across`` run inside ``jax.shard_map``, on one rank's arrays.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.tree_util import KeyPath
from jaxtyping import Bool, Float, Float32, Int, Int32, Shaped

from gaze_jax.core.budget import PerQuery
from gaze_jax.core.candidates import Candidates, best
from gaze_jax.core.routing import Routing
from gaze_jax.core.types import AnyArray, Array
from gaze_jax.errors import UserError
from gaze_jax.parallel import rules
from pallas_kernels import Windows
from pallas_kernels.softmax import WithLse, joined

AXIS = "context"

Tree = TypeVar("Tree")
Names = tuple[str | None, ...]

HeadsWithLse = tuple[Float[Array, "B H D"], Float32[Array, "B H"]]
"""One query's attention to some of its keys, and the log-sum-exp of their logits."""


def ranks() -> int:
    """The number of devices that share a sequence, on the mesh in use; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def check(strategy: Routing, decode_implementation: str | None, parts: int) -> None:
    """Refuse what needs all keys in one place, if ``parts`` ranks share them.

    Raises:
      UserError: the strategy or the implementation does.
    """
    if parts == 1:
        return
    if decode_implementation == "offload":
        raise UserError(
            "decode_implementation='offload' keeps a sequence's visual cache in the memory of one host, "
            f"and mesh.context={parts} splits it; use one of the two."
        )
    if strategy.strategy == "oracle":
        raise UserError(
            "Routing(strategy='oracle') compares all keys of a sequence, which "
            f"mesh.context={parts} splits; use it with mesh.context=1."
        )


def stored_at(number: Int[Array, ""], size: int) -> Int[Array, ""]:
    """Where an array of ``size`` regions or slots holds the one with a number: it is dealt to the ranks."""
    return number % ranks() * (size // ranks()) + number // ranks()


def concatenate(
    first: Shaped[AnyArray, "..."], second: Shaped[AnyArray, "..."], axis: int
) -> Shaped[Array, "..."]:
    """Join two arrays along ``axis``, on each rank its parts."""
    parts = ranks()
    if parts == 1:
        return jnp.concatenate([first, second], axis=axis)
    both = jnp.concatenate([_by_rank(a, axis, parts) for a in (first, second)], axis=axis + 1)
    return both.reshape(*first.shape[:axis], -1, *first.shape[axis + 1 :])


def split(
    both: Shaped[Array, "..."], size: int, axis: int
) -> tuple[Shaped[Array, "..."], Shaped[Array, "..."]]:
    """Undo :func:`concatenate`; ``size`` is that of the first array."""
    parts = ranks()
    if parts == 1:
        cut = jax.lax.slice_in_dim
        return cut(both, 0, size, axis=axis), cut(both, size, both.shape[axis], axis=axis)
    first, second = jnp.split(_by_rank(both, axis, parts), [size // parts], axis=axis + 1)

    def flat(a: Array) -> Array:
        return a.reshape(*both.shape[:axis], -1, *both.shape[axis + 1 :])

    return flat(first), flat(second)


def pad(a: Shaped[Array, "..."], axis: int, more: int, value: int = 0) -> Shaped[Array, "..."]:
    """``a`` with ``more`` entries after the others, the same number on each rank."""
    return concatenate(a, jnp.full((*a.shape[:axis], more, *a.shape[axis + 1 :]), value, a.dtype), axis)


def _by_rank(a: Shaped[AnyArray, "..."], axis: int, parts: int) -> Shaped[Array, "..."]:
    return jnp.reshape(a, (*a.shape[:axis], parts, a.shape[axis] // parts, *a.shape[axis + 1 :]))


def merged_rows(
    images: Shaped[AnyArray, "B N ..."],
) -> tuple[Shaped[Array, "rows ..."], Callable[[Shaped[Array, "rows ..."]], Shaped[Array, "B N ..."]]]:
    """Images of all rows as one axis, so that each device has those of its own rows, and its share of each.

    Args:
      images: [B, N, ...].

    Returns:
      [B * N, ...], with more rows of zeros if the ranks do not divide N, and a function that takes an array
      with these rows to [B, N, ...].
    """
    parts, count = ranks(), images.shape[1]
    _, groups = rules.split_sizes(jax.sharding.get_abstract_mesh(), "batch")
    batch = images.shape[0]
    groups = groups if batch % groups == 0 else 1
    more = -count % parts
    each = (count + more) // parts

    def flat(a: Array) -> Array:
        # Rows of a group of devices, then the images of a rank: the order of the devices that hold them.
        a = jnp.pad(a, ((0, 0), (0, more), *[(0, 0)] * (a.ndim - 2)))
        a = jnp.moveaxis(a.reshape(groups, batch // groups, parts, each, *a.shape[2:]), 2, 1)
        return split_rows(a.reshape(batch * parts * each, *a.shape[4:]))

    def split_rows(a: Array) -> Array:
        return nn.with_logical_constraint(a, ("images", *[None] * (a.ndim - 1)))

    def restore(a: Array) -> Array:
        a = split_rows(a).reshape(groups, parts, batch // groups, each, *a.shape[1:])
        a = jnp.moveaxis(a, 1, 2)
        return a.reshape(batch, parts * each, *a.shape[4:])[:, :count]

    return flat(jnp.asarray(images)), restore


Axes = Names | Mapping[str, Any]
"""Logical axes of the leading dimensions of all arrays of a tree, or by name those of each field."""


def spec(names: Names) -> PartitionSpec:
    """How an array with these logical axes is split over the mesh in use."""
    return nn.logical_to_mesh_axes(names) or PartitionSpec()


def spec_at(axes: Axes, path: KeyPath, a: Shaped[AnyArray, "..."]) -> PartitionSpec:
    """:func:`spec` of an array at ``path`` in a tree with these axes; one of size 1 stays whole."""
    for key in path:
        if not isinstance(axes, Mapping):
            break
        axes = axes[jax.tree_util.keystr((key,), simple=True)]
    assert isinstance(axes, tuple), f"no axes of {jax.tree_util.keystr(path)}"
    mesh = jax.sharding.get_abstract_mesh()

    def split(name: str | None, size: int) -> bool:
        return name is not None and (size > 1 or rules.split_sizes(mesh, name)[1] == 1)

    return spec(tuple(name if split(name, size) else None for name, size in zip(axes, a.shape)))


def on_ranks(
    function: Callable[..., Any], arguments: tuple[Any, ...], axes: tuple[Axes, ...], out: Any
) -> Any:
    """Call ``function`` on each device's part of the arguments.

    Args:
      function: takes ``arguments``, trees of arrays; None stays None.
      arguments: its arguments.
      axes: the logical axes of each.
      out: partition specs of the result.
    """
    leaves, tree = jax.tree.flatten(arguments)
    # Trees of specs, made by the arguments' classes, would not be what the classes say that they hold.
    specs = (
        spec_at(names, path, leaf)
        for each, names in zip(arguments, axes, strict=True)
        for path, leaf in jax.tree_util.tree_leaves_with_path(each)
    )
    return jax.shard_map(
        lambda *parts: function(*jax.tree.unflatten(tree, parts)),
        mesh=jax.sharding.get_abstract_mesh(),
        in_specs=tuple(specs),
        out_specs=out,
        check_vma=False,
    )(*leaves)


def start_across(size: int) -> Int32[Array, ""]:
    """The number of this rank's first region (or slot), of ``size`` per rank."""
    return jax.lax.axis_index(AXIS) * size


def first_across(number: Int[Array, ""]) -> Int[Array, ""]:
    """Where this rank holds the first of its regions or slots whose number is at least ``number``."""
    return (number + (jax.lax.axis_index(AXIS) - number) % ranks()) // ranks()


def gathered_across(tree: Tree, axis: int) -> Tree:
    """All ranks' arrays, one after the other along ``axis``."""
    return jax.tree.map(lambda a: jax.lax.all_gather(a, AXIS, axis=axis, tiled=True), tree)


def scores_across(
    score: Callable[[Float[Array, "B every H E"]], Float32[Array, "B every Hs R"]],
    queries: Float[Array, "B T H E"],
) -> Float32[Array, "B T Hs regions"]:
    """Scores of all ranks' regions for this rank's queries.

    Args:
      score: scores of this rank's regions.
      queries: [B, T, H, E].
    """
    scores = score(gathered_across(queries, 1))
    return jax.lax.all_to_all(scores, AXIS, split_axis=1, concat_axis=3, tiled=True)


def attend_across(
    attend: Callable[
        [Float[Array, "B every H D"], Windows, Bool[Array, "B every Hs regions"] | None],
        tuple[Float[Array, "B every H D"], Float32[Array, "B every H"]],
    ],
    q: Float[Array, "B T H D"],
    queries: Windows,
    selected: Bool[Array, "B T Hs R"] | None,
    *,
    most: int,
) -> Float[Array, "B T H D"]:
    """Attention of this rank's queries to the keys of all ranks.

    Args:
      attend: attention of any number of queries to this rank's keys; takes queries [B, T, H, D], their
        windows and, of this rank's regions, which are selected.
      q: [B, T, H, D].
      queries: their windows [B, T].
      selected: bool [B, T, Hs, R], of all ranks' regions; None: no query is routed.
      most: queries that each rank sends at once.
    """

    def block(given: tuple[Array, Windows, Array | None]) -> Array:
        q, queries, selected = given
        if selected is not None:
            selected = jax.lax.all_to_all(selected, AXIS, split_axis=3, concat_axis=1, tiled=True)
        out, lse = attend(*gathered_across((q, queries), 1), selected)

        def returned(a: Array) -> Array:
            """Every rank's part of the results of this rank's queries, [B, ranks, T, ...]."""
            a = a.reshape(a.shape[0], ranks(), -1, *a.shape[2:])
            return jax.lax.all_to_all(a, AXIS, split_axis=1, concat_axis=1, tiled=True)

        # Summed here in float32, where a reduction over the ranks would send float32 too.
        return joined(returned(out), returned(lse), axis=1)[0]

    length = q.shape[1]
    if length <= most:
        return block((q, queries, selected))
    count = math.ceil(length / most)
    size = math.ceil(length / count)

    def cut(a: Array) -> Array:
        # A query of segment -1 sees nothing; other fields of padding are not read.
        wide = [(0, 0), (0, count * size - length), *[(0, 0)] * (a.ndim - 2)]
        a = jnp.pad(a, wide, constant_values=-1 if a.dtype == jnp.int32 else 0)
        return jnp.moveaxis(a.reshape(a.shape[0], count, size, *a.shape[2:]), 1, 0)

    out = jax.lax.map(jax.checkpoint(block), jax.tree.map(cut, (q, queries, selected)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :length]


def best_across(found: Candidates, budget: PerQuery, capacity: int) -> Int32[Array, "B Hs {capacity}"]:
    """The Top-K of all ranks' candidates, the same on every rank; see :func:`candidates.best`."""
    return best(gathered_across(found, 2), budget, capacity)


def per_pass(capacity: int, regions: int) -> int:
    """Regions that a rank attends to in one pass: its share of ``capacity`` and two standard deviations.

    The regions are dealt in turn, so it seldom needs a second pass; at worst it has all ``capacity``.

    Args:
      capacity: J.
      regions: regions of a rank.
    """
    even = capacity / ranks()
    return min(capacity, regions, math.ceil(even) + math.ceil(2 * math.sqrt(even)))


def attend_in_passes(
    attend: Callable[[Int32[Array, "B Hs A"], bool], HeadsWithLse],
    indices: Int32[Array, "B Hs J"],
    regions: int,
) -> HeadsWithLse:
    """Attention to this rank's regions among those that are selected.

    Args:
      attend: takes regions int32 [B, Hs, A], numbered from this rank's first, -1 in unused slots, and whether
        the text stream is attended to as well.
      indices: int32 [B, Hs, J] selected regions of all ranks.
      regions: regions of a rank.

    Returns:
      What ``attend`` returns, of all passes.
    """
    local, here = _local(indices, regions)
    # This rank's regions first; their order does not matter.
    _, mine = jax.lax.sort((~here, local), dimension=-1, num_keys=1)
    size = per_pass(indices.shape[-1], regions)
    _, passes = _counts(here, size)
    mine = jnp.pad(mine, ((0, 0), (0, 0), (0, -mine.shape[-1] % size)), constant_values=-1)

    def another(number: Array, so_far: WithLse) -> WithLse:
        listed = jax.lax.dynamic_slice_in_dim(mine, number * size, size, axis=-1)
        out, lse = map(jnp.stack, zip(so_far, attend(listed, False)))
        return joined(out, lse, 0)

    return jax.lax.fori_loop(1, passes, another, attend(mine[..., :size], True))


def work_across(
    indices: Int32[Array, "B Hs J"], visible: Bool[Array, "B 1 R"], full: Bool[Array, ""] | None
) -> dict[str, Int32[Array, "B 1"]]:
    """What this rank does in a layer: the most regions that a selector has here, and the number of passes.

    Args:
      indices: selected regions of all ranks.
      visible: this rank's regions that may be selected.
      full: whether the layer reads every region; None: no.
    """
    regions = visible.shape[2]
    _, here = _local(indices, regions)
    count, passes = _counts(here, per_pass(indices.shape[-1], regions))
    passes = jnp.broadcast_to(passes, count.shape)
    if full is not None:
        count = jnp.where(full, jnp.sum(visible, axis=2, dtype=jnp.int32), count)
        passes = jnp.where(full, 1, passes)
    return {"rank_regions": count, "rank_passes": passes}


def _local(
    indices: Int32[Array, "B Hs J"], regions: int
) -> tuple[Int32[Array, "B Hs J"], Bool[Array, "B Hs J"]]:
    """Regions by their number on this rank, -1 for those of others, and which are here."""
    local = indices - start_across(regions)
    here = (indices >= 0) & (local >= 0) & (local < regions)
    return jnp.where(here, local, -1), here


def _counts(here: Bool[Array, "B Hs J"], size: int) -> tuple[Int32[Array, "B 1"], Int32[Array, ""]]:
    """The most regions of a row's selectors, and the passes of ``size`` that all rows need."""
    count = jnp.max(jnp.sum(here, axis=-1, dtype=jnp.int32), axis=-1, keepdims=True)
    return count, jnp.maximum(jnp.max(-(-count // size)), 1)


def masses_across(
    regions: Float32[Array, "B K G R"], text: Float32[Array, "B K G"]
) -> tuple[Float32[Array, "B K G every"], Float32[Array, "B K G"]]:
    """:func:`gaze_jax.core.routing.log_masses` of all ranks' keys, from each rank's."""
    return gathered_across(regions, 3), jax.nn.logsumexp(jax.lax.all_gather(text, AXIS), axis=0)


def join_across(part: HeadsWithLse) -> Float[Array, "B H D"]:
    """The attention to the keys of all ranks, from each rank's."""
    out, lse = (jax.lax.all_gather(a, AXIS) for a in part)
    return joined(out, lse, axis=0)[0]


def first_head_across(heads: int) -> Int32[Array, ""] | int:
    """The number of this device's first head, of ``heads`` per device; another mesh axis splits them."""
    axes, devices = rules.split_sizes(jax.sharding.get_abstract_mesh(), "heads")
    return jax.lax.axis_index(axes) * heads if devices > 1 else 0


def mean_over_heads_across(values: Float32[Array, "B S"]) -> Float32[Array, "B S"]:
    """The mean of the devices that have different heads of the same queries."""
    axes, devices = rules.split_sizes(jax.sharding.get_abstract_mesh(), "heads")
    return jax.lax.pmean(values, axes) if devices > 1 else values
