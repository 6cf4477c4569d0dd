"""Evaluation during training: loss and accuracy on held-out data, of Gaze and of dense attention.

Both read the same parameters and the same batches. Gaze is evaluated with the budget that training ends with,
whatever the schedule's is at the moment, since that is how the model will be asked.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from gaze_jax.core.budget import budget_from_keep
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import IGNORE, Streams
from gaze_jax.core.types import NamedArrays
from gaze_jax.data.dealing import collected
from gaze_jax.data.padding import pad_to
from gaze_jax.data.placement import Arrays, PlacedView
from gaze_jax.data.processor import process_with_views
from gaze_jax.data.sample import Corners, Sample
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.models import MLLM
from gaze_jax.models.attention import make_metadata
from gaze_jax.parallel import rules
from gaze_jax.train import lora
from gaze_jax.train.config import Experiment
from gaze_jax.train.losses import ROW_LOSSES, Batch, Metrics, count_supervised, next_token_loss
from gaze_jax.train.pipeline import HeldOut
from gaze_jax.train.step import keep_fraction, put_batch

Array = jax.Array

FILE = "evaluation.jsonl"
FOLDER = "evaluation"
"""Folder of a run with a picture per evaluation."""


@dataclasses.dataclass(frozen=True, eq=False)
class SampleTrace:
    """Which regions one held-out sample's queries selected, to draw.

    Attributes:
      sample: the sample.
      views: where its images and frames are.
      pieces: T supervised tokens as text, in the order of the sequence.
      boxes: what each of them refers to, in pixels of its image; None if nothing is known.
      selected: bool [T, L, Hs, R], what the query that predicts each of them selected.
    """

    sample: Sample
    views: tuple[PlacedView, ...]
    pieces: tuple[str, ...]
    boxes: tuple[Corners | None, ...]
    selected: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluated:
    """One evaluation, for whoever draws it.

    Attributes:
      workdir: the run's folder.
      step: steps done.
      row: of evaluation.jsonl: "step", "tokens" (supervised ones) and, for "gaze" (if the model is not dense)
        and "dense", "loss", "accuracy", "top_k" and "visual_entries", means over these tokens.
      trace: None if the model is dense or the sample has no image.
    """

    workdir: Path
    step: int
    row: Mapping[str, Any]
    trace: SampleTrace | None


OnEvaluation = Callable[[Evaluated], None]


def measure_function(experiment: Experiment) -> Callable[[PyTree, Batch], dict[str, Any]]:
    """Make (params, batch) -> {"tokens": int32 scalar, "gaze" and "dense": sums over supervised tokens}."""

    def measure(params: PyTree, batch: Batch) -> dict[str, Any]:
        params = lora.joined(params, experiment.lora)
        one = jnp.ones((), jnp.int32)

        def sums(keep: Array | None) -> Metrics:
            found = next_token_loss(params, batch, keep, experiment.model, one)[1]
            return {name: value for name, value in found.items() if name != ROW_LOSSES}

        final = keep_fraction(experiment, jnp.asarray(experiment.steps, jnp.int32))
        found: dict[str, Any] = {} if final is None else {"gaze": sums(final)}
        return found | {"dense": sums(None), "tokens": count_supervised(batch)}

    return measure


def trace_function(experiment: Experiment, at: np.ndarray) -> Callable[[PyTree, Batch], Array]:
    """Make (params, batch) -> bool [L, T, Hs, R]: what queries ``at`` int64 [T] of the first row selected."""

    def trace(params: PyTree, batch: Batch) -> Array:
        streams, sample = Streams.from_batch(batch), batch["sample_id"]
        final = keep_fraction(experiment, jnp.asarray(experiment.steps, jnp.int32))
        assert final is not None, "a dense model selects nothing"
        visible = make_metadata(streams, experiment.model.gaze, sample).routed.count
        passed = MLLM(experiment.model).apply(
            {"params": lora.joined(params, experiment.lora)},
            batch["images"],
            streams,
            Selection(budget_from_keep(final, visible)),
            SelectionSpec(return_trace=True),
            sample_id=sample,
            method="hidden",
        )
        _, out = cast(tuple[Array, NamedArrays], passed)
        return out["selected"][:, 0, at]

    return trace


def _compiled(function: Callable[..., Any], experiment: Experiment, mesh: Mesh, batch: Batch) -> Any:
    params = lora.abstract_params(experiment.model, experiment.lora, mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.flax_rules()):
        return jax.jit(function, out_shardings=rules.replicated(mesh)).lower(params, batch).compile()


class Evaluator:
    """Evaluates parameters on the held-out part of a run's data; all processes call it together."""

    def __init__(self, experiment: Experiment, mesh: Mesh, held_out: HeldOut, tokenizer: Tokenizer):
        """Compile what every evaluation runs, which reads a batch and the sample that is drawn."""
        self._mesh, self._held_out = mesh, held_out
        with contextlib.closing(held_out.batches()) as batches:
            batch = put_batch(next(batches), mesh)
        self._measure = _compiled(measure_function(experiment), experiment, mesh, batch)
        self._trace: Any = None
        sample = held_out.sample()
        arrays, views = process_with_views(held_out.processor, sample)
        at = np.flatnonzero(arrays["targets"] != IGNORE)
        if experiment.model.gaze.top_k is None or not views or not len(at):
            return
        at = at[np.argsort(arrays["text_order"][at], kind="stable")]
        # The devices that share the rows of a batch get one each, all the same.
        devices = math.prod(mesh.shape[axis] for axis in rules.RULES["batch"])
        row = pad_to(arrays, **dataclasses.asdict(held_out.bucket))
        self._row = put_batch(_repeated(row, devices // rules.rows_of_process(mesh)[1]), mesh)
        _, self._ranks = rules.split_sizes(mesh, "tokens")
        slots = self._row["targets"].shape[1]
        stored = collected(np.arange(slots), 0, self._ranks)[at]
        self._trace = _compiled(trace_function(experiment, stored), experiment, mesh, self._row)
        pieces = tuple(tokenizer.decode([token]) for token in arrays["targets"][at].tolist())
        self._regions = len(arrays["region_segment"])
        boxes = tuple(tuple(box) if box[0] >= 0 else None for box in arrays["target_box"][at].tolist())
        self._shown = sample, views, pieces, boxes

    def measure(self, params: PyTree) -> dict[str, Any]:
        """Means over the supervised tokens of all held-out data; see :attr:`Evaluated.row`."""
        parts = []
        with contextlib.closing(self._held_out.batches()) as batches:
            for _ in range(self._held_out.count):
                parts.append(self._measure(params, put_batch(next(batches), self._mesh)))
        found = jax.device_get(parts)
        tokens = sum(int(part["tokens"]) for part in found)

        def mean(way: str, name: str) -> float:
            return math.fsum(float(part[way][name]) for part in found) / max(tokens, 1)

        ways = [way for way in ("gaze", "dense") if way in found[0]]
        return {"tokens": tokens} | {way: {name: mean(way, name) for name in found[0][way]} for way in ways}

    def trace(self, params: PyTree) -> SampleTrace | None:
        """Which regions the queries of the sample that is drawn select."""
        if self._trace is None:
            return None
        selected = np.asarray(self._trace(params, self._row))
        by_token = np.moveaxis(collected(selected, -1, self._ranks), 0, 1)
        return SampleTrace(*self._shown, by_token[..., : self._regions])


def _repeated(row: Arrays, times: int) -> Arrays:
    return {name: np.repeat(values[None], times, axis=0) for name, values in row.items()}


def line(step: int, row: Mapping[str, Any]) -> str:
    """The line that a run prints of an evaluation."""
    ways = []
    if "gaze" in row:
        gaze = row["gaze"]
        ways.append(
            f"Gaze loss {gaze['loss']:.4f}  accuracy {gaze['accuracy']:.3f}  top_k {gaze['top_k']:.1f}"
        )
    ways.append(f"dense loss {row['dense']['loss']:.4f}  accuracy {row['dense']['accuracy']:.3f}")
    return f"step {step}, held out ({row['tokens']:,} tokens):  {';  '.join(ways)}"
