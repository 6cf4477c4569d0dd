"""Inputs of the attention ops, cut from toy streams so that they have every irregularity at once."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gaze_jax.core import masks
from gaze_jax.core.streams import Streams
from pallas_kernels import GazeSpec
from tests.helpers.streams import Newline, PlacedView, Row, Text, batch, pack, pad, sample, shuffle

ARRAYS = ("q", "visual_k", "visual_v", "text_k", "text_v")


def runnable(spec: GazeSpec) -> GazeSpec:
    """Kernels run interpreted on a CPU and compiled elsewhere."""
    return dataclasses.replace(spec, interpret=jax.default_backend() == "cpu")


def no_races(out: Any) -> None:
    """Fail if the TPU kernel that made ``out`` raced with its own copies in the interpreter."""
    # Private, and with another jax perhaps elsewhere: needed only where kernels are interpreted.
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    jax.block_until_ready(out)
    races = interpret_pallas_call.races
    assert races is None or not races.races_found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefill:
    """Arguments of ``gaze_prefill``; ``spec`` is static."""

    q: Any
    visual_k: Any
    visual_v: Any
    text_k: Any
    text_v: Any
    queries: Any
    places: Any
    selected: Any
    spec: GazeSpec = dataclasses.field(metadata={"static": True})

    def arrays(self) -> tuple[Any, ...]:
        """What gradients are taken of."""
        return tuple(getattr(self, name) for name in ARRAYS)

    def with_arrays(self, arrays: tuple[Any, ...]) -> "Prefill":
        return dataclasses.replace(self, **dict(zip(ARRAYS, arrays, strict=True)))


def rows() -> list[Row]:
    """Partial regions, two views, newlines in and outside of views, packing, padding and shuffled storage."""
    one = sample(
        [Text(2), PlacedView(3, 5, newlines=True), Text(2), Newline(), PlacedView(2, 3), Text(3)], context=2
    )
    two = pack(
        [
            sample([PlacedView(2, 3), Text(2)], context=1),
            sample([Text(1), PlacedView(3, 2), Text(3)], context=1),
        ]
    )
    return [one, shuffle(pad(two, regions=8, text=18), seed=1)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _queries_and_places(streams: Streams, scope: str, causal: bool) -> tuple[Any, Any]:
    """One program: as many as there are operations take three times as long to compile."""
    visual, text = masks.windows(streams, visual_scope=scope, visual_causal=causal)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), visual, text), masks.key_places(streams)


def prefill(
    rows: list[Row],
    *,
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 8,
    select_per: str = "head",
    query_block: int = 512,
    dtype: Any = jnp.float32,
    scope: str = "all",
    causal: bool = True,
    seed: int = 0,
) -> Prefill:
    """All tokens of the rows as queries, with random values and a random selection of about half."""
    streams = batch(rows)
    rng = np.random.default_rng(seed)
    size, regions, slots = streams.visual_src.shape
    text = streams.tokens.shape[1]
    queries, places = _queries_and_places(streams, scope, causal)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)

    heads = kv_heads * group
    shared = heads if select_per == "head" else kv_heads
    length = regions * slots + text
    return Prefill(
        q=normal(size, length, heads, dim),
        visual_k=normal(size, kv_heads, regions, slots, dim),
        visual_v=normal(size, kv_heads, regions, slots, dim),
        text_k=normal(size, kv_heads, text, dim),
        text_v=normal(size, kv_heads, text, dim),
        queries=queries,
        places=places,
        selected=jnp.asarray(rng.random((size, length, shared, regions)) < 0.5),
        spec=GazeSpec(scale=0.8 * dim**-0.5, select_per=select_per, query_block=query_block),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decode:
    """Arguments of ``gaze_decode``, with the cache unpacked: ``k`` and ``v`` are [L, B, K, R, P, D]."""

    q: Any
    k: Any
    v: Any
    text_k: Any
    text_v: Any
    layer: Any
    indices: Any
    visual_seen: Any
    text_seen: Any
    spec: GazeSpec = dataclasses.field(metadata={"static": True})


def decode(
    *,
    layers: int = 3,
    size: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    regions: int = 7,
    slots: int = 5,
    text: int = 11,
    dim: int = 8,
    capacity: int | None = 4,
    select_per: str = "head",
    dtype: Any = jnp.float32,
    seed: int = 0,
) -> Decode:
    """Random distinct indices with -1 among them, partial regions and half of the text stream."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)

    heads = kv_heads * group
    indices = None
    if capacity is not None:
        shared = heads if select_per == "head" else kv_heads
        wide = max(regions, capacity)
        order = rng.permuted(np.broadcast_to(np.arange(wide), (size, shared, wide)), axis=-1)
        picks = np.where(order < regions, order, -1)[..., :capacity]
        indices = jnp.asarray(np.where(rng.random(picks.shape) < 0.25, -1, picks), jnp.int32)
    seen = rng.random((size, regions, slots)) < 0.7
    return Decode(
        q=normal(size, heads, dim),
        k=normal(layers, size, kv_heads, regions, slots, dim),
        v=normal(layers, size, kv_heads, regions, slots, dim),
        text_k=normal(layers, size, kv_heads, text, dim),
        text_v=normal(layers, size, kv_heads, text, dim),
        layer=jnp.int32(layers // 2),
        indices=indices,
        visual_seen=jnp.asarray(seen),
        text_seen=jnp.asarray(rng.random((size, text)) < 0.6),
        spec=GazeSpec(scale=0.8 * dim**-0.5, select_per=select_per),
    )
