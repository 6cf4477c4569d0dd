"""Frozen model configurations: the single description of an architecture.

Field names are the keys of a config file (``configs/*.py``) and of a checkpoint's ``config.json``.
"""

import dataclasses
from collections.abc import Mapping
from typing import TypedDict

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gaze_jax.core.layout import NEWLINES, ViewConfig, VisualLayout
from gaze_jax.core.regions import DESCRIPTORS
from pallas_kernels.spec import SELECT_PER, VISUAL_DTYPES

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
PARAM_DTYPES = DTYPES | {"float16": jnp.float16}
"""Parameters may also be stored in float16, as in some published checkpoints; nothing computes in it."""
SCOPES = ("all", "view")
REMAT_POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What a rematerialised block keeps besides its input."""


class Kinds(TypedDict):
    """Dtype keyword arguments of a module."""

    dtype: DTypeLike
    param_dtype: DTypeLike


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A Qwen3 / Qwen2.5-shaped decoder.

    Attributes:
      vocab_size: V, rows of the embedding table.
      width: M, the residual stream.
      depth: L, number of blocks.
      num_heads: H query heads.
      num_kv_heads: K key-value heads; H must be a multiple.
      head_dim: D; H * D need not equal M (Qwen3).
      mlp_dim: hidden width of the gated MLP.
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon of every RMSNorm.
      qk_norm: RMSNorm over D on queries and keys before RoPE (Qwen3).
      qkv_bias: biases on the q, k and v projections (Qwen2, Qwen2.5).
      tie_embeddings: the output head is the transposed embedding table.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    qk_norm: bool = True
    qkv_bias: bool = False
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"decoder.num_heads={self.num_heads} must be a multiple of "
            f"decoder.num_kv_heads={self.num_kv_heads}.",
        )
        _require(
            self.head_dim % 2 == 0,
            f"decoder.head_dim={self.head_dim} must be even: RoPE rotates pairs of channels.",
        )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A SigLIP-shaped tower: square images, learned absolute positions, no class token.

    Attributes:
      image_size: side of the input in pixels.
      patch_size: side of a patch; a remainder at the right and bottom is dropped, as SigLIP does.
      width: channels.
      depth: encoder blocks that are *run* (the penultimate feature of a 27-layer SigLIP is depth 26).
      num_heads: attention heads; must divide ``width``.
      mlp_dim: hidden width of the MLP.
      norm_eps: epsilon of every LayerNorm.
      post_norm: apply the final LayerNorm to the features (MLLMs leave it out).
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    norm_eps: float = 1e-6
    post_norm: bool = False

    def __post_init__(self) -> None:
        _require(
            self.width % self.num_heads == 0,
            f"vision.width={self.width} must be a multiple of vision.num_heads={self.num_heads}.",
        )
        _require(
            self.image_size >= self.patch_size,
            f"vision.image_size={self.image_size} must be at least vision.patch_size={self.patch_size}.",
        )

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class GazeConfig:
    """How the decoder attends to visual tokens.

    Attributes:
      region: (r_h, r_w) target size of a region in tokens; sides are balanced (``core.regions``).
      context_tokens: C learnable tokens after each view; 0 for parity with a dense checkpoint.
      top_k: default number of regions that a query selects; None is dense attention.
      select_per: "head" selects per query head, "kv_head" once per kv head.
      descriptor: summary of a region used for selection: "mean", the mean key (the paper), or "minmax",
        the minimum and maximum of each channel, whose score bounds the region's largest logit.
      visual_scope: which visual tokens a visual token sees: "all" earlier ones, or only its own view's with
        "view" (prefill linear in frames).
      visual_causal: False lets a visual token also see later tokens of its own view.
      prefill_implementation, decode_implementation: implementations of the attention ops ``gaze_prefill``
        (training, prefill) and ``gaze_decode``; see ``pallas_kernels``. "auto" decodes by "native" on a CPU
        where its library is built, by "xla" elsewhere.
      query_block: queries that the XLA prefill handles at once; bounds its memory.
      video_region: (r_t, r_h, r_w) target size of a region of a video, a slab of r_t frames; None is
        one frame and ``region``.
      newlines: "text" keeps the newlines of a view in the text stream, which every query reads in full;
        "region" adds each to the last region of its row.
      visual_dtype: dtype of the visual keys and values in the cache: None for the computed dtype, or "int8"
        with one scale per token and head. Descriptors and the text stream are not quantised.
      interpret: run Pallas kernels in JAX's interpreter, to test a model without their chip; slow.
    """

    region: tuple[int, int] = (6, 6)
    context_tokens: int = 4
    top_k: int | None = None
    select_per: str = "head"
    descriptor: str = "mean"
    visual_scope: str = "all"
    visual_causal: bool = True
    prefill_implementation: str = "xla"
    decode_implementation: str = "auto"
    query_block: int = 512
    video_region: tuple[int, int, int] | None = None
    newlines: str = "text"
    visual_dtype: str | None = None
    interpret: bool = dataclasses.field(default=False, metadata={"stored": False})

    def __post_init__(self) -> None:
        object.__setattr__(self, "region", tuple(self.region))
        if self.video_region is not None:
            object.__setattr__(self, "video_region", tuple(self.video_region))
            _require(
                len(self.video_region) == 3 and min(self.video_region) >= 1,
                f"gaze.video_region={self.video_region} must be three sizes (r_t, r_h, r_w) of at least 1.",
            )
        _require(self.newlines in NEWLINES, f"gaze.newlines={self.newlines!r} must be one of {NEWLINES}.")
        _require(
            len(self.region) == 2 and min(self.region) >= 1,
            f"gaze.region={self.region} must be two sizes (r_h, r_w) of at least 1 token.",
        )
        _require(self.context_tokens >= 0, f"gaze.context_tokens={self.context_tokens} must not be negative.")
        _require(
            self.top_k is None or self.top_k >= 1,
            f"gaze.top_k={self.top_k} must be at least 1 region; use None for dense attention.",
        )
        _require(
            self.select_per in SELECT_PER, f"gaze.select_per={self.select_per!r} must be one of {SELECT_PER}."
        )
        _require(
            self.descriptor in DESCRIPTORS,
            f"gaze.descriptor={self.descriptor!r} must be one of {DESCRIPTORS}.",
        )
        _require(
            self.visual_scope in SCOPES, f"gaze.visual_scope={self.visual_scope!r} must be one of {SCOPES}."
        )
        _require(
            self.visual_dtype in VISUAL_DTYPES,
            f"gaze.visual_dtype={self.visual_dtype!r} must be one of {VISUAL_DTYPES}.",
        )
        _require(self.query_block >= 1, f"gaze.query_block={self.query_block} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Numerical settings of all modules.

    Attributes:
      dtype: dtype of activations and the KV cache; "float32" or "bfloat16".
      param_dtype: dtype of new parameters; "float32", "bfloat16" or "float16".
      remat: recompute a block's activations in the backward pass.
      remat_policy: what is kept of them: "nothing", or "dots", the products with parameters, which costs
        memory and saves their recomputation.
    """

    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False
    remat_policy: str = "nothing"

    def __post_init__(self) -> None:
        known: Mapping[str, Mapping[str, object]] = {
            "dtype": DTYPES,
            "param_dtype": PARAM_DTYPES,
            "remat_policy": REMAT_POLICIES,
        }
        for name, values in known.items():
            value = getattr(self, name)
            _require(value in values, f"{name}={value!r} must be one of {tuple(values)}.")
        _require(
            self.remat or self.remat_policy == "nothing",
            f"remat_policy={self.remat_policy!r} has no effect without remat=True; set it, or leave it out.",
        )

    @property
    def kinds(self) -> Kinds:
        """Keyword arguments ``dtype`` and ``param_dtype`` of a module."""
        return {"dtype": DTYPES[self.dtype], "param_dtype": PARAM_DTYPES[self.param_dtype]}


