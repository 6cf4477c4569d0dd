"""A checkpoint that does not fit is refused before anything is written, and everything wrong is listed."""

import numpy as np
import pytest

from gaze_jax.convert import hub, run
from gaze_jax.convert.source import open_directory
from gaze_jax.errors import UserError
from gaze_jax.families import CONVERSIONS
from gaze_jax.models.config import GazeConfig
from tests.helpers.checkpoints import QWEN, SIGLIP, checkpoint


def test_everything_wrong_is_listed_at_once(tmp_path):
    def break_it(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((16, 8), np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((24, 16), np.int8)
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
        return tensors

    with pytest.raises(UserError) as error:
        open_directory(checkpoint(tmp_path / "hf", change=break_it))
    for part in (
        "model.norm.weight [16] is missing",
        "model.layers.0.self_attn.q_proj.weight is [16, 8] and should be [16, 16]",
        "model.layers.1.mlp.up_proj.weight is of dtype I8 and should be one of F32, F16, BF16",
        "model.layers.2.mlp.up_proj.weight [24, 16] is unexpected",
        "Nothing was converted",
    ):
        assert part in str(error.value)


def test_buffers_that_are_recomputed_are_left_out_by_name(tmp_path):
    def add(tensors):
        return tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}

    plan = run.plan_directory(checkpoint(tmp_path / "hf", change=add))
    assert plan.opened["decoder"].notes == (
        "1 tensors not converted: a buffer that is computed from rope_theta.",
    )


def test_a_name_with_and_without_its_prefix(tmp_path):
    def twice(tensors):
        return tensors | {"vision_model.post_layernorm.bias": tensors["post_layernorm.bias"]}

    with pytest.raises(UserError, match=r"post_layernorm\.bias under two names"):
        open_directory(checkpoint(tmp_path / "hf", SIGLIP, twice))


def test_the_family_is_that_of_config_json_whatever_the_path_says(tmp_path):
    directory = checkpoint(tmp_path / "clip-vit-large-qwen3", SIGLIP)
    assert open_directory(directory).conversion is CONVERSIONS["siglip_vision_model"]


def test_code_that_config_json_points_to_is_ignored(tmp_path):
    config = QWEN | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    directory = checkpoint(tmp_path / "hf", config)
    (directory / "evil.py").write_text("raise SystemExit('ran')")
    run.write_plan(run.plan_directory(directory), tmp_path / "gaze")
    assert not list((tmp_path / "gaze").rglob("*.py"))


def test_parts_are_not_taken_for_each_other(tmp_path):
    llm, tower = checkpoint(tmp_path / "llm"), checkpoint(tmp_path / "tower", SIGLIP)
    gaze = GazeConfig((2, 2), context_tokens=0)
    with pytest.raises(UserError, match="is an image tower but a language model is needed"):
        run.compose(tower, tower, gaze=gaze)
    with pytest.raises(UserError, match="is a language model but an image tower is needed"):
        run.compose(llm, llm, gaze=gaze)
    with pytest.raises(UserError, match="larger than the tower's 3x3 token grid"):
        run.compose(llm, tower, gaze=GazeConfig((6, 6)))


def test_new_parameters_depend_on_the_seed_alone(tmp_path):
    llm, tower = checkpoint(tmp_path / "llm"), checkpoint(tmp_path / "tower", SIGLIP)
    gaze = GazeConfig((2, 2), context_tokens=3)

    def kernel(seed):
        pending = run.compose(llm, tower, gaze=gaze, seed=seed).leaves["projector/linear_1/kernel"]
        out = np.empty(pending.leaf.shape, np.float32)
        pending.fill(out, 0)
        return out

    np.testing.assert_array_equal(kernel(0), kernel(0))
    assert not np.array_equal(kernel(0), kernel(1)) and kernel(0).std() > 0


def test_a_missing_file_or_directory(tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        open_directory(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        open_directory(tmp_path / "empty")


def test_a_name_that_is_no_hub_id_is_refused():
    for where in ("https://example.org/x", "nothing-here", "a/b/c", "./a/b", "../a", "/a", "a/b@"):
        with pytest.raises(UserError, match="is not a directory; give a checkpoint, or a Hub id"):
            hub.resolve(where)


def test_a_hub_id_is_downloaded_at_its_commit(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def snapshot_download(name, *, revision, allow_patterns):
        calls.append((name, revision, tuple(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve("Qwen/Qwen3-4B@" + "a" * 40) == tmp_path
    ((name, revision, patterns),) = calls
    assert (name, revision) == ("Qwen/Qwen3-4B", "a" * 40)
    assert "*.safetensors" in patterns and not any(pattern.endswith((".bin", ".py")) for pattern in patterns)
    assert hub.resolve(str(tmp_path)) == tmp_path  # a directory is never looked up


def test_a_failed_download_is_one_sentence(monkeypatch):
    import huggingface_hub

    def fail(*args, **options):
        raise OSError("no route to host\nand a trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"cannot be downloaded from the Hub \(no route to host\)\.$"):
        hub.resolve("Qwen/Qwen3-4B@" + "a" * 40)
