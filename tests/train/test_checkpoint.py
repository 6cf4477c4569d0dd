import dataclasses
import functools
import itertools
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gaze_jax.errors import NotFiniteError, UserError
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train import checkpoint, loop
from gaze_jax.train.step import put_batch
from tests.helpers.experiments import (
    batches_of,
    begun,
    compiled,
    data_of,
    reused_programs,
    tiny_experiment,
    whole_arrays,
)

pytestmark = [
    pytest.mark.standard_promotion,
    pytest.mark.xdist_group("train"),
    # When one array cannot be read, Orbax closes its event loop on the reads of the others.
    pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    with reused_programs():
        loop.train(tiny_experiment(), workdir)
    return workdir


def resume(workdir, experiment):
    mesh = make_mesh(experiment.mesh)
    with checkpoint.open_manager(workdir, 2) as manager:
        return checkpoint.restore(manager, experiment, mesh, data_of(experiment).fingerprint)


def test_an_empty_workdir_has_nothing_to_restore(tmp_path):
    assert resume(tmp_path, tiny_experiment()) is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"optimizer.learning_rate": 1e-4}, "optimizer.learning_rate was 0.002 and is 0.0001"),
        ({"model.gaze.top_k": 2}, "model.gaze.top_k was 1 and is 2"),
        ({"init_from": "elsewhere"}, "init_from was None and is 'elsewhere'"),
        ({"data.background": "photo"}, "data.background was 'texture' and is 'photo'"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused_by_the_field_that_differs(run, change, field):
    with pytest.raises(UserError, match=f"is of another config: {field}; restore the old value"):
        resume(run, tiny_experiment(**change))


@pytest.mark.parametrize(("part", "value"), [("tokenizer", "another"), ("length", 63)])
def test_a_checkpoint_of_other_data_is_refused_by_what_differs(part, value, run):
    experiment = tiny_experiment()
    now = data_of(experiment).fingerprint | {part: value}
    message = (
        rf"data pipeline differs: {part} was \S+ and is {value!r}\. Restore the old setting, or start in"
    )
    with checkpoint.open_manager(run, 2) as manager, pytest.raises(UserError, match=message):
        checkpoint.restore(manager, experiment, make_mesh(experiment.mesh), now)


def test_what_changes_no_result_may_change(run):
    change = {"checkpoint_every": 1, "keep_checkpoints": 5, "log_every": 1}
    found = resume(run, tiny_experiment(**change, **{"mesh.fsdp": 4, "eval.samples": 2}))
    assert int(found.state.step) == 6


def test_a_flipped_bit_is_found_and_its_array_named(run, tmp_path):
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    meta = tmp_path / "checkpoints" / "6" / "meta" / "metadata"
    text = meta.read_text()
    at = text.index('"digest": "', text.index("decoder/embedding")) + len('"digest": "')
    meta.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    with pytest.raises(UserError, match="is damaged: decoder/embedding is not what was saved"):
        resume(tmp_path, tiny_experiment())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8])
def test_the_digest_sees_every_bit_and_every_place(dtype):
    values = jnp.asarray(np.random.default_rng(0).integers(1, 100, (5, 6)), dtype)
    digest = int(checkpoint._digest(values))
    raw = np.asarray(values).view(np.uint8).copy()
    for byte in range(raw.shape[1]):
        for bit in range(8):
            flipped = raw.copy()
            flipped[3, byte] ^= 1 << bit
            assert int(checkpoint._digest(jnp.asarray(flipped.view(np.asarray(values).dtype)))) != digest
    assert int(checkpoint._digest(values[::-1])) != digest
    assert int(checkpoint._digest(values[:, ::-1])) != digest


def test_the_digest_is_the_same_on_every_mesh():
    values = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    specs = [jax.sharding.PartitionSpec(*axes) for axes in [(), ("data",), ("fsdp", "data"), (None, "fsdp")]]
    found = {
        int(checkpoint._digest(jax.device_put(values, jax.sharding.NamedSharding(mesh, s)))) for s in specs
    }
    assert len(found) == 1


@pytest.mark.parametrize("item", ["params", "train", "meta"])
def test_a_missing_item_is_one_sentence_with_the_path(run, item, tmp_path):
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "6" / item)
    with pytest.raises(UserError, match=rf"checkpoints/6 cannot be read \({item}: ") as error:
        resume(tmp_path, tiny_experiment())
    assert "\n" not in str(error.value)


