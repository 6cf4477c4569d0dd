"""What was trained here goes to transformers too, and comes back."""

import chex
import pytest
import tokenizers

from gaze_jax.convert import run, verify
from gaze_jax.convert.export import part_directories
from gaze_jax.convert.load import load, one_device
from gaze_jax.corpora.phrases import build_tokenizer
from gaze_jax.errors import UserError
from tests.helpers.experiments import save_untrained, tiny_experiment

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("parity")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    where = tmp_path_factory.mktemp("run")
    save_untrained(tiny_experiment(), where / "run")
    run.convert_back(where / "run", where / "back")
    return where


def test_transformers_loads_every_tensor(exported):
    places = part_directories(exported / "back")
    for part, kind in (
        ("decoder", transformers.AutoModelForCausalLM),
        ("vision", transformers.SiglipVisionModel),
    ):
        _, info = kind.from_pretrained(places[part], output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    found = tokenizers.Tokenizer.from_file(str(places["decoder"] / "tokenizer.json"))
    assert found.to_str() == tokenizers.Tokenizer.from_str(build_tokenizer().json).to_str()


def test_it_computes_the_same(exported):
    stages = verify.verify(exported / "run", part_directories(exported / "back"))
    assert (stages[0].name, stages[-1].name) == ("image tower", "logits")
    verify.require_equal(stages)


def test_it_comes_back(exported, tmp_path):
    run.write_plan(run.plan_directory(exported / "back"), tmp_path / "gaze")
    before, after = load(exported / "run", one_device()), load(tmp_path / "gaze", one_device())
    assert before.config.decoder == after.config.decoder and before.config.gaze == after.config.gaze
    chex.assert_trees_all_equal(before.params, after.params, strict=True)


def test_a_decoder_of_no_family_is_refused(tmp_path):
    save_untrained(tiny_experiment(**{"model.decoder.qkv_bias": True}), tmp_path / "run")
    with pytest.raises(UserError, match="transformers has no class for it"):
        run.convert_back(tmp_path / "run", tmp_path / "back")
    assert not (tmp_path / "back").exists()
