import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train.optimizer import (
    OptimizerConfig,
    PartRates,
    hidden_matrices,
    learning_rate,
    make_optimizer,
    muon_dimensions,
)
from gaze_jax.train.step import abstract_state
from tests.helpers.experiments import tiny_experiment


def names(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, value in jax.tree_util.tree_leaves_with_path(tree)
        if value
    }


def first_update(optimizer, grads, params):
    """One program: as many as there are operations take three times as long to compile."""
    return jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0])(
        grads, params
    )


@pytest.mark.standard_promotion
def test_muon_and_decay_take_the_matrices_between_hidden_vectors_and_nothing_else():
    params = abstract_state(tiny_experiment(), make_mesh(MeshConfig())).params
    hidden = names(hidden_matrices(params))
    assert len(hidden) == 7 + 6 + 2  # decoder block, tower block, projector
    assert not any(word in name for name in hidden for word in ("embedding", "lm_head", "norm", "bias"))
    is_leaf = lambda value: value is None or not isinstance(value, dict)  # noqa: E731
    dimensions = jax.tree.map(lambda d: d is not None, muon_dimensions(params), is_leaf=is_leaf)
    assert names(dimensions) == hidden


def test_the_rate_rises_to_its_peak_and_ends_where_it_should():
    config = OptimizerConfig(warmup_steps=4, final_fraction=0.1)
    rates = [float(learning_rate(2.0, config, 20)(step)) for step in range(21)]
    np.testing.assert_allclose(rates[:5], [0.5, 0.875, 1.25, 1.625, 2.0])
    np.testing.assert_allclose(rates[20], 0.2, rtol=1e-6)
    assert (np.diff(rates[4:]) < 0).all()
    cosine = learning_rate(2.0, OptimizerConfig(warmup_steps=4, decay="cosine", final_fraction=0.1), 20)
    np.testing.assert_allclose([cosine(4), cosine(12), cosine(20)], [2.0, 1.1, 0.2], rtol=1e-6)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_an_update_has_the_size_that_the_rate_names(name):
    # An RMS of 0.2 to 1.5 times the rate (Adam's first step looks ahead), whatever the gradient's size.
    config = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=0, weight_decay=0.0)
    params = {"mlp": {"kernel": jnp.zeros((2, 24, 16))}, "norm": {"weight": jnp.ones(16)}}
    update, _ = make_optimizer(config, 100)
    grads = jax.tree.map(
        lambda p: jnp.asarray(1e3 * np.random.default_rng(0).normal(size=p.shape), jnp.float32), params
    )
    updates = first_update(update, grads, params)
    for leaf in jax.tree.leaves(updates):
        assert 0.015 < float(jnp.sqrt(jnp.mean(leaf**2))) < 0.16
    if name == "muon":
        # Every singular value of an orthogonalised matrix is about the same.
        values = np.linalg.svd(np.asarray(updates["mlp"]["kernel"][1]), compute_uv=False)
        assert values.max() / values.min() < 2.0


@pytest.mark.standard_promotion
def test_decay_pulls_hidden_matrices_only():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    params = {"mlp": {"kernel": jnp.ones((8, 8))}, "norm": {"weight": jnp.ones(8)}}
    update, _ = make_optimizer(config, 100)
    updates = first_update(update, jax.tree.map(jnp.zeros_like, params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["mlp"]["kernel"], 1 - 0.1 * 0.5, rtol=1e-5)
    np.testing.assert_array_equal(after["norm"]["weight"], 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("clip_norm", -1.0),
        ("b2", 1.0),
        ("final_fraction", 2.0),
        ("weight_decay", -1.0),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"optimizer.{field}={value}"):
        OptimizerConfig(**{field: value})


def test_adams_own_rate_needs_muon():
    with pytest.raises(ValueError, match="adam_learning_rate has an effect only with name='muon'"):
        OptimizerConfig(name="adamw", adam_learning_rate=1e-3)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("frozen", [(), ("projector",)])
def test_a_part_is_updated_at_its_rate(frozen):
    """Its decay too; adapters as the decoder, the others as before, and what is frozen not at all."""
    rng = np.random.default_rng(0)
    parts = ("vision", "projector", "decoder", "lora")
    params = {part: {"kernel": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)} for part in parts}
    grads = jax.tree.map(lambda leaf: jnp.cos(leaf), params)
    config = OptimizerConfig(name="adamw", warmup_steps=0, weight_decay=0.1, frozen=frozen)
    found = []
    for rates in (PartRates(), PartRates(vision=0.2, decoder=2.0)):
        update, _ = make_optimizer(dataclasses.replace(config, part_rates=rates), 10)
        found.append(first_update(update, grads, params))
    for part, rate in {"vision": 0.2, "projector": 1.0, "decoder": 2.0, "lora": 2.0}.items():
        expected = 0.0 if part in frozen else rate * found[0][part]["kernel"]
        np.testing.assert_allclose(found[1][part]["kernel"], np.broadcast_to(expected, (4, 4)), rtol=1e-6)
        assert part in frozen or np.abs(expected).min() > 0
