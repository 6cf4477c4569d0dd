import dataclasses

import pytest

from gaze_jax.config import from_dict, to_dict
from gaze_jax.core.schedule import Schedule
from gaze_jax.corpora.config import CorpusConfig
from gaze_jax.corpora.digits import DigitsConfig
from gaze_jax.errors import UserError
from gaze_jax.models.config import GazeConfig, MLLMConfig
from gaze_jax.models.dummy import DUMMY
from gaze_jax.train.changes import GazeChanges, ModelChanges, changed
from gaze_jax.train.config import Experiment, complete, parse, read_data, resolve
from tests.helpers.experiments import tiny


def test_a_completed_config_has_every_field_so_that_a_flag_can_set_it():
    assert set(tiny()) == {field.name for field in dataclasses.fields(Experiment)}
    assert tiny().data.background == "texture"
    assert tiny().model.gaze.get_type("region") is tuple
    # An empty field knows what it may be set to.
    assert tiny().optimizer.get_type("adam_learning_rate") is float
    assert parse(tiny()).optimizer.adam_learning_rate is None


def test_arms_differ_in_what_they_say_they_differ_in():
    arms = {arm: parse(tiny(arm=arm)) for arm in ("gaze", "dense_context", "dense", "sparse_start")}
    gaze = {arm: experiment.model.gaze for arm, experiment in arms.items()}
    assert [gaze[arm].top_k for arm in arms] == [1, None, None, 1]
    assert [gaze[arm].context_tokens for arm in arms] == [1, 1, 0, 1]
    assert arms["sparse_start"].schedule == Schedule(0.0, 0.0) != arms["gaze"].schedule
    # Nothing else: with these put back, all four are one experiment.
    same = {
        dataclasses.replace(
            e,
            arm="gaze",
            schedule=arms["gaze"].schedule,
            model=dataclasses.replace(e.model, gaze=gaze["gaze"]),
        )
        for e in arms.values()
    }
    assert same == {arms["gaze"]}


def test_resolving_twice_changes_nothing():
    for arm in ("gaze", "dense", "sparse_start"):
        once = parse(tiny(arm=arm))
        assert resolve(once) == once


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"arm": "sparse"}, "arm='sparse' must be one of"),
        ({"model.gaze.top_k": 0}, r"gaze.top_k=0 must be at least 1"),
        ({"model.gaze.top_k": 5}, r"model.gaze.top_k=5 must be at most 4, the regions of one image"),
        ({"model.gaze.region": (5, 2)}, r"region"),
        ({"model.vision": None}, r"model.vision is empty; training needs an image tower"),
        ({"model.vision.image_size": 25}, r"model.vision.image_size=25 must be 20"),
        ({"model.decoder.vocab_size": 100}, r"model.decoder.vocab_size=100 must be at least"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"eval.samples": 1}, "eval.samples=1 must be at least 2"),
        ({"eval.batch_size": 0}, "eval.batch_size=0 must be at least 1"),
        ({"seed": 2**32}, r"seed=4294967296 must be less than 2\*\*32"),
        ({"optimizer.warmup_steps": 6}, "optimizer.warmup_steps=6 must be less than steps=6"),
        ({"optimizer.name": "sgd"}, "optimizer.name='sgd' must be one of"),
        ({"steps": "many"}, "steps='many' must be of type int"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(change, sentence):
    config = tiny()
    with config.ignore_type(), config.unlocked():
        config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=sentence) as error:
        parse(config)
    assert "\n" not in str(error.value)


def test_an_unknown_key_is_named_with_its_path():
    plain = tiny().to_dict()
    plain["model"]["gaze"]["topk"] = 3
    with pytest.raises(UserError, match=r"Unknown config key model.gaze.topk; did you mean model.gaze.top_k"):
        complete(plain)


CHANGES = {
    "init_from": "ckpt",
    "steps": 0,
    "model": {"gaze": {"top_k": 2, "context_tokens": 1}, "param_dtype": "bfloat16"},
    "data": {"path": "my.jsonl", "epochs": 2.0},
    "optimizer": {"warmup_steps": 0},
}


