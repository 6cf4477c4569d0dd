"""Whole multimodal checkpoints in three layouts: in, back byte for byte, and equal to the original."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gaze_jax.convert import manifest, run, verify
from gaze_jax.convert.checkpoint import flat_leaves
from gaze_jax.convert.export import part_directories
from gaze_jax.convert.load import load, one_device, place
from gaze_jax.convert.shards import INDEX
from gaze_jax.core.layout import ViewConfig
from gaze_jax.core.selection import Selection
from gaze_jax.core.streams import text_streams
from gaze_jax.errors import UserError
from gaze_jax.families import conversion_of, siglip
from gaze_jax.models import MLLM
from gaze_jax.models.config import VisionConfig
from tests.helpers import hf, layouts

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.xdist_group("parity")

NFP = "nfp_head, which predicts the next frame in training and has no part in answers"


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_file_comes_back_byte_for_byte(tmp_path, layout):
    """Weights, configs, tokenizer, chat template and processor settings; a separate tower too."""
    source, gaze = layouts.converted(layout)
    run.convert_back(gaze, tmp_path / "back")
    assert {"model.safetensors", "preprocessor_config.json"} <= layouts.same_files(source, tmp_path / "back")
    found = manifest.read(gaze)
    unstacked = "no tower" in layout
    assert set(found.sources) == ({"model", "vision"} if unstacked else {"model"}) and not found.new
    if unstacked:
        assert "model.safetensors" in layouts.same_files(
            layouts.tower("tied" in layout), tmp_path / "back" / "vision"
        )
    again = run.plan_directory(tmp_path / "back")  # gaze.json knows what config.json does not
    assert again.config == found.model
    assert {name: pending.leaf for name, pending in again.leaves.items()} == found.leaves


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *(("transformers 4", "float16"), ("LLaVA-NeXT", "float16"), ("Cambrian-S", "bfloat16")),
        pytest.param("transformers 4", "bfloat16", marks=pytest.mark.long),
        pytest.param("LLaVA-NeXT", "bfloat16", marks=pytest.mark.long),
        pytest.param("Cambrian-S", "float16", marks=pytest.mark.long),
    ],
)
def test_published_dtypes_come_back_byte_for_byte(tmp_path, layout, dtype):
    """LLaVA-OneVision is published in float16, Cambrian-S in bfloat16."""
    write, elsewhere = layouts.LAYOUTS[layout]
    source = write(tmp_path / "hf", dtype=dtype)
    plan = run.plan_directory(source, vision=layouts.tower() if elsewhere else None)
    assert plan.config.param_dtype == dtype
    assert plan.config.dtype == ("float32" if dtype == "float16" else dtype)
    run.write_plan(plan, tmp_path / "gaze")
    run.convert_back(tmp_path / "gaze", tmp_path / "back")
    layouts.same_files(source, tmp_path / "back")


def logits(model, tokens, valid):
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=torch.tensor(valid.astype(np.int64))).logits.numpy()


@functools.cache
def text_logits(config):
    return jax.jit(lambda params, s: MLLM(config).apply({"params": params}, None, s, Selection())[0])


# Of the others the files come back, and test_verify_reports_every_stage runs some.
OTHER_LAYOUTS = ("transformers 5, tied", "in memory", "LLaVA-NeXT", "Cambrian-S, tied, no tower")


@pytest.mark.parametrize(
    "layout",
    [pytest.param(n, marks=pytest.mark.long) if n in OTHER_LAYOUTS else n for n in layouts.LAYOUTS],
)
def test_text_through_the_whole_model(layout):
    """Logits of a text prompt, one row padded, are transformers'; the tokenizer and its files are found."""
    source, gaze = layouts.converted(layout)
    found = load(gaze, one_device())
    assert found.tokenizer == (source / "tokenizer.json").read_text()
    assert (found.files / "chat_template.jinja").read_text() == "{{ messages }}"
    tokens = np.random.default_rng(1).integers(0, hf.TEXT["vocab_size"], (2, 20))
    valid = np.arange(20) < np.array([[20], [11]])
    theirs = logits(layouts.original(layout), tokens, valid)
    streams = text_streams(jnp.asarray(tokens), jnp.asarray(valid))
    ours = np.asarray(text_logits(found.config)(found.params, streams))
    np.testing.assert_allclose(ours[valid], theirs[valid], atol=1e-4, rtol=0)
    assert np.abs(theirs[valid]).max() > 1  # or 1e-4 would mean little


