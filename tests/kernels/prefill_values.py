"""The values and gradients that every implementation of ``gaze_prefill`` must give, at all sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gaze_prefill import api
from pallas_kernels.softmax import joined
from tests.helpers import cases, oracle, rounding
from tests.helpers.streams import PlacedView, Text, sample


def _call(case, implementation):
    return _call_with_lse(case, implementation)[0]


def _call_with_lse(case, implementation):
    return api.gaze_prefill_with_lse(
        *case.arrays(),
        case.queries,
        case.places,
        case.selected,
        spec=cases.runnable(case.spec),
        implementation=implementation,
    )


@functools.cache
def _program(implementation, gradients):
    """One jitted function per implementation, so that equal shapes compile once for all tests."""

    def forward(case):
        return _call(case, implementation)

    def with_gradients(case, cotangent):
        out, pull = jax.vjp(lambda arrays: forward(case.with_arrays(arrays)), case.arrays())
        return out, pull(cotangent)[0]

    return jax.jit(with_gradients if gradients else forward)


def _cotangent(case):
    return jnp.asarray(np.random.default_rng(9).normal(size=case.q.shape), jnp.float32).astype(case.q.dtype)


def _close(got, expected, tolerance):
    """Relative to the largest value: elements near 0 carry the rounding of the others."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    scale = max(np.abs(expected).max(initial=0.0), 1e-3)
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * scale)


@functools.cache
def _rows():
    return cases.rows()


def _one_row():
    return [sample([Text(1), PlacedView(3, 3), Text(3)], context=1)]


