"""Shapes in which gaze_decode is used: published decoders over images and videos.

Ahead-of-time compilation checks that every kernel compiles for them.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.gaze_decode import api
from pallas_kernels.spec import GazeSpec

HEADS = {
    "qwen3-4b": (36, 8, 4, 128),
    "qwen2.5-7b": (28, 4, 7, 128),
    "qwen2.5-0.5b": (24, 2, 7, 64),
}
"""Name -> (L, K, G, D)."""

SCENES = {
    4_608: (128, 20),
    9_216: (256, 40),
    19_980: (555, 55),
    36_864: (1_024, 102),
    147_456: (4_096, 410),
    1_048_576: (29_128, 583),
}
"""Visual tokens -> (regions of at most 36 tokens, top_k): the paper's three, then 10, 10 and 2 % kept."""

SLOTS = 36
TEXT = 2_048  # text and context tokens


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call of gaze_decode.

    Attributes:
      heads: a key of :data:`HEADS`.
      tokens: a key of :data:`SCENES`.
      batch: B.
      select_per: see :class:`GazeSpec`.
      visual_dtype: see :class:`GazeSpec`; everything else is bfloat16.
      layers: L of the cache; fewer than the model's if memory is short.
    """

    heads: str
    tokens: int
    batch: int = 1
    select_per: str = "head"
    visual_dtype: str | None = None
    layers: int = 1

    @property
    def name(self) -> str:
        kind = self.visual_dtype or "bfloat16"
        return f"{self.heads} {self.tokens} B{self.batch} {self.select_per} {kind} L{self.layers}"

    @property
    def spec(self) -> GazeSpec:
        return GazeSpec(
            scale=HEADS[self.heads][3] ** -0.5, select_per=self.select_per, visual_dtype=self.visual_dtype
        )

    @property
    def layer_bytes(self) -> int:
        """Bytes of the visual keys and values of one layer, for all sequences."""
        _, kv_heads, _, dim = HEADS[self.heads]
        size = 1 if self.visual_dtype == "int8" else 2
        return self.batch * kv_heads * SCENES[self.tokens][0] * SLOTS * 2 * dim * size

    def fitting(self, memory: int) -> "Shape | None":
        """The shape with as many layers as fit ``memory`` bytes, text stream included; None if none fits."""
        layers, kv_heads, _, dim = HEADS[self.heads]
        text = self.batch * kv_heads * TEXT * 2 * dim * 2
        layers = min(layers, memory // (self.layer_bytes + text))
        return dataclasses.replace(self, layers=layers) if layers else None

    def arguments(self, implementation: str) -> tuple[object, ...]:
        """Abstract arguments of :func:`call`."""
        _, kv_heads, group, dim = HEADS[self.heads]
        regions, top_k = SCENES[self.tokens]
        heads = kv_heads * group

        def array(dtype: object, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        cache = array(jnp.bfloat16, self.layers, self.batch, kv_heads, regions, SLOTS, dim)
        packed = jax.eval_shape(
            lambda k, v: api.pack(k, v, spec=self.spec, implementation=implementation), cache, cache
        )
        text = array(jnp.bfloat16, self.layers, self.batch, kv_heads, TEXT, dim)
        return (
            array(jnp.bfloat16, self.batch, heads, dim),
            packed,
            text,
            text,
            array(jnp.int32),
            array(jnp.int32, self.batch, heads if self.select_per == "head" else kv_heads, top_k),
            array(jnp.bool_, self.batch, regions, SLOTS),
            array(jnp.bool_, self.batch, TEXT),
        )


def real() -> Iterator[Shape]:
    """What to compile: every scene alone, two of them in batches of 8, one in int8."""
    for heads in HEADS:
        for select_per in ("head", "kv_head"):
            for tokens in SCENES:
                yield Shape(heads, tokens, 1, select_per)
                if tokens in (9_216, 36_864):
                    yield Shape(heads, tokens, 8, select_per)
            yield Shape(heads, 36_864, 1, select_per, "int8")
