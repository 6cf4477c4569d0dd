"""Drawing tokens: greedy, by temperature, out of a nucleus, each row by its own numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from gaze_jax.errors import UserError
from gaze_jax.infer.sampling import SamplingParams, check_sampling, next_token, nucleus

LOGITS = np.log(np.float32([0.5, 0.25, 0.15, 0.06, 0.04]))


def draw(temperature, top_p=None, seeds=None, rows=4000, index=0):
    """Counts of every token over ``rows`` rows that have seeds of their own."""
    seeds = list(range(rows)) if seeds is None else seeds
    top_p = None if top_p is None else [top_p] * len(seeds)
    sampling = SamplingParams.of([temperature] * len(seeds), top_p, seeds)
    logits = jnp.tile(LOGITS, (len(seeds), 1))
    return np.asarray(jax.jit(next_token)(logits, sampling, jnp.full(len(seeds), index, jnp.int32)))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature):
    """4,000 draws, within four standard deviations of their shares."""
    expected = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
    share = np.bincount(draw(temperature), minlength=5) / 4000
    np.testing.assert_allclose(share, expected, atol=4 * (0.25 / 4000) ** 0.5)


def test_draws_stay_in_the_nucleus_and_keep_its_shares():
    """The likeliest tokens that reach 0.7 together are two; among them nothing changes."""
    drawn = draw(1.0, top_p=0.7)
    assert set(drawn.tolist()) == {0, 1}
    np.testing.assert_allclose((drawn == 0).mean(), 2 / 3, atol=4 * (0.25 / 4000) ** 0.5)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5001, 0.9, 1.0])
def test_the_nucleus_is_that_of_transformers(top_p):
    """Random logits without ties: the same tokens stay."""
    logits = np.random.default_rng(0).normal(size=(5, 300)).astype(np.float32) * 3
    kept = nucleus(jnp.asarray(logits), jnp.full(5, top_p, jnp.float32))
    theirs = transformers.TopPLogitsWarper(top_p=top_p)(None, torch.from_numpy(logits)).numpy()
    np.testing.assert_array_equal(np.isfinite(kept), np.isfinite(theirs))


def test_a_draw_depends_on_its_row_and_place_alone():
    """The same seed in other company says the same; another place of the answer, something else."""
    alone = draw(1.0, seeds=[17])
    assert draw(1.0, seeds=[3, 17, 5])[1] == alone[0]
    places = [int(draw(1.0, seeds=[17], index=i)[0]) for i in range(20)]
    assert len(set(places)) > 1
    assert places == [int(draw(1.0, seeds=[17], index=i)[0]) for i in range(20)]


def test_greedy_takes_the_first_of_the_likeliest():
    """Beside rows that draw too."""
    sampling = SamplingParams.of([0.0, 2.0, 0.0], [0.1, 1.0, 1.0], [1, 2, 3])
    logits = jnp.asarray([[0.0, 3.0, 3.0], [0.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
    drawn = next_token(logits, sampling, jnp.zeros(3, jnp.int32))
    assert drawn[0] == 1 and drawn[2] == 0 and drawn.dtype == jnp.int32


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-44])
def test_a_temperature_near_0_is_greedy(temperature):
    """Where dividing by it overflows too."""
    sampling = SamplingParams.of([temperature], [0.9], [1])
    assert next_token(jnp.asarray([[1.0, 5.0, 2.0]]), sampling, jnp.zeros(1, jnp.int32)).tolist() == [1]


@pytest.mark.parametrize(
    ("sentence", "wrong"),
    [
        ("temperature=-1.0 must be", (-1.0, 1.0, 0)),
        ("temperature=nan must be", (float("nan"), 1.0, 0)),
        ("temperature=inf must be", (float("inf"), 1.0, 0)),
        ("top_p=0.0 must be", (0.0, 0.0, 0)),
        ("top_p=1.1 must be", (0.0, 1.1, 0)),
        ("seed=-1 must be", (0.0, 1.0, -1)),
    ],
)
def test_numbers_out_of_range_are_refused(sentence, wrong):
    """Named, each."""
    with pytest.raises(UserError, match=sentence):
        check_sampling(*wrong)
