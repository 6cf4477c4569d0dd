"""Sampling: greedy, by temperature, top-k and top-p, with numbers per row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.errors import UserError
from gaze_jax.infer.sampling import SamplingParams, check_sampling, likeliest, next_token

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LOGITS = np.log(np.float32([0.5, 0.25, 0.15, 0.06, 0.04]))


def draw(temperature, top_p=None, seeds=None, rows=4000, index=0, top_k=None):
    """The tokens of ``rows`` rows that have seeds of their own."""
    seeds = list(range(rows)) if seeds is None else seeds
    top_p = None if top_p is None else [top_p] * len(seeds)
    sampling = SamplingParams.of([temperature] * len(seeds), top_p, seeds, [top_k] * len(seeds))
    logits = jnp.tile(LOGITS, (len(seeds), 1))
    return np.asarray(jax.jit(next_token)(logits, sampling, jnp.full(len(seeds), index, jnp.int32)))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature):
    """4,000 draws, within four standard deviations of their shares."""
    expected = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
    measured = np.bincount(draw(temperature), minlength=5) / 4000
    np.testing.assert_allclose(measured, expected, atol=4 * (0.25 / 4000) ** 0.5)


def test_draws_stay_in_the_nucleus_and_keep_its_shares():
    """The likeliest tokens that reach 0.7 together are two; among them nothing changes."""
    drawn = draw(1.0, top_p=0.7)
    assert set(drawn.tolist()) == {0, 1}
    np.testing.assert_allclose((drawn == 0).mean(), 2 / 3, atol=4 * (0.25 / 4000) ** 0.5)


def test_draws_stay_among_the_k_likeliest_and_keep_their_shares():
    """Of three tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    drawn = draw(1.0, top_k=3)
    shares = np.float32([0.5, 0.25, 0.15]) / 0.9
    np.testing.assert_allclose(np.bincount(drawn) / 4000, shares, atol=4 * (0.25 / 4000) ** 0.5)


def test_top_p_is_of_what_top_k_leaves():
    """0.52 of all is the two likeliest; of the two that top_k leaves, 0.52 of 0.75 is the first alone."""
    assert set(draw(1.0, top_p=0.52).tolist()) == {0, 1}
    assert set(draw(1.0, top_p=0.52, top_k=2).tolist()) == {0}
    assert set(draw(1.0, top_p=0.9, top_k=2).tolist()) == {0, 1}


@pytest.mark.parametrize("top_k", [None, 0, 5, 6, 2**40])
def test_top_k_of_the_whole_vocabulary_is_off(top_k):
    """The same tokens with the same seeds, also beside top_p."""
    np.testing.assert_array_equal(draw(2.0, rows=500, top_k=top_k), draw(2.0, rows=500))
    both = draw(2.0, rows=500, top_k=top_k, top_p=0.9)
    np.testing.assert_array_equal(both, draw(2.0, rows=500, top_p=0.9))


def test_top_k_of_1_is_greedy():
    """At any temperature; a row's number is its own."""
    assert set(draw(5.0, top_k=1).tolist()) == {0}
    sampling = SamplingParams.of([5.0] * 300, None, list(range(300)), [1, 2, None] * 100)
    drawn = np.asarray(next_token(jnp.tile(LOGITS, (300, 1)), sampling, jnp.zeros(300, jnp.int32)))
    assert [set(drawn[i::3].tolist()) for i in range(3)] == [{0}, {0, 1}, {0, 1, 2, 3, 4}]


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [
        (0, 0.01),
        (0, 0.3),
        (0, 0.5001),
        (0, 0.9),
        (0, 1.0),
        (1, 1.0),
        (7, 1.0),
        (7, 0.9),
        (40, 0.5),
        (300, 0.9),
    ],
)
def test_the_likeliest_are_those_of_transformers(top_k, top_p):
    """Random logits without ties: the same tokens stay, top_k before top_p."""
    logits = np.random.default_rng(0).normal(size=(5, 300)).astype(np.float32) * 3
    kept = likeliest(jnp.asarray(logits), jnp.full(5, top_k, jnp.int32), jnp.full(5, top_p, jnp.float32))
    theirs = torch.from_numpy(logits)
    if top_k:
        theirs = transformers.TopKLogitsWarper(top_k=top_k)(None, theirs)
    theirs = transformers.TopPLogitsWarper(top_p=top_p)(None, theirs).numpy()
    np.testing.assert_array_equal(np.isfinite(kept), np.isfinite(theirs))
    np.testing.assert_array_equal(np.asarray(kept)[np.isfinite(kept)], logits[np.isfinite(kept)])


def test_equal_tokens_stay_together():
    """The cut falls on the second of three: all three stay, as in transformers."""
    logits = np.float32([[3.0, 1.0, 2.0, 2.0, 2.0]])
    kept = likeliest(jnp.asarray(logits), jnp.asarray([2]), jnp.asarray([1.0], jnp.float32))
    theirs = transformers.TopKLogitsWarper(top_k=2)(None, torch.from_numpy(logits)).numpy()
    assert np.isfinite(kept).tolist() == np.isfinite(theirs).tolist() == [[True, False, True, True, True]]


def test_nothing_is_sorted_where_nobody_asks():
    """The sort is in the branch of a condition, and not beside it."""
    sampling = SamplingParams.of([1.0], [1.0], [0], [0])
    jaxpr = jax.make_jaxpr(next_token)(jnp.zeros((1, 9)), sampling, jnp.zeros(1, jnp.int32)).jaxpr
    assert "sort" in str(jaxpr)
    assert not any(equation.primitive.name == "sort" for equation in jaxpr.eqns)
    (drawing,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "cond")
    (inside,) = (branch.jaxpr for branch in drawing.params["branches"] if len(branch.jaxpr.eqns) > 1)
    assert not any(equation.primitive.name == "sort" for equation in inside.eqns)


def test_a_draw_depends_on_its_row_and_place_alone():
    """The same seed in another batch draws the same token; at another index of the answer, another."""
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
        ("sample_top_k=-1 must be at least 1; 0 draws from all", (0.0, 1.0, 0, -1)),
        ("sample_top_k=0.5 must be a whole number", (0.0, 1.0, 0, 0.5)),
    ],
)
def test_numbers_out_of_range_are_refused(sentence, wrong):
    """Named, each."""
    with pytest.raises(UserError, match=sentence):
        check_sampling(*wrong)
