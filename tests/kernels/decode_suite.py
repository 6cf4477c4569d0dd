"""What every implementation of ``gaze_decode`` must pass; see ``test_decode.py`` for the subclasses.

The edge cases are here, the values in ``decode_values``. They carry the numbers of ``prefill_suite``.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gaze_decode import api
from tests.helpers import cases
from tests.kernels.decode_values import DecodeValues, _close, _unread, call, long


class DecodeSuite(DecodeValues):
    """Subclass, name the implementation, and switch off what it cannot do."""

    def test_edge_01_the_order_of_the_list_does_not_matter(self):
        """The same regions listed in another order give the same softmax."""
        case = cases.decode()
        turned = dataclasses.replace(case, indices=case.indices[..., ::-1])
        _close(self.run(turned), self.run(case), 1e-6)

    @pytest.mark.parametrize("select_per", ["head", "kv_head"])
    def test_edge_02_listing_every_region_equals_dense(self, select_per):
        """All R regions by index and no indices at all agree to one rounding."""
        case = cases.decode(capacity=7, select_per=select_per)
        everything = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32)[::-1], case.indices.shape)
        listed = self.run(dataclasses.replace(case, indices=everything))
        _close(listed, self.run(dataclasses.replace(case, indices=None)), 5e-7)

    @pytest.mark.parametrize("capacity", [None, 2])
    @pytest.mark.parametrize("regions", [0, 1])
    def test_edge_03_no_region_or_one(self, regions, capacity):
        """R = 0 (text only, nothing but -1 listed) and R = 1."""
        case = cases.decode(regions=regions, capacity=capacity)
        _close(self.run(case), self.expected(case), self.tolerance)

    def test_edge_05_nan_in_unread_slots_changes_nothing(self):
        """NaN in unselected regions, other layers, invalid slots and unseen text-stream keys: the same
        bits."""
        case = cases.decode()
        layer = np.arange(3)[:, None, None, None, None] != int(case.layer)
        bad = jnp.asarray(layer | _unread(case)[None])[..., None]
        text_bad = jnp.asarray(
            (np.arange(3)[:, None, None] != int(case.layer)) | ~np.asarray(case.text_seen)[None]
        )[:, :, None, :, None]
        poisoned = dataclasses.replace(
            case,
            k=jnp.where(bad, jnp.nan, case.k),
            v=jnp.where(bad, jnp.nan, case.v),
            text_k=jnp.where(text_bad, jnp.nan, case.text_k),
            text_v=jnp.where(text_bad, jnp.nan, case.text_v),
        )
        assert np.isnan(poisoned.k).mean() > 0.5 and np.isnan(poisoned.text_v).any()
        got = np.asarray(self.run(poisoned))
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got, self.run(case))

    @pytest.mark.parametrize(("side", "capacity"), [("k", 2), ("v", 4), long("k", 4), long("v", 2)])
    def test_edge_05_nan_in_a_region_reaches_the_heads_of_its_group(self, side, capacity):
        """Whether heads gather their own lists or all read a union: one rule. No other kv head or row."""
        case = cases.decode(capacity=capacity)
        group, listed = 2, jnp.asarray([[[0, 1, 3, -1], [2, 5, -1, 4]]], jnp.int32)
        indices = jnp.broadcast_to(listed[:, jnp.arange(4) % 2, :capacity], (2, 4, capacity))
        case = dataclasses.replace(case, indices=indices, visual_seen=jnp.ones_like(case.visual_seen))
        bad = (
            getattr(case, side).at[int(case.layer), 0, 0, 1].set(jnp.nan)
        )  # head 0 lists region 1, head 1 does not
        got = np.asarray(self.run(dataclasses.replace(case, **{side: bad})))
        assert np.isnan(got[0, :group]).all()
        rest = np.ones(got.shape[:2], bool)
        rest[0, :group] = False
        np.testing.assert_array_equal(got[rest], np.asarray(self.run(case))[rest])

    @pytest.mark.parametrize("capacity", [3, None])
    def test_edge_03_no_text_stream(self, capacity):
        """S = 0: the listed regions alone; and nothing at all."""
        case = cases.decode(text=0, capacity=capacity)
        _close(self.run(case), self.expected(case), self.tolerance)
        nothing = cases.decode(text=0, regions=0, capacity=capacity)
        assert (np.asarray(self.run(nothing)) == 0).all()

    def test_edge_06_a_query_that_sees_nothing_outputs_zero(self):
        """An all -1 list without text-stream keys, and listed regions without valid slots: 0."""
        case = cases.decode()
        blind = dataclasses.replace(case, text_seen=jnp.zeros_like(case.text_seen))
        none = dataclasses.replace(blind, indices=jnp.full_like(case.indices, -1))
        assert (np.asarray(self.run(none)) == 0).all()
        empty = dataclasses.replace(blind, visual_seen=jnp.zeros_like(case.visual_seen))
        assert (np.asarray(self.run(empty)) == 0).all()
        one_row = dataclasses.replace(none, text_seen=case.text_seen.at[1].set(False))
        got = np.asarray(self.run(one_row))
        assert (got[1] == 0).all() and (got[0] != 0).any(-1).all()

    @pytest.mark.parametrize("select_per", ["head", "kv_head"])
    def test_edge_07_minus_one_and_duplicates(self, select_per):
        """-1 anywhere in the list reads nothing, and a region listed three times counts once."""
        case = cases.decode(select_per=select_per, capacity=6)
        heads = case.indices.shape[1]
        spread = jnp.asarray([[[3, -1, 3, 5, -1, 3]] * heads, [[-1, 0, 0, -1, 6, 0]] * heads], jnp.int32)
        plain = jnp.asarray([[[3, 5, -1, -1, -1, -1]] * heads, [[0, 6, -1, -1, -1, -1]] * heads], jnp.int32)
        spread = dataclasses.replace(case, indices=spread)
        _close(self.run(spread), self.expected(spread), self.tolerance)
        _close(self.run(spread), self.run(dataclasses.replace(case, indices=plain)), 1e-6)

    def test_edge_07_the_region_in_a_clamped_slot_is_not_read(self):
        """-1 must not fall back to region 0 or to the last region: NaN there stays out."""
        case = cases.decode(capacity=3)
        indices = jnp.broadcast_to(jnp.array([-1, 2, -1], jnp.int32), case.indices.shape)
        k, v = (a.at[:, :, :, jnp.array([0, 6])].set(jnp.nan) for a in (case.k, case.v))
        clean = self.run(dataclasses.replace(case, indices=indices))
        got = self.run(dataclasses.replace(case, indices=indices, k=k, v=v))
        np.testing.assert_array_equal(got, clean)
        assert np.isfinite(got).all()

    def test_edge_15_sharded_over_kv_heads(self):
        """Heads on two devices: the unsharded values, and an output that stays sharded over heads."""
        if not self.shards_heads:
            pytest.skip(f"{self.implementation} is not partitioned by the compiler")
        case = cases.decode()
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",))

        def over(axis, a):
            spec = jax.P(*[None] * axis, "tensor")
            return jax.device_put(a, jax.sharding.NamedSharding(mesh, spec))

        split = dataclasses.replace(
            case,
            q=over(1, case.q),
            indices=over(1, case.indices),
            **{name: over(2, getattr(case, name)) for name in ("k", "v", "text_k", "text_v")},
        )
        got = self.run(split)
        _close(got, self.run(case), 1e-6)
        assert got.sharding.is_equivalent_to(split.q.sharding, got.ndim)

    def test_edge_16_the_scale_changes_the_output(self):
        """Twice the scale equals twice the query, and differs from once."""
        case = cases.decode()
        doubled = dataclasses.replace(case, spec=dataclasses.replace(case.spec, scale=2 * case.spec.scale))
        _close(self.run(doubled), self.run(dataclasses.replace(case, q=2 * case.q)), 1e-6)
        assert np.abs(np.asarray(self.run(doubled)) - np.asarray(self.run(case))).max() > 1e-2

    def test_edge_17_twice_is_bitwise_equal(self):
        """The output has the same bits when run again."""
        case = cases.decode()
        np.testing.assert_array_equal(self.run(case), self.run(case))

    def test_vmap(self):
        """A mapped axis in front of every argument equals one call per entry."""
        pair = [cases.decode(seed=seed) for seed in (0, 1)]
        both = jax.tree.map(lambda *a: jnp.stack(a), *pair)
        got = jax.jit(jax.vmap(lambda case: call(case, self.implementation)))(both)
        for one, case in zip(got, pair, strict=True):
            _close(one, self.run(case), 1e-6)

    @pytest.mark.parametrize("names", [("k", "v"), ("q",), ("layer",)], ids=["cache", "query", "layer"])
    def test_vmap_over_one_argument(self, names):
        """Several caches for one query, several queries or layers of one cache; packed under vmap too."""
        case, other = cases.decode(seed=0), dataclasses.replace(cases.decode(seed=1), layer=jnp.int32(2))
        both = {name: jnp.stack([getattr(case, name), getattr(other, name)]) for name in names}
        mapped = jax.vmap(lambda some: call(dataclasses.replace(case, **some), self.implementation))
        got = jax.jit(mapped)(both)
        cases.no_races(got)
        for i, one in enumerate(got):
            _close(one, self.run(dataclasses.replace(case, **{n: a[i] for n, a in both.items()})), 1e-6)
        assert np.abs(np.asarray(got[0]) - np.asarray(got[1])).max() > 0.01

    def test_vmap_of_a_growing_cache(self):
        """Packed, widened and written at a place of its own: the bits of one cache after the other."""
        pair = [cases.decode(seed=seed) for seed in (0, 1)]
        options = {"spec": cases.runnable(pair[0].spec), "implementation": self.implementation}

        def grow(k, v, start):
            packed = api.reserve(api.pack(k, v, **options), 2, **options)
            packed = api.append(packed, k[:, :, :, :3], v[:, :, :, :3], start, **options)
            return packed, api.unpack(packed, **options)

        starts = jnp.array([1, 6], jnp.int32)
        got = jax.jit(jax.vmap(grow))(*(jnp.stack([getattr(case, n) for case in pair]) for n in "kv"), starts)
        for i, case in enumerate(pair):
            plain = jax.jit(grow)(case.k, case.v, starts[i])
            for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(plain), strict=True):
                np.testing.assert_array_equal(mine[i], theirs)
                assert mine.sharding.memory_kind == theirs.sharding.memory_kind
            for mine, a in zip(got[1], (case.k, case.v), strict=True):
                whole = np.pad(a, [(0, 0)] * 3 + [(0, 2), (0, 0), (0, 0)])
                whole[:, :, :, starts[i] : starts[i] + 3] = a[:, :, :, :3]
                np.testing.assert_array_equal(mine[i], whole)

    def test_rows_are_independent(self):
        """A row's result has the same bits whatever the other row holds."""
        case, other = cases.decode(seed=0), cases.decode(seed=3)

        def mixed(mine, theirs):
            if mine.ndim == 0:
                return mine
            axis = 1 if mine.shape[0] == 3 else 0
            return jnp.concatenate([jnp.take(mine, 0, axis)[None], jnp.take(theirs, 1, axis)[None]]).swapaxes(
                0, axis
            )

        got = self.run(jax.tree.map(mixed, case, other))
        np.testing.assert_array_equal(got[0], self.run(case)[0])
        np.testing.assert_array_equal(got[1], self.run(dataclasses.replace(other, layer=case.layer))[1])


