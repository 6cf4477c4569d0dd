"""The next-token objective: cross entropy of every token, without logits of all tokens at once.

Logits exist for one chunk of tokens at a time, in both passes. On a mesh, the devices that share one copy of
the parameters each compute the logits of a part of the vocabulary, for the tokens of all of them: so none
ever holds the whole table or its gradient. Only activations and sums per token are exchanged.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Float32, Int

from gaze_jax.core.streams import IGNORE
from gaze_jax.core.types import Array
from gaze_jax.parallel import rules

LOGIT_BYTES = 128 * 2**20
"""Most bytes of float32 logits, and of the hidden vectors they are made of, that a device holds at once."""


class TokenLosses(NamedTuple):
    """What the model predicts for each target; of no meaning where the target is ``IGNORE``.

    Attributes:
      loss: float32 [B, S], cross entropy in nats.
      correct: bool [B, S], the target has the largest logit.
    """

    loss: Float32[Array, "B S"]
    correct: Bool[Array, "B S"]


def token_losses(
    hidden: Float[Array, "B S M"], table: Float[Array, "V M"], targets: Int[Array, "B S"]
) -> TokenLosses:
    """Cross entropy of the logits ``hidden @ table.T``, which are float32.

    Args:
      hidden: [B, S, M] after the final norm.
      table: [V, M], the head; on a mesh it is split over M.
      targets: int32 [B, S].
    """
    mesh = jax.sharding.get_abstract_mesh()
    (axis,) = rules.RULES["embed"]
    parts = mesh.shape.get(axis, 1)
    if parts == 1 or table.shape[1] % parts:
        return TokenLosses(*_losses(hidden, table, targets, axis=None, parts=1))
    batch = PartitionSpec(rules.RULES["batch"])
    out: tuple[Array, Array] = jax.shard_map(
        functools.partial(_losses, axis=axis, parts=parts),
        mesh=mesh,
        in_specs=(batch, PartitionSpec(None, axis), batch),
        out_specs=(batch, batch),
        check_vma=False,
    )(hidden, table, targets)
    return TokenLosses(*out)


def _losses(
    hidden: Float[Array, "B S M"],
    table: Float[Array, "V M"],
    targets: Int[Array, "B S"],
    *,
    axis: str | None,
    parts: int,
) -> tuple[Float32[Array, "B S"], Bool[Array, "B S"]]:
    """:func:`token_losses` of a device's rows; ``table`` is one of ``parts`` parts along M."""
    batch, length = targets.shape
    vocab = table.shape[0]
    table = table.astype(hidden.dtype)
    first = jnp.zeros((), jnp.int32)
    if axis is not None:
        table = jnp.pad(table, ((0, -vocab % parts), (0, 0)))
        table = jax.lax.all_to_all(table, axis, split_axis=0, concat_axis=1, tiled=True)
        first = jax.lax.axis_index(axis) * table.shape[0]
    ids = first + jnp.arange(table.shape[0])

    def chunk(h: Float[Array, "B C M"], t: Int[Array, "B C"]) -> tuple[Array, Array]:
        if axis is not None:
            h, t = (jax.lax.all_gather(a, axis, tiled=True) for a in (h, t))
        logits = jnp.einsum("BCM,VM->BCV", h, table, preferred_element_type=jnp.float32)
        logits = jnp.where(ids < vocab, logits, -jnp.inf)
        here = jax.lax.stop_gradient(logits)
        top = _across(jax.lax.pmax, jnp.max(here, axis=-1), axis)
        total = _across(jax.lax.psum, jnp.sum(jnp.exp(logits - top[..., None]), axis=-1), axis)
        wanted = jnp.where(ids == t[..., None], logits, 0.0)
        loss = jnp.log(total) + top - _across(jax.lax.psum, jnp.sum(wanted, axis=-1), axis)
        best = jnp.where(jnp.max(here, axis=-1) == top, first + jnp.argmax(here, axis=-1), vocab)
        correct = _across(jax.lax.pmin, best, axis) == t
        if axis is not None:
            row = jax.lax.axis_index(axis) * batch
            loss, correct = (jax.lax.dynamic_slice_in_dim(a, row, batch) for a in (loss, correct))
        return loss, correct

    # Of a token: its logits of this part for every row, and its hidden vectors of all devices.
    token = batch * max(4 * vocab, parts * hidden.shape[2] * hidden.dtype.itemsize)
    count = min(length, math.ceil(length * token / LOGIT_BYTES))
    if count <= 1:
        return chunk(hidden, targets)
    size = -(-length // count)
    more = count * size - length
    hidden = jnp.pad(hidden, ((0, 0), (0, more), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, more)), constant_values=IGNORE)
    chunks = (_blocks(hidden, count), _blocks(targets, count))
    out = jax.lax.map(jax.checkpoint(lambda xs: chunk(*xs)), chunks)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(batch, -1)[:, :length], out)


def _blocks(a: Array, count: int) -> Array:
    """[B, count * C, ...] to [count, B, C, ...]."""
    return jnp.moveaxis(a.reshape(a.shape[0], count, -1, *a.shape[2:]), 1, 0)


def _across(reduce: Callable[[Array, str], Array], a: Array, axis: str | None) -> Array:
    """``a`` reduced over the devices of a mesh axis, if there is one."""
    return a if axis is None else reduce(a, axis)