class PrefillValues:
    """The part of ``prefill_suite.PrefillSuite`` that compares values."""

    implementation = ""
    has_gradients = True
    shards_heads = True
    tolerance = 2e-5
    bf16_tolerance = 2e-2

    def forward(self, case):
        return _program(self.implementation, False)(case)

    def gradients(self, case):
        """Output, and gradients of q, visual_k, visual_v, text_k, text_v under a fixed cotangent."""
        if not self.has_gradients:
            pytest.skip(f"{self.implementation} has no backward pass")
        return _program(self.implementation, True)(case, _cotangent(case))

    def expected(self, case):
        """The reference implementation; its own subclass is checked against float64 loops instead."""
        return _program("reference", False)(case)

    def expected_gradients(self, case):
        return _program("reference", True)(case, _cotangent(case))[1]

    @pytest.mark.parametrize("select_per", ["head", "kv_head"])
    @pytest.mark.parametrize("scope", ["all", "view"])
    def test_forward(self, select_per, scope):
        """Partial regions, packing, padding, newlines and shuffled storage at once."""
        case = cases.prefill(_rows(), select_per=select_per, scope=scope, causal=scope == "all")
        _close(self.forward(case), self.expected(case), self.tolerance)

    @pytest.mark.parametrize("select_per", ["head", "kv_head"])
    def test_gradients(self, select_per):
        """d q, d K and d V of both streams equal the reference's."""
        case = cases.prefill(_rows(), select_per=select_per)
        _, got = self.gradients(case)
        for name, mine, theirs in zip(cases.ARRAYS, got, self.expected_gradients(case), strict=True):
            assert np.abs(theirs).max() > 0, name
            _close(mine, theirs, self.tolerance)

    def test_gradients_equal_finite_differences(self):
        """Against central differences of the float64 loops at a tiny size."""
        rows = [sample([PlacedView(1, 3), Text(2)], region=(1, 2), context=1)]
        case = cases.prefill(rows, kv_heads=1, group=2, dim=2)
        _, got = self.gradients(case)
        arrays, cotangent = case.arrays(), np.asarray(_cotangent(case), np.float64)
        for i, name in enumerate(cases.ARRAYS):

            def loss(x, i=i):
                changed = case.with_arrays((*arrays[:i], x, *arrays[i + 1 :]))
                return np.sum(oracle.prefill(changed) * cotangent)

            numeric = oracle.numeric_gradient(loss, np.asarray(arrays[i]))
            np.testing.assert_allclose(got[i], numeric, rtol=1e-4, atol=1e-5, err_msg=name)

    def test_dense_without_a_selection(self):
        """``selected=None`` attends to whole windows; forward and gradients."""
        case = dataclasses.replace(cases.prefill(_rows()), selected=None)
        out, got = self.gradients(case) if self.has_gradients else (self.forward(case), None)
        _close(out, self.expected(case), self.tolerance)
        if got is not None:
            for mine, theirs in zip(got, self.expected_gradients(case), strict=True):
                _close(mine, theirs, self.tolerance)

    @pytest.mark.parametrize(
        ("group", "select_per"), [(1, "head"), (4, "kv_head"), (5, "head"), (7, "kv_head"), (8, "head")]
    )
    def test_edge_12_group_sizes(self, group, select_per):
        """G = 1, 4, 5, 7, 8: query head h reads kv head h // G, and K = 3 is no power of two either."""
        case = cases.prefill(_one_row(), kv_heads=3, group=group, select_per=select_per, dim=4)
        _close(self.forward(case), self.expected(case), self.tolerance)

    @pytest.mark.parametrize("dim", [1, 20])
    def test_odd_head_dims(self, dim):
        """D = 1 and D = 20."""
        case = cases.prefill(_one_row(), dim=dim)
        _close(self.forward(case), self.expected(case), self.tolerance)

    @pytest.mark.parametrize("select_per", ["head", "kv_head"])
    def test_bf16(self, select_per):
        """bfloat16 in and out; near the float32 result of the same rounded inputs, forward and gradients."""
        case = cases.prefill(_rows(), select_per=select_per, dtype=jnp.bfloat16)
        wide = case.with_arrays(tuple(a.astype(jnp.float32) for a in case.arrays()))
        out, got = self.gradients(case)
        assert out.dtype == jnp.bfloat16
        _close(out, _program("reference", False)(wide), self.bf16_tolerance)
        cotangent = _cotangent(case).astype(jnp.float32)
        _, exact = _program("reference", True)(wide, cotangent)
        for mine, theirs in zip(got, exact, strict=True):
            assert mine.dtype == jnp.bfloat16
            _close(mine, theirs, 2 * self.bf16_tolerance)

    @pytest.mark.parametrize(("select_per", "group"), [("head", 3), ("kv_head", 2), (None, 3)])
    def test_bf16_where_no_block_divides(self, select_per, group):
        """3 regions of 6 slots, 19 text-stream keys, 37 queries, D = 20; NaN in the slots without a token.

        No element of the output or of a gradient is further from float64 than the roundings of bfloat16.
        """
        row = sample([Text(2), PlacedView(2, 7), Text(16)], region=(2, 3), context=1)
        options = {"kv_heads": 1, "group": group, "dim": 20, "dtype": jnp.bfloat16}
        case = cases.prefill([row], select_per=select_per or "head", **options)
        empty = (case.places.visual_order < 0)[:, None, :, :, None]
        assert empty.sum() == 4
        nan = jnp.bfloat16(jnp.nan)
        k, v = (jnp.where(empty, nan, a) for a in (case.visual_k, case.visual_v))
        case = dataclasses.replace(case, visual_k=k, visual_v=v)
        case = case if select_per else dataclasses.replace(case, selected=None)
        out, got = self.gradients(case)
        for mine, exact, squares in zip((out, *got), *rounding.prefill(case, _cotangent(case)), strict=True):
            assert mine.dtype == jnp.bfloat16
            rounding.within(mine, exact, squares)

    def test_parts_are_joined(self):
        """Even regions, then the others and the text stream: joined by their log-sum-exp they are the whole,
        forward and gradients."""
        case = cases.prefill(_rows())
        even = jnp.arange(case.visual_k.shape[2]) % 2 == 0

        def part(case, regions, text):
            places = dataclasses.replace(
                case.places,
                visual_order=jnp.where(regions[None, :, None], case.places.visual_order, -1),
                text_order=jnp.where(text, case.places.text_order, -1),
            )
            return _call_with_lse(dataclasses.replace(case, places=places), self.implementation)

        def in_parts(arrays):
            split = case.with_arrays(arrays)
            parts = part(split, even, False), part(split, ~even, True)
            return joined(*map(jnp.stack, zip(*parts)), 0)

        def loss(call):
            def total(arrays):
                out, lse = call(arrays)
                seen = jnp.where(lse == -jnp.inf, 0.0, lse)
                return jnp.sum(out * _cotangent(case)) + jnp.sum(jnp.sin(seen)), (out, lse)

            return jax.jit(jax.grad(total, has_aux=True))

        got, (out, lse) = loss(in_parts)(case.arrays())
        whole = loss(lambda arrays: _call_with_lse(case.with_arrays(arrays), "reference"))
        expected, (expected_out, expected_lse) = whole(case.arrays())
        _close(out, expected_out, self.tolerance)
        none = np.asarray(expected_lse) == -np.inf
        np.testing.assert_array_equal(np.asarray(lse) == -np.inf, none)
        assert none.any() and not none.all()
        _close(np.where(none, 0, lse), np.where(none, 0, expected_lse), self.tolerance)
        for name, mine, theirs in zip(cases.ARRAYS, got, expected, strict=True):
            assert np.abs(theirs).max() > 0, name
            _close(mine, theirs, self.tolerance)

    def test_large_logits(self):
        """Logits of +-10,000 neither overflow nor lose the maximum."""
        case = cases.prefill(_one_row(), dim=4)
        case = dataclasses.replace(case, q=case.q * 1e4)
        out, got = self.gradients(case)
        assert np.isfinite(out).all() and all(np.isfinite(g).all() for g in got)
        _close(out, self.expected(case), 1e-3)
