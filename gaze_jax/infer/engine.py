"""The engine: prefill and decode on one cache, from which nothing is evicted.

Chat, batches, evaluation and comparison all decode here. A batch has rows, one sequence each. ``prefill``
runs the model over new text and frames against the cache; ``decode`` runs one compiled loop of steps. The
last token of a prompt is held back and fed to the first step of the loop. So every token of an answer comes
from the same program, and a streamed answer is bit-identical to one that is computed in one call.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from gaze_jax.core.budget import ALL_REGIONS, Keep
from gaze_jax.core.routing import Routing
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import EMPTY, IGNORE, Kind, Streams
from gaze_jax.data.dealing import collected, dealt, dealt_batch, field_sharding, joined, up
from gaze_jax.data.padding import pad_to
from gaze_jax.data.pipeline import prompt_length, stack
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
from gaze_jax.models import MLLM, context
from gaze_jax.parallel.rules import batch_sharding, fetch, flax_rules, put, replicated, split_sizes

Array = jax.Array
Arrays = Mapping[str, np.ndarray]


class Engine:
    """A batch of rows, prefilled and decoded in turns.

    Args:
      model: the network.
      params: the model's parameters.
      rows: the first arrays of each row, from ``processor.process``, unpadded. Their ``sample_id`` keys
        random routing.
      free_slots: text-stream slots to keep free for later tokens.
      selection: called before every prefill and decode; returns what queries may select, with arrays of
        ``batch`` rows.
      routing: where region scores come from.
      mesh: devices that the rows are split over, and each row's sequence if it has an axis "context"; None
        means one device.

    Raises:
      UserError: the mesh splits sequences, and the routing or the model's cache needs all keys in one place.
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
        devices, self._ranks = 1, 1
        if self._mesh is not None:
            devices, self._ranks = (split_sizes(self._mesh, name)[1] for name in ("batch", "regions"))
        context.check(routing, model.config.gaze.decode_implementation, self._ranks)
        self.batch = bucket(-(-len(rows) // devices)) * devices
        blank = np.zeros(self.batch, np.int32)
        names = [int(row["sample_id"]) for row in rows]
        sample = np.asarray(names + names[:1] * (self.batch - len(rows)), np.int32)
        self._state = DecodeState(blank, blank - 1, blank - 1, blank > 0, blank, np.int32(0), sample)
        self._held = np.zeros(len(rows), bool)
        self._ends: frozenset[int] = frozenset()
        read = self._hold(rows)
        sizes = _sizes(read, self._ranks)
        self.slots = sizes["slots"]
        self.capacity = sizes["regions"]
        self.regions = max(len(row["visual_src"]) for row in read)
        self.visual_tokens = max(int((row["visual_src"] >= 0).sum()) for row in read)
        self._selection, self._spec = selection, SelectionSpec(routing)
        self._kind = np.zeros((self.batch, 0), np.int32)
        batch = self._batch(read, sizes)
        with self._devices():
            chosen = self._put_selection(_as_budgets(self.selection()))
            self._cache = prefill_step(
                model, params, *self._inputs(batch), chosen, spec=self._spec, free_slots=free_slots
            )
        self._record_kinds(read, 0)

    def _devices(self) -> contextlib.ExitStack:
        """A context in which programs run on the mesh, if there is one."""
        stack = contextlib.ExitStack()
        if self._mesh is not None:
            stack.enter_context(jax.set_mesh(self._mesh))
            stack.enter_context(nn.logical_axis_rules(flax_rules()))
        return stack

    def _put(self, tree: PyTree) -> PyTree:
        if self._mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return put(tree, batch_sharding(self._mesh))

    def _put_selection(self, selection: Selection) -> Selection:
        # Processes share no array of one device, as a selection's are.
        if self._mesh is None or not self._mesh.is_multi_process:
            return selection
        return put(selection, replicated(self._mesh))

    def _hold(self, rows: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        """Hold back each row's last token if it is text; if the row ends in an image, hold back nothing."""
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
        """bool [rows]: the row's last token is an end token, which is never fed to the model."""
        token, done = np.asarray(self._state.token), np.asarray(self._state.done)
        return (done & np.isin(token, list(self._ends)))[: self.rows]

    def _batch(self, rows: Sequence[Arrays], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """The rows padded and stacked; copies of the first fill the batch, and their output is dropped."""
        padded = [pad_to(_trim_slots(row, sizes["slots"]), **sizes) for row in rows]
        return stack(padded + [padded[0]] * (self.batch - len(padded)))

    def _inputs(
        self, batch: dict[str, np.ndarray], region: int = 0, write_index: int = 0
    ) -> tuple[Array | None, Streams, Array]:
        """Arguments of a program; ``region`` and ``write_index`` are the first ones in the cache."""
        read = {name: batch[name] for name in (*_READ, "images") if name in batch}
        if self._mesh is None:
            placed = {name: jnp.asarray(a) for name, a in read.items()}
        else:
            dealt = dealt_batch(read, self._ranks, region=region, write_index=write_index)
            placed = {name: put(a, field_sharding(self._mesh, name)) for name, a in dealt.items()}
        images = placed["images"] if placed["images"].shape[1] else None
        return images, Streams.from_batch(placed), self._put(self._state.sample)

    def _record_kinds(self, rows: Sequence[Arrays], write_index: int) -> None:
        """Record the kind of each text-stream slot that was written, and advance the write index."""
        longest = max(len(row["kind"]) for row in rows)
        new = np.full((self.batch, longest), Kind.PAD, np.int32)
        for b, row in enumerate(rows):
            new[b, : len(row["kind"])] = row["kind"]
        self._kind = np.concatenate([self._kinds(write_index), new], axis=1)
        self._state = dataclasses.replace(self._state, write_index=np.int32(write_index + longest))

    def _kinds(self, slots: int) -> np.ndarray:
        """int32 [B, slots], the kind of token by slot number; decoded tokens and free slots are TEXT."""
        return np.pad(self._kind, ((0, 0), (0, slots - self._kind.shape[1])), constant_values=Kind.TEXT)

    @property
    def order(self) -> np.ndarray:
        """int32 [rows], order of the last prefilled or decoded token; an end token does not count."""
        return np.asarray(self._state.order)[: self.rows] - self._ended

    @property
    def text_length(self) -> int:
        """Text-stream slots in use."""
        return int(self._state.write_index)

    @property
    def free_slots(self) -> int:
        """Text-stream tokens that fit before the cache has to grow."""
        return self._cache.text_order.shape[1] - int(self._state.write_index)

    def selection(self, more: int = 0) -> Selection:
        """What the rows may select now; the bias has a column for each region of the cache and ``more``."""
        chosen = self._selection(self)
        if chosen.bias is None:
            return chosen
        bias = np.asarray(chosen.bias)
        # In NumPy: each number of regions would be another program for JAX.
        cached, new = (np.zeros((*bias.shape[:2], size), np.float32) for size in (self.capacity, more))
        before, after = bias[..., : self.regions], bias[..., self.regions :]
        cached[..., : before.shape[2]], new[..., : after.shape[2]] = before, after
        cached, new = dealt(cached, 2, self._ranks), dealt(new, 2, self._ranks, start=self.regions)
        return dataclasses.replace(chosen, bias=jnp.asarray(joined(cached, new, 2, self._ranks)))

    def fits(self, *, text: int, regions: int, slots: int) -> bool:
        """Whether ``text`` tokens and ``regions`` regions of ``slots`` fit without growing the cache."""
        return slots <= self.slots and text <= self.free_slots and self.regions + regions <= self.capacity

    def reserve(self, *, text: int = 0, regions: int = 0, slots: int = 0) -> None:
        """Grow the cache for more text-stream tokens and regions; each new size compiles once."""
        # Grow by at least half, so that a long conversation does not compile at every turn.
        slots_now = self._cache.text_order.shape[1]
        missing = text - self.free_slots
        free_slots = bucket(slots_now + max(missing, slots_now // 2)) - slots_now if missing > 0 else 0
        wanted = self.regions + regions
        more = up(bucket(wanted), self._ranks) - self.capacity if wanted > self.capacity else 0
        wider = max(slots, self.slots)
        if free_slots or more or wider > self.slots:
            with self._devices():
                self._cache = grow_cache(
                    self._model.config, self._cache, free_slots=free_slots, regions=more, slots=wider
                )
            self.capacity, self.slots = self.capacity + more, wider

    def prefill(self, rows: Sequence[Arrays]) -> None:
        """Prefill the next tokens of each row; only these are computed.

        Args:
          rows: from ``processor.process_with_views``; their ``order`` starts at :attr:`order` + 1.
        """
        state, unread = self._state, self._held & ~self._ended
        rows = [
            _with_token(row, state.token[b], state.order[b], state.positions[b]) if unread[b] else row
            for b, row in enumerate(rows)
        ]
        read = self._hold(rows)
        if not any(len(row["kind"]) or len(row["visual_src"]) for row in read):
            return
        sizes = _sizes(read, self._ranks)
        # Where a rank's part of the new ones begins, it may leave a place that another rank fills.
        gap = self._ranks - 1
        text, regions = sizes["text"] + 1 + gap, sizes["regions"] and sizes["regions"] + gap
        self.reserve(text=text, regions=regions, slots=sizes["slots"])
        sizes["slots"] = self.slots
        write_index = int(self._state.write_index)
        with self._devices():
            self._cache = extend_step(
                self._model,
                self._params,
                *self._inputs(self._batch(read, sizes), self.regions, write_index),
                self._cache,
                self._put_selection(_as_budgets(self.selection(sizes["regions"]))),
                np.int32(self.regions),
                np.int32(write_index),
                spec=self._spec,
            )
        self.regions += max(len(row["visual_src"]) for row in read)
        self.visual_tokens += max(int((row["visual_src"] >= 0).sum()) for row in read)
        self._record_kinds(read, write_index)

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
        """Decode one answer in every row.

        Args:
          max_tokens: maximum number of tokens per row.
          ends: ids of tokens that end a row's answer; the end token is part of the output.
          sampling: how the rows' tokens are drawn.
          returns: what to yield besides tokens.
          chunked: yield several steps at once; False yields every step as soon as it is computed.
          capacity: J, the maximum number of regions that a query selects; None means all.
          stopped: called after every yield; returns one bool per row, True if the row is done without an end
            token.

        Yields:
          "tokens" int32 [n, rows], -100 after a row's end. With "selection", also, for the query that emitted
          each token: "visual_tokens" int32 [n, rows], "entries" float32 [n, L, rows, 4] (visual, newline,
          context, text keys, a mean over heads), and under routing "selected" bool [n, L, rows, Hs, R].
          With "trace", also "probability" float32 [n, rows] of each token, "attention" and "dense" float32
          [n, L, rows, H, R], and under routing "scores" float32 [n, L, rows, Hs, R]. A row's last token is
          fed to the model by the next call; an end token never is.

        Raises:
          ValueError: nothing was prefilled since a row's answer ended, or a prompt ends in an image.
        """
        if not self._held.all() or self._ended.any():
            raise ValueError(
                "Nothing was prefilled since a row's answer ended, or its prompt ends in an image."
            )
        self.reserve(text=max_tokens)
        self._ends = frozenset(ends)
        state = dataclasses.replace(
            self._state, done=np.arange(self.batch) >= self.rows, index=np.zeros(self.batch, np.int32)
        )
        selection = self._put_selection(self.selection())
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
                    self._put(dealt(self._kinds(self._cache.text_order.shape[1]), 1, self._ranks)),
                    spec=dataclasses.replace(self._spec, capacity=capacity),
                    returns=returns,
                )
            self._cache = dataclasses.replace(cache, **updated)
            found, after = fetch((found, after), self._mesh)
            found |= {name: collected(found[name], -1, self._ranks) for name in _BY_REGION if name in found}
            ran = int(after.write_index - state.write_index)
            state = self._state = after
            generated += ran
            rows = slice(0, self.rows)
            flat = ("tokens", "visual_tokens", "probability")
            out = {name: a[:ran, rows] if name in flat else a[:ran, :, rows] for name, a in found.items()}
            if returns != "tokens" and out["entries"].shape[1] == 1:
                out["entries"] = np.repeat(out["entries"], self._model.config.decoder.depth, axis=1)
            yield out
            if stopped is not None:
                done = state.done.copy()
                done[: self.rows] |= np.asarray(stopped())
                state = self._state = dataclasses.replace(state, done=done)

    def _put_state(self, state: DecodeState) -> DecodeState:
        placed = self._put(dataclasses.replace(state, write_index=None))
        return dataclasses.replace(placed, write_index=np.int32(state.write_index))


_READ = tuple(field.name for field in dataclasses.fields(Streams))
"""Fields of a batch that a model reads, beside its images."""

_BY_REGION = ("selected", "scores", "attention", "dense")
"""Outputs of decoding with a last axis R."""

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
    """The largest order or position of a row, over both streams."""
    values = (arrays[f"visual_{name}"], arrays[f"text_{name}"])
    return max(int(a.max(initial=-1)) for a in values)


def _trim_slots(row: Arrays, slots: int) -> dict[str, np.ndarray]:
    """Cut a row without regions to ``slots`` token slots per region."""
    if len(row["visual_src"]):
        return dict(row)
    return {name: a[:, :slots] if name.startswith(("visual_", "pool_")) else a for name, a in row.items()}


def _sizes(rows: Sequence[Arrays], ranks: int) -> dict[str, int]:
    """The smallest bucket that holds all rows and that ``ranks`` devices can share."""

    def most(name: str, axis: int = 0) -> int:
        return max(row[name].shape[axis] for row in rows)

    return {
        "regions": up(bucket(most("visual_src")), ranks),
        "text": up(prompt_length(max(most("kind"), 1)), ranks),
        "images": bucket(most("images")),
        # Rows without media do not count: their number of slots is only the layout's maximum.
        "slots": max((row["visual_src"].shape[1] for row in rows if len(row["visual_src"])), default=1),
    }


_Scalar = int | Array | np.integer


def _with_token(row: Arrays, token: _Scalar, order: _Scalar, positions: _Scalar) -> dict[str, np.ndarray]:
    """The row with a text token prepended."""
    first: dict[str, object] = {
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


def _as_budgets(selection: Selection) -> Selection:
    """Full layers as budgets of every region: to prefill they are nothing else, so they need no program."""
    if selection.full_layers is None:
        return selection
    full, budget = np.asarray(selection.full_layers).reshape(-1, 1, 1), selection.budget
    if isinstance(budget, Keep):
        fraction = jnp.asarray(np.where(full, 1, budget.fraction), jnp.float32)
        budget = Keep(fraction, jnp.asarray(np.where(full, ALL_REGIONS, budget.most), jnp.int32))
    elif budget is not None:
        budget = jnp.asarray(np.where(full, ALL_REGIONS, budget), jnp.int32)
    return dataclasses.replace(selection, budget=budget, full_layers=None)


def _padded(sampling: SamplingParams, rows: int) -> SamplingParams:
    return jax.tree.map(lambda a: np.pad(a, (0, rows - len(a)), mode="edge"), sampling)
