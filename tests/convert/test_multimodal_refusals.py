"""Multimodal checkpoints that are not what they should be, and towers that are elsewhere."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from gaze_jax.convert import run
from gaze_jax.convert.load import load, one_device, place
from gaze_jax.errors import UserError
from gaze_jax.families import conversion_of, siglip
from tests.helpers import hf, layouts

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.xdist_group("parity")


@pytest.mark.parametrize("write", [hf.save_cambrian, hf.save_llava_next])
def test_a_tower_that_is_elsewhere_must_be_named(tmp_path, monkeypatch, write):
    """One sentence names the field and the flag, whether the tower's sizes are known or not."""
    source = write(tmp_path / "hf")
    vision = conversion_of(json.loads((source / "config.json").read_text()), "x").names.vision
    field = "mm_vision_tower_aux_list" if write is hf.save_cambrian else "mm_vision_tower"
    with pytest.raises(UserError, match=r"does not describe its image tower 'tiny/siglip.*with --vision"):
        run.plan_directory(source)
    hf.edit_tensors(source, lambda t: {name: v for name, v in t.items() if not name.startswith(vision)})
    for name in ("siglip", "siglip2"):
        monkeypatch.setitem(siglip.TOWERS, name, layouts.TOWER)
    for read in (run.plan_directory, lambda directory: load(directory, one_device())):
        with pytest.raises(UserError, match=rf"holds no image tower; its {field} names .*with --vision"):
            read(source)
    plan = run.plan_directory(source, vision=layouts.tower())
    assert set(plan.opened) == {"model", "vision"} and plan.config.vision == layouts.TOWER
    features = np.asarray(place(plan, one_device()).params["vision"]["position_embedding"])
    np.testing.assert_array_equal(
        features, load_file(layouts.tower() / "model.safetensors")["embeddings.position_embedding.weight"]
    )


def test_vision_where_it_has_no_effect(tmp_path):
    """A model that has and describes its tower, a language model, and a directory that is no tower."""
    whole = hf.save("llava_onevision", tmp_path / "whole")
    with pytest.raises(UserError, match=r"--vision has no effect: .* with its image tower; drop it"):
        run.plan_directory(whole, vision=layouts.tower())
    llm = hf.save("qwen2_tied", tmp_path / "llm")
    with pytest.raises(UserError, match=r"--vision has no effect: .* is a language model; drop it"):
        run.plan_directory(llm, vision=layouts.tower())
    source = hf.save_cambrian(tmp_path / "cambrian")
    with pytest.raises(UserError, match="is not an image tower; give one with --vision"):
        run.plan_directory(source, vision=llm)
    with pytest.raises(UserError, match="is not a directory; give that of an image tower"):
        run.plan_directory(source, vision=tmp_path / "nothing")
    exported = tmp_path / "back"
    run.convert_back(layouts.converted("Cambrian-S")[1], exported)
    with pytest.raises(UserError, match=r"--vision has no effect: .* is an export of this project"):
        run.plan_directory(exported, vision=layouts.tower())


@pytest.mark.parametrize("layout", ["transformers 4", "in memory", "LLaVA-NeXT", "Cambrian-S"])
def test_everything_wrong_is_listed_at_once(tmp_path, layout):
    """Missing, misshapen and unexpected tensors of every part, by name; nothing is converted."""
    write, elsewhere = layouts.LAYOUTS[layout]
    source = write(tmp_path / "hf")
    names = {}

    def break_it(tensors):
        def find(end):
            return next(name for name in tensors if name.endswith(end))

        names["missing"] = [find("image_newline"), find("layers.1.layer_norm1.bias"), find("k_proj.bias")]
        names["wrong"] = [find("position_embedding.weight"), find("layers.2.mlp.up_proj.weight")]
        for name in names["missing"]:
            del tensors[name]
        for name in names["wrong"]:
            tensors[name] = tensors[name][:-1]
        return tensors | {"model.vision_resampler.weight": np.zeros(3, np.float32)}

    hf.edit_tensors(source, break_it)
    with pytest.raises(UserError) as error:
        run.plan_directory(source, vision=layouts.tower() if elsewhere else None)
    conversion = conversion_of(json.loads((source / "config.json").read_text()), "x")
    message = str(error.value)
    for name in names["missing"]:
        assert f"{conversion.canonical(name)} [" in message and "is missing" in message, name
    for name in names["wrong"]:
        assert f"{conversion.canonical(name)} is [" in message and "and should be [" in message, name
    assert "vision_resampler.weight [3] is unexpected" in message and "Nothing was converted" in message


def test_a_tensor_under_two_of_its_names(tmp_path):
    """The namings may not be mixed for one tensor."""
    source = hf.save("llava_onevision", tmp_path / "hf")
    hf.edit_tensors(source, lambda t: t | {"model.image_newline": t["image_newline"]})
    with pytest.raises(UserError, match="has image_newline under two names"):
        run.plan_directory(source)


def test_a_tied_head_that_was_written_anyway(tmp_path):
    """It is compared, and written again."""
    source = hf.save_llava_next(tmp_path / "hf", tied=True)
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    hf.edit_tensors(source, lambda tensors: tensors | {head: tensors[table]})
    run.write_plan(run.plan_directory(source, vision=layouts.tower(tied=True)), tmp_path / "gaze")
    run.convert_back(tmp_path / "gaze", tmp_path / "back")
    layouts.same_files(source, tmp_path / "back")
    hf.edit_tensors(source, lambda tensors: tensors | {head: tensors[table] + 1})
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        run.plan_directory(source, vision=layouts.tower(tied=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"]["decoder"].update(rope_theta=1e4), "describes another decoder"),
        (lambda s: s["model"]["vision"].update(num_heads=2), "describes another vision"),
        (lambda s: s["model"]["views"].update(max_tiles=4), "describes another views"),
        (lambda s: s["model"]["gaze"].update(context_tokens=2), r"gaze\.safetensors does not exist"),
        (lambda s: s["parts"].update(model="elsewhere"), "which is not what was written"),
    ],
)
def test_settings_that_do_not_fit_the_export_are_refused(tmp_path, change, message):
    """gaze.json cannot make another model of the files beside it."""
    run.convert_back(layouts.converted("transformers 5")[1], tmp_path / "back")
    path = tmp_path / "back" / "gaze.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        run.plan_directory(tmp_path / "back")


def test_a_damaged_part_is_named(tmp_path):
    """Files beside a whole model are under checksums like the rest."""
    source = hf.save("llava_onevision", tmp_path / "hf")
    run.write_plan(run.plan_directory(source), tmp_path / "gaze")
    path = tmp_path / "gaze" / "model" / "config.json"
    path.write_bytes(path.read_bytes().replace(b"anyres_max_9", b"anyres_max_8"))
    with pytest.raises(UserError, match=r"model/config\.json"):
        load(tmp_path / "gaze", one_device())
