"""A language model of this project and the same one in transformers, ready to be timed.

Both get visual tokens as embeddings, without an image tower, and both have the same random weights, mapped by
the conversion table.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import SLOTS
from gaze_jax.core import accounting
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import EMPTY, Kind, Streams
from gaze_jax.families import CONVERSIONS
from gaze_jax.models import MLLM, Cache, DecodePosition, MLLMConfig
from gaze_jax.models.attention import make_metadata
from gaze_jax.models.cache import build_cache, decode_spec
from gaze_jax.models.config import DecoderConfig, GazeConfig
from gaze_jax.models.decoder import Decoder
from gaze_jax.models.parameters import boxed_params
from gaze_jax.models.unstacked import split_layers
from pallas_kernels.gaze_decode import api
from pallas_kernels.gaze_decode.cpu import Layered

Array = jax.Array

OURS = ("dense", "head", "kv_head")
"""Dense attention, and Gaze with each ``select_per``."""

QUESTION = 16
"""Tokens of a user's turn."""

FILLED, TEXT = 32, 64
"""Text tokens in a cache that was not prefilled, and its capacity for these and the decoded tokens."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of sequences: visual tokens in regions of 36, of which Gaze selects a tenth."""

    tokens: int
    batch: int

    @property
    def regions(self) -> int:
        return self.tokens // SLOTS

    def top_k(self, variant: str) -> int | None:
        return None if variant == "dense" else max(1, round(self.regions / 10))


def config_of(decoder: DecoderConfig, variant: str) -> MLLMConfig:
    select_per = "kv_head" if variant == "kv_head" else "head"
    return MLLMConfig(decoder, None, GazeConfig(region=(6, 6), context_tokens=0, select_per=select_per))


def draw(decoder: DecoderConfig) -> Any:
    """Random parameters as NumPy arrays, layers stacked, scaled to keep activations in range."""
    rng = np.random.default_rng(0)

    def leaf(path: Any, boxed: Any) -> np.ndarray:
        values = rng.random(boxed.shape, np.float32)  # three times as fast as a normal distribution
        values -= 0.5
        name = path[-1].key
        if name in ("weight", "bias"):
            return values * np.float32(0.4) + np.float32(name == "weight")
        fan_in = boxed.shape[-2] if name == "kernel" else boxed.shape[-1]
        values *= np.float32((12 / fan_in) ** 0.5)
        return values

    shapes = nn.meta.unbox(boxed_params(config_of(decoder, "dense")))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def ours(drawn: Any) -> Any:
    """Parameters in the layout for decoding: unstacked on a CPU, unchanged elsewhere."""
    stacked = jax.tree.map(jnp.asarray, drawn)
    return split_layers(stacked) if jax.default_backend() == "cpu" else stacked


