import numpy as np
import pytest

from gaze_jax.core.layout import VisualLayout
from gaze_jax.evaluate.metrics import (
    accuracy,
    best_layer,
    routing_hits,
    student_interval,
    target_regions,
    token_scores,
    wilson,
)

LAYOUT = VisualLayout(image_size=20, patch_size=5, region=(2, 2), context_tokens=0)  # 4x4 tokens, 2x2 regions


def test_wilson_solves_its_equation_and_stays_inside():
    # The bounds are the p at which the observed mean lies z standard errors away.
    for mean, count in [(0.5, 10), (0.97, 256), (0.0, 20), (1.0, 20)]:
        for bound in wilson(mean, count):
            assert 0.0 <= bound <= 1.0
            assert (mean - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / count, abs=1e-9)
    low, high = wilson(1.0, 20)
    assert low < 0.9 and high == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least one"):
        wilson(0.5, 0)


def test_students_interval_is_over_samples_and_stays_inside():
    # Quantiles of 2 and 9 degrees of freedom, from a printed table.
    assert student_interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3
    )
    low, high = student_interval([0.0, 1.0] * 5, lowest=0.2)
    deviation = (10 / 9 * 0.25) ** 0.5
    assert (low, high) == pytest.approx((0.2, 0.5 + 2.262 * deviation / 10**0.5), abs=1e-3)
    assert student_interval([0.9, 1.0], 0.0, 1.0)[1] == 1.0
    assert student_interval([0.5]) is None


def test_only_counted_tokens_score_and_each_in_its_place():
    answers = np.array([[5, 6, 7, 9], [5, 6, -100, -100]])
    tokens = np.array([[5, 7, 6, 9], [5, 6, 1, 1]])
    counted = np.array([[True, True, True, False], [True, True, True, True]])
    np.testing.assert_allclose(token_scores(tokens, answers, counted), [1 / 3, 1.0])


def test_an_answer_that_ended_early_scores_what_it_generated():
    assert token_scores(np.array([[5, -100]]), np.array([[5, 6]]), np.full((1, 2), True))[0] == 0.5


def test_accuracy_is_over_samples():
    found = accuracy(np.array([1.0, 0.5, 0.0, 0.5]))
    assert (found.acc, found.samples) == (0.5, 4)
    assert found.ci == wilson(0.5, 4)


@pytest.mark.parametrize(
    ("box", "region"),
    [
        ((0, 0, 10, 10), 0),
        ((10, 0, 20, 10), 1),
        ((3, 12, 8, 18), 2),
        ((9, 9, 20, 20), 3),
        ((6, 1, 11, 9), 0),  # four of its five columns
        ((-1, -1, -1, -1), -1),
    ],
)
def test_a_box_belongs_to_the_region_that_covers_most_of_it(box, region):
    assert target_regions(np.array(box, float), LAYOUT) == region


def test_targets_on_a_grid_that_regions_do_not_divide():
    layout = VisualLayout(image_size=15, patch_size=5, region=(2, 2), context_tokens=0)  # 2 + 1 by 2 + 1
    boxes = np.array([[0, 0, 10, 10], [10, 0, 15, 10], [0, 10, 10, 15], [10, 10, 15, 15]], float)
    assert sorted(target_regions(boxes, layout)) == [0, 1, 2, 3]


def test_hits_are_a_mean_over_heads_and_counted_tokens():
    selected = np.zeros((3, 2, 2, 2, 4), bool)  # [A, L, N, Hs, R]
    targets = np.array([[1, 2, -1], [-1, -1, -1]])
    selected[0, 0, 0, :, 1] = True  # both heads at the first token
    selected[1, 0, 0, 0, 2] = True  # one at the second
    selected[2, 0, 0] = True  # not counted
    selected[1, 1, 0, 1, 2] = True
    hits, counts = routing_hits(selected, targets)
    np.testing.assert_allclose(hits, [[1.5, 0.0], [0.5, 0.0]])
    assert counts.tolist() == [2, 0]


def test_random_selections_hit_as_often_as_their_share():
    rng = np.random.default_rng(0)
    selected = rng.permuted(np.tile(np.arange(16) < 2, (10, 3, 200, 4, 1)), axis=-1)
    hits, counts = routing_hits(selected, rng.integers(16, size=(200, 10)))
    np.testing.assert_allclose(hits.sum(axis=1) / counts.sum(), 2 / 16, atol=4 * (0.11 / 8000) ** 0.5)


def test_the_best_layer_is_chosen_on_one_half_and_reported_on_the_other():
    # Layer 0 is luckier on the half that chooses, layer 1 on the half that reports; every token counts once.
    hits = np.array([[9.0, 0.0, 0.9, 0.2], [5.0, 0.0, 0.5, 0.6]])
    counts = np.array([10, 1, 1, 1])
    assert best_layer(hits, counts) == {"best": 0.1, "layer": 0, "per_layer": [0.1, 0.3]}
