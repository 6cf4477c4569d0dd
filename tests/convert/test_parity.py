"""The converted model is the original: logits, features and greedy answers of transformers."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.convert import verify
from gaze_jax.convert.load import load, one_device, place
from gaze_jax.convert.run import plan_directory
from gaze_jax.core.selection import Selection
from gaze_jax.core.streams import text_streams
from gaze_jax.errors import UserError
from gaze_jax.families import feature_tower
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.sampling import SamplingParams
from gaze_jax.models import MLLM
from gaze_jax.models.vision import VisionTower
from tests.helpers import hf
from tests.helpers.engines import generated_row

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.xdist_group("parity")

ROWS, LENGTH, SHORT = 3, 20, 11


@functools.cache
def directory(name: str) -> Path:
    where = tempfile.TemporaryDirectory()
    keep.append(where)
    return hf.save(name, Path(where.name) / name)


keep: list[tempfile.TemporaryDirectory] = []


@functools.cache
def loaded(name: str):
    return load(directory(name), one_device())


@pytest.mark.parametrize("name", hf.DECODERS)
def test_logits(name):
    found = loaded(name)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, hf.TEXT["vocab_size"], (ROWS, LENGTH))
    valid = np.ones((ROWS, LENGTH), bool)
    valid[1, SHORT:] = False  # padded on the right
    valid[2, :SHORT] = False  # and on the left
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    with torch.no_grad():
        theirs = hf.model(name)(
            torch.tensor(tokens),
            attention_mask=torch.tensor(valid.astype(np.int64)),
            position_ids=torch.tensor(positions),
        ).logits.numpy()
    streams = text_streams(jnp.asarray(tokens), jnp.asarray(valid))
    run = jax.jit(lambda params, s: MLLM(found.config).apply({"params": params}, None, s, Selection())[0])
    ours = np.asarray(run(found.params, streams))
    np.testing.assert_allclose(ours[valid], theirs[valid], atol=1e-4, rtol=0)
    assert np.abs(theirs[valid]).max() > 1  # or 1e-4 would mean little


@pytest.mark.parametrize(
    "name",
    ["qwen2_tied", "qwen3_untied", "llama_untied"]
    + [pytest.param(name, marks=pytest.mark.long) for name in ("qwen2_untied", "qwen3_tied")],
)
def test_greedy_answers_with_the_cache(name):
    steps = 64
    found = loaded(name)
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, hf.TEXT["vocab_size"], (ROWS, LENGTH))
    valid = np.arange(LENGTH) >= np.array([[0], [SHORT], [LENGTH - 3]])
    with torch.no_grad():
        out = hf.model(name).generate(
            torch.tensor(tokens),
            attention_mask=torch.tensor(valid.astype(np.int64)),
            max_new_tokens=steps,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
            output_scores=True,
            pad_token_id=0,
        )
    theirs = out.sequences[:, LENGTH:].numpy()
    top2 = torch.stack(out.scores, dim=1).topk(2, dim=-1).values.numpy()
    decided = (top2[..., 0] - top2[..., 1]) > 1e-3
    rows = [generated_row(tokens[row, valid[row]], 0) for row in range(ROWS)]
    engine = Engine(MLLM(found.config), found.params, rows, free_slots=steps)
    greedy = SamplingParams.of([0.0] * ROWS)
    ours = np.concatenate([out["tokens"] for out in engine.decode(steps, ends=(), sampling=greedy)]).T
    assert theirs.shape == ours.shape == (ROWS, steps)
    agree = ours == theirs
    # An answer may part from the original where two tokens tie, and only there.
    until = np.where(agree.all(axis=1), steps, agree.argmin(axis=1))
    assert not any(decided[row, end] for row, end in enumerate(until) if end < steps)
    assert until.sum() > 0.9 * ROWS * steps
    assert len(np.unique(theirs)) > 10  # not one token repeated


@pytest.mark.parametrize("feature_layer", [-1, -2, -3])
@pytest.mark.parametrize("name", hf.TOWERS)
def test_tower_features(name, feature_layer):
    plan = plan_directory(directory(name), feature_layer=feature_layer)
    size = plan.config.image_size
    pixels = np.random.default_rng(3).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    original = hf.model(name)
    with torch.no_grad():
        tower = original.vision_model if name == "siglip_whole" else original
        out = tower(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    params = place(plan, one_device()).params["vision"]
    ours = VisionTower(plan.config).apply({"params": params}, jnp.asarray(pixels))
    theirs = out.hidden_states[feature_layer].numpy()
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-4, rtol=0)


def test_the_feature_layer_is_one_that_exists():
    tower = plan_directory(directory("siglip"), feature_layer=-1).config
    assert tower.depth == 3 and not tower.post_norm
    for layer in (0, 1, -4):
        with pytest.raises(UserError, match="must be between -3 and -1"):
            feature_tower(tower, layer)


def test_verify_reports_every_stage():
    stages = verify.verify(directory("qwen3_untied"), {"decoder": directory("qwen3_untied")})
    assert [stage.name for stage in stages] == [f"decoder layer {i}" for i in range(3)] + ["logits"]
    assert all(stage.relative < 1e-5 for stage in stages)
    assert stages[-1].top1 == 1 and abs(stages[-1].kl) < 1e-8
    verify.require_equal(stages)
    assert "logits" in verify.table(stages)


@pytest.mark.parametrize(
    ("name", "part", "leaf"),
    [
        ("qwen3_tied", "decoder", "model.layers.1.self_attn.k_norm.weight"),
        ("qwen2_tied", "decoder", "model.layers.2.self_attn.v_proj.bias"),
        ("siglip_odd", "vision", "encoder.layers.1.mlp.fc2.bias"),
    ],
)
def test_verify_finds_one_wrong_tensor(tmp_path, name, part, leaf):
    wrong = hf.save(name, tmp_path / "wrong")
    hf.edit_tensors(wrong, lambda tensors: tensors | {leaf: tensors[leaf] + 0.01})
    stages = verify.verify(wrong, {part: directory(name)})
    with pytest.raises(UserError, match="The models differ"):
        verify.require_equal(stages)


def test_verify_computes_in_float32_whatever_the_model_does():
    found = loaded("qwen2_tied")
    config = dataclasses.replace(found.config, dtype="bfloat16")
    stages = verify.verify_decoder(directory("qwen2_tied"), config, found.params)
    assert stages[-1].relative < 1e-5
