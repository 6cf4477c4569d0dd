import dataclasses

import pytest

from gaze_jax.core.schedule import Schedule
from gaze_jax.errors import UserError
from gaze_jax.train.config import Experiment, complete, parse, resolve
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
