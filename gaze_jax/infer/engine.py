"""The engine: prefill and decode on one cache that nothing is evicted from.

Chat, batches, evaluation and comparison all decode here. A batch has rows, one sequence each. ``prefill``
runs the model over new text and frames against the cache; ``decode`` runs one compiled loop of steps. The
last token of a prompt is held back and fed to the first step of the loop. So every token of an answer comes
from the same program, and an answer that is taken token by token has the same bits as one taken at once.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gaze_jax.core.routing import Routing
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import EMPTY, IGNORE, Kind, Streams
from gaze_jax.data.pipeline import prompt_length, stack
from gaze_jax.data.processor import pad_to
from gaze_jax.infer.programs import (
    STEPS,
    UPDATED,
    DecodeState,
    Params,
    Returns,
    bucket,
    decode_loop,
    extend_step,
    grow_cache,
    prefill_step,
)
from gaze_jax.infer.sampling import SamplingParams
from gaze_jax.models import MLLM
from gaze_jax.parallel.rules import batch_sharding, flax_rules

Array = jax.Array
Arrays = Mapping[str, np.ndarray]


class Engine:
    """Rows of a batch, prefilled and decoded in turns.

    Args:
      model: the network.
      params: of the model.
      rows: the beginning of each row, from ``processor.process``, unpadded. Their ``sample_id`` names the
        rows for random routing.
      free_slots: text-stream slots to keep free for later tokens.
      selection: called before every prefill and decode: what queries may select, with arrays of ``batch``
        rows.
      routing: where region scores come from.
      mesh: devices that the rows are dealt to; None is one device.
    """

    def __init__(
        self,
        model: MLLM,
        params: Params,
        rows: Sequence[Arrays],
        *,
        free_slots: int,
        selection: Callable[["Engine"], Selection] = lambda _: Selection(),
        routing: Routing = Routing(),
        mesh: Mesh | None = None,
    ) -> None:
        self._model, self._params = model, params
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        self.rows = len(rows)
        devices = 1 if self._mesh is None else self._mesh.size
        self.batch = bucket(-(-len(rows) // devices)) * devices
        blank = np.zeros(self.batch, np.int32)
        names = [int(row["sample_id"]) for row in rows]
        sample = np.asarray(names + names[:1] * (self.batch - len(rows)), np.int32)
        self._state = DecodeState(blank, blank - 1, blank - 1, blank > 0, blank, np.int32(0), sample)
        self._held = np.zeros(len(rows), bool)
        self._ends: frozenset[int] = frozenset()
        read = self._hold(rows)
        sizes = _sizes(read)
        self.slots = sizes["slots"]
        self.capacity = sizes["regions"]
        self.regions = max(len(row["visual_src"]) for row in read)
        self.visual_tokens = max(int((row["visual_src"] >= 0).sum()) for row in read)
        self._selection, self._spec = selection, SelectionSpec(routing)
        self._kind = np.zeros((self.batch, 0), np.int32)
        batch = self._batch(read, sizes)
        with self._devices():
            chosen = _spread(selection(self), self.regions, self.capacity)
            self._cache = prefill_step(
                model, params, *self._inputs(batch), chosen, spec=self._spec, free_slots=free_slots
            )
        self._written(read, 0)

    def _devices(self) -> contextlib.AbstractContextManager[Any]:
        """Where programs run: on the mesh, if there is one."""
        stack = contextlib.ExitStack()
        if self._mesh is not None:
            stack.enter_context(jax.set_mesh(self._mesh))
            stack.enter_context(nn.logical_axis_rules(flax_rules()))
        return stack

    def _put(self, tree: Any) -> Any:
        if self._mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return jax.device_put(tree, batch_sharding(self._mesh))

    def _hold(self, rows: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        """Set each row's last token aside, if it is text; a row that ends in a picture holds none."""
        held, token = [], np.array(self._state.token)
        order, positions = np.array(self._state.order), np.array(self._state.positions)
        for b, row in enumerate(rows):
            own = dict(row)
            before = self._ended[b]
            order[b] = max(order[b] - before, _last(row, "order"))
            positions[b] = max(positions[b] - before, _last(row, "positions"))
            ready = (
                len(row["kind"]) > 0 and row["kind"][-1] == Kind.TEXT and row["text_order"][-1] == order[b]
            )
            if ready:
                token[b] = row["tokens"][-1]
                own |= {name: row[name][:-1] for name in _TEXT_FIELDS}
            held.append(own)
            self._held[b] = ready
        self._state = dataclasses.replace(
            self._state, token=token, order=order, positions=positions, done=order > order
        )
        return held

    @property
    def _ended(self) -> np.ndarray:
        """bool [rows]: the row's last token is an end token, which is never read."""
        token, done = np.asarray(self._state.token), np.asarray(self._state.done)
        return (done & np.isin(token, list(self._ends)))[: self.rows]

    def _batch(self, rows: Sequence[Arrays], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Padded and stacked; rows beyond the last are copies of the first, which nobody listens to."""
        padded = [pad_to(_narrow(row, sizes["slots"]), **sizes) for row in rows]
        return stack(padded + [padded[0]] * (self.batch - len(padded)))

    def _inputs(self, batch: dict[str, np.ndarray]) -> tuple[Array | None, Streams, Array]:
        images = batch["images"] if batch["images"].shape[1] else None
        return self._put(images), self._put(Streams.from_batch(batch)), self._put(self._state.sample)

    def _written(self, rows: Sequence[Arrays], write_index: int) -> None:
        """Note what kind of token is where, and which slot is free next."""
        longest = max(len(row["kind"]) for row in rows)
        new = np.full((self.batch, longest), Kind.PAD, np.int32)
        for b, row in enumerate(rows):
            new[b, : len(row["kind"])] = row["kind"]
        self._kind = np.concatenate([self._kinds(write_index), new], axis=1)
        self._state = dataclasses.replace(self._state, write_index=np.int32(write_index + longest))

    def _kinds(self, slots: int) -> np.ndarray:
        """int32 [B, slots], what kind of token is where; whatever was or will be decoded is text."""
        return np.pad(self._kind, ((0, 0), (0, slots - self._kind.shape[1])), constant_values=Kind.TEXT)

    @property
    def order(self) -> np.ndarray:
        """int32 [rows], of the last token, prefilled or decoded; an end token does not count."""
        return np.asarray(self._state.order)[: self.rows] - self._ended

    @property
    def text_length(self) -> int:
        """Text-stream slots that are taken."""
        return int(self._state.write_index)

    @property
    def free_slots(self) -> int:
        """Text-stream tokens that fit before the cache has to grow."""
        return self._cache.text_order.shape[1] - int(self._state.write_index)

    def fits(self, *, text: int, regions: int, slots: int) -> bool:
        """Whether so many more text-stream tokens, and regions of ``slots``, fit before the cache grows."""
        return slots <= self.slots and text <= self.free_slots and self.regions + regions <= self.capacity

    def reserve(self, *, text: int = 0, regions: int = 0, slots: int = 0) -> None:
        """Make room for as many more text-stream tokens and regions; a larger cache is compiled for once."""
        # By half at least, so that a long conversation does not compile for every turn.
        slots_now = self._cache.text_order.shape[1]
        missing = text - self.free_slots
        free_slots = bucket(slots_now + max(missing, slots_now // 2)) - slots_now if missing > 0 else 0
        wanted = self.regions + regions
        more = bucket(wanted) - self.capacity if wanted > self.capacity else 0
        wider = max(slots, self.slots)
        if free_slots or more or wider > self.slots:
            with self._devices():
                self._cache = grow_cache(
                    self._model.config, self._cache, free_slots=free_slots, regions=more, slots=wider
                )
            self.capacity, self.slots = self.capacity + more, wider

    def prefill(self, rows: Sequence[Arrays]) -> None:
        """Read what comes next in each row; only its own tokens are computed.

        Args:
          rows: from ``processor.process_with_views``, with ``order`` one more than :attr:`order`.
        """
        state, unread = self._state, self._held & ~self._ended
        rows = [
            _with_token(row, state.token[b], state.order[b], state.positions[b]) if unread[b] else row
            for b, row in enumerate(rows)
        ]
        read = self._hold(rows)
        if not any(len(row["kind"]) or len(row["visual_src"]) for row in read):
            return
        sizes = _sizes(read)
        self.reserve(text=sizes["text"] + 1, regions=sizes["regions"], slots=sizes["slots"])
        sizes["slots"] = self.slots
        write_index = int(self._state.write_index)
        with self._devices():
            self._cache = extend_step(
                self._model,
                self._params,
                *self._inputs(self._batch(read, sizes)),
                self._cache,
                _spread(self._selection(self), self.regions, self.capacity, sizes["regions"]),
                np.int32(self.regions),
                np.int32(write_index),
                spec=self._spec,
            )
        self.regions += max(len(row["visual_src"]) for row in read)
        self.visual_tokens += max(int((row["visual_src"] >= 0).sum()) for row in read)
        self._written(read, write_index)

    def decode(
        self,
        max_tokens: int,
        *,
        ends: Collection[int],
        sampling: SamplingParams,
        returns: Returns = "tokens",
        chunked: bool = True,
        capacity: int | None = None,
        stopped: Callable[[], Sequence[bool]] | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Answer in all rows.

        Args:
          max_tokens: of each row.
          ends: tokens that end a row's answer; they are part of it.
          sampling: of the rows.
          returns: what to yield besides tokens.
          chunked: yield several steps at once; False yields every step as soon as it is there.
          capacity: J, the most regions that a query selects; None is all.
          stopped: asked after every yield: which rows are done without an end token.

        Yields:
          "tokens" int32 [n, rows], -100 after a row's end. With "selection", about the query that emitted
          each token: "visual_tokens" int32 [n, rows], "entries" float32 [n, L, rows, 4] (visual, newline,
          context, text keys, a mean over heads), and under routing "selected" bool [n, L, rows, Hs, R].
          With "trace" also "attention" and "dense" float32 [n, L, rows, H, R], and under routing "scores"
          float32 [n, L, rows, Hs, R]. The last token of a row is not read until the next :meth:`prefill`.
        """
        if not self._held.all() or self._ended.any():
            raise ValueError("Nothing was read since the last answer, or it ends in a picture.")
        self.reserve(text=max_tokens)
        self._ends = frozenset(ends)
        state = dataclasses.replace(
            self._state, done=np.arange(self.batch) >= self.rows, index=np.zeros(self.batch, np.int32)
        )
        selection = _spread(self._selection(self), self.regions, self.capacity)
        depth = self._model.config.decoder.depth
        last = np.asarray(sorted(ends) or [-1], np.int32)
        generated = 0
        while generated < max_tokens and not state.done.all():
            steps = min(STEPS if chunked else 1, max_tokens - generated)
            with self._devices():
                cache = self._cache
                updated, after, found = decode_loop(
                    self._model,
                    self._params,
                    dataclasses.replace(cache, **dict.fromkeys(UPDATED)),
                    {name: getattr(cache, name) for name in UPDATED},
                    self._put_state(state),
                    selection,
                    self._put(_padded(sampling, self.batch)),
                    last,
                    np.int32(steps),
                    self._put(self._kinds(self._cache.text_order.shape[1])),
                    spec=dataclasses.replace(self._spec, capacity=capacity),
                    returns=returns,
                )
            self._cache = dataclasses.replace(cache, **updated)
            found, after = jax.device_get((found, after))
            ran = int(after.write_index - state.write_index)
            state = self._state = after
            generated += ran
            rows = slice(0, self.rows)
            flat = ("tokens", "visual_tokens")
            out = {name: a[:ran, rows] if name in flat else a[:ran, :, rows] for name, a in found.items()}
            if returns != "tokens" and out["entries"].shape[1] == 1:
                out["entries"] = np.repeat(out["entries"], depth, axis=1)
            yield out
            if stopped is not None:
                done = state.done.copy()
                done[: self.rows] |= np.asarray(stopped())
                state = self._state = dataclasses.replace(state, done=done)

    def _put_state(self, state: DecodeState) -> DecodeState:
        placed = self._put(dataclasses.replace(state, write_index=None))
        return dataclasses.replace(placed, write_index=np.int32(state.write_index))


_TEXT_FIELDS = (
    "tokens",
    "kind",
    "text_order",
    "text_positions",
    "text_segment",
    "text_view",
    "targets",
    "target_box",
    "target_view",
)


def _last(arrays: Arrays, name: str) -> int:
    """The largest order or position of a row, of either stream."""
    values = (arrays[f"visual_{name}"], arrays[f"text_{name}"])
    return max(int(a.max(initial=-1)) for a in values)


def _narrow(row: Arrays, slots: int) -> dict[str, np.ndarray]:
    """The row with no more than ``slots`` token slots where it has no regions that could use them."""
    if len(row["visual_src"]):
        return dict(row)
    return {name: a[:, :slots] if name.startswith(("visual_", "pool_")) else a for name, a in row.items()}


def _sizes(rows: Sequence[Arrays]) -> dict[str, int]:
    """The bucket that all rows fit."""

    def most(name: str, axis: int = 0) -> int:
        return max(row[name].shape[axis] for row in rows)

    return {
        "regions": bucket(most("visual_src")),
        "text": prompt_length(max(most("kind"), 1)),
        "images": bucket(most("images")),
        # Of rows that show something: the others' is only what the layout says.
        "slots": max((row["visual_src"].shape[1] for row in rows if len(row["visual_src"])), default=1),
    }


def _with_token(row: Arrays, token: int, order: int, positions: int) -> dict[str, np.ndarray]:
    """The row with a token of text before it."""
    first: dict[str, Any] = {
        "tokens": [token],
        "kind": [Kind.TEXT],
        "text_order": [order],
        "text_positions": [positions],
        "text_segment": [0],
        "text_view": [EMPTY],
        "targets": [IGNORE],
        "target_box": [[-1.0] * 4],
        "target_view": [EMPTY],
    }
    return dict(row) | {
        name: np.concatenate([np.asarray(value, row[name].dtype), row[name]]) for name, value in first.items()
    }


def _spread(selection: Selection, regions: int, capacity: int, more: int = 0) -> Selection:
    """The look with a bias for a cache of ``capacity``, ``regions`` of them used, and ``more`` after it."""
    if selection.bias is None:
        return selection

    def fill(bias: Array, size: int) -> Array:
        return jnp.pad(bias, ((0, 0), (0, 0), (0, size - bias.shape[2])))

    before, after = selection.bias[..., :regions], selection.bias[..., regions:]
    bias = jnp.concatenate([fill(before, capacity), fill(after, more)], axis=2)
    return dataclasses.replace(selection, bias=bias)


def _padded(sampling: SamplingParams, rows: int) -> SamplingParams:
    return jax.tree.map(lambda a: np.pad(a, (0, rows - len(a)), mode="edge"), sampling)
