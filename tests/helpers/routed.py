"""What routing in a decoding call must return: what core.routing selects, attended to by the reference."""

import jax.numpy as jnp
import numpy as np

from gaze_jax.core import routing
from pallas_kernels.gaze_decode import api


def expected(case, descriptors, budget, visible, order, *, capacity):
    """Output, log-sum-exp, indices and scores of a case of tests/helpers/cases.py."""
    options = {"spec": case.spec, "implementation": "reference"}
    select_per = case.spec.select_per
    scores = routing.descriptor_scores(case.q[:, None], descriptors[case.layer], select_per=select_per)
    indices = routing.select_indices(scores, visible[:, None, None], budget[:, None], capacity, order)[:, 0]
    stored = (api.pack(case.k, case.v, **options), case.text_k, case.text_v, case.layer)
    found = api.gaze_decode_with_lse(case.q, *stored, indices, case.visual_seen, case.text_seen, **options)
    return *found, indices, scores[:, 0]


def close(got, wanted, dtype):
    """Assert equal indices, and the rest within rounding; returns the indices as NumPy's integers."""
    got, wanted = ([np.asarray(a, np.float32) for a in found] for found in (got, wanted))
    np.testing.assert_array_equal(got[2], wanted[2])
    np.testing.assert_allclose(got[3], wanted[3], rtol=1e-6, atol=1e-6)
    tolerance = 1e-2 if dtype == jnp.bfloat16 else 2e-5
    np.testing.assert_allclose(got[0], wanted[0], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(got[1], wanted[1], rtol=2e-5, atol=2e-5)
    return got[2].astype(int)
