"""A converted checkpoint is what was written or it is refused; it loads onto any mesh."""

import json
import os
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from gaze_jax.convert import checkpoint, manifest, run
from gaze_jax.convert.checkpoint import flat_leaves, load
from gaze_jax.convert.load import load as load_any
from gaze_jax.convert.load import one_device, place
from gaze_jax.errors import UserError
from gaze_jax.models.config import GazeConfig
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from tests.helpers import checkpoints
from tests.helpers.disks import full_after


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    where = tmp_path_factory.mktemp("sources")
    return (
        checkpoints.checkpoint(where / "llm", checkpoints.QWEN | {"tie_word_embeddings": True}, tied),
        checkpoints.checkpoint(where / "tower", checkpoints.SIGLIP),
    )


def tied(tensors):
    return {name: values for name, values in tensors.items() if name != "lm_head.weight"}


@pytest.fixture(scope="module")
def plan(sources):
    return run.compose(*sources, gaze=GazeConfig((2, 2), context_tokens=2))


@pytest.fixture(scope="module")
def written(plan, tmp_path_factory):
    directory = tmp_path_factory.mktemp("written") / "gaze"
    run.write_plan(plan, directory)
    return directory


def weight_files(directory):
    files = sorted(path for path in (directory / manifest.PARAMS).rglob("*") if path.is_file())
    return files, np.cumsum([path.stat().st_size for path in files])


@pytest.fixture(scope="module")
def victim(written, tmp_path_factory):
    """A copy to damage."""
    return shutil.copytree(written, tmp_path_factory.mktemp("victim") / "gaze")


@settings(max_examples=20)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused_with_the_name_of_the_leaf(victim, position, bit):
    files, ends = weight_files(victim)
    at = int(position * ends[-1])
    file = int(np.searchsorted(ends, at, side="right"))
    path, offset = files[file], at - (ends[file - 1] if file else 0)
    data = bytearray(path.read_bytes())
    original = bytes(data)
    data[offset] ^= 1 << bit
    path.write_bytes(data)
    try:
        with pytest.raises(UserError, match="is damaged") as error:
            load(victim, one_device())
    finally:
        path.write_bytes(original)
    folder = path.parent.name
    leaf = str(path.relative_to(victim)) if folder == manifest.PARAMS else folder.replace(".", "/")
    assert leaf in str(error.value)


