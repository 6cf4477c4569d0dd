"""What the compiled programs do besides their values: dtypes, rematerialisation, memory, refusals."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from gaze_jax.core.routing import Routing
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import POOL_FIELDS
from gaze_jax.models import DUMMY, MLLM
from tests.helpers import models
from tests.helpers.streams import batch

BF16 = models.changed(DUMMY, dtype="bfloat16")


@pytest.mark.parametrize("select_per", ["head", pytest.param("kv_head", marks=pytest.mark.long)])
def test_bf16_runs_near_float32(select_per):
    """bfloat16 activations over float32 parameters: float32 logits, near, and most selections the same."""
    images, streams = models.toy()
    variables, top_k = models.parameters(DUMMY), jnp.int32(3)
    narrow, wide = (models.changed(c, gaze={"select_per": select_per}) for c in (BF16, DUMMY))
    got, out = models.forward(narrow, collect=True)(variables, images, streams, top_k)
    expected, exact = models.forward(wide, collect=True)(variables, images, streams, top_k)
    assert got.dtype == jnp.float32 and out["scores"].dtype == jnp.float32
    both = np.asarray(out["selected"]) & np.asarray(exact["selected"])
    overlap = both.sum() / np.asarray(exact["selected"]).sum()
    assert overlap > 0.8, f"overlap of the selections {overlap:.3f}"
    # Flipped selections move single positions a lot; the typical one stays within bfloat16's rounding.
    difference = np.abs(np.asarray(got) - np.asarray(expected)).max(-1) / np.abs(np.asarray(expected)).max()
    assert np.median(difference) < 0.05


def test_bf16_prefill_and_decode():
    """The cache is bfloat16, descriptors too; a decoded token equals teacher forcing within bfloat16."""
    variables, row = models.parameters(DUMMY), models.two_images(0)
    images, streams = models.images(1, 2), batch([row])
    shorter = dataclasses.replace(
        streams, kind=streams.kind.at[:, -1].set(0), text_segment=streams.text_segment.at[:, -1].set(-1)
    )
    full, _ = models.forward(BF16)(variables, images, streams, jnp.int32(18))
    logits, cache, _ = models.prefill(BF16, 1)(variables, images, shorter, jnp.int32(18))
    kinds = {a.dtype for a in (*jax.tree.leaves(cache.visual), cache.text_k, cache.text_v, cache.descriptors)}
    assert kinds == {jnp.dtype("bfloat16")} and logits.dtype == jnp.float32
    write_index = streams.tokens.shape[1]
    order = streams.text_order[:, -1]
    got, _, _ = models.decode(BF16, None)(
        variables, streams.tokens[:, -1], order, cache, models.step(order, write_index), jnp.int32(18)
    )
    models.close(got, np.asarray(full)[:, -1], 0.05)


def test_bf16_parameters():
    """param_dtype="bfloat16" runs with strict promotion and differs from float32 by rounding only."""
    config = models.changed(BF16, param_dtype="bfloat16")
    variables = jax.tree.map(lambda a: a.astype(jnp.bfloat16), models.parameters(DUMMY))
    images, streams = models.toy()
    got, _ = models.forward(config)(variables, images, streams, None)
    expected, _ = models.forward(DUMMY)(models.parameters(DUMMY), images, streams, None)
    assert np.isfinite(got).all()
    models.close(got, expected, 0.1)


def test_remat_changes_memory_and_no_value():
    """Loss and gradients of a rematerialised model equal the plain one's."""
    images, streams = models.toy()
    variables, top_k = models.parameters(DUMMY), jnp.int32(3)
    loss, expected = models.gradients(DUMMY)(variables, images, streams, top_k)
    products = set()
    for policy in ("nothing", "dots"):
        config = models.changed(DUMMY, remat=True, remat_policy=policy)
        again, got = models.gradients(config)(variables, images, streams, top_k)
        assert float(again) == pytest.approx(float(loss), rel=1e-6)
        for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            models.close(mine, theirs, 1e-5)
        jaxpr = jax.make_jaxpr(models.gradients(config))(variables, images, streams, top_k)
        products.add(str(jaxpr).count("dot_general"))
    assert len(products) == 2  # "dots" computes fewer again


