"""Next-token losses: those of plain logits, in chunks, and with the vocabulary split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaze_jax.core.streams import IGNORE
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train import objective

BATCH, LENGTH, WIDTH = 8, 11, 16


def inputs(vocab):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    table = rng.normal(size=(vocab, WIDTH)).astype(np.float32)
    table[7] = table[3]  # equal logits: the first is the prediction
    targets = rng.integers(vocab, size=(BATCH, LENGTH)).astype(np.int32)
    targets[0, :2] = 3, 7
    hidden[0, :2] = 5 * table[3]
    targets[:, 5] = IGNORE
    return hidden, table, targets


def plain(given, targets):
    hidden, table = given
    logits = jnp.einsum("BSM,VM->BSV", hidden, table)
    wanted = jnp.where(targets == IGNORE, 0, targets)
    return optax.softmax_cross_entropy_with_integer_labels(logits, wanted), jnp.argmax(logits, -1) == targets


def loss_of(function, targets):
    """A weighted sum of the losses of the targets, so that each has a gradient of its own."""
    weights = np.where(targets == IGNORE, 0, np.arange(targets.size).reshape(targets.shape)).astype(
        np.float32
    )
    return lambda hidden, table: jnp.sum(function(objective.Logits(hidden, table), targets)[0] * weights)


def plain_kl(given, targets, teacher):
    """The same for the divergence from a teacher."""
    ours, theirs = (
        jax.nn.log_softmax(jnp.einsum("BSM,VM->BSV", hidden, table)) for hidden, table in (given, teacher)
    )
    return (jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1),)


def compare_kl(vocab, mesh):
    """Divergence from a teacher of another width, and its gradient."""
    hidden, table, targets = inputs(vocab)
    rng = np.random.default_rng(1)
    teacher = objective.Logits(
        rng.normal(size=(BATCH, LENGTH, 2 * WIDTH)).astype(np.float32),
        rng.normal(size=(vocab, 2 * WIDTH)).astype(np.float32),
    )

    def found(given, targets):
        return (objective.token_losses(given, targets, teacher).kl,)

    def wanted(given, targets):
        return plain_kl(given, targets, teacher)

    expected = jax.jit(jax.grad(loss_of(wanted, targets), argnums=(0, 1)))(hidden, table)
    with jax.set_mesh(mesh):
        kl = jax.jit(objective.token_losses)(objective.Logits(hidden, table), targets, teacher).kl
        gradients = jax.jit(jax.grad(loss_of(found, targets), argnums=(0, 1)))(hidden, table)
    np.testing.assert_allclose(kl, wanted((hidden, table), targets)[0], rtol=1e-5, atol=1e-5)
    assert float(kl.min()) > 0.1
    for mine, theirs in zip(gradients, expected):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def compare(vocab, mesh):
    hidden, table, targets = inputs(vocab)
    loss, correct = jax.jit(plain)((hidden, table), targets)
    expected = jax.jit(jax.grad(loss_of(plain, targets), argnums=(0, 1)))(hidden, table)
    with jax.set_mesh(mesh):
        found = jax.jit(objective.token_losses)(objective.Logits(hidden, table), targets)
        gradients = jax.jit(jax.grad(loss_of(objective.token_losses, targets), argnums=(0, 1)))(hidden, table)
    some = targets != IGNORE
    np.testing.assert_allclose(found.loss[some], loss[some], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.correct[some], correct[some])
    assert correct[0, 0] and not correct[0, 1]
    for mine, theirs in zip(gradients, expected):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


MESHES = [
    (40, MeshConfig(2, 4)),
    (37, MeshConfig(2, 4)),
    (37, MeshConfig(8, 1)),
    (37, None),
    (42, MeshConfig(2, 2, 2)),
    (40, MeshConfig(2, 1, 4)),
]


@pytest.mark.parametrize(
    ("vocab", "mesh", "kilobytes"),
    [
        pytest.param(*pair, kilobytes, marks=[] if number % 2 == which else [pytest.mark.long])
        for number, pair in enumerate(MESHES)
        for which, kilobytes in enumerate((64, 1))
    ],
)
def test_losses_and_gradients_are_those_of_plain_logits(vocab, mesh, kilobytes, monkeypatch):
    """Chunks, parts of the vocabulary, and a vocabulary that the parts do not divide change nothing."""
    monkeypatch.setattr(objective, "LOGIT_BYTES", kilobytes * 1024)
    compare(vocab, make_mesh(mesh or MeshConfig(1, 1), None if mesh else jax.devices()[:1]))


@pytest.mark.parametrize(("mesh", "kilobytes"), [(MeshConfig(1, 4, 2), 1), (None, 64)])
def test_the_divergence_from_a_teacher_is_that_of_plain_logits(mesh, kilobytes, monkeypatch):
    monkeypatch.setattr(objective, "LOGIT_BYTES", kilobytes * 1024)
    compare_kl(42, make_mesh(mesh or MeshConfig(1, 1), None if mesh else jax.devices()[:1]))


def test_no_logits_of_all_tokens_and_no_whole_table_exist(monkeypatch):
    """Read from the compiled gradient: a chunk's logits of a part of the vocabulary are the largest array."""
    monkeypatch.setattr(objective, "LOGIT_BYTES", 4 * 4 * 1000)
    hidden, table, targets = inputs(1000)
    with jax.set_mesh(make_mesh(MeshConfig(1, 8))):
        spec = jax.sharding.PartitionSpec(None, "fsdp")
        table = jax.device_put(table, jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec))
        gradient = jax.jit(
            jax.grad(loss_of(objective.token_losses, targets), argnums=1), out_shardings=table.sharding
        )
        text = gradient.lower(hidden, table).compile().as_text()
    assert "f32[1000,2]" in text  # each device's part
    assert "f32[1000,16]" not in text and "f32[1000,1000]" not in text
    assert "f32[8,11,1000]" not in text and "f32[8,4,125]" in text