def test_a_target_may_be_relative_to_a_folder_above(written, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = load(written, one_device())
    leaves = {
        name: checkpoint.pending_array(np.asarray(leaf)) for name, leaf in flat_leaves(found.params).items()
    }
    with checkpoint.new_directory(Path("../gaze")) as partial:
        checkpoint.write(partial, found.config, leaves)
    chex.assert_trees_all_equal(load(tmp_path / "gaze", one_device()).params, found.params, strict=True)
    assert not list((tmp_path / "here").iterdir())


def by_orbax(directory):
    """``params`` as any user of Orbax restores them."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory / manifest.PARAMS)


def test_orbax_reads_what_we_write(written):
    ours = load(written, one_device()).params
    chex.assert_trees_all_equal(by_orbax(written), ours, strict=True)


def test_orbax_alone_does_not_notice_a_flipped_bit(victim):
    leaf = "decoder/layers/mlp/up_proj/kernel"
    path = victim / manifest.chunk_path(leaf, manifest.read(victim).leaves[leaf], 1)
    before = path.read_bytes()
    path.write_bytes(before[:40] + bytes([before[40] ^ 1]) + before[41:])
    try:
        unchecked = load(victim, one_device(), check=False).params  # which is what the switch is for
        restored = by_orbax(victim)
        with pytest.raises(UserError, match=f"{leaf}, layer 1 is not what was written"):
            load(victim, one_device())
        with pytest.raises(UserError, match=f"{leaf}, layer 1 is not what was written"):
            run.convert_back(victim, victim.parent / "back")
    finally:
        path.write_bytes(before)
    assert not (victim.parent / "back").exists()
    right = np.asarray(flat_leaves(load(victim, one_device()).params)[leaf])
    for wrong in (unchecked, restored):
        assert (right != np.asarray(flat_leaves(wrong)[leaf])).sum() == 1


def test_all_damage_is_listed(victim):
    names = ["decoder/norm/weight", "newline"]
    paths = [victim / manifest.chunk_path(n, manifest.read(victim).leaves[n]) for n in names]
    before = [path.read_bytes() for path in paths]
    paths[0].unlink()
    paths[1].write_bytes(before[1][:-1])
    try:
        with pytest.raises(UserError) as error:
            load(victim, one_device())
    finally:
        for path, data in zip(paths, before, strict=True):
            path.write_bytes(data)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("name", ["decoder/config.json", "vision/config.json"])
def test_files_beside_the_weights_are_checked_too(victim, name):
    before = (victim / name).read_bytes()
    (victim / name).write_bytes(before.replace(b"16", b"17", 1))
    try:
        for action in (lambda: load(victim, one_device()), lambda: run.open_model(victim)):
            with pytest.raises(UserError, match=name):
                action()
    finally:
        (victim / name).write_bytes(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace('"rope_theta": 1000000.0', '"rope_theta": 1000001.0'),
            "damaged or edited",
        ),
        (lambda text: text.replace('"format_version": 3', '"format_version": 4'), "format_version 4"),
        (lambda text: text[:-40], "is not valid JSON"),
    ],
)
def test_the_manifest_is_checked(victim, change, message):
    path = victim / manifest.FILE
    before = path.read_text()
    assert change(before) != before
    path.write_text(change(before))
    try:
        with pytest.raises(UserError, match=message):
            load(victim, one_device())
    finally:
        path.write_text(before)


def test_the_manifest_names_what_is_new_and_where_the_rest_came_from(written, plan):
    found = manifest.read(written)
    assert set(found.new) == {name for name in plan.leaves if not name.startswith(("decoder", "vision"))}
    assert {part: source.model_type for part, source in found.sources.items()} == {
        "decoder": "qwen2",
        "vision": "siglip_vision_model",
    }
    assert found.model == plan.config
    on_disk = {str(p.relative_to(written)) for p in written.rglob("*") if p.is_file()} - {manifest.FILE}
    assert set(found.files) == on_disk


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=4)])
def test_it_loads_onto_any_mesh(written, plan, mesh):
    mesh = make_mesh(mesh)
    for found in (load(written, mesh), place(plan, mesh)):
        for name, leaf in flat_leaves(found.params).items():
            values, _ = checkpoint.materialise(plan.leaves[name])
            np.testing.assert_array_equal(np.asarray(leaf), values, err_msg=name)
            assert isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        kernel = found.params["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // mesh.shape["fsdp"]


def test_a_hugging_face_directory_loads_as_it_is(sources):
    found = load_any(sources[0], one_device())
    assert found.config.vision is None and found.tokenizer is None
    tensors = tied(checkpoints.tensors_of(checkpoints.QWEN | {"tie_word_embeddings": True}))
    np.testing.assert_array_equal(
        np.asarray(found.params["decoder"]["embedding"]), tensors["model.embed_tokens.weight"]
    )


def test_a_tower_alone(sources, tmp_path):
    plan = run.plan_directory(sources[1])
    run.write_plan(plan, tmp_path / "tower")
    found = load_any(tmp_path / "tower", one_device())
    assert found.config == plan.config and found.params.keys() == {"vision"}


def test_a_directory_that_exists_is_not_touched(written, plan):
    before = sorted(os.listdir(written))
    with pytest.raises(UserError, match="exists already"):
        run.write_plan(plan, written)
    assert sorted(os.listdir(written)) == before


def test_nothing_is_left_of_a_conversion_that_failed(plan, tmp_path):
    def progress(count):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        run.write_plan(plan, tmp_path / "gaze", progress)
    assert not any(tmp_path.iterdir())
    run.write_plan(plan, tmp_path / "gaze")  # and the next attempt works
    assert jax.tree.leaves(load(tmp_path / "gaze", one_device()).params)


@pytest.mark.parametrize("size", [0, 12_000])
def test_a_full_disk_is_one_sentence(plan, size, tmp_path):
    """And nothing is left."""
    with full_after(size), pytest.raises(UserError) as error:
        run.write_plan(plan, tmp_path / "gaze")
    where = tmp_path / "gaze"
    assert str(error.value) == f"{where} cannot be written (File too large); free space or choose another."
    assert not any(tmp_path.iterdir())


def test_a_full_disk_of_tensorstore_is_one_sentence(tmp_path):
    """As it says it, in the middle of a long text; other errors of its are no UserErrors."""
    text = "RESOURCE_EXHAUSTED: Error writing \"a/0.0\": {} [os_error_code='28'] [tensorstore_spec=...]"
    with pytest.raises(UserError) as error, checkpoint.new_directory(tmp_path / "x"):
        raise ValueError(text.format("No space left on device"))
    assert f"{tmp_path / 'x'} cannot be written (No space left on device); free space" in str(error.value)
    with pytest.raises(ValueError, match="RESOURCE") as error, checkpoint.new_directory(tmp_path / "x"):
        raise ValueError(text.format("A bug"))
    assert not isinstance(error.value, UserError) and not any(tmp_path.iterdir())


def test_a_directory_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="model_type 'bert'"):
        load_any(tmp_path, one_device())
    with pytest.raises(UserError, match="is neither a converted checkpoint"):
        run.open_model(tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        load_any(tmp_path / "none", one_device())


def test_zeros_are_stored_like_anything_else(tmp_path):
    zeros = checkpoints.checkpoint(
        tmp_path / "hf", change=lambda t: {name: np.zeros_like(values) for name, values in t.items()}
    )
    run.write_plan(run.plan_directory(zeros), tmp_path / "gaze")
    found = load(tmp_path / "gaze", one_device())
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(found.params))