def tensors(drawn: Any, decoder: DecoderConfig) -> dict[str, np.ndarray]:
    """The same parameters with the names and layout of transformers."""
    leaves = {
        "/".join(part.key for part in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(drawn)
    }
    found = {}
    for rule in CONVERSIONS["qwen2"].rules(decoder):
        for i, name in enumerate(rule.tensors):
            leaf = leaves[rule.leaf]
            found[name] = rule.to_tensor(leaf[i] if rule.layers else leaf)
    return found


def embeddings(decoder: DecoderConfig, case: Case) -> np.ndarray:
    """Random visual embeddings, float32 [B, tokens, M]."""
    shape = (case.batch, case.tokens, decoder.width)
    return np.random.default_rng(1).standard_normal(shape, np.float32) * np.float32(decoder.width**-0.5)


def question(decoder: DecoderConfig, case: Case, turn: int) -> np.ndarray:
    """int32 [B, QUESTION]."""
    shape = (case.batch, QUESTION)
    return np.random.default_rng(1 + turn).integers(0, decoder.vocab_size, shape, np.int32)


def _streams(tokens: Array, visual: int, start: Array | int) -> Streams:
    """Streams of ``visual`` tokens, region by region, and text [B, S] that begins at order ``start``."""
    batch, text = tokens.shape

    def rows(a: Array) -> Array:
        return jnp.broadcast_to(a, (batch, *a.shape))

    order = rows(jnp.arange(visual, dtype=jnp.int32).reshape(-1, SLOTS))
    after = rows(start + jnp.arange(text, dtype=jnp.int32))
    text = jnp.zeros_like(after)
    return Streams(
        visual_src=order,
        visual_order=order,
        visual_positions=order,
        visual_view=jnp.zeros_like(order),
        region_segment=jnp.zeros_like(order[:, :, 0]),
        tokens=tokens,
        kind=text + Kind.TEXT,
        text_order=after,
        text_positions=after,
        text_segment=text,
        text_view=text + EMPTY,
        targets=text,
    )


def _selection(top_k: int | None) -> Selection:
    return Selection(None if top_k is None else jnp.int32(top_k))


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(
    config: MLLMConfig, top_k: int | None, params: Any, visual: Array, tokens: Array
) -> tuple[Array, Cache]:
    """Prefill visual embeddings [B, n, M] and text int32 [B, S]: the last logits [B, V] and the cache."""
    decoder: Callable[..., Any] = functools.partial(Decoder(config).apply, {"params": params["decoder"]})
    streams = _streams(tokens, visual.shape[1], visual.shape[1])
    x = jnp.concatenate([visual, decoder(tokens, method="embed")], axis=1)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    hidden, layers = decoder(
        x,
        positions,
        make_metadata(streams, config.gaze),
        _selection(top_k),
        SelectionSpec(),
        keep_kv=True,
        method="forward",
    )
    return decoder(hidden[:, -1], method="logits"), build_cache(layers, streams, config.gaze, free_slots=TEXT)


@functools.partial(jax.jit, static_argnums=(0, 1))
def follow(
    config: MLLMConfig,
    top_k: int | None,
    params: Any,
    tokens: Array,
    order: Array,
    write_index: Array,
    steps: Array,
    cache: Cache,
) -> tuple[Array, Array, Array | None]:
    """Decode tokens int32 [B, T], then greedily, ``steps`` steps in total.

    Args:
      tokens: the first tokens.
      order, write_index: int32 scalars, index of the first token in the sequence and in the text stream.
      steps: int32 scalar.

    Returns:
      The most likely next token [B], the last logits [B, V], and the last selections int32 [L, B, Hs, J].
    """
    batch, known = tokens.shape
    apply: Callable[..., Any] = MLLM(config).apply
    # Keep what a step does not change out of the loop, which would copy it.
    updated = ("text_k", "text_v", "text_order")

    def step(token: Array, i: Array, parts: Mapping[str, Array]) -> Any:
        at = jnp.broadcast_to(order + i, (batch,))
        where = DecodePosition(order=at, write_index=write_index + i, sample=jnp.zeros_like(at))
        now = dataclasses.replace(cache, **parts)
        spec = SelectionSpec(capacity=top_k)
        return apply({"params": params}, token, at, now, where, _selection(top_k), spec, method="decode")

    def body(i: Array, state: Any) -> Any:
        token, parts, _, _ = state
        given = jax.lax.dynamic_index_in_dim(tokens, jnp.minimum(i, known - 1), axis=1, keepdims=False)
        logits, now, out = step(jnp.where(i < known, given, token), i, parts)
        parts = {name: getattr(now, name) for name in updated}
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), parts, logits, out.get("indices")

    parts = {name: getattr(cache, name) for name in updated}
    zero = jnp.zeros((), jnp.int32)
    logits, _, out = jax.eval_shape(step, tokens[:, 0], zero, parts)
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (logits, out.get("indices")))
    token, _, last, picks = jax.lax.fori_loop(0, steps, body, (tokens[:, 0], parts, *nothing))
    return token, last, picks


@functools.partial(jax.jit, static_argnums=(0, 1))
def ask(
    config: MLLMConfig,
    top_k: int | None,
    params: Any,
    tokens: Array,
    order: Array,
    write_index: Array,
    cache: Cache,
) -> tuple[Array, Array, Array | None]:
    """Read tokens int32 [B, T] with the cache: all but the last at once, as a chat session does.

    Arguments and result are as for :func:`follow`.
    """
    apply: Callable[..., Any] = MLLM(config).apply
    extended = apply(
        {"params": params},
        None,
        _streams(tokens[:, :-1], 0, order),
        cache,
        _selection(top_k),
        region=jnp.int32(cache.visual_order.shape[1]),
        write_index=write_index,
        method="extend",
    )
    known = tokens.shape[1] - 1
    return follow(
        config, top_k, params, tokens[:, -1:], order + known, write_index + known, jnp.int32(1), extended
    )


