"""Rules: their own inverse, and the axes of each layout."""

import numpy as np
import pytest

from gaze_jax.families.table import Rule


@pytest.mark.parametrize("layout", ["same", "linear", "conv"])
def test_rules_are_their_own_inverse(layout):
    shape = {"same": (5,), "linear": (300, 7), "conv": (6, 3, 2, 4)}[layout]
    tensor = np.random.default_rng(0).normal(size=shape)
    rule = Rule("a/b", "a.b", layout)
    leaf = rule.to_leaf(tensor)
    np.testing.assert_array_equal(rule.to_tensor(leaf), tensor)
    assert rule.to_tensor(leaf).flags.c_contiguous
    assert rule.tensor_shape(leaf.shape) == tensor.shape
    stacked = Rule("a/b", "a.{}.b", layout, layers=9)
    assert stacked.tensor_shape((9, *leaf.shape)) == tensor.shape
    assert stacked.tensors == tuple(f"a.{i}.b" for i in range(9))


def test_a_linear_weight_is_transposed_and_a_patch_embedding_is_hwio():
    assert Rule("a", "a", "linear").to_leaf(np.zeros((2, 3))).shape == (3, 2)
    tensor = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    leaf = Rule("a", "a", "conv").to_leaf(tensor)
    assert leaf.shape == (4, 5, 3, 2) and leaf[3, 2, 1, 0] == tensor[0, 1, 3, 2]
