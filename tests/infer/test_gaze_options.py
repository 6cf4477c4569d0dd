"""What a query may select: budgets."""

import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core.budget import budget_from_keep
from gaze_jax.errors import UserError
from gaze_jax.infer.gaze_options import GazeOptions, budget_count, check, selection_capacity


def test_numbers_of_any_type_stay_counts_and_fractions():
    """All regions are not one region."""
    assert GazeOptions(keep=1).budget(None) == 1.0 and isinstance(GazeOptions(keep=1).budget(None), float)
    assert isinstance(GazeOptions(keep=np.float32(0.5)).budget(None), float)
    assert type(GazeOptions(top_k=np.int64(3)).budget(None)) is int
    assert type(GazeOptions(top_k=np.array(3)).budget(None)) is int
    for many in ([3, 1], np.array([3, 1]), jnp.array([3, 1])):
        budget = GazeOptions(top_k=many).budget(None)
        assert budget == (3, 1) and [type(count) for count in budget] == [int, int]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"top_k": 2.0}, "top_k=2.0 must be a whole number, or one for each layer; keep is a fraction"),
        ({"top_k": []}, r"top_k=\[\] must be a whole number"),
        ({"top_k": "12"}, "top_k='12' must be a whole number"),
        ({"top_k": [1, 2.5]}, r"top_k=\[1, 2.5\] must be a whole number"),
        ({"top_k": (3, 0)}, "top_k=3,0 must be at least 1"),
        ({"top_k": (3, 1), "keep": 0.5}, "both budgets"),
        ({"top_k": (3, 1), "dense": True}, "top_k has no effect with dense"),
        ({"keep": "half"}, "keep='half' must be a number"),
        ({"keep": float("nan")}, "keep=nan must be above 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": 1, "keep": 0.5}, "both budgets"),
        ({"dense": True, "look_at": ("x",)}, "look_at has no effect with dense"),
    ],
)
def test_what_is_no_budget_is_refused(fields, sentence):
    """In one sentence."""
    with pytest.raises(UserError, match=sentence):
        GazeOptions(**fields)


@pytest.mark.parametrize("regions", [1, 5, 12, 64, 144])
def test_a_fraction_is_headed_as_the_device_counts_it(regions):
    """And the capacity is enough for every number of regions in sight."""
    for keep in np.linspace(0.01, 1, 67).tolist():
        found = budget_from_keep(keep, jnp.full((1, 1), regions, jnp.int32)).item()
        assert budget_count(keep, regions) == found
        assert selection_capacity([keep], regions) >= found


def test_the_capacity_is_a_bucket_and_the_heading_the_budget():
    """Capacities are few, so that programs are."""
    assert (selection_capacity([9], 40), budget_count(9, 40)) == (10, 9)
    assert (selection_capacity([(1, 9), 0.2], 40), budget_count((1, 9), 5)) == (10, (1, 5))
    assert {selection_capacity([count], 40) for count in range(1, 9)} == {8}, "one program for small budgets"
    assert (selection_capacity([3, 9], 8), budget_count(9, 8)) == (8, 8)
    assert selection_capacity(None, 8) is selection_capacity([1], 0) is None


def test_the_number_of_layers_is_checked():
    """And each layer's budget against the regions."""
    gaze = GazeOptions(top_k=(3, 1))
    check(gaze, (), 2, regions=3)
    with pytest.raises(
        UserError, match="top_k=3,1 is for 2 layers but the model has 3; give a number for each"
    ):
        check(gaze, (), 3)
    with pytest.raises(UserError, match="top_k=3,1 must be between 1 and 2, the regions of what is shown"):
        check(gaze, (), 2, regions=2)
