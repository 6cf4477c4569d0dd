"""Losses of every token, without logits of all tokens at once: cross entropy, and KL to a teacher.

Logits exist for one chunk of tokens at a time, in both passes. On a mesh, the devices that share one copy of
the parameters each compute the logits of a part of the vocabulary, for the tokens of all of them: so none
ever holds the whole table or its gradient. Only activations and sums per token are exchanged.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int

from gaze_jax.core.streams import IGNORE
from gaze_jax.core.types import Array
from gaze_jax.parallel import rules

OBJECTIVES = ("next_token", "distill")

LOGIT_BYTES = 128 * 2**20
"""Most bytes of float32 logits, and of the hidden vectors they are made of, that a device holds at once."""


_NO_TOKEN = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned.

    Attributes:
      name: "next_token" (the paper): cross entropy of the next tokens. "distill": the distributions of
        ``init_from``, attended to densely and without context tokens, whatever the next tokens are.
      region_weight: of "distill", the weight of a second loss: how far the region scores are from the
        teacher's attention to the regions.
    """

    name: str = "next_token"
    region_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ValueError(f"objective.name={self.name!r} must be one of {OBJECTIVES}.")
        if not 0 <= self.region_weight < math.inf:
            raise ValueError(f"objective.region_weight={self.region_weight} must be a number of at least 0.")
        if self.region_weight and self.name != "distill":
            raise ValueError(
                f"objective.region_weight={self.region_weight} has an effect only with "
                "objective.name='distill'."
            )


class TokenLosses(NamedTuple):
    """What the model predicts for each target; of no meaning where the target is ``IGNORE``.

    Attributes:
      loss: float32 [B, S], cross entropy in nats.
      correct: bool [B, S], the target has the largest logit.
      kl: float32 [B, S], KL divergence of the distribution from the teacher's, in nats; None without one.
    """

    loss: Float32[Array, "B S"]
    correct: Bool[Array, "B S"]
    kl: Float32[Array, "B S"] | None = None


class Logits(NamedTuple):
    """Logits as the product of what the trainer has: ``hidden @ table.T``, float32.

    Attributes:
      hidden: [B, S, M] after the final norm.
      table: [V, M], the head; on a mesh it is split over M.
    """

    hidden: Float[Array, "B S M"]
    table: Float[Array, "V M"]


def token_losses(logits: Logits, targets: Int[Array, "B S"], teacher: Logits | None = None) -> TokenLosses:
    """Losses of every token.

    Args:
      logits: the model's.
      targets: int32 [B, S].
      teacher: those of a teacher with the same vocabulary.
    """
    mesh = jax.sharding.get_abstract_mesh()
    (width_axes, columns), (vocab_axes, rows) = (rules.split_sizes(mesh, name) for name in ("embed", "vocab"))
    all_logits = (logits,) if teacher is None else (logits, teacher)
    shapes = [given.table.shape for given in all_logits]
    if rows * columns == 1 or any(vocab % rows or width % columns for vocab, width in shapes):
        return TokenLosses(*_losses(all_logits, targets, _Parts()))
    # The devices of "context" share the columns too, and each has other tokens of the same rows.
    batch = rules.partition_spec(("batch", "tokens"))
    specs = Logits(batch, rules.partition_spec(("vocab", "embed")))  # type: ignore[arg-type]
    out: tuple[Array, ...] = jax.shard_map(
        functools.partial(_losses, parts=_Parts(width_axes, columns, vocab_axes)),
        mesh=mesh,
        in_specs=((specs,) * len(all_logits), batch),
        out_specs=batch,
        check_vma=False,
    )(all_logits, targets)
    return TokenLosses(*out)


class _Parts(NamedTuple):
    """How the head is split over a mesh; by default it is whole.

    Attributes:
      width: mesh axes over which M is split, whose devices have different tokens too.
      columns: their number of devices.
      vocab: mesh axes over which V is split, whose devices have the same tokens.
    """

    width: tuple[str, ...] = ()
    columns: int = 1
    vocab: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """The axes over which logits are split."""
        return (*self.vocab, *self.width)