@dataclasses.dataclass(frozen=True)
class MLLMConfig:
    """Tower, projector, decoder and gaze of one multimodal model.

    Attributes:
      decoder: the language model.
      vision: the image tower; None for a language model alone, which has no projector, newline or context
        tokens.
      gaze: attention over visual tokens.
      dtype, param_dtype, remat, remat_policy: see :class:`Numerics`.
      views: how images and frames become token grids.
    """

    decoder: DecoderConfig
    vision: VisionConfig | None
    gaze: GazeConfig = GazeConfig()
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False
    remat_policy: str = "nothing"
    views: ViewConfig = ViewConfig()

    def __post_init__(self) -> None:
        _ = self.numerics  # checks its fields
        if self.vision is None:
            return
        r_h, r_w = self.gaze.region
        grid = self.vision.grid
        _require(
            max(r_h, r_w) <= grid,
            f"gaze.region={self.gaze.region} is larger than the tower's {grid}x{grid} token grid "
            f"(image_size {self.vision.image_size} / patch_size {self.vision.patch_size}); "
            "choose a smaller region or a larger image.",
        )

    @property
    def numerics(self) -> Numerics:
        """Numerical settings of the tower and the decoder."""
        return Numerics(self.dtype, self.param_dtype, self.remat, self.remat_policy)

    @property
    def tower(self) -> VisionConfig:
        """The image tower, for callers that need one.

        Raises:
          ValueError: this is a language model alone.
        """
        if self.vision is None:
            raise ValueError("This model has no image tower (vision=None), so it cannot read images.")
        return self.vision

    @property
    def layout(self) -> VisualLayout:
        """What the data pipeline needs to make this model's tokens.

        Raises:
          ValueError: this is a language model alone, or a size does not fit the tower.
        """
        tower, gaze = self.tower, self.gaze
        return VisualLayout(
            tower.image_size,
            tower.patch_size,
            gaze.region,
            gaze.context_tokens,
            self.views,
            gaze.video_region,
            gaze.newlines,
        )
