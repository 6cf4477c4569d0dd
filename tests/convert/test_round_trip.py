"""Invariant 6: PyTorch to Flax and back is bit-exact: names, dtypes, bytes; here even the files are the
same."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gaze_jax.convert import run
from gaze_jax.convert.export import part_directories
from gaze_jax.convert.load import load, one_device
from gaze_jax.convert.shards import INDEX
from gaze_jax.errors import UserError
from gaze_jax.models.config import GazeConfig, MLLMConfig
from tests.helpers import hf
from tests.helpers.layouts import same_files

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.xdist_group("parity")


def there_and_back(source, tmp_path, **options):
    run.write_plan(run.plan_directory(source, **options), tmp_path / "gaze")
    run.convert_back(tmp_path / "gaze", tmp_path / "back")
    return tmp_path / "back"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", ["qwen2_tied", "qwen2_untied", "qwen3_untied", "llama_untied", "siglip_odd", "siglip_headless"]
)
def test_every_file_comes_back_byte_for_byte(tmp_path, name, dtype):
    source = hf.save(name, tmp_path / "hf", dtype=dtype)
    (source / "tokenizer.json").write_text('{"kept": "as it is"}')
    (source / "preprocessor_config.json").write_text('{"do_resize": true}')
    assert "model.safetensors" in same_files(source, there_and_back(source, tmp_path))


def test_shards_keep_their_places(tmp_path):
    source = hf.save("qwen3_untied", tmp_path / "hf", shard="200KB")
    names = same_files(source, there_and_back(source, tmp_path))
    assert INDEX in names and sum(name.startswith("model-") for name in names) > 2


def test_a_tied_head_that_was_written_anyway_is_written_again(tmp_path):
    source = hf.save("qwen2_tied", tmp_path / "hf")

    def repeat(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}

    hf.edit_tensors(source, repeat)
    same_files(source, there_and_back(source, tmp_path))


def test_a_tied_head_that_differs_is_refused(tmp_path):
    source = hf.save("qwen2_tied", tmp_path / "hf")
    hf.edit_tensors(source, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        run.plan_directory(source)


def test_dtypes_may_differ_between_leaves_and_not_within_one(tmp_path):
    source = hf.save("qwen2_tied", tmp_path / "hf")

    def norms_to_half(tensors):
        return {name: t.astype(np.float16) if "norm" in name else t for name, t in tensors.items()}

    hf.edit_tensors(source, norms_to_half)
    same_files(source, there_and_back(source, tmp_path))
    one = "model.layers.1.mlp.up_proj.weight"
    hf.edit_tensors(source, lambda t: t | {one: t[one].astype(np.float16)})
    with pytest.raises(UserError, match=r"mlp\.up_proj\.weight is float16 and float32 in different layers"):
        run.plan_directory(source)


def test_of_a_whole_siglip_the_tower_comes_back(tmp_path):
    source = hf.save("siglip_whole", tmp_path / "hf")
    plan = run.plan_directory(source)
    assert any("text tower" in note for note in plan.opened["vision"].notes)
    back = there_and_back(source, tmp_path)
    before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert {f"vision_model.{name}" for name in after} == {n for n in before if n.startswith("vision_model.")}
    for name, values in after.items():
        np.testing.assert_array_equal(values, before[f"vision_model.{name}"])
    found, info = transformers.SiglipVisionModel.from_pretrained(back, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert found.config.num_hidden_layers == hf.VISION["num_hidden_layers"]


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """A language model and a tower, joined and exported: the directories and the plan."""
    where = tmp_path_factory.mktemp("joined")
    llm, tower = hf.save("qwen3_tied", where / "llm", dtype="bfloat16"), hf.save("siglip", where / "tower")
    plan = run.compose(llm, tower, gaze=GazeConfig((2, 2), context_tokens=2, top_k=3, select_per="kv_head"))
    run.write_plan(plan, where / "gaze")
    run.convert_back(where / "gaze", where / "back")
    return where, plan


def test_a_joined_model_has_its_parts_unchanged(joined):
    where, plan = joined
    same_files(where / "llm", where / "back" / "decoder")
    same_files(where / "tower", where / "back" / "vision")
    assert part_directories(where / "back").keys() == {"decoder", "vision"}
    assert "projector/linear_1/kernel" in plan.new and "context" in plan.new
    assert plan.config.dtype == "bfloat16"


def test_a_joined_model_comes_back_from_its_export(joined, tmp_path):
    where, plan = joined
    again = run.plan_directory(where / "back")
    assert again.config == plan.config
    run.write_plan(again, tmp_path / "again")
    first, second = load(where / "gaze", one_device()), load(tmp_path / "again", one_device())
    assert isinstance(first.config, MLLMConfig) and first.config.gaze.select_per == "kv_head"
    chex.assert_trees_all_equal(first.params, second.params, strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"]["decoder"].update(rope_theta=1e4), "describes another decoder"),
        (lambda s: s["parts"].update(vision="../../tower"), "which is not what was written"),
        (lambda s: s["model"].update(attention="sparse"), "Unknown config key attention"),
        (lambda s: s.update(format_version=4), "format_version 4"),
    ],
)
def test_settings_that_are_not_what_was_written_are_refused(joined, tmp_path, change, message):
    where, _ = joined
    copy = shutil.copytree(where / "back", tmp_path / "copy")
    path = copy / "gaze.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        run.plan_directory(copy)


def test_a_joined_model_may_be_cast_on_either_way(joined, tmp_path):
    where, _ = joined
    run.convert_back(where / "gaze", tmp_path / "cast", dtype="float16")
    run.write_plan(run.plan_directory(tmp_path / "cast"), tmp_path / "gaze")
    run.write_plan(run.plan_directory(where / "back", dtype="float16"), tmp_path / "direct")
    for directory in ("gaze", "direct"):
        found = load(tmp_path / directory, one_device())
        assert found.config.param_dtype == "float16"
        assert {leaf.dtype.name for leaf in jax.tree.leaves(found.params)} == {"float16"}


def test_what_is_converted_already_is_not_converted_again(joined, tmp_path):
    where, _ = joined
    with pytest.raises(UserError, match="is already converted"):
        run.plan_directory(where / "gaze")


def test_a_cast_is_made_only_when_asked_for_and_says_so_in_config_json(tmp_path):
    source = hf.save("qwen2_untied", tmp_path / "hf", dtype="float32")
    back = there_and_back(source, tmp_path, dtype="bfloat16")
    before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    for name, values in after.items():
        np.testing.assert_array_equal(values, before[name].astype(values.dtype))
        assert values.dtype.name == "bfloat16"
    assert transformers.AutoConfig.from_pretrained(back).dtype is torch.bfloat16


def test_a_cast_that_overflows_is_refused(tmp_path):
    source = hf.save("qwen2_untied", tmp_path / "hf")
    name = "model.layers.2.mlp.up_proj.weight"

    def enlarge(tensors):
        tensors[name][0, 0] = 1e6
        return tensors

    hf.edit_tensors(source, enlarge)
    with pytest.raises(UserError, match=rf"{name} has values too large for float16"):
        run.write_plan(run.plan_directory(source, dtype="float16"), tmp_path / "gaze")
    assert not (tmp_path / "gaze").exists() and not (tmp_path / "gaze.partial").exists()