def test_a_model_without_a_decoder_is_the_checkpoints_with_changes():
    completed = complete(CHANGES)
    assert completed.data.get_type("max_tokens") is int and completed.model.gaze.region is None
    experiment = parse(completed, DUMMY)
    gaze = dataclasses.replace(DUMMY.gaze, context_tokens=1)
    assert experiment.model == dataclasses.replace(DUMMY, gaze=gaze, param_dtype="bfloat16")
    assert isinstance(experiment.data, CorpusConfig) and experiment.data.path == "my.jsonl"
    # What a run stores has the model itself, and needs no checkpoint to be read again.
    assert parse(to_dict(experiment)) == experiment
    with pytest.raises(UserError, match=r"model has no decoder.*name one in init_from"):
        parse(completed)


def test_what_may_be_changed_are_fields_of_the_model():
    for changes, config in ((GazeChanges, GazeConfig), (ModelChanges, MLLMConfig)):
        names = {field.name for field in dataclasses.fields(changes)}
        assert names <= {field.name for field in dataclasses.fields(config)}
    for field in dataclasses.fields(GazeChanges):
        others = {"region": (1, 2), "video_region": (2, 1, 1), "top_k": 3, "context_tokens": 0}
        others |= {"visual_causal": False, "query_block": 7, "select_per": "kv_head", "newlines": "region"}
        value = others.get(field.name, getattr(GazeConfig(), field.name))
        found = changed(DUMMY, ModelChanges(gaze=GazeChanges(**{field.name: value})))
        assert getattr(found.gaze, field.name) == value


@pytest.mark.parametrize(
    ("section", "change", "sentence"),
    [
        ("data", {"pth": "x"}, r"Unknown config key data.pth; did you mean data.path\?"),
        ("data", {"rows": 4}, r"Unknown config key data.rows; did you mean data.row\?"),
        ("model", {"dypte": "float32"}, r"Unknown config key model.dypte; did you mean model.dtype\?"),
        ("model", {"gaze": {"top_k": "2"}}, r"Config field model.gaze.top_k='2' must be of type int"),
        ("model", {"gaze": {"region": (9, 9)}}, r"model: gaze.region=\(9, 9\) is larger"),
        ("data", {"path": "x", "too_long": "cut"}, r"data.too_long='cut' must be one of"),
        ("data", {"path": "x", "too_long": "skip"}, r"data.too_long='skip' must be 'error' without"),
        ("data", {"path": "x", "sources": ({"path": "y"},)}, r"data.path='x' must be empty if data.sources"),
        ("data", {"path": "", "sources": ({"path": "y", "weight": 0.0},)}, "must be of positive weights"),
        ("data", {"path": "x", "epochs": None}, r"steps=0 takes as many steps as data.epochs need"),
        ("optimizer", {"frozen": ("tower",)}, r"optimizer.frozen names tower; the parts are vision"),
        ("optimizer", {"part_rates": {"vision": 0.0}}, r"part_rates.vision=0.0 must be positive"),
        (
            "optimizer",
            {"part_rates": {"vision": 0.5}, "frozen": ("vision",)},
            r"part_rates.vision=0.5 has no effect, since vision is frozen",
        ),
        ("optimizer", {"warmup_fraction": 0.1, "warmup_steps": 5}, r"contradicts optimizer.warmup_fraction"),
    ],
)
def test_a_wrong_setting_of_a_corpus_or_of_changes_is_named(section, change, sentence):
    config = CHANGES | {section: CHANGES.get(section, {}) | change}
    with pytest.raises(UserError, match=sentence):
        parse(complete(config), DUMMY)


def test_digit_scenes_and_a_corpus_are_told_apart_by_their_keys():
    assert isinstance(read_data(tiny()), DigitsConfig)
    assert isinstance(read_data(complete(CHANGES)), CorpusConfig)
    assert isinstance(from_dict(Experiment, to_dict(parse(tiny()))).data, DigitsConfig)