@pytest.mark.parametrize(
    "layout",
    [
        "transformers 4",
        "transformers 5, a layer early",
        "LLaVA-NeXT, tied",
        "Cambrian-S, wrapped",
        "Cambrian-S, no tower",
    ],
)
def test_verify_reports_every_stage(layout):
    """Tower, projector, newline and every layer of the decoder, against the original's own tensors."""
    source, gaze = layouts.converted(layout)
    originals = {"model": source} | (
        {"vision": layouts.tower("tied" in layout)} if "no tower" in layout else {}
    )
    stages = verify.verify(gaze, originals)
    names = ["image tower", "projector", "newline", *(f"decoder layer {i}" for i in range(3)), "logits"]
    assert [stage.name for stage in stages] == names
    assert all(stage.relative < 1e-5 for stage in stages) and stages[-1].top1 == 1


@pytest.mark.parametrize(
    ("layout", "tensor", "stage"),
    [
        ("transformers 5", "multi_modal_projector.linear_2.bias", "projector"),
        ("LLaVA-NeXT", "model.image_newline", "newline"),
        (
            "LLaVA-NeXT",
            "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc2.bias",
            "image tower",
        ),
        ("Cambrian-S", "model.mm_projector.0.weight", "projector"),
        ("Cambrian-S, no tower", "model.layers.2.self_attn.v_proj.bias", "decoder layer 2"),
    ],
)
def test_verify_finds_one_wrong_tensor(tmp_path, layout, tensor, stage):
    """A tensor of the original is changed after conversion: its stage, and none before it, says so."""
    _, gaze = layouts.converted(layout)
    write, _ = layouts.LAYOUTS[layout]
    other = write(tmp_path / "other")
    hf.edit_tensors(other, lambda tensors: tensors | {tensor: tensors[tensor] + 0.01})
    originals = {"model": other} | ({"vision": layouts.tower()} if "no tower" in layout else {})
    stages = verify.verify(gaze, originals)
    with pytest.raises(UserError, match="The models differ"):
        verify.require_equal(stages)
    wrong = [found.name for found in stages if found.relative > 1e-5]
    assert wrong[0] == stage


def test_a_file_that_kept_the_towers_last_layer_is_verified_too(tmp_path):
    """LLaVA-NeXT's code deletes it on loading, whether it is in the file or not."""
    source = hf.save_llava_next(tmp_path / "source")
    mine, theirs = "model.vision_tower.", "model.vision_tower.vision_tower.vision_model."
    whole = hf.model("llava_onevision_penultimate").state_dict()
    last = {theirs + n.removeprefix(mine): t.numpy() for n, t in whole.items() if n.startswith(mine)}
    hf.edit_tensors(source, lambda tensors: last | tensors)
    run.write_plan(run.plan_directory(source, vision=layouts.tower()), tmp_path / "gaze")
    assert any("encoder.layers.2." in name for name in load_file(source / "model.safetensors"))
    verify.require_equal(verify.verify(tmp_path / "gaze", {"model": source}))


def test_the_three_namings_of_transformers_are_one_model(tmp_path):
    """Whatever a file calls its tensors, the parameters are equal bit for bit."""
    params = []
    for index, new in enumerate((str, hf.hub_name, hf.memory_name)):
        source = hf.rename(hf.save("llava_onevision", tmp_path / str(index)), new)
        params.append(load(source, one_device()).params)
    chex.assert_trees_all_equal(*params[:2], strict=True)
    chex.assert_trees_all_equal(*params[1:], strict=True)