@functools.cache
def _fresh():
    experiment = tiny_experiment()
    return begun(experiment, make_mesh(experiment.mesh))


def _rewrite(to, change):
    """A checkpoint of the same config with other arrays."""
    experiment, state = tiny_experiment(), _fresh()
    data = data_of(experiment)
    with checkpoint.open_manager(to, 2) as manager, whole_arrays():
        state = dataclasses.replace(state, step=jnp.asarray(6, jnp.int32), params=change(state.params))
        checkpoint.save(manager, state, experiment, data.fingerprint, data.tokenizer, [])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: p | {"newline": p["newline"].astype(jnp.bfloat16)}, "has newline as bfloat16"),
        (lambda p: p | {"newline": p["newline"][:-1]}, r"has newline as float32\[31\] but the model wants"),
        (lambda p: {k: v for k, v in p.items() if k != "newline"}, "lacks array newline"),
        (lambda p: p | {"extra": p["newline"]}, "has an unknown array extra"),
    ],
    ids=["dtype", "shape", "missing", "extra"],
)
def test_arrays_that_are_not_the_models_are_named(change, sentence, tmp_path):
    _rewrite(tmp_path, change)
    with pytest.raises(UserError, match=sentence):
        resume(tmp_path, tiny_experiment())


def test_saving_holds_the_values_though_the_state_is_donated_at_once(tmp_path):
    experiment = tiny_experiment()
    mesh = make_mesh(experiment.mesh)
    data = data_of(experiment)
    batch = put_batch(batches_of(experiment)[0], mesh)
    step_once = compiled(experiment, mesh)
    state = begun(experiment, mesh)
    with checkpoint.open_manager(tmp_path, 9) as manager, whole_arrays():
        for _ in range(3):
            state, _ = step_once(state, batch)
            checkpoint.save(manager, state, experiment, data.fingerprint, data.tokenizer, [])
        manager.wait_until_finished()
        saved = []
        for step in (1, 2, 3):
            meta = checkpoint._meta(manager, step)
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state.params)
            saved.append(checkpoint._read_trees(manager, step, meta, {"params": abstract})["params"])
            assert checkpoint.describe(saved[-1]) == meta["leaves"]["params"]
    chex.assert_trees_all_equal(saved[-1], state.params, strict=True)
    for before, after in itertools.pairwise(saved):
        assert checkpoint.describe(before) != checkpoint.describe(after), "each step moved the parameters"


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_a_state_that_is_not_finite_is_never_saved(value, tmp_path):
    """Of the optimizer too, whose values no metric shows."""
    experiment, state, data = tiny_experiment(), _fresh(), data_of(tiny_experiment())
    leaves, tree = jax.tree.flatten(state.opt_state)
    at = next(number for number, leaf in enumerate(leaves) if leaf.shape == (144, 32))
    leaves[at] = leaves[at].at[5, 7].set(value)
    bad = dataclasses.replace(state, opt_state=jax.tree.unflatten(tree, leaves))
    message = r"After step 0 opt_state\S*/mu/decoder/embedding is not finite, so it is not saved;"
    with checkpoint.open_manager(tmp_path, 2) as manager, pytest.raises(NotFiniteError, match=message):
        checkpoint.save(manager, bad, experiment, data.fingerprint, data.tokenizer, [])
    assert resume(tmp_path, experiment) is None


def test_inference_needs_a_checkpoint(tmp_path):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with pytest.raises(UserError, match="holds no checkpoint; give the --workdir of a run"):
        checkpoint.load_for_inference(tmp_path, mesh)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no finished checkpoint"):
        checkpoint.load_for_inference(tmp_path, mesh)


def test_a_field_that_is_younger_than_the_checkpoint_has_its_default(run, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    (meta,) = workdir.glob("checkpoints/*/meta/metadata")
    saved = json.loads(meta.read_text())
    assert saved["config"]["model"]["gaze"].pop("descriptor") == "mean"
    meta.write_text(json.dumps(saved))
    assert resume(workdir, tiny_experiment()) is not None
    with pytest.raises(UserError, match=r"model\.gaze\.descriptor was 'mean' and is 'minmax'"):
        resume(workdir, tiny_experiment(**{"model.gaze.descriptor": "minmax"}))
