"""Invariant 8: no option is ignored. One table: field -> an observable that changes with it."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core import routing
from gaze_jax.core.layout import ViewConfig
from gaze_jax.core.routing import Routing
from gaze_jax.core.schedule import Schedule
from gaze_jax.core.selection import Selection
from gaze_jax.corpora.phrases import build_tokenizer
from gaze_jax.data.processor import Processor, process
from gaze_jax.data.sample import Image, Sample, Video
from gaze_jax.families import get_family
from gaze_jax.models import DUMMY, MLLM, DecoderConfig, GazeConfig, MLLMConfig, VisionConfig
from gaze_jax.models.attention import RoutedQueries, region_scores
from pallas_kernels import GazeSpec, dispatch, gaze_prefill
from pallas_kernels.gaze_decode import api as decode_api
from tests.helpers import cases, models
from tests.helpers.streams import PlacedView, Text, batch, sample


def _toy(config):
    grid = config.vision.grid
    parts = [Text(2), PlacedView(grid, grid, newlines=True), Text(2), PlacedView(grid, grid), Text(3)]
    return models.images(1, 2, config=config), batch([sample(parts)])


def _parameters(config):
    """Names, shapes and dtypes of the parameters."""
    images, streams = _toy(config)
    shapes = jax.eval_shape(
        lambda key: MLLM(config).init(key, images, streams, Selection()), jax.random.key(0)
    )
    return str(nn.meta.unbox(shapes))


def _logits(config):
    """Values of the routed forward with the dummy's parameters."""
    images, streams = _toy(config)
    logits, _ = models.forward(config)(models.parameters(DUMMY), images, streams, jnp.int32(2))
    return np.asarray(logits)


def _program(config):
    """The traced program of the routed forward."""
    images, streams = _toy(config)
    traced = jax.make_jaxpr(lambda v: MLLM(config).apply(v, images, streams, Selection(jnp.int32(2))))(
        models.parameters(DUMMY)
    )
    return re.sub(r"0x[0-9a-f]+|\bid=\d+", "", str(traced))


def _cache(config):
    """Shapes and dtypes of a prefilled cache and its logits."""
    images, streams = _toy(config)
    shapes = jax.eval_shape(
        lambda v: MLLM(config).apply(v, images, streams, Selection(), free_slots=2, method="prefill"),
        models.parameters(DUMMY),
    )
    return str(shapes)


def _decode_program(config):
    """The traced program of one cached step after a prefill."""
    images, streams = _toy(config)

    write_index = streams.tokens.shape[1]

    def run(v):
        _, cache, _ = models.prefill(config, 1)(v, images, streams, None)
        token = jnp.zeros(1, jnp.int32)
        return models.decode(config, 2)(v, token, token, cache, models.step([90], write_index), jnp.int32(2))

    return re.sub(r"0x[0-9a-f]+|\bid=\d+", "", str(jax.make_jaxpr(run)(models.parameters(DUMMY))))


def _kernels(config):
    """Whether a kernel for another device runs."""
    try:
        return _program(models.changed(config, gaze={"prefill_implementation": "tpu"}))
    except NotImplementedError as error:
        return str(error)


def _packed(spec):
    """A cache after packing and unpacking."""
    case = cases.decode()
    packed = decode_api.pack(case.k, case.v, spec=spec, implementation="reference")
    return np.asarray(decode_api.unpack(packed, spec=spec, implementation="reference")[0])


def _needs(spec):
    return str(dispatch.needs("tpu", spec))


def _layout(config):
    """The table by which the data pipeline cuts the tower's grid."""
    return config.layout.table


# Tiles, pooling and newlines all have something to change here.
VIEWS = ViewConfig("cambrian_s", canvases=((24, 24), (24, 48)), image_side=5, frame_side=3)
LLAVA = ViewConfig("llava_onevision", canvases=((24, 24), (24, 48)), max_tiles=2)
UNLIMITED = dataclasses.replace(LLAVA, max_tiles=None)


