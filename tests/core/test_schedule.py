"""The progressive schedule of the kept fraction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core.schedule import Schedule


def test_endpoints_and_midpoint():
    """1 until dense_until, the final fraction from sparse_from, the geometric mean halfway."""
    schedule = Schedule(dense_until=0.2, sparse_from=0.6)
    keep = [float(schedule.keep(p, 0.25)) for p in (0.0, 0.2, 0.4, 0.6, 1.0)]
    np.testing.assert_allclose(keep, [1.0, 1.0, 0.5, 0.25, 0.25], rtol=1e-6)
    assert keep[0] == keep[1] == 1.0, "dense means exactly everything"


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(0.0, 1.0), Schedule(0.0, 0.0), Schedule(0.3, 0.3)])
def test_monotone_and_bounded(schedule):
    """The fraction never rises and stays in [final, 1]; progress is traced."""
    keep = jax.jit(lambda p: schedule.keep(p, 0.1))
    values = np.array([float(keep(jnp.float32(p))) for p in np.linspace(0, 1, 41)])
    assert (np.diff(values) <= 1e-7).all()
    assert values.max() <= 1 and values.min() >= 0.1 * (1 - 1e-6)
    assert values[-1] == pytest.approx(0.1)
    assert keep._cache_size() == 1


@pytest.mark.parametrize("edge", [0.0, 0.3, 1.0])
def test_a_schedule_without_a_ramp_jumps_at_its_edge(edge):
    """dense_until == sparse_from: dense before the edge, sparse at it; (0, 0) is sparse from step one."""
    schedule = Schedule(edge, edge)
    assert float(schedule.keep(edge, 0.1)) == pytest.approx(0.1)
    if edge > 0:
        assert float(schedule.keep(edge - 1e-3, 0.1)) == 1.0


def test_a_final_fraction_of_one_is_always_dense():
    """Nothing is dropped when the target is everything."""
    assert [float(Schedule().keep(p, 1.0)) for p in (0.0, 0.5, 1.0)] == [1.0] * 3


@pytest.mark.parametrize("edges", [(-0.1, 0.5), (0.6, 0.5), (0.5, 1.1)])
def test_disordered_edges_raise(edges):
    """One sentence with both values."""
    with pytest.raises(ValueError, match=f"dense_until={edges[0]} and sparse_from={edges[1]}"):
        Schedule(*edges)


@pytest.mark.parametrize(("field", "value"), [("dense_until", 0.0), ("sparse_from", 0.9)])
def test_every_field_matters(field, value):
    """Changing a field changes the fraction in the middle of training."""
    changed = Schedule(**{field: value})
    assert float(changed.keep(0.3, 0.1)) != float(Schedule().keep(0.3, 0.1))
