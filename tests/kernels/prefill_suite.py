"""What every implementation of ``gaze_prefill`` must pass; see ``test_prefill.py`` for the subclasses.

The edge cases that sparse-attention kernels get wrong, by the numbers in the tests' names, here, in
``prefill_values``, ``tests/core`` and ``tests/models``:

 1 ties at the K-th score           7 -1 and duplicates in the list    13 sizes that no block divides
 2 K >= R equals dense              8 a query inside an image          14 incremental descriptors
 3 no region, one region, K = 1     9 packed samples                   15 sharded over kv heads
 4 partial regions                 10 no gradient if not selected      16 the scale: output, not choice
 5 NaN in what is not read         11 bfloat16 against float32         17 twice the same bits
 6 a query that sees nothing       12 G = 1, 4, 5, 7, 8
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import cases
from tests.helpers.streams import PlacedView, Text, pack, pad, sample
from tests.kernels.prefill_values import PrefillValues, _call, _close, _one_row, _program, _rows


class PrefillSuite(PrefillValues):
    """Subclass, name the implementation, and switch off what it cannot do."""

    def test_edge_02_selecting_every_region_equals_dense(self):
        """All regions selected and no selection at all agree to one rounding, forward and gradients."""
        case = cases.prefill(_rows())
        everything = dataclasses.replace(case, selected=jnp.ones_like(case.selected))
        routed, routed_gradients = self.gradients(everything)
        dense, dense_gradients = self.gradients(dataclasses.replace(case, selected=None))
        _close(routed, dense, 2e-7)
        for mine, theirs in zip(routed_gradients, dense_gradients, strict=True):
            _close(mine, theirs, 1e-6)

    @pytest.mark.parametrize(
        "parts", [[Text(4)], [Text(1), PlacedView(2, 2), Text(2)]], ids=["no region", "one region"]
    )
    def test_edge_03_no_region_or_one(self, parts):
        """R = 0 (text only) and R = 1, with and without a selection."""
        case = cases.prefill([sample(parts)])
        assert case.visual_k.shape[2] == len(parts) // 2
        for selected in (case.selected, None):
            case = dataclasses.replace(case, selected=selected)
            _close(self.forward(case), self.expected(case), self.tolerance)

    def test_edge_03_one_selected_region(self):
        """K = 1: every routed query sees exactly one region."""
        case = cases.prefill(_rows())
        one = np.random.default_rng(1).integers(0, 8, case.selected.shape[:-1])
        case = dataclasses.replace(case, selected=jnp.asarray(one[..., None] == np.arange(8)))
        _close(self.forward(case), self.expected(case), self.tolerance)

    def _routed_only(self):
        """A case in which only routed queries are alive, and per kv head two regions that nobody selects."""
        case = cases.prefill(_rows(), select_per="head")
        queries = dataclasses.replace(
            case.queries, segment=jnp.where(case.queries.routed, case.queries.segment, -1)
        )
        hidden = np.zeros((2, 8), bool)
        hidden[0, [1, 4]] = hidden[1, [0, 4]] = True
        selected = np.asarray(case.selected) & ~np.repeat(hidden, 2, axis=0)
        nobody = hidden[None, :, :, None] | (np.asarray(case.places.visual_order) < 0)[:, None]
        text_nobody = np.asarray(case.places.text_order) < 0
        return (
            dataclasses.replace(case, queries=queries, selected=jnp.asarray(selected)),
            nobody,
            text_nobody,
        )

    def test_edge_05_nan_in_unseen_keys_changes_nothing(self):
        """NaN in K and V of unselected regions, empty slots and padding: equal output, gradient 0."""
        case, nobody, text_nobody = self._routed_only()
        clean, clean_gradients = self.gradients(case)

        def poison(a, where):
            return jnp.where(where[..., None], jnp.nan, a)

        poisoned = case.with_arrays(
            (
                case.q,
                *(poison(a, nobody) for a in (case.visual_k, case.visual_v)),
                *(poison(a, text_nobody[:, None]) for a in (case.text_k, case.text_v)),
            )
        )
        assert np.isnan(poisoned.visual_k).any() and np.isnan(poisoned.text_v).any()
        out, got = self.gradients(poisoned)
        np.testing.assert_array_equal(out, clean)
        for mine, theirs in zip(got, clean_gradients, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        for gradient in got[1:3]:
            assert (np.asarray(gradient)[nobody] == 0).all()
            assert (np.asarray(gradient)[~nobody] != 0).any()

    def test_edge_05_a_seen_nan_is_not_hidden(self):
        """NaN in a value makes the outputs of exactly those queries NaN that see it."""
        case = cases.prefill(_rows())
        slot = int(np.argmax(np.asarray(case.places.text_order[0]) == 0))
        bad = dataclasses.replace(case, text_v=case.text_v.at[0, 0, slot, 3].set(jnp.nan))
        got, clean = np.asarray(self.forward(bad)), np.asarray(self.forward(case))
        windows = jax.tree.map(np.asarray, case.queries)
        sees = (windows.segment[0] == int(case.places.text_segment[0, slot])) & (windows.text_hi[0] >= 0)
        sees &= windows.text_lo[0] <= 0
        assert sees.any() and (~sees).any()
        assert np.isnan(got[0, sees][:, :2, 3]).all()
        np.testing.assert_array_equal(got[0, ~sees], clean[0, ~sees])
        np.testing.assert_array_equal(got[0, :, 2:], clean[0, :, 2:])

    def test_edge_05_nan_in_a_region_reaches_those_who_see_it(self):
        """A region that some heads of a group select and others do not, in K and in V."""
        case = cases.prefill(_rows())
        region = int(np.argmax(np.asarray(case.selected)[0].any((0, 1))))
        clean = np.asarray(self.forward(case))
        for side in ("visual_k", "visual_v"):
            array = getattr(case, side)
            bad = dataclasses.replace(case, **{side: array.at[0, 0, region].set(jnp.nan)})
            got, expected = np.asarray(self.forward(bad)), np.asarray(_program("reference", False)(bad))
            touched = np.isnan(expected)
            np.testing.assert_array_equal(np.isnan(got), touched)
            assert touched[0, :, 0].any() and (touched[0, :, 0] != touched[0, :, 1]).any()
            np.testing.assert_array_equal(got[~touched], clean[~touched])

    @pytest.mark.parametrize("empty", ["queries", "text", "regions", "all keys"])
    def test_edge_03_empty_axes(self, empty):
        """T = 0, S = 0 or R = 0: what is left is attended to, and gradients have the shapes of the arrays."""
        case = cases.prefill(_one_row())
        if empty == "queries":
            none = jax.tree.map(lambda a: a[:, :0], (case.q, case.queries, case.selected))
            case = dataclasses.replace(case, q=none[0], queries=none[1], selected=none[2])
        if empty in ("text", "all keys"):
            places = dataclasses.replace(
                case.places,
                text_order=case.places.text_order[:, :0],
                text_segment=case.places.text_segment[:, :0],
            )
            case = dataclasses.replace(
                case, text_k=case.text_k[:, :, :0], text_v=case.text_v[:, :, :0], places=places
            )
        if empty in ("regions", "all keys"):
            places = dataclasses.replace(
                case.places,
                visual_order=case.places.visual_order[:, :0],
                region_segment=case.places.region_segment[:, :0],
            )
            case = dataclasses.replace(
                case,
                visual_k=case.visual_k[:, :, :0],
                visual_v=case.visual_v[:, :, :0],
                places=places,
                selected=case.selected[..., :0],
            )
        out, got = self.gradients(case)
        _close(out, self.expected(case), self.tolerance)
        for gradient, array in zip(got, case.arrays(), strict=True):
            assert gradient.shape == array.shape and np.isfinite(gradient).all()

    def test_edge_10_unselected_regions_get_no_gradient(self):
        """Finite K and V of regions that nobody selects: gradient exactly 0; of selected ones: not 0."""
        case, nobody, _ = self._routed_only()
        _, got = self.gradients(case)
        for gradient in got[1:3]:
            assert (np.asarray(gradient)[nobody] == 0).all()
        chosen = np.asarray(case.selected)[0][np.asarray(case.queries.segment)[0] >= 0].any(0)  # [H, R]
        for h, r in zip(*np.nonzero(chosen), strict=True):
            valid = np.asarray(case.places.visual_order)[0, r] >= 0
            assert (np.asarray(got[2])[0, h // 2, r][valid] != 0).any()

    def test_edge_06_a_query_that_sees_nothing_outputs_zero(self):
        """Padding, an empty window and an empty selection without text-stream keys: 0, and finite
        gradients."""
        case = cases.prefill(_rows())
        out, _ = self.gradients(case)
        padding = np.asarray(case.queries.segment) < 0
        assert padding.any() and (np.asarray(out)[padding] == 0).all()
        assert (np.asarray(out)[~padding] != 0).any(-1).all()
        blind = dataclasses.replace(
            case,
            queries=dataclasses.replace(case.queries, text_hi=case.queries.text_lo - 1),
            selected=jnp.zeros_like(case.selected),
        )
        out, got = self.gradients(blind)
        routed = np.asarray(case.queries.routed)
        assert routed.any() and (np.asarray(out)[routed] == 0).all()
        assert all(np.isfinite(g).all() for g in got)
        assert (np.asarray(got[0])[routed] == 0).all()

    def test_edge_08_causal_queries_inside_an_image(self):
        """New values at later keys change no bit of an earlier visual query, its own region's included."""
        case = cases.prefill([sample([Text(1), PlacedView(4, 4), Text(2)], context=1)], seed=1)
        order = np.asarray(case.places.visual_order)[0]
        cut = 8  # inside the image and inside a region: orders 1..16 in regions of 2x2
        other = cases.prefill([sample([Text(1), PlacedView(4, 4), Text(2)], context=1)], seed=2)
        later = jnp.asarray(order > cut)[None, None, :, :, None]
        text_later = (case.places.text_order > cut)[:, None, :, None]
        changed = case.with_arrays(
            (
                case.q,
                *(jnp.where(later, getattr(other, n), getattr(case, n)) for n in ("visual_k", "visual_v")),
                *(jnp.where(text_later, getattr(other, n), getattr(case, n)) for n in ("text_k", "text_v")),
            )
        )
        before, after = np.asarray(self.forward(case)), np.asarray(self.forward(changed))
        earlier = np.concatenate([order.ravel(), np.asarray(case.places.text_order)[0]]) <= cut
        np.testing.assert_array_equal(after[:, earlier], before[:, earlier])
        assert (after[:, ~earlier] != before[:, ~earlier]).any()

    def test_edge_09_packed_samples_do_not_mix(self):
        """Other keys and values in one sample change no bit of the other's output."""
        row = pack(
            [
                sample([PlacedView(2, 3), Text(2)], context=1),
                sample([Text(1), PlacedView(3, 2), Text(3)], context=1),
            ]
        )
        case = cases.prefill([row])
        second = case.places.region_segment == 1
        text_second = (case.places.text_segment == 1)[:, None, :, None]
        other = cases.prefill([row], seed=5)
        visual_second = second[:, None, :, None, None]
        changed = case.with_arrays(
            (
                case.q,
                *(
                    jnp.where(visual_second, getattr(other, n), getattr(case, n))
                    for n in ("visual_k", "visual_v")
                ),
                *(jnp.where(text_second, getattr(other, n), getattr(case, n)) for n in ("text_k", "text_v")),
            )
        )
        before, after = np.asarray(self.forward(case)), np.asarray(self.forward(changed))
        first = np.asarray(case.queries.segment) == 0
        np.testing.assert_array_equal(after[first], before[first])
        assert (after[~first] != before[~first]).any()

    @pytest.mark.parametrize("query_block", [1, 7, 49])
    def test_edge_13_query_blocks_with_remainders(self, query_block):
        """T not a multiple of the block: the same values and gradients as in one block."""
        case = cases.prefill(_rows(), select_per="kv_head")
        length = case.q.shape[1]
        assert length == 50 and (query_block == 1 or length % query_block)
        blocks = dataclasses.replace(case, spec=dataclasses.replace(case.spec, query_block=query_block))
        out, got = self.gradients(blocks)
        whole, expected = self.gradients(case)
        _close(out, whole, 1e-6)
        for mine, theirs in zip(got, expected, strict=True):
            _close(mine, theirs, 5e-6)

    def test_query_blocks_ignore_unseen_nan_and_equal_dense(self):
        """In blocks too, NaN that no query of any block sees changes nothing; neither does selected=None."""
        case, nobody, _ = self._routed_only()
        case = dataclasses.replace(case, spec=dataclasses.replace(case.spec, query_block=7))
        clean, _ = self.gradients(case)
        bad = jnp.asarray(nobody)[..., None]
        poisoned = dataclasses.replace(
            case,
            visual_k=jnp.where(bad, jnp.nan, case.visual_k),
            visual_v=jnp.where(bad, jnp.nan, case.visual_v),
        )
        out, got = self.gradients(poisoned)
        np.testing.assert_array_equal(out, clean)
        assert (np.asarray(got[1])[nobody] == 0).all() and np.isfinite(got[0]).all()
        dense = dataclasses.replace(case, selected=None)
        _close(self.forward(dense), self.expected(dense), self.tolerance)

    def test_edge_15_sharded_over_kv_heads(self):
        """Heads on two devices: the unsharded values, and an output that stays sharded over heads."""
        if not self.shards_heads:
            pytest.skip(f"{self.implementation} is not partitioned by the compiler")
        case = cases.prefill(_rows())
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",))

        def over(axis, a):
            spec = jax.P(*[None] * axis, "tensor")
            return jax.device_put(a, jax.sharding.NamedSharding(mesh, spec))

        split = dataclasses.replace(
            case.with_arrays((over(2, case.q), *(over(1, a) for a in case.arrays()[1:]))),
            selected=over(2, case.selected),
        )
        got = self.forward(split)
        _close(got, self.forward(case), 1e-6)
        assert got.sharding.is_equivalent_to(split.q.sharding, got.ndim)

    def test_edge_16_the_scale_changes_the_output(self):
        """Twice the scale equals twice the query, and differs from once."""
        case = cases.prefill(_one_row())
        doubled = dataclasses.replace(case, spec=dataclasses.replace(case.spec, scale=2 * case.spec.scale))
        _close(self.forward(doubled), self.forward(dataclasses.replace(case, q=2 * case.q)), 1e-6)
        assert np.abs(np.asarray(self.forward(doubled)) - np.asarray(self.forward(case))).max() > 1e-2

    def test_edge_17_twice_is_bitwise_equal(self):
        """Output and gradients have the same bits when run again."""
        case = cases.prefill(_rows())
        first, second = self.gradients(case), self.gradients(case)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_vmap(self):
        """A mapped axis in front of every argument equals one call per entry."""
        pair = [cases.prefill(_one_row(), seed=seed) for seed in (0, 1)]
        both = jax.tree.map(lambda *a: jnp.stack(a), *pair)
        got = jax.jit(jax.vmap(lambda case: _call(case, self.implementation)))(both)
        for one, case in zip(got, pair, strict=True):
            _close(one, self.forward(case), 1e-6)

    def test_padding_the_keys_changes_nothing(self):
        """Empty regions, empty slots and padded text-stream keys leave the queries' values as they are."""
        row = _one_row()[0]
        small = cases.prefill([row])
        large = cases.prefill([pad(row, regions=7, slots=6, text=9)])
        regions, slots, dense = *small.places.visual_order.shape[1:], small.places.text_order.shape[1]
        extended = large.with_arrays(
            (
                large.q,
                *(
                    getattr(large, n).at[:, :, :regions, :slots].set(getattr(small, n))
                    for n in ("visual_k", "visual_v")
                ),
                *(getattr(large, n).at[:, :, :dense].set(getattr(small, n)) for n in ("text_k", "text_v")),
            )
        )
        start = large.places.visual_order.size
        extended = dataclasses.replace(
            extended,
            q=extended.q.at[:, start : start + dense].set(small.q[:, regions * slots :]),
            selected=extended.selected.at[:, start : start + dense, :, :regions].set(
                small.selected[:, regions * slots :]
            ),
        )
        got = np.asarray(self.forward(extended))[:, start:]
        _close(got[:, :dense], np.asarray(self.forward(small))[:, regions * slots :], 1e-6)
        assert (got[:, dense:] == 0).all()
