"""Configs and tokenizers with something missing, of another type or absurd: read, or one sentence."""

import json
import shutil

import numpy as np
import pytest

from gaze_jax.convert.load import one_device, place
from gaze_jax.convert.run import plan_directory
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError
from tests.helpers import multimodal

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("parity")]

VALUES = (None, 0, -1, 1, 2**40, 1.5, True, "", "x", [], {}, [[]], {"a": 1}, "default", 1e400)


def edited(value, rng):
    """The same JSON with one place removed or set to another value."""
    places = []

    def walk(node, path):
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((*path, key))
            if isinstance(inner, dict | list) and len(inner) < 60:
                walk(inner, (*path, key))

    walk(value, ())
    value = json.loads(json.dumps(value))
    *path, last = places[int(rng.integers(len(places)))]
    node = value
    for key in path:
        node = node[key]
    if rng.random() < 0.3:
        del node[last]
    else:
        node[last] = VALUES[int(rng.integers(len(VALUES)))]
    return value, [*path, last]


@pytest.mark.parametrize("family", ["llava_onevision", "cambrian_s"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("seed", range(4))
def test_five_hundred_edits(family, name, seed, tmp_path):
    directory = multimodal.write(family, tmp_path / "whole")
    if not (directory / name).exists():
        (directory / name).write_text(json.dumps({"added_tokens_decoder": {}, "pad_token": "<|im_end|>"}))
    original = json.loads((directory / name).read_text())
    work = shutil.copytree(directory, tmp_path / "work")
    rng = np.random.default_rng(seed)
    for _ in range(22):
        value, path = edited(original, rng)
        (work / name).write_text(json.dumps(value))
        try:
            found = place(plan_directory(work), one_device())
            if found.tokenizer is not None:
                Tokenizer(found.tokenizer)
        except UserError as error:
            assert "\n" not in str(error), (path, str(error))
        except ValueError as error:  # what is said of a tokenizer gets its file's name where it is loaded
            assert str(error).startswith("Tokenizer"), (path, str(error))