@pytest.mark.parametrize("top", [None, False, True])
@pytest.mark.parametrize("inner", [None, False, True])
def test_tying_is_resolved_as_transformers_does(top, inner):
    """tie_word_embeddings may stand at either level, or at none."""
    text = hf.TEXT | {"model_type": "qwen2"} | ({} if inner is None else {"tie_word_embeddings": inner})
    config = {
        "model_type": "llava_onevision",
        "text_config": text,
        "vision_config": hf.VISION | {"model_type": "siglip_vision_model"},
        "image_grid_pinpoints": hf.pinpoints(),
    } | ({} if top is None else {"tie_word_embeddings": top})
    theirs = transformers.LlavaOnevisionConfig(**config).tie_word_embeddings
    assert conversion_of(config, "x").read_config(config).decoder.tie_embeddings == theirs


def test_default_pinpoints_are_those_of_transformers():
    """36 canvases in the same order."""
    sizes = hf.VISION | {"image_size": 384, "patch_size": 14, "model_type": "siglip_vision_model"}
    config = {"model_type": "llava_onevision", "text_config": hf.TEXT, "vision_config": sizes}
    theirs = transformers.LlavaOnevisionConfig(vision_config=sizes).image_grid_pinpoints
    assert conversion_of(config, "x").read_config(config).views.canvases == tuple(map(tuple, theirs))


def test_views_of_the_small_models(tmp_path):
    """What the processors will be told, of each layout."""
    four = tuple(map(tuple, hf.pinpoints()))
    llava = ViewConfig("llava_onevision", four, max_tiles=9, frame_side=3)
    assert manifest.read(layouts.converted("transformers 4")[1]).model.views == llava
    assert manifest.read(layouts.converted("LLaVA-NeXT")[1]).model.views.max_tiles == 9
    odd = run.plan_directory(hf.save("llava_onevision_odd", tmp_path / "odd")).config
    assert odd.views.canvases[1] == (20, 40) and odd.views.frame_side == 3 and odd.gaze.region == (5, 5)
    shrunk = run.plan_directory(hf.save("llava_onevision_max_1", tmp_path / "one")).config
    assert shrunk.views.max_tiles == 1
    tiles = tuple((h * 24, w * 24) for w in range(1, 5) for h in range(1, 5) if h * w <= 4)
    cambrian = ViewConfig("cambrian_s", tiles, image_side=6, frame_side=3)
    assert manifest.read(layouts.converted("Cambrian-S")[1]).model.views == cambrian


@pytest.mark.parametrize("shards", [1, 3])
def test_the_next_frame_head_is_left_out_and_said_so(tmp_path, capsys, shards):
    """Everything else comes back, also where the head had a shard of its own, and the index fits."""
    source = hf.save_cambrian(tmp_path / "hf", nfp=True)
    before = load_file(source / "model.safetensors")
    if shards > 1:
        hf.shard(source, lambda name: 2 if "nfp_head" in name else int("layers.2" in name))
    plan = run.plan_directory(source, vision=layouts.tower())
    assert f"4 tensors not converted: {NFP}" in run.summary(plan)
    run.write_plan(plan, tmp_path / "gaze")
    run.convert_back(tmp_path / "gaze", tmp_path / "back")
    assert f"model: 4 tensors not converted: {NFP}" in capsys.readouterr().out
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) == max(1, shards - 1)
    after = {name: values for file in files for name, values in load_file(file).items()}
    assert set(after) == {name for name in before if "nfp_head" not in name}
    for name, values in after.items():
        np.testing.assert_array_equal(values, before[name])
    if shards > 1:
        index = json.loads((tmp_path / "back" / INDEX).read_text())
        assert set(index["weight_map"]) == set(after)
        untouched = "model-00002-of-00003.safetensors"
        assert (source / untouched).read_bytes() == (tmp_path / "back" / untouched).read_bytes()
    assert (source / "config.json").read_bytes() == (tmp_path / "back" / "config.json").read_bytes()
    assert run.plan_directory(tmp_path / "back").config == plan.config


