"""Invariant 2: decoding token by token with the cache equals the teacher-forced forward."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core.routing import Routing
from gaze_jax.models import DUMMY
from gaze_jax.models.cache import decode_spec
from pallas_kernels.gaze_decode.api import unpack
from tests.helpers import models
from tests.helpers.streams import batch, find, pad, prefix, shuffle

STEPS = 4
SAMPLE_ID = jnp.array([3, 8], jnp.int32)


def _rows():
    """Two answers of STEPS tokens after prompts of unequal length, both with two images."""
    return [
        models.two_images(0, answer=2 + STEPS),
        models.two_images(1, first=1, text=1, answer=1 + STEPS, newlines=True),
    ]


def _prompts(rows):
    """The rows without their last STEPS tokens, in a bucket larger than either, stored out of order."""
    cut = [prefix(row, int(row["text_order"].max()) + 1 - STEPS) for row in rows]
    return [shuffle(pad(row, regions=20, text=20), seed=i) for i, row in enumerate(cut)]


def _decode_all(config, rows, top_k, capacity, route=Routing()):
    """Logits [STEPS + 1, B, V] from prefill and decode, and the decoded selections."""
    variables, images = models.parameters(DUMMY), models.images(2, 2)
    prompts = batch(_prompts(rows))
    logits, cache, out = models.prefill(config, STEPS, route)(
        variables, images, prompts, top_k, None, SAMPLE_ID
    )
    all_logits, outs = [logits], [out]
    for t in range(STEPS):
        at = [find(row)[t - STEPS] for row in rows]
        tokens = jnp.array([row["tokens"][i] for row, i in zip(rows, at)])
        order = jnp.array([row["text_order"][i] for row, i in zip(rows, at)])
        logits, cache, out = models.decode(config, capacity, route)(
            variables, tokens, order, cache, models.step(order, 20 + t, SAMPLE_ID), top_k
        )
        all_logits.append(logits)
        outs.append(out)
    return np.stack(all_logits), outs


def _teacher_forced(config, rows, top_k, route=Routing()):
    """Logits [STEPS + 1, B, V] of the same positions, and the selections there, [L, B, Hs, R] each."""
    run = models.forward(config, route, collect=True)
    logits, out = run(models.parameters(DUMMY), models.images(2, 2), batch(rows), top_k, None, SAMPLE_ID)
    at = np.stack([find(row)[-STEPS - 1 :] for row in rows])  # [B, STEPS + 1]
    picked = np.take_along_axis(np.asarray(logits), at[..., None], axis=1).swapaxes(0, 1)
    if "selected" not in out:
        return picked, None
    selected = np.asarray(out["selected"])
    return picked, [np.stack([selected[:, b, at[b, t]] for b in range(2)], axis=1) for t in range(STEPS + 1)]


def _selected_tokens(selected, row, b):
    """Names of the chosen regions that do not depend on storage: first orders, per layer and head."""
    orders = np.where(row["visual_order"] >= 0, row["visual_order"], 10**6).min(1)
    return [[sorted(orders[np.flatnonzero(h)].tolist()) for h in layer] for layer in selected[:, b]]


@pytest.mark.parametrize(
    ("select_per", "strategy", "top_k", "descriptor"),
    [
        ("head", "descriptor", 3, "mean"),
        ("kv_head", "descriptor", 3, "minmax"),
        ("kv_head", "oracle", 3, "mean"),
        ("head", "descriptor", None, "mean"),
        # tests/infer/test_plain_loop.py has random routing by default.
        pytest.param("head", "random", 3, "mean", marks=pytest.mark.long),
        pytest.param("kv_head", "descriptor", 3, "mean", marks=pytest.mark.long),
        pytest.param("head", "descriptor", 3, "minmax", marks=pytest.mark.long),
        pytest.param("head", "oracle", 3, "mean", marks=pytest.mark.long),
    ],
)
def test_cached_decode_equals_teacher_forcing(select_per, strategy, top_k, descriptor):
    """Unequal prompts in a padded, shuffled bucket, two images, newlines: equal logits and selections."""
    config = models.changed(DUMMY, gaze={"select_per": select_per, "descriptor": descriptor})
    route = Routing(strategy)
    rows = _rows()
    budget = None if top_k is None else jnp.int32(top_k)
    got, outs = _decode_all(config, rows, budget, None if top_k is None else 5, route)
    expected, selected = _teacher_forced(config, rows, budget, route)
    models.close(got, expected)
    if top_k is None:
        assert outs == [{}] * (STEPS + 1)
        return
    padded, prompts = batch(rows), _prompts(rows)
    names = {name: np.asarray(getattr(padded, name)) for name in ("visual_order",)}
    for t, out in enumerate(outs):
        mask = np.asarray(out["selected"]) if t == 0 else _as_mask(out["indices"], 20)
        assert (mask.sum(-1) == top_k).all()
        for b in range(2):
            mine = _selected_tokens(mask, prompts[b], b)
            theirs = _selected_tokens(selected[t], {"visual_order": names["visual_order"][b]}, b)
            assert mine == theirs, f"row {b}, step {t}"


def _as_mask(indices, regions):
    return (np.asarray(indices)[..., None] == np.arange(regions)).any(-2)


@pytest.mark.parametrize("top_k", [3, pytest.param(None, marks=pytest.mark.long)])
def test_a_token_between_images_does_not_see_the_later_one(top_k):
    """A token with a later image in the cache, decoded again in its own slot: the logits of its place."""
    config = models.changed(DUMMY, gaze={"select_per": "head"})
    rows = [models.two_images(0), models.two_images(1)]
    streams, images, variables = batch(rows), models.images(2, 2), models.parameters(DUMMY)
    budget = None if top_k is None else jnp.int32(top_k)
    write_index = int(find(rows[0])[4])  # the last of the text between the images
    order = streams.text_order[:, write_index]
    later = np.asarray(streams.visual_order) > np.asarray(order)[:, None, None]
    assert 0 < later.any(-1).sum() < later.any(-1).size, "regions before and behind"
    _, cache, _ = models.prefill(config, STEPS)(variables, images, streams, budget, None, SAMPLE_ID)
    expected, _ = models.forward(config, collect=True)(variables, images, streams, budget, None, SAMPLE_ID)
    got, _, out = models.decode(config, 5)(
        variables,
        streams.tokens[:, write_index],
        order,
        cache,
        models.step(order, write_index, SAMPLE_ID),
        budget,
    )
    models.close(got, expected[:, write_index])
    if top_k is not None:
        listed = _as_mask(out["indices"], later.shape[1])
        assert (listed.sum(-1) == top_k).all() and not (listed & later.any(-1)[:, None]).any()


def test_decode_reports_indices_best_first_with_their_scores():
    """Indices [L, B, Hs, J] follow the scores [L, B, Hs, R]; J beyond top_k is -1."""
    _, outs = _decode_all(models.changed(DUMMY, gaze={"select_per": "head"}), _rows(), jnp.int32(3), 5)
    for out in outs[1:]:
        indices, scores = np.asarray(out["indices"]), np.asarray(out["scores"])
        assert indices.shape == (3, 2, 4, 5) and scores.shape == (3, 2, 4, 20)
        assert (indices[..., 3:] == -1).all() and (indices[..., :3] >= 0).all()
        ranked = np.take_along_axis(scores, indices[..., :3], axis=-1)
        assert (np.diff(ranked, axis=-1) <= 0).all()
        valid = np.stack([(row["visual_order"] >= 0).any(1) for row in _prompts(_rows())])
        best = np.where(valid[None, :, None], scores, -np.inf).max(-1)
        np.testing.assert_array_equal(ranked[..., 0], best)


def test_edge_01_ties_go_to_the_regions_that_come_first():
    """All scores 0: decoding lists the three earliest regions, in order, though they are stored shuffled."""
    rows = _rows()
    config = models.changed(DUMMY, gaze={"select_per": "head"})
    variables, images = models.indifferent(models.parameters(DUMMY)), models.images(2, 2)
    prompts = _prompts(rows)
    _, cache, _ = models.prefill(config, STEPS)(
        variables, images, batch(prompts), jnp.int32(3), None, SAMPLE_ID
    )
    step = models.step([70, 71], 20, SAMPLE_ID)
    _, _, out = models.decode(config, 5)(variables, jnp.array([1, 2]), step.order, cache, step, jnp.int32(3))
    for b, start in enumerate((2, 1)):
        order = prompts[b]["visual_order"]
        first = np.where(order >= 0, order, 10**6).min(1)
        listed = np.asarray(out["indices"])[:, b, :, :3]
        assert (first[listed] == [start, start + 2, start + 4]).all()


def test_decode_with_top_k_of_all_regions_equals_dense_decode():
    """Invariant 1 in the decode op of the whole model."""
    rows = _rows()
    config = models.changed(DUMMY, gaze={"select_per": "head"})
    routed, _ = _decode_all(config, rows, jnp.int32(20), None)
    dense, _ = _decode_all(config, rows, None, None)
    models.close(routed, dense)


def test_forced_regions_decode_as_they_prefill():
    """Forced selections (steering) mean the same in prefill and decode; unlisted regions are never read."""
    rows = _rows()
    config, route = DUMMY, Routing("forced")
    variables, images = models.parameters(DUMMY), models.images(2, 2)
    forced = jnp.array([4, 11, -1, 4], jnp.int32).reshape(1, 1, 1, 1, 4)
    prompts = batch([pad(prefix(row, int(row["text_order"].max()) + 1 - STEPS), text=20) for row in rows])
    full, out = models.forward(config, route, collect=True)(
        variables, images, batch(rows), jnp.int32(9), forced
    )
    at = [find(row)[-STEPS] for row in rows]
    assert np.flatnonzero(np.asarray(out["selected"])[:, 0, at[0]].any((0, 1))).tolist() == [4, 11]
    _, cache, _ = models.prefill(config, STEPS, route)(variables, images, prompts, jnp.int32(9), forced)
    order = jnp.array([row["text_order"][i] for row, i in zip(rows, at)])
    tokens = jnp.array([row["tokens"][i] for row, i in zip(rows, at)])
    logits, _, out = models.decode(config, 5, route)(
        variables, tokens, order, cache, models.step(order, 20), jnp.int32(9), forced
    )
    models.close(logits, np.stack([np.asarray(full)[b, i] for b, i in enumerate(at)]))
    assert np.asarray(out["indices"])[1, 0, 2].tolist() == [4, 11, -1, -1, -1]


def test_traced_top_k_and_step_do_not_recompile_decode():
    """One decode program serves every budget, slot, order and layer budget of the same rank."""
    rows = _rows()
    config = models.changed(DUMMY, gaze={"query_block": 511})  # its own programs, whatever ran before
    variables, images = models.parameters(DUMMY), models.images(2, 2)
    _, cache, _ = models.prefill(config, STEPS)(variables, images, batch(_prompts(rows)), jnp.int32(1))
    run = models.decode(config, 9)
    for top_k in range(1, 10):
        order = jnp.array([90 + top_k, 80 + top_k])
        tokens = jnp.array([top_k, 1])
        _, _, out = run(
            variables, tokens, order, cache, models.step(order, 20 + top_k % STEPS), jnp.int32(top_k)
        )
        assert ((np.asarray(out["indices"]) >= 0).sum(-1) == top_k).all()
    assert run._cache_size() == 1


def test_a_decoded_token_changes_only_its_own_slot():
    """The cache grows in place: visual part, descriptors and earlier text-stream slots keep their bits."""
    rows = _rows()
    variables, images = models.parameters(DUMMY), models.images(2, 2)
    config = models.changed(DUMMY, gaze={"select_per": "head"})
    _, cache, _ = models.prefill(config, STEPS)(
        variables, images, batch(_prompts(rows)), jnp.int32(3), None, SAMPLE_ID
    )
    order = jnp.array([70, 71])
    step = models.step(order, 21, SAMPLE_ID)
    _, after, _ = models.decode(config, 5)(variables, jnp.array([1, 2]), order, cache, step, jnp.int32(3))
    for name in ("text_k", "text_v"):
        before, now = np.asarray(getattr(cache, name)), np.asarray(getattr(after, name))
        assert before.shape[3] == 20 + STEPS and (before[:, :, :, 20:] == 0).all()
        others = np.arange(20 + STEPS) != 21
        np.testing.assert_array_equal(now[:, :, :, others], before[:, :, :, others])
        assert (now[:, :, :, 21] != 0).any(-1).all()
    assert np.asarray(after.text_order)[:, 21].tolist() == [70, 71]
    for name in ("descriptors", "visual_order"):
        np.testing.assert_array_equal(getattr(after, name), getattr(cache, name))
    chex.assert_trees_all_equal(after.visual, cache.visual, strict=True)


def test_cached_descriptors_are_means_of_the_cached_keys():
    """[L, B, K, R, D], over valid tokens, in the cache's dtype."""
    rows = _rows()
    variables, images = models.parameters(DUMMY), models.images(2, 2)
    config = models.changed(DUMMY, gaze={"select_per": "head"})
    _, cache, _ = models.prefill(config, STEPS)(
        variables, images, batch(_prompts(rows)), jnp.int32(3), None, SAMPLE_ID
    )
    spec = decode_spec(config.gaze, config.decoder.head_dim)
    keys, _ = unpack(cache.visual, spec=spec, implementation=config.gaze.decode_implementation)
    keys, valid = np.asarray(keys, np.float64), np.asarray(cache.visual_order) >= 0
    total = np.where(valid[None, :, None, :, :, None], keys, 0).sum(4)
    mean = total / np.maximum(valid.sum(-1), 1)[None, :, None, :, None]
    assert cache.descriptors.shape == (3, 2, 2, 20, 8) and cache.descriptors.dtype == jnp.float32
    np.testing.assert_allclose(cache.descriptors, mean, rtol=2e-5, atol=1e-6)
    config = models.changed(DUMMY, gaze={"select_per": "head", "descriptor": "minmax"})
    _, boxed, _ = models.prefill(config, STEPS)(
        variables, images, batch(_prompts(rows)), jnp.int32(20), None, SAMPLE_ID
    )
    assert boxed.descriptors.shape == (3, 2, 2, 20, 16)
    spans = jax.jit(lambda c: (c.first, c.last))(cache)
    for b, row in enumerate(_prompts(rows)):
        order = row["visual_order"]
        assert np.asarray(spans[1])[b].tolist() == order.max(1).tolist()
        assert np.asarray(spans[0])[b].tolist() == [o[o >= 0].min() if (o >= 0).any() else -1 for o in order]