def _streams(views, config=DUMMY):
    """What the processor makes of an image and of a video of four frames: sizes and sums of all fields."""
    vision = dataclasses.replace(config.vision, image_size=24, patch_size=4)
    layout = dataclasses.replace(config, vision=vision, views=views).layout
    processor = Processor(layout, build_tokenizer(), ("a",), get_family(views.style).views, resize=True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 50, 90, 3), dtype=np.uint8)
    made = Sample(0, (pixels[0],), (Image(0), Video(0)), "a", (pixels,))
    return " ".join(f"{name} {a.shape} {a.sum()}" for name, a in sorted(process(processor, made).items()))


def _with_newlines(config):
    return _streams(VIEWS, config)


def _as_configured(config):
    return _streams(config.views, config)


MODEL = {
    "decoder.vocab_size": (_parameters, 65),
    "decoder.width": (_parameters, 40),
    "decoder.depth": (_parameters, 2),
    "decoder.num_heads": (_parameters, 2),
    "decoder.num_kv_heads": (_parameters, 1),
    "decoder.head_dim": (_parameters, 10),
    "decoder.mlp_dim": (_parameters, 50),
    "decoder.rope_theta": (_logits, 100.0),
    "decoder.norm_eps": (_logits, 0.1),
    "decoder.qk_norm": (_parameters, False),
    "decoder.qkv_bias": (_parameters, False),
    "decoder.tie_embeddings": (_parameters, True),
    "vision.image_size": (_parameters, 24),
    "vision.patch_size": (_parameters, 5),
    "vision.width": (_parameters, 27),
    "vision.depth": (_parameters, 1),
    "vision.num_heads": (_logits, 2),
    "vision.mlp_dim": (_parameters, 41),
    "vision.norm_eps": (_logits, 0.1),
    "vision.post_norm": (_parameters, True),
    "gaze.region": (_layout, (2, 3)),
    "gaze.context_tokens": (_parameters, 0),
    "gaze.select_per": (_logits, "kv_head"),
    "gaze.descriptor": (_logits, "minmax"),
    "gaze.visual_scope": (_logits, "view"),
    "gaze.visual_causal": (_logits, False),
    "gaze.prefill_implementation": (_program, "reference"),
    "gaze.decode_implementation": (_decode_program, "reference"),
    "gaze.query_block": (_program, 7),
    "gaze.video_region": (_as_configured, (2, 2, 2)),
    "gaze.newlines": (_with_newlines, "region"),
    "gaze.visual_dtype": (_cache, "int8"),
    "gaze.interpret": (_kernels, True),
    "views": (_as_configured, VIEWS),
    "dtype": (_cache, "bfloat16"),
    "param_dtype": (_parameters, "bfloat16"),
    "remat": (_program, True),
}
# Read by the programs that call the model, which takes top_k as an argument; tested with them.
# remat_policy needs remat: tests/models/test_programs.py.
ELSEWHERE = {"gaze.top_k", "remat_policy"}


def test_the_table_names_every_field_of_the_model():
    """A new field of any config fails this test until the table says what it changes."""
    sections = {"decoder": DecoderConfig, "vision": VisionConfig, "gaze": GazeConfig}
    names = {f.name for f in dataclasses.fields(MLLMConfig)} - set(sections)
    names |= {f"{section}.{f.name}" for section, cls in sections.items() for f in dataclasses.fields(cls)}
    assert names == set(MODEL) | ELSEWHERE


@functools.cache
def _of_the_dummy(observe):
    return observe(DUMMY)


@pytest.mark.parametrize("name", MODEL)
def test_model_field(name):
    """The observable differs between the dummy and the dummy with one field changed."""
    observe, value = MODEL[name]
    section, _, field = name.rpartition(".")
    config = models.changed(DUMMY, **({section: {field: value}} if section else {field: value}))
    assert config != DUMMY
    before, after = _of_the_dummy(observe), observe(config)
    if isinstance(before, np.ndarray):
        assert np.isfinite(after).all()
        assert before.shape != after.shape or np.abs(after - before).max() > 1e-3
    else:
        assert after != before


def _op(spec):
    """Values of the prefill op; with select_per "kv_head" the first head of each group selects for it."""
    case = cases.prefill([sample([Text(1), PlacedView(3, 3), Text(2)])])
    selected = case.selected if spec.select_per == "head" else case.selected[:, :, ::2]
    run = jax.jit(
        lambda c, s: gaze_prefill(*c.arrays(), c.queries, c.places, s, spec=spec, implementation="xla")
    )
    return np.asarray(run(case, selected))