def test_shards_keep_their_places(tmp_path):
    """Files and index of a sharded whole model."""
    source = hf.save("llava_onevision", tmp_path / "hf", shard="200KB")
    run.write_plan(run.plan_directory(source), tmp_path / "gaze")
    run.convert_back(tmp_path / "gaze", tmp_path / "back")
    names = layouts.same_files(source, tmp_path / "back")
    assert INDEX in names and sum(name.startswith("model-") for name in names) > 2


def test_a_tower_in_the_file_is_the_one_that_is_used(tmp_path):
    """It was trained: --vision then only describes it, and needs no weights."""
    source = hf.save_llava_next(tmp_path / "hf")
    described = tmp_path / "described"
    described.mkdir()
    (described / "config.json").write_bytes((layouts.tower() / "config.json").read_bytes())
    name = "model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight"
    hf.edit_tensors(source, lambda tensors: tensors | {name: tensors[name] + 1})
    plan = run.plan_directory(source, vision=described)
    found = np.asarray(place(plan, one_device()).params["vision"]["position_embedding"])
    np.testing.assert_array_equal(found, load_file(source / "model.safetensors")[name])


def test_a_published_tower_needs_no_description(tmp_path, monkeypatch):
    """Its sizes are in a table, and every tensor must have them."""
    monkeypatch.setitem(siglip.TOWERS, "siglip", layouts.TOWER)
    source = hf.save_llava_next(tmp_path / "hf")
    assert run.plan_directory(source).config.vision == layouts.TOWER
    found = load(source, one_device())
    assert found.files == source and found.config.vision == layouts.TOWER
    monkeypatch.setitem(siglip.TOWERS, "siglip", VisionConfig(28, 4, 48, 2, 4, 80))
    hf.edit_config(source, image_grid_pinpoints="(1x1),...,(2x2)")
    with pytest.raises(UserError, match=r"position_embedding\.weight is \[36, 48\] and should be \[49, 48\]"):
        run.plan_directory(source)


def test_a_cast_on_either_way(tmp_path):
    """--dtype changes every tensor and what config.json says at each level; transformers loads the result."""
    source = layouts.hub_layout(tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"] | {"torch_dtype": "float32"}  # as transformers 4 repeated it
    hf.edit_config(source, text_config=text)
    run.write_plan(run.plan_directory(source), tmp_path / "gaze")
    run.convert_back(tmp_path / "gaze", tmp_path / "back", dtype="bfloat16")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["dtype"], config["text_config"]["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert config["text_config"]["vocab_size"] == hf.TEXT["vocab_size"]
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    for name, values in after.items():
        np.testing.assert_array_equal(values, before[name].astype(values.dtype))
        assert values.dtype.name == "bfloat16"
    found, info = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and found.dtype is torch.bfloat16
    plan = run.plan_directory(source, dtype="bfloat16")
    assert {pending.leaf.dtype for pending in plan.leaves.values()} == {"bfloat16"}
    assert (plan.config.dtype, plan.config.param_dtype) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize("layout", ["LLaVA-NeXT", "Cambrian-S, no tower"])
def test_an_export_is_read_again(tmp_path, layout):
    """With its settings, which may have changed since, and verified against the original."""
    _, gaze = layouts.converted(layout)
    run.convert_back(gaze, tmp_path / "back")
    settings = json.loads((tmp_path / "back" / "gaze.json").read_text())
    settings["model"]["gaze"]["top_k"] = 3
    (tmp_path / "back" / "gaze.json").write_text(json.dumps(settings))
    again = load(tmp_path / "back", one_device())
    assert again.config.gaze.top_k == 3 and again.files == tmp_path / "back"
    first, second = flat_leaves(load(gaze, one_device()).params), flat_leaves(again.params)
    for name, values in first.items():
        np.testing.assert_array_equal(np.asarray(values), np.asarray(second[name]), err_msg=name)
    verify.require_equal(verify.verify(gaze, part_directories(tmp_path / "back")))
