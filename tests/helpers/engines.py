"""Engines of small models, the rows they prefill, and the logits of the next token."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from gaze_jax.core.selection import Selection
from gaze_jax.core.streams import Streams
from gaze_jax.corpora.phrases import FAMILIES, build_tokenizer
from gaze_jax.data.pipeline import stack
from gaze_jax.data.processor import Processor, process_with_views
from gaze_jax.data.sample import Image, Sample, Text
from gaze_jax.families import get_family
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.gaze_options import GazeOptions, join, selection_capacity
from gaze_jax.infer.sampling import SamplingParams
from gaze_jax.models import MLLM, DecodePosition
from tests.helpers.experiments import tiny_experiment
from tests.helpers.models import parameters

MODEL = tiny_experiment().model
TOKENIZER = build_tokenizer()
IMAGES = tuple(np.random.default_rng(0).integers(256, size=(4, 20, 20, 3), dtype=np.uint8))


def row(*parts, config=MODEL, order=0, videos=()):
    """Arrays of images, by number, of texts, and of parts as they are."""
    kinds = {int: Image, str: Text}
    parts = tuple(kinds[type(part)](part) if type(part) in kinds else part for part in parts)
    processor = Processor(
        config.layout, TOKENIZER, FAMILIES, get_family(config.views.style).views, resize=True
    )
    sample = Sample(0, IMAGES, parts, FAMILIES[0], tuple(videos))
    return process_with_views(processor, sample, order=order)[0]


def make_engine(*rows, config=MODEL, params=None, budgets=2, gaze=None, free_slots=12, views=(), mesh=None):
    """An engine whose rows select ``budgets`` regions each: a number, a fraction, a list; None is dense."""
    budgets = [budgets] * len(rows) if isinstance(budgets, int | float) else budgets
    gaze_options = [GazeOptions() if gaze is None else gaze] * len(rows)
    depth = config.decoder.depth
    made = Engine(
        MLLM(config),
        parameters(config)["params"] if params is None else params,
        rows,
        free_slots=free_slots,
        selection=lambda engine: join(engine, gaze_options, budgets, [views] * len(rows), depth),
        mesh=mesh,
    )
    made.budgets = budgets
    return made


def decode(engine, length, *, ends=(), temperature=0.0, seeds=None, **options):
    """What :meth:`Engine.decode` yields, joined over steps."""
    seeds = list(range(engine.rows)) if seeds is None else seeds
    sampling = SamplingParams.of([temperature] * engine.rows, seed=seeds)
    capacity = selection_capacity(engine.budgets, engine.capacity)
    found = list(engine.decode(length, ends=ends, sampling=sampling, capacity=capacity, **options))
    return {name: np.concatenate([out[name] for out in found]) for name in found[0]}


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, cache, state, selection):
    step = DecodePosition(state.order, state.write_index, jnp.zeros_like(state.order))
    return model.apply(
        {"params": params},
        state.token,
        state.positions,
        cache,
        step,
        selection,
        method="decode",
    )[0]


def logits(engine):
    """float32 [rows, V] logits of the next token; the session does not change."""
    selection = engine.selection()
    return np.asarray(_logits(engine._model, engine._params, engine._cache, engine._state, selection))[
        : engine.rows
    ]


def at_once(config, params, arrays, top_k):
    """float32 [V] at the last token of a row, in one pass over everything."""
    batch = {name: jnp.asarray(value) for name, value in stack([arrays]).items()}
    budget = None if top_k is None else jnp.asarray(top_k, jnp.int32)
    images = batch["images"] if batch["images"].shape[1] else None
    found = _one_pass(MLLM(config), params, images, Streams.from_batch(batch), budget)
    return np.asarray(found[0, len(arrays["tokens"]) - 1])


@functools.partial(jax.jit, static_argnums=0)
def _one_pass(model, params, images, streams, top_k):
    return model.apply({"params": params}, images, streams, Selection(top_k))[0]


def generated_row(ids, order):
    """Arrays of the generated tokens, whatever text they decode to."""
    count = len(ids)
    places = order + np.arange(count, dtype=np.int32)
    blank = row("a")
    repeated = {name: np.repeat(a[:1], count, axis=0) for name, a in blank.items() if len(np.shape(a))}
    visual = {name: a for name, a in blank.items() if name.startswith(("visual", "pool", "region", "images"))}
    generated = {"tokens": np.asarray(ids, np.int32), "text_order": places, "text_positions": places}
    return blank | repeated | visual | generated


def joined(*rows):
    """Rows that follow each other, their orders as they are, as one."""
    out, tokens, views = rows[0], 0, 0
    for before, after in itertools.pairwise(rows):
        tokens += int((before["visual_src"] >= 0).sum())
        views += int(before["visual_view"].max(initial=-1)) + 1
        shifts = {"visual_src": tokens, "visual_view": views, "text_view": views}
        moved = {
            name: np.where(after[name] >= 0, after[name] + by, after[name]) for name, by in shifts.items()
        }
        out = {
            name: np.concatenate([a, (after | moved)[name]]) if np.ndim(a) else a for name, a in out.items()
        }
    return out