def test_a_policy_without_remat_is_refused():
    with pytest.raises(ValueError, match="remat_policy='dots' has no effect without remat=True"):
        models.changed(DUMMY, remat_policy="dots")


def _abstract_decode(select_per):
    """The compiled routed decode step over 300 regions of 16 slots and 8 text-stream slots."""
    config = models.changed(DUMMY, gaze={"select_per": select_per})
    regions, slots, text = 300, 16, 7

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    streams = batch([models.two_images(0)])
    fields = {
        f.name: array(1, text) if getattr(streams, f.name).ndim == 2 else array(1, regions, slots)
        for f in dataclasses.fields(streams)
        if f.name not in POOL_FIELDS
    }
    fields["region_segment"] = array(1, regions)
    variables = models.parameters(DUMMY)
    model = MLLM(config)
    _, cache, _ = jax.eval_shape(
        lambda v, i, s: model.apply(v, i, s, Selection(), free_slots=1, method="prefill"),
        variables,
        models.images(1, 1),
        streams.__class__(**fields),
    )

    def step(variables, tokens, positions, cache, step, top_k):
        return model.apply(
            variables,
            tokens,
            positions,
            cache,
            step,
            Selection(top_k),
            SelectionSpec(capacity=4),
            method="decode",
        )

    at = models.step([9], 7)
    args = (variables, array(1), array(1), cache, at, jnp.int32(4))
    return jax.jit(step, donate_argnums=3).lower(*args).compile(), cache


@pytest.mark.parametrize("select_per", ["head", "kv_head"])
def test_a_routed_decode_step_never_copies_a_layers_cache(select_per):
    """No instruction but parameters, tuples and loops has the size of one layer's visual keys."""
    compiled, cache = _abstract_decode(select_per)
    one_layer = jax.tree.leaves(cache.visual)[0].size
    shape = re.compile(r"= \(?(?:f32|bf16|f16|s32|u32|pred)\[([\d,]*)\]\S* ([\w-]+)\(")
    large = {}
    for line in compiled.as_text().splitlines():
        if found := shape.search(line):
            sizes, kind = found.groups()
            if math.prod(int(n) for n in sizes.split(",") if n) >= one_layer:
                large.setdefault(kind, line.strip())
    assert "parameter" in large, "the walk sees the cache itself"
    assert set(large) <= {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "conditional"}, large
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * one_layer / 2


def test_refusals_of_the_model(monkeypatch):
    """What would be ignored or cut off silently raises one sentence instead."""
    images, streams = models.toy()
    variables = models.parameters(DUMMY)
    forced = jnp.zeros((1, 1, 1, 1, 2), jnp.int32)

    def run(top_k, route=Routing(), **options):
        def call(v):
            return MLLM(DUMMY).apply(v, images, streams, Selection(top_k, **options), SelectionSpec(route))

        return jax.eval_shape(call, variables)

    with pytest.raises(ValueError, match=r"forced regions and Routing\(.*\) go together"):
        run(2, forced=forced)
    with pytest.raises(ValueError, match=r"forced regions and Routing\(.*\) go together"):
        run(2, Routing("forced"))
    with pytest.raises(ValueError, match="Forced regions need a budget"):
        run(None, Routing("forced"), forced=forced)
    with pytest.raises(ValueError, match="Forced regions need a budget"):
        run(None, forced=forced)
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # outside of the tests nothing checks types
    with pytest.raises(TypeError, match="must be integers, got float32"):
        run(0.5)
    with pytest.raises(TypeError, match="must be integers"):
        run(jnp.float32(2))
    _, cache, _ = jax.eval_shape(
        lambda v: MLLM(DUMMY).apply(v, images, streams, Selection(), free_slots=1, method="prefill"),
        variables,
    )
    order = jnp.array([50, 50])
    with pytest.raises(ValueError, match="capacity J=0 must be at least 1"):
        jax.eval_shape(
            lambda v, c: MLLM(DUMMY).apply(
                v,
                order,
                order,
                c,
                models.step(order, 20),
                Selection(2),
                SelectionSpec(capacity=0),
                method="decode",
            ),
            variables,
            cache,
        )
