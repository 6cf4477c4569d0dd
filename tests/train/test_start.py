"""Starting from a checkpoint: its parameters, in the dtype of the run, and context tokens that are new."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.chat.template import CHATML
from gaze_jax.corpora.stand_in import byte_tokenizer
from gaze_jax.errors import UserError
from gaze_jax.models import MLLM
from gaze_jax.models.config import GazeConfig, VisionConfig
from gaze_jax.models.dummy import DUMMY
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train.optimizer import OptimizerConfig, make_optimizer, warmup_of
from gaze_jax.train.start import Start, check_start, initial_params
from tests.helpers.models import parameters

PLAIN = dataclasses.replace(DUMMY, gaze=GazeConfig((2, 2), context_tokens=0, top_k=2))


def start(config=PLAIN):
    def load(mesh):  # a copy: what is loaded is donated
        return jax.tree.map(jnp.array, parameters(config)["params"])

    return Start("ckpt", config, byte_tokenizer(), CHATML, load, lambda out: None)


def one_device():
    return make_mesh(MeshConfig(data=1), jax.local_devices()[:1])


def with_context(count, **changes):
    return dataclasses.replace(PLAIN, gaze=dataclasses.replace(PLAIN.gaze, context_tokens=count), **changes)


def batch(images=3):
    """Noise, and one image that only pads."""
    pixels = np.random.default_rng(0).integers(1, 256, (2, images, 20, 20, 3), dtype=np.uint8)
    pixels[1, -1] = 0
    return {"images": jnp.asarray(pixels)}


def test_new_context_tokens_begin_near_the_mean_of_the_features():
    config = with_context(4, param_dtype="bfloat16")
    assert check_start(start(), config) == ("context",)
    params = initial_params(start(), config, one_device(), 0, batch())
    encode = jax.jit(lambda params, images: MLLM(PLAIN).apply({"params": params}, images, method="encode"))
    features = encode(parameters(PLAIN)["params"], batch()["images"])
    shown = np.asarray(features).reshape(2, 3, -1, 32)[[0, 0, 0, 1, 1], [0, 1, 2, 0, 1]].reshape(-1, 32)
    mean, spread = shown.mean(axis=0), shown.std(axis=0)
    away = (np.asarray(params["context"], np.float32) - mean) / spread
    assert params["context"].shape == (4, 32) and params["context"].dtype == jnp.bfloat16
    assert 0.05 < away.std() < 0.2 and abs(away.mean()) < 0.05
    assert len({tuple(row) for row in away.tolist()}) == 4
    # The rest is the checkpoint's, in the dtype of the run.
    for name, leaf in jax.tree_util.tree_leaves_with_path(parameters(PLAIN)["params"]):
        mine = params
        for key in name:
            mine = mine[key.key]
        np.testing.assert_array_equal(mine, leaf.astype(jnp.bfloat16))


def test_context_tokens_may_be_left_out_but_not_others_in_number():
    have = start(with_context(2))
    params = initial_params(have, PLAIN, one_device(), 0, batch())
    assert "context" not in params
    assert check_start(have, with_context(2)) == ()
    with pytest.raises(UserError, match=r"has 2 context tokens but model.gaze.context_tokens=3; keep 2"):
        check_start(have, with_context(3))


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("decoder", dataclasses.replace(DUMMY.decoder, depth=4)),
        ("vision", VisionConfig(image_size=20, patch_size=5, width=24, depth=2, num_heads=3, mlp_dim=40)),
    ],
)
def test_another_model_is_refused_by_its_part(part, other):
    with pytest.raises(UserError, match=f"init_from=ckpt has another {part} than the config's model.{part}"):
        check_start(start(), dataclasses.replace(PLAIN, **{part: other}))


def test_what_is_frozen_has_no_state_and_is_not_updated():
    config = OptimizerConfig(name="muon", warmup_steps=0, learning_rate=0.1, frozen=("vision", "decoder"))
    params = parameters(PLAIN)["params"]
    optimizer, _ = make_optimizer(config, 10)
    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(optimizer.init)(params)
        updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, params), state, params)
    assert not any("decoder" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))
    for part, tree in updates.items():
        moved = [bool((np.asarray(leaf) != 0).any()) for leaf in jax.tree.leaves(tree)]
        assert any(moved) != (part in config.frozen)


def test_warmup_may_be_a_fraction_of_the_steps():
    assert warmup_of(OptimizerConfig(warmup_steps=7), 100) == 7
    assert warmup_of(OptimizerConfig(warmup_steps=0, warmup_fraction=0.03), 1000) == 30
