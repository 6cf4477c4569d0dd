"""A model and its teacher in one scan: both are what they are alone, and the divergence is what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core.routing import Routing
from gaze_jax.core.selection import Selection
from gaze_jax.models import DUMMY
from gaze_jax.models.attention import make_metadata
from gaze_jax.models.paired import Side, paired_features, region_kl
from tests.helpers import models
from tests.helpers.streams import Newline, PlacedView, Text, batch, sample

# The teacher's own layout of attention is not the student's.
TEACHER = models.changed(DUMMY, gaze={"context_tokens": 0, "top_k": None, "visual_causal": False})
TOP_K = 3


def rows(context):
    """Two rows with two images each; text before, between and after them."""
    grid = PlacedView(models.GRID, models.GRID)
    newlines = PlacedView(models.GRID, models.GRID, newlines=True)
    parts = [[Text(2), grid, Text(3), newlines, Newline(), Text(4)], [Text(1), grid, Text(1), grid, Text(5)]]
    return batch([sample(each, seed=seed, context=context) for seed, each in enumerate(parts)])


@functools.cache
def run(student, top_k):
    """What a student with random parameters and another teacher say of :func:`rows`."""

    def call(params, taught, streams):
        return paired_features(
            Side(student, params),
            Side(TEACHER, taught),
            models.images(2, 2),
            streams,
            Selection(top_k),
            shared_tower=False,
        )

    params, taught = sides(student)
    return jax.jit(call)(params, taught, rows(student.gaze.context_tokens))


def sides(student):
    return models.parameters(student)["params"], models.parameters(TEACHER, seed=1)["params"]


def test_both_are_what_they_are_alone():
    """The student as it is, and the teacher dense on the sequence that never had context tokens."""
    student = DUMMY
    both, streams = run(student, TOP_K), rows(2)
    logits, trace = models.forward(student, collect=True)(
        models.parameters(student), models.images(2, 2), streams, TOP_K
    )
    models.close(jnp.einsum("BSM,VM->BSV", both.hidden, both.head), logits)
    sizes = np.asarray((streams.visual_src >= 0).sum(-1))
    entries = np.einsum("LBSHR,BR->BS", np.asarray(trace["selected"]), sizes) / (
        student.decoder.depth * trace["selected"].shape[3]
    )
    models.close(both.entries, entries)

    plain = rows(0)
    expected, _ = models.forward(TEACHER)(
        models.parameters(TEACHER, seed=1), models.images(2, 2), plain, None
    )
    found = jnp.einsum("BSM,VM->BSV", both.teacher_hidden, both.teacher_head)
    kinds, plain_kinds = np.asarray(streams.kind), np.asarray(plain.kind)
    for row in range(2):
        kept = (kinds[row] != 3) & (kinds[row] > 0)
        models.close(np.asarray(found)[row][kept], np.asarray(expected)[row][plain_kinds[row] > 0])


@pytest.mark.parametrize("select_per", [pytest.param("head", marks=pytest.mark.long), "kv_head"])
def test_the_divergence_is_between_attention_to_the_regions_and_their_scores(select_per):
    """Against the scores of a trace, and the masses by which strategy "oracle" selects."""
    student = models.changed(DUMMY, gaze={"select_per": select_per})
    both, streams, plain = run(student, TOP_K), rows(2), rows(0)
    _, trace = models.forward(student, collect=True)(
        models.parameters(student), models.images(2, 2), streams, TOP_K
    )
    oracle = models.changed(TEACHER, gaze={"select_per": select_per})
    _, masses = models.forward(oracle, Routing("oracle"), collect=True)(
        models.parameters(TEACHER, seed=1), models.images(2, 2), plain, streams.visual_src.shape[1]
    )
    visible = np.asarray(jax.jit(lambda s: make_metadata(s, student.gaze).routed.visible)(streams))
    kinds, plain_kinds = np.asarray(streams.kind), np.asarray(plain.kind)
    divergence = np.asarray(both.region_kl)
    heads_per_selector = student.decoder.num_heads // trace["scores"].shape[3]
    logits = np.asarray(trace["scores"], np.float64) / (student.decoder.head_dim**0.5 * heads_per_selector)
    for row in range(2):
        places = np.flatnonzero((kinds[row] != 3) & (kinds[row] > 0))
        for mine, theirs in zip(places, np.flatnonzero(plain_kinds[row] > 0), strict=True):
            seen = visible[row, mine]
            expected = 0.0
            if seen.any():
                target = np.exp(np.asarray(masses["scores"], np.float64)[:, row, theirs][..., seen])
                target /= target.sum(-1, keepdims=True)
                found = np.exp(logits[:, row, mine][..., seen])
                found /= found.sum(-1, keepdims=True)
                expected = (target * np.log(target / found)).sum(-1).mean()
                assert expected > 1e-3
            np.testing.assert_allclose(divergence[row, mine], expected, rtol=1e-3, atol=1e-6)


def test_only_the_student_has_a_gradient_and_scores_have_one():
    """Selection has none, so that the second loss alone moves what is selected."""
    params, taught = sides(DUMMY)

    def loss(params, taught):
        both = paired_features(
            Side(models.changed(DUMMY, remat=True), params),
            Side(TEACHER, taught),
            models.images(2, 2),
            rows(2),
            Selection(TOP_K),
            shared_tower=False,
        )
        return jnp.sum(both.region_kl)

    mine, theirs = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, taught)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(theirs))
    attention = mine["decoder"]["layers"]["self_attn"]
    for name in ("q_proj", "k_proj"):
        largest = np.abs(attention[name]["kernel"]).max(axis=(1, 2))
        assert (largest > 1e-4).all() and np.isfinite(largest).all()
    assert not np.any(mine["decoder"]["lm_head"]["kernel"])


@pytest.mark.parametrize(("shared", "towers"), [(False, 2), (True, 1)])
def test_a_shared_tower_runs_once(shared, towers):
    """The teacher's tower is then the student's: counted by the convolutions that cut images into patches."""
    params, taught = sides(DUMMY)

    def call():
        return paired_features(
            Side(DUMMY, params),
            Side(TEACHER, taught),
            models.images(2, 2),
            rows(2),
            Selection(TOP_K),
            shared_tower=shared,
        )

    assert str(jax.make_jaxpr(call)()).count("conv_general_dilated[") == towers


def test_a_dense_student_selects_nothing():
    student = models.changed(DUMMY, gaze={"top_k": None})
    params, taught = sides(student)
    both = jax.eval_shape(
        lambda: paired_features(
            Side(student, params),
            Side(TEACHER, taught),
            models.images(2, 2),
            rows(2),
            Selection(),
            shared_tower=False,
        )
    )
    assert both.entries is None and both.region_kl is None and both.hidden.shape == (2, 19, 32)


def test_what_is_not_seen_counts_neither_in_the_divergence_nor_in_its_gradient():
    """NaN scores of regions that a query may not select, and a query that may select none."""
    rng = np.random.default_rng(0)
    logits, mass = (rng.normal(size=(1, 2, 2, 4)).astype(np.float32) for _ in range(2))
    visible = np.array([[[True, True, False, False], [False] * 4]])
    logits[..., 3], mass[..., 2:] = np.nan, -np.inf
    mine = jnp.asarray(mass), jnp.asarray(visible)
    kl = jax.jit(jax.value_and_grad(lambda x: jnp.sum(region_kl(x, *mine))))
    found, gradient = kl(jnp.asarray(logits))
    p, q = (np.exp(a[0, 0, :, :2]) / np.exp(a[0, 0, :, :2]).sum(-1, keepdims=True) for a in (mass, logits))
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(-1).mean(), rtol=1e-5)
    assert np.isfinite(gradient).all() and not np.any(gradient[..., 2:]) and not np.any(gradient[0, 1])
    np.testing.assert_allclose(gradient[0, 0, :, :2], (q - p) / 2, rtol=1e-4)