def _losses(all_logits: tuple[Logits, ...], targets: Int[Array, "B S"], parts: _Parts) -> tuple[Array, ...]:
    """:func:`token_losses` of a device's rows and its part of the tables."""
    batch, length = targets.shape
    vocab = all_logits[0].table.shape[0]
    tables = [given.table.astype(given.hidden.dtype) for given in all_logits]
    first, end = jnp.zeros((), jnp.int32), jnp.int32(vocab)
    if parts.vocab:
        first = jax.lax.axis_index(parts.vocab) * vocab
        end = first + vocab
    if parts.width:
        # From a part of the columns of every row to all columns of a part of the rows.
        tables = [jnp.pad(table, ((0, -vocab % parts.columns), (0, 0))) for table in tables]
        tables = [
            jax.lax.all_to_all(table, parts.width, split_axis=0, concat_axis=1, tiled=True)
            for table in tables
        ]
        first = first + jax.lax.axis_index(parts.width) * tables[0].shape[0]
    ids = first + jnp.arange(tables[0].shape[0])

    def chunk(hidden: tuple[Array, ...], t: Int[Array, "B C"]) -> tuple[Array, ...]:
        if parts.width:
            hidden, t = jax.tree.map(lambda a: jax.lax.all_gather(a, parts.width, tiled=True), (hidden, t))
        logits = [_logits(h, table, ids < end) for h, table in zip(hidden, tables, strict=True)]
        log_total = [_log_total(values, parts.all) for values in logits]
        here = jax.lax.stop_gradient(logits[0])
        top = _across(jax.lax.pmax, jnp.max(here, axis=-1), parts.all)
        # A row that only pads a part has the number of the next part's first token.
        wanted = jnp.where((ids == t[..., None]) & (ids < end), logits[0], 0.0)
        loss = log_total[0] - _across(jax.lax.psum, jnp.sum(wanted, axis=-1), parts.all)
        best = jnp.where(jnp.max(here, axis=-1) == top, first + jnp.argmax(here, axis=-1), _NO_TOKEN)
        out = [loss, _across(jax.lax.pmin, best, parts.all) == t]
        if len(logits) > 1:
            ours, theirs = (values - total[..., None] for values, total in zip(logits, log_total))
            ratio = jnp.where(ids < end, theirs - ours, 0.0)
            out.append(_across(jax.lax.psum, jnp.sum(jnp.exp(theirs) * ratio, axis=-1), parts.all))
        if parts.width:
            row = jax.lax.axis_index(parts.width) * batch
            out = [jax.lax.dynamic_slice_in_dim(a, row, batch) for a in out]
        return tuple(out)

    # Of a token: its logits of this part for every row, and its hidden vectors of all devices.
    widths = [parts.columns * given.hidden.shape[2] * given.hidden.dtype.itemsize for given in all_logits]
    token = batch * max(4 * vocab * len(all_logits), *widths)
    count = min(length, math.ceil(length * token / LOGIT_BYTES))
    hidden = tuple(given.hidden for given in all_logits)
    if count <= 1:
        return chunk(hidden, targets)
    size = -(-length // count)
    more = count * size - length
    hidden = tuple(jnp.pad(h, ((0, 0), (0, more), (0, 0))) for h in hidden)
    targets = jnp.pad(targets, ((0, 0), (0, more)), constant_values=IGNORE)
    chunks = jax.tree.map(lambda a: _blocks(a, count), (hidden, targets))
    out = jax.lax.map(jax.checkpoint(lambda xs: chunk(*xs)), chunks)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(batch, -1)[:, :length], out)


def _logits(
    hidden: Float[Array, "B C M"], table: Float[Array, "V M"], real: Bool[Array, " V"]
) -> Float32[Array, "B C V"]:
    """Logits of a part of the vocabulary; -inf where a row of the table only pads it."""
    logits = jnp.einsum("BCM,VM->BCV", hidden, table, preferred_element_type=jnp.float32)
    return jnp.where(real, logits, -jnp.inf)


def _log_total(logits: Float32[Array, "B C V"], axes: tuple[str, ...]) -> Float32[Array, "B C"]:
    """Logarithm of the sum of the exponentials over the whole vocabulary."""
    top = _across(jax.lax.pmax, jnp.max(jax.lax.stop_gradient(logits), axis=-1), axes)
    return top + jnp.log(_across(jax.lax.psum, jnp.sum(jnp.exp(logits - top[..., None]), axis=-1), axes))


def _blocks(a: Array, count: int) -> Array:
    """[B, count * C, ...] to [count, B, C, ...]."""
    return jnp.moveaxis(a.reshape(a.shape[0], count, -1, *a.shape[2:]), 1, 0)


def _across(reduce: Callable[[Array, tuple[str, ...]], Array], a: Array, axes: tuple[str, ...]) -> Array:
    """``a`` reduced over the devices of mesh axes, if there are any."""
    return reduce(a, axes) if axes else a