class InterpretedDecodeSuite(DecodeSuite):
    """The suite for kernels that are interpreted, which takes seconds per case.

    Pairs of values stand for the products, which ``-m long`` runs.
    """

    @pytest.mark.parametrize(
        ("group", "select_per"),
        [
            (5, "kv_head"),
            *(long(group, per) for group in (1, 4, 7, 8) for per in ("head", "kv_head")),
            long(5, "head"),
        ],
    )
    def test_edge_12_group_sizes(self, group, select_per):
        super().test_edge_12_group_sizes(group, select_per)

    @pytest.mark.parametrize("capacity", [long(1), long(3), long(7), 9])
    def test_edge_13_odd_capacities(self, capacity):
        super().test_edge_13_odd_capacities(capacity)

    @pytest.mark.parametrize(
        "sizes", [{"dim": 20, "size": 3}, *map(long, ({"slots": 1}, {"text": 1}, {"slots": 36, "layers": 1}))]
    )
    def test_odd_sizes(self, sizes):
        super().test_odd_sizes(sizes)

    @pytest.mark.parametrize("select_per", ["kv_head", long("head")])
    def test_int8(self, select_per):
        super().test_int8(select_per)

    @pytest.mark.long
    def test_vmap(self):  # the cache alone, by default on the TPU, takes the same loop
        super().test_vmap()

    @pytest.mark.long
    @pytest.mark.parametrize("names", [("k", "v"), ("q",), ("layer",)], ids=["cache", "query", "layer"])
    def test_vmap_over_one_argument(self, names):
        super().test_vmap_over_one_argument(names)

    @pytest.mark.long
    @pytest.mark.parametrize("select_per", ["head", "kv_head"])
    def test_bf16(self, select_per):  # where no block divides, by default
        super().test_bf16(select_per)

    @pytest.mark.long
    @pytest.mark.parametrize("select_per", ["head", "kv_head"])
    def test_edge_02_listing_every_region_equals_dense(self, select_per):  # both equal the reference
        super().test_edge_02_listing_every_region_equals_dense(select_per)

    @pytest.mark.long
    def test_every_layer_is_reached_by_its_index(self):  # every case is of the second layer of three
        super().test_every_layer_is_reached_by_its_index()

    @pytest.mark.long
    def test_edge_01_the_order_of_the_list_does_not_matter(self):  # the lists of test_values are in no order
        super().test_edge_01_the_order_of_the_list_does_not_matter()

    @pytest.mark.parametrize("select_per", ["head", long("kv_head")])
    def test_edge_07_minus_one_and_duplicates(self, select_per):
        super().test_edge_07_minus_one_and_duplicates(select_per)

    @pytest.mark.parametrize(("regions", "capacity"), [(0, 2), (1, None), long(0, None), long(1, 2)])
    def test_edge_03_no_region_or_one(self, regions, capacity):
        super().test_edge_03_no_region_or_one(regions, capacity)

    @pytest.mark.long
    def test_edge_16_the_scale_changes_the_output(self):  # no case has the scale that follows from D
        super().test_edge_16_the_scale_changes_the_output()

    @pytest.mark.long
    def test_edge_17_twice_is_bitwise_equal(self):  # test_rows_are_independent compares bits of two runs
        super().test_edge_17_twice_is_bitwise_equal()
