"""Shapes in which gaze_prefill is used, as abstract arguments; TPU compilation is checked with them.

Text queries route over the visual tokens of published models: Qwen3-4B has 32 query and 8 kv heads of 128,
Qwen2.5-7B 28 and 4 of 128, Qwen2.5-0.5B 14 and 2 of 64. Regions are 6 x 6 tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.gaze_prefill.api import gaze_prefill
from pallas_kernels.spec import GazeSpec, KeyPlaces, Windows

Build = Callable[[], tuple[Callable[..., object], tuple[object, ...]]]

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call of the op; the fields are the axes' sizes.

    Attributes:
      name: the model and its number of visual tokens.
      heads, kv_heads, dim: H, K and D.
      queries: T.
      regions, slots: R and P.
      text: S.
      select_per: see :class:`GazeSpec`; None: a call without a selection.
      dtype: dtype of q, K and V.
    """

    name: str
    heads: int
    kv_heads: int
    dim: int
    queries: int
    regions: int
    slots: int = 36
    text: int = 2048
    select_per: str | None = "head"
    dtype: str = "bfloat16"

    def abstract(self) -> tuple[Any, ...]:
        """(q, K and V of both streams), windows, places and selection, for a batch of one."""

        def array(dtype: DTypeLike, *shape: int) -> Any:
            return jax.ShapeDtypeStruct((1, *shape), dtype)

        shared = self.heads if self.select_per == "head" else self.kv_heads
        visual = array(self.dtype, self.kv_heads, self.regions, self.slots, self.dim)
        text = array(self.dtype, self.kv_heads, self.text, self.dim)
        windows = Windows(
            **{field: array(jnp.int32, self.queries) for field in _WINDOWS},
            routed=array(jnp.bool_, self.queries),
        )
        places = KeyPlaces(
            visual_order=array(jnp.int32, self.regions, self.slots),
            region_segment=array(jnp.int32, self.regions),
            text_order=array(jnp.int32, self.text),
            text_segment=array(jnp.int32, self.text),
        )
        selected = None if self.select_per is None else array(jnp.bool_, self.queries, shared, self.regions)
        q = array(self.dtype, self.queries, self.heads, self.dim)
        return (q, visual, visual, text, text), windows, places, selected

    def forward(
        self, arrays: Arrays, windows: Windows, places: KeyPlaces, selected: jax.Array | None
    ) -> jax.Array:
        """The op's output, [1, T, H, D]."""
        q, visual_k, visual_v, text_k, text_v = arrays
        return gaze_prefill(
            q,
            visual_k,
            visual_v,
            text_k,
            text_v,
            windows,
            places,
            selected,
            spec=GazeSpec(scale=self.dim**-0.5, select_per=self.select_per or "head"),
            implementation="tpu",
        )

    def gradients(
        self,
        d_out: jax.Array,
        arrays: Arrays,
        windows: Windows,
        places: KeyPlaces,
        selected: jax.Array | None,
    ) -> tuple[jax.Array, Arrays]:
        """Output, and gradients with respect to the five arrays."""
        out, pull = jax.vjp(lambda arrays: self.forward(arrays, windows, places, selected), arrays)
        return out, pull(d_out)[0]


_WINDOWS = ("segment", "visual_lo", "visual_hi", "text_lo", "text_hi")

SHAPES = (
    Shape("qwen3-4b 9,216", 32, 8, 128, queries=1024, regions=256),
    Shape("qwen3-4b 36,864", 32, 8, 128, queries=1024, regions=1024),
    Shape("qwen3-4b 147,456", 32, 8, 128, queries=1024, regions=4096),
    Shape("qwen2.5-7b 36,864", 28, 4, 128, queries=1024, regions=1024),
    Shape("qwen2.5-7b 36,864 kv_head", 28, 4, 128, queries=1024, regions=1024, select_per="kv_head"),
    Shape("qwen2.5-0.5b 9,216 kv_head", 14, 2, 64, queries=1024, regions=256, select_per="kv_head"),
    Shape("qwen3-4b 9,216 float32", 32, 8, 128, queries=1024, regions=256, dtype="float32"),
    Shape("qwen3-4b 9,216 visual queries", 32, 8, 128, queries=9216, regions=256, select_per=None),
)


def _build(shape: Shape, gradients: bool) -> Build:
    def build() -> tuple[Callable[..., object], tuple[object, ...]]:
        arguments = shape.abstract()
        return (shape.gradients, (arguments[0][0], *arguments)) if gradients else (shape.forward, arguments)

    return build


# (name, build); build() returns a function and its abstract arguments. The gradient runs both kernels.
PROGRAMS: tuple[tuple[str, Build], ...] = tuple(
    (f"{shape.name}, {'gradients' if gradients else 'forward'}", _build(shape, gradients))
    for shape in SHAPES
    for gradients in (False, True)
)
