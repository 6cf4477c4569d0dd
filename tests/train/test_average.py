"""The moving average of parameters: its recurrence, its place in a checkpoint, and who reads it."""

import jax
import numpy as np
import pytest

from gaze_jax.errors import UserError
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train import checkpoint
from gaze_jax.train.checkpoint import load_for_inference
from gaze_jax.train.step import abstract_state, compile_step, init_state, put_batch, shardings_of
from tests.helpers.experiments import batches_of, data_of, random_state, tiny_experiment, whole_arrays

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("train")]

DECAY = 0.25
SETTINGS = {
    "average_decay": DECAY,
    "optimizer.frozen": ("vision",),
    "mesh.fsdp": 8,
    "mesh.data": 1,
}


@pytest.fixture(scope="module")
def steps():
    """The experiment, its mesh, and copies of the states of three steps on it."""
    experiment = tiny_experiment(**SETTINGS)
    mesh = make_mesh(experiment.mesh)
    batches = [put_batch(each, mesh) for each in batches_of(experiment, 3)]
    with jax.numpy_dtype_promotion("standard"):
        step_once = compile_step(experiment, mesh, batches[0])
        state = init_state(experiment, mesh, random_state(experiment).params)
        states = [jax.device_get(state)]
        for batch in batches:
            state, _ = step_once(state, batch)
            states.append(jax.device_get(state))
    return experiment, mesh, states, state


def test_the_average_follows_the_parameters_in_float32(steps):
    """Decays 2/11, 3/12 and, of 4/13, the 0.25 of the config; frozen parts have none."""
    _, _, states, _ = steps
    parts = set(states[0].params) - {"vision"}
    average = {part: states[0].params[part] for part in parts}
    for state, decay in zip(states[1:], (2 / 11, 3 / 12, DECAY), strict=True):
        average = jax.tree.map(
            lambda old, new, decay=decay: decay * old + (1 - decay) * new,
            average,
            {part: state.params[part] for part in parts},
        )
        assert set(state.average) == parts
        for mine, theirs in zip(jax.tree.leaves(state.average), jax.tree.leaves(average), strict=True):
            assert mine.dtype == np.float32
            np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)
    last = {part: states[3].params[part] for part in parts}
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (average, last)), strict=True))


def test_it_is_sharded_restored_bit_by_bit_and_what_inference_reads(steps, tmp_path):
    experiment, mesh, states, state = steps
    wanted = abstract_state(experiment, mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings_of(wanted)
    data = data_of(experiment)
    with checkpoint.open_manager(tmp_path, 1) as manager, whole_arrays():
        checkpoint.save(manager, state, experiment, data.fingerprint, data.tokenizer, [])
        manager.wait_until_finished()
        found = checkpoint.restore(manager, experiment, mesh, data.fingerprint)
    for mine, theirs in zip(jax.tree.leaves(found.state), jax.tree.leaves(states[3]), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    params = load_for_inference(tmp_path, make_mesh(MeshConfig(data=1), jax.devices()[:1])).params
    assert set(params) == set(states[3].params)
    for part, tree in params.items():
        other = states[3].params[part] if part == "vision" else states[3].average[part]
        for mine, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(UserError, match=rf"average_decay={decay} must lie between 0 and 1"):
        tiny_experiment(average_decay=decay)