def _op_program(spec, side=3):
    case = cases.prefill([sample([Text(1), PlacedView(side, side), Text(2)])])
    return str(
        jax.make_jaxpr(
            lambda c: gaze_prefill(
                *c.arrays(), c.queries, c.places, c.selected, spec=spec, implementation="xla"
            )
        )(case)
    )


def _scores(route):
    """Region scores under a strategy."""
    rng = np.random.default_rng(0)
    q, keys = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 3, 4, 8), (1, 2, 5, 8)))
    order, first = jnp.arange(3, dtype=jnp.int32)[None] + 20, jnp.arange(5, dtype=jnp.int32)[None]
    routed = RoutedQueries(
        visible=jnp.ones((1, 3, 5), bool),
        count=jnp.full((1, 3), 5, jnp.int32),
        order=order,
        sample=jnp.zeros((1, 1), jnp.int32),
        first=first,
        permutation=jnp.arange(5, dtype=jnp.int32)[None],
    )
    scores, _ = region_scores(
        q,
        2,
        routed,
        Selection(jnp.int32(2)),
        gaze=DUMMY.gaze,
        strategy=route,
        layer=jnp.int32(0),
        described=lambda q: routing.descriptor_scores(q, keys, select_per="head"),
        oracle=lambda: jnp.zeros((1, 3, 4, 5)),
    )
    return np.asarray(scores)


def _keep(schedule):
    return np.asarray(schedule.keep(0.3, 0.1))


OTHERS = {
    "ViewConfig.style": (_streams, UNLIMITED, dataclasses.replace(UNLIMITED, style="cambrian_s")),
    "ViewConfig.canvases": (_streams, VIEWS, dataclasses.replace(VIEWS, canvases=((48, 24),))),
    "ViewConfig.max_tiles": (_streams, LLAVA, dataclasses.replace(LLAVA, max_tiles=1)),
    "ViewConfig.image_side": (_streams, VIEWS, dataclasses.replace(VIEWS, image_side=4)),
    "ViewConfig.frame_side": (_streams, VIEWS, dataclasses.replace(VIEWS, frame_side=2)),
    "GazeSpec.scale": (_op, GazeSpec(0.3), GazeSpec(0.9)),
    "GazeSpec.select_per": (_op, GazeSpec(0.3), GazeSpec(0.3, select_per="kv_head")),
    "GazeSpec.query_block": (_op_program, GazeSpec(0.3), GazeSpec(0.3, query_block=3)),
    # More keys than a chunk has.
    "GazeSpec.local": (functools.partial(_op_program, side=23), GazeSpec(0.3), GazeSpec(0.3, local=True)),
    "GazeSpec.visual_dtype": (_packed, GazeSpec(0.3), GazeSpec(0.3, visual_dtype="int8")),
    "GazeSpec.interpret": (_needs, GazeSpec(0.3), GazeSpec(0.3, interpret=True)),
    "Routing.strategy": (_scores, Routing(), Routing("random")),
    "Routing.seed": (_scores, Routing("random"), Routing("random", seed=1)),
    "Schedule.dense_until": (_keep, Schedule(), Schedule(dense_until=0.0)),
    "Schedule.sparse_from": (_keep, Schedule(), Schedule(sparse_from=0.9)),
}


def test_the_table_names_every_field_of_the_small_configs():
    """ViewConfig, GazeSpec, Routing and Schedule, complete by ``dataclasses.fields``."""
    classes = (ViewConfig, GazeSpec, Routing, Schedule)
    assert {f"{c.__name__}.{f.name}" for c in classes for f in dataclasses.fields(c)} == set(OTHERS)


@pytest.mark.parametrize("name", OTHERS)
def test_small_config_field(name):
    """Two values that differ in one field give another result."""
    observe, base, other = OTHERS[name]
    field = name.partition(".")[2]
    assert dataclasses.replace(other, **{field: getattr(base, field)}) == base
    before, after = observe(base), observe(other)
    if isinstance(before, str):
        assert before != after
    else:
        assert np.abs(before - after).max() > 1e-3
