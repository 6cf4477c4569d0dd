"""Configurations: refused in one sentence, and read from nested mappings without silent defaults."""

import json

import pytest

from gaze_jax.config import from_dict, to_dict
from gaze_jax.models import DUMMY, GazeConfig, MLLMConfig, dummy
from tests.helpers import models

REFUSED = {
    "region larger than the grid": (
        {"gaze": {"region": (6, 2)}},
        r"gaze.region=\(6, 2\) is larger than the tower's 5x5 token grid \(image_size 20 / patch_size 4\)",
    ),
    "empty region": ({"gaze": {"region": (0, 2)}}, r"gaze.region=\(0, 2\) must be two sizes"),
    "three sizes": ({"gaze": {"region": (2, 2, 2)}}, r"gaze.region=\(2, 2, 2\) must be two sizes"),
    "negative context": ({"gaze": {"context_tokens": -1}}, "gaze.context_tokens=-1 must not be negative"),
    "top_k 0": ({"gaze": {"top_k": 0}}, "gaze.top_k=0 must be at least 1 region; use None for dense"),
    "select_per": ({"gaze": {"select_per": "token"}}, "gaze.select_per='token' must be one of"),
    "descriptor": ({"gaze": {"descriptor": "max"}}, "gaze.descriptor='max' must be one of"),
    "scope": ({"gaze": {"visual_scope": "image"}}, "gaze.visual_scope='image' must be one of"),
    "query block": ({"gaze": {"query_block": 0}}, "gaze.query_block=0 must be at least 1"),
    "heads": (
        {"decoder": {"num_heads": 3}},
        "decoder.num_heads=3 must be a multiple of decoder.num_kv_heads=2",
    ),
    "odd head dim": ({"decoder": {"head_dim": 7}}, "decoder.head_dim=7 must be even"),
    "tower heads": ({"vision": {"num_heads": 5}}, "vision.width=24 must be a multiple of vision.num_heads=5"),
    "tiny image": ({"vision": {"image_size": 3}}, "vision.image_size=3 must be at least vision.patch_size=4"),
    "dtype": ({"dtype": "float16"}, "dtype='float16' must be one of"),
    "param dtype": ({"param_dtype": "int8"}, "param_dtype='int8' must be one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nonsense_is_refused_when_the_config_is_made(name):
    """The sentence names the field, its value and what would do."""
    changes, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        models.changed(DUMMY, **changes)


def test_an_unknown_implementation_is_refused_by_the_op():
    """The model raises the op's sentence; nothing falls back."""
    images, streams = models.toy()
    with pytest.raises(ValueError, match="gaze_prefill has no implementation 'cuda'"):
        models.forward(dummy(prefill_implementation="cuda"))(models.parameters(DUMMY), images, streams, None)


def test_round_trip_through_json():
    """to_dict is JSON-ready and from_dict brings every field back, tuples included."""
    config = models.changed(DUMMY, gaze={"top_k": None, "region": (2, 3)}, remat=True)
    assert from_dict(MLLMConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_defaults_may_be_left_out():
    """Only fields without a default are required."""
    values = to_dict(DUMMY)
    del values["dtype"], values["decoder"]["rope_theta"]
    values["gaze"] = {"region": [2, 2]}
    config = from_dict(MLLMConfig, values)
    assert config.gaze == GazeConfig(region=(2, 2))
    assert config.decoder.rope_theta == 1e6


BROKEN = {
    "typo": (
        lambda v: v["gaze"].update(topk=3),
        KeyError,
        r"Unknown config key gaze.topk; did you mean gaze.top_k\?",
    ),
    "unknown": (lambda v: v.update(zzz=3), KeyError, "Unknown config key zzz; known: decoder, vision, gaze"),
    "missing": (lambda v: v["decoder"].pop("width"), KeyError, "Config key decoder.width is missing"),
    "string": (lambda v: v["decoder"].update(depth="3"), TypeError, "decoder.depth='3' must be of type int"),
    "float for int": (
        lambda v: v["decoder"].update(depth=3.0),
        TypeError,
        "decoder.depth=3.0 must be of type int",
    ),
    "bool for int": (
        lambda v: v["decoder"].update(depth=True),
        TypeError,
        "decoder.depth=True must be of type int",
    ),
    "int for bool": (lambda v: v.update(remat=1), TypeError, "remat=1 must be of type bool"),
    "short tuple": (lambda v: v["gaze"].update(region=[2]), TypeError, r"gaze.region=\[2\] must be of type"),
    "wrong element": (
        lambda v: v["gaze"].update(region=[2, "2"]),
        TypeError,
        r"gaze.region\[1\]='2' must be",
    ),
    "section": (lambda v: v.update(gaze=3), TypeError, "Config section gaze=3 must be a mapping"),
    "none": (
        lambda v: v["gaze"].update(select_per=None),
        TypeError,
        "gaze.select_per=None must be of type str",
    ),
    "value": (lambda v: v["gaze"].update(top_k=0), ValueError, "gaze.top_k=0 must be at least 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_from_dict_names_the_path_of_what_is_wrong(name):
    """Unknown, missing and mistyped entries each raise with their full path."""
    change, error, match = BROKEN[name]
    values = to_dict(DUMMY)
    change(values)
    with pytest.raises(error, match=match):
        from_dict(MLLMConfig, values)


def test_an_integer_does_for_a_float():
    """rope_theta: 10000 is a float; the config holds 10000.0."""
    values = to_dict(DUMMY)
    values["decoder"]["rope_theta"] = 10000
    theta = from_dict(MLLMConfig, values).decoder.rope_theta
    assert theta == 1e4 and type(theta) is float
