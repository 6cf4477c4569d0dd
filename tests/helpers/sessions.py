"""Sessions of small models, the rows they read, and the logits of what comes next."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from gaze_jax.core.streams import Streams
from gaze_jax.data.phrases import FAMILIES, build_tokenizer
from gaze_jax.data.pipeline import stack
from gaze_jax.data.processor import Processor, process_with_units
from gaze_jax.data.sample import Image, Sample, Text
from gaze_jax.infer.look import Looking, join, most
from gaze_jax.infer.sampling import Sampling
from gaze_jax.infer.session import Session
from gaze_jax.models import MLLM, Step
from tests.helpers.experiments import tiny_experiment
from tests.helpers.models import parameters

MODEL = tiny_experiment().model
TOKENIZER = build_tokenizer()
IMAGES = tuple(np.random.default_rng(0).integers(256, size=(4, 20, 20, 3), dtype=np.uint8))


def row(*parts, config=MODEL, order=0, videos=()):
    """Arrays of images, by number, of texts, and of parts as they are."""
    kinds = {int: Image, str: Text}
    parts = tuple(kinds[type(part)](part) if type(part) in kinds else part for part in parts)
    processor = Processor(config.layout, TOKENIZER, FAMILIES, resize=True)
    sample = Sample(0, IMAGES, parts, FAMILIES[0], tuple(videos))
    return process_with_units(processor, sample, order=order)[0]


def session(*rows, config=MODEL, params=None, budgets=2, looking=None, room=12, units=(), mesh=None):
    """A session of rows that select ``budgets`` regions each: a number, a fraction, a list; None is dense."""
    budgets = [budgets] * len(rows) if isinstance(budgets, int | float) else budgets
    lookings = [Looking() if looking is None else looking] * len(rows)
    depth = config.decoder.depth
    made = Session(
        MLLM(config),
        parameters(config)["params"] if params is None else params,
        rows,
        room=room,
        look=lambda session: join(session, lookings, budgets, [units] * len(rows), depth),
        mesh=mesh,
    )
    made.budgets = budgets
    return made


def say(session, length, *, ends=(), temperature=0.0, seeds=None, **options):
    """What :meth:`Session.say` yields, joined over steps."""
    seeds = list(range(session.rows)) if seeds is None else seeds
    sampling = Sampling.of([temperature] * session.rows, seed=seeds)
    budget = most(session.budgets, session.capacity)
    found = list(session.say(length, ends=ends, sampling=sampling, budget=budget, **options))
    return {name: np.concatenate([out[name] for out in found]) for name in found[0]}


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, cache, turn, look):
    step = Step(turn.order, turn.slot, jnp.zeros_like(turn.order))
    return model.apply(
        {"params": params},
        turn.token,
        turn.pos,
        cache,
        step,
        top_k=look.top_k,
        bias=look.bias,
        method="decode",
    )[0]


def logits(session):
    """float32 [rows, V] of what would be said next; the session stays as it is."""
    look = session._look(session)
    return np.asarray(_logits(session._model, session._params, session._cache, session._turn, look))[
        : session.rows
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
    return model.apply({"params": params}, images, streams, top_k=top_k)[0]


def said_row(ids, order):
    """Arrays of tokens that were said, whatever text they make."""
    count = len(ids)
    places = order + np.arange(count, dtype=np.int32)
    blank = row("a")
    repeated = {name: np.repeat(a[:1], count, axis=0) for name, a in blank.items() if len(np.shape(a))}
    visual = {name: a for name, a in blank.items() if name.startswith(("visual", "region", "images"))}
    said = {"tokens": np.asarray(ids, np.int32), "dense_order": places, "dense_pos": places}
    return blank | repeated | visual | said


def joined(*rows):
    """Rows that follow each other, their orders as they are, as one."""
    out, tokens, units = rows[0], 0, 0
    for before, after in itertools.pairwise(rows):
        tokens += int((before["visual_src"] >= 0).sum())
        units += int(before["visual_unit"].max(initial=-1)) + 1
        shifts = {"visual_src": tokens, "visual_unit": units, "dense_unit": units}
        moved = {
            name: np.where(after[name] >= 0, after[name] + by, after[name]) for name, by in shifts.items()
        }
        out = {
            name: np.concatenate([a, (after | moved)[name]]) if np.ndim(a) else a for name, a in out.items()
        }
    return out