def random_cache(config: MLLMConfig, case: Case) -> Cache:
    """A cache with random keys and values, FILLED text tokens and capacity TEXT."""
    decoder, gaze = config.decoder, config.gaze
    spec, implementation = decode_spec(gaze, decoder.head_dim), gaze.decode_implementation

    def one(key: Array, *sizes: int, layers: int = decoder.depth) -> Array:
        return jax.random.normal(key, (layers, case.batch, decoder.num_kv_heads, *sizes, decoder.head_dim))

    @jax.jit
    def visual(key: Array) -> Any:
        keys, values = (one(k, case.regions, SLOTS, layers=1) for k in jax.random.split(key))
        return api.pack(keys, values, spec=spec, implementation=implementation)

    def joined(*packed: Any) -> Any:
        if isinstance(packed[0], Layered):
            return Layered(tuple(layer for each in packed for layer in each.layers))
        return jax.tree.map(lambda *a: jnp.concatenate(a), *packed)

    keys = jax.random.split(jax.random.key(0), 4)
    streams = _streams(jnp.zeros((case.batch, TEXT), jnp.int32), case.tokens, case.tokens)
    filled = jnp.arange(TEXT) < FILLED
    return Cache(
        visual=joined(*map(visual, jax.random.split(keys[0], decoder.depth))),
        descriptors=one(keys[1], case.regions),
        text_k=one(keys[2], TEXT),
        text_v=one(keys[3], TEXT),
        visual_order=streams.visual_order,
        text_order=jnp.where(filled, streams.text_order, EMPTY),
    )


def step_bytes(
    config: MLLMConfig, params: Any, case: Case, picks: Array | None, text: float
) -> dict[str, float]:
    """Bytes that a decoding step must read: every parameter once, and the attended keys and values.

    The output head reads every row of the embedding. A region selected by several query heads of a kv head is
    read once; with Gaze, every descriptor is read.

    Args:
      config: the model's config.
      params: the model's parameters.
      case: the sequences.
      picks: int32 [L, B, Hs, J], selections of a step; None for dense attention.
      text: number of text-stream keys that a step sees.
    """
    decoder, union, regions = config.decoder, float(case.regions), None
    if picks is not None:
        mask, regions = accounting.mask_from_indices(picks, case.regions), case.regions
        union = float(jnp.mean(accounting.union_over_group(mask, decoder.num_kv_heads)))
    reads = accounting.decode_floor(decoder.num_kv_heads, decoder.head_dim, 4, regions, SLOTS, union, text)
    cache = float(reads.total) * decoder.depth * case.batch
    return {"parameters": float(sum(leaf.nbytes for leaf in jax.tree.leaves(params))), "cache": cache}


class Theirs:
    """transformers' Qwen2 on a CPU, with a cache; a call ends when the next token is known."""

    def __init__(self, drawn: Any, decoder: DecoderConfig):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        conversion = CONVERSIONS["qwen2"]
        assert conversion.write_config is not None
        fields = {k: v for k, v in conversion.write_config(decoder).items() if k != "model_type"}
        config = transformers.Qwen2Config(**fields, max_position_embeddings=32768)
        found = {name: torch.from_numpy(values) for name, values in tensors(drawn, decoder).items()}
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
        self.model = transformers.Qwen2ForCausalLM.from_pretrained(
            None, config=config, state_dict=found, attn_implementation="sdpa", dtype=torch.float32
        ).eval()
        self.decoder, self._new = decoder, transformers.DynamicCache
        # From 5.24 on transformers calls the argument "cache".
        parameters = inspect.signature(self.model.forward).parameters
        self._keyword = "cache" if "cache" in parameters else "past_key_values"

    def prefill(self, visual: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, Any]:
        """See :func:`prefill`."""
        import torch

        with torch.inference_mode():
            text = self.model.get_input_embeddings()(torch.from_numpy(tokens).long())
            x = torch.cat([torch.from_numpy(visual), text], dim=1)
            cache = self._new()  # filled in place
            out = self.model(inputs_embeds=x, use_cache=True, logits_to_keep=1, **{self._keyword: cache})
            return out.logits[:, -1].numpy(), cache

    def follow(self, tokens: np.ndarray, steps: int, cache: Any) -> tuple[np.ndarray, np.ndarray]:
        """See :func:`follow`; the given tokens are read at once, and the cache is restored."""
        import torch

        before = cache.get_seq_length()
        with torch.inference_mode():
            ids = torch.from_numpy(tokens).long()
            for _ in range(steps - tokens.shape[1] + 1):
                out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **{self._keyword: cache})
                ids = out.logits[:, -1:].argmax(-1)
        cache.crop(before - cache.get_seq_length())
        return ids[:, 0].numpy(), out.logits[:, -1].numpy()

    def random_cache(self, case: Case) -> Any:
        """See :func:`random_cache`."""
        import torch

        cache, decoder = self._new(), self.decoder
        size = (case.batch, decoder.num_kv_heads, case.tokens + FILLED, decoder.head_dim)
        for layer in range(decoder.depth):
            cache.update(torch.randn(size), torch.randn(size), layer)
        return cache
