"""The values that every implementation of ``gaze_decode`` must give at all sizes, and how its cache grows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gaze_decode import api
from pallas_kernels.softmax import joined
from tests.helpers import cases, rounding


def call(case, implementation):
    """Pack the case's cache and decode."""
    return call_with_lse(case, implementation)[0]


def call_with_lse(case, implementation):
    """:func:`call`, and the log-sum-exp of the logits."""
    spec = cases.runnable(case.spec)
    packed = api.pack(case.k, case.v, spec=spec, implementation=implementation)
    return api.gaze_decode_with_lse(
        case.q,
        packed,
        case.text_k,
        case.text_v,
        case.layer,
        case.indices,
        case.visual_seen,
        case.text_seen,
        spec=spec,
        implementation=implementation,
    )


@functools.cache
def _program(implementation):
    """One jitted function per implementation, so that equal shapes compile once for all tests."""
    return jax.jit(lambda case: call(case, implementation))


def _close(got, expected, tolerance):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    np.testing.assert_allclose(
        got, expected, rtol=tolerance, atol=tolerance * max(np.abs(expected).max(), 1e-3)
    )


def _unread(case):
    """bool [B, K, R, P]: no query head of the kv head reads the slot."""
    kv_heads, regions = case.k.shape[2:4]
    picks = np.asarray(case.indices)
    listed = (picks[..., None] == np.arange(regions)).any(2)
    listed = listed.reshape(listed.shape[0], kv_heads, -1, regions).any(2)
    return ~(listed[..., None] & np.asarray(case.visual_seen)[:, None])


def long(*values):
    """Parameters of a case that is left to ``-m long``: a neighbour takes the same paths."""
    return pytest.param(*values, marks=pytest.mark.long)


class DecodeValues:
    """The part of ``decode_suite.DecodeSuite`` that compares values."""

    implementation = ""
    shards_heads = True
    tolerance = 2e-5
    bf16_tolerance = 2e-2

    def run(self, case):
        out = _program(self.implementation)(case)
        cases.no_races(out)
        return out

    def expected(self, case):
        """The reference implementation; its own subclass is checked against float64 loops instead."""
        return _program("reference")(case)

    @pytest.mark.parametrize("select_per", ["head", "kv_head"])
    @pytest.mark.parametrize("seed", [0, long(1), long(2)])
    def test_values(self, select_per, seed):
        """Partial regions, -1 inside the list, half of the text stream."""
        case = cases.decode(select_per=select_per, seed=seed)
        _close(self.run(case), self.expected(case), self.tolerance)

    def test_dense_without_indices(self):
        """``indices=None`` reads every region."""
        case = cases.decode(capacity=None)
        _close(self.run(case), self.expected(case), self.tolerance)

    @pytest.mark.parametrize("select_per", ["head", "kv_head"])
    def test_parts_are_joined(self, select_per):
        """The first two listed regions, then the others and the text stream: joined by their log-sum-exp they
        are the whole; a part without any key changes nothing."""
        case = cases.decode(select_per=select_per)
        at = jnp.arange(case.indices.shape[-1])
        nothing = jnp.zeros_like(case.text_seen)

        def part(listed, text_seen):
            indices = jnp.where(listed, case.indices, -1)
            return dataclasses.replace(case, indices=indices, text_seen=text_seen)

        program = jax.jit(lambda case: call_with_lse(case, self.implementation))
        parts = [
            program(part(*which))
            for which in ((at < 2, nothing), (at >= 2, case.text_seen), (at < 0, nothing))
        ]
        assert (np.asarray(parts[2][0]) == 0).all() and (np.asarray(parts[2][1]) == -np.inf).all()
        whole = program(case)
        got = joined(*map(jnp.stack, zip(*parts)), 0)
        for mine, theirs in zip(got, whole, strict=True):
            _close(mine, theirs, self.tolerance)
        expected = call_with_lse(case, "reference")[1]
        assert np.isfinite(expected).all()
        _close(whole[1], expected, self.tolerance)

    def test_every_layer_is_reached_by_its_index(self):
        """The layer is traced: one program, another result for each layer."""
        case = cases.decode()
        outs = []
        for layer in range(3):
            at = dataclasses.replace(case, layer=jnp.int32(layer))
            outs.append(np.asarray(self.run(at)))
            _close(outs[-1], self.expected(at), self.tolerance)
        assert np.abs(outs[0] - outs[1]).max() > 0.01 and np.abs(outs[1] - outs[2]).max() > 0.01

    @pytest.mark.parametrize(
        ("group", "select_per"),
        [
            (1, "head"),
            (4, "kv_head"),
            (5, "head"),
            (7, "kv_head"),
            (8, "head"),
            *(
                long(*pair)
                for pair in [(1, "kv_head"), (4, "head"), (5, "kv_head"), (7, "head"), (8, "kv_head")]
            ),
        ],
    )
    def test_edge_12_group_sizes(self, group, select_per):
        """G = 1, 4, 5, 7, 8: query head h reads kv head h // G, and K = 3 is no power of two either."""
        case = cases.decode(kv_heads=3, group=group, select_per=select_per, dim=4)
        _close(self.run(case), self.expected(case), self.tolerance)

    @pytest.mark.parametrize("capacity", [1, long(3), long(7), 9])  # 3 and 7 are in edges 03 and 02
    def test_edge_13_odd_capacities(self, capacity):
        """J = 1, 3, R and more than R."""
        case = cases.decode(capacity=capacity)
        _close(self.run(case), self.expected(case), self.tolerance)

    @pytest.mark.parametrize(
        "sizes", [{"slots": 1}, {"text": 1}, {"dim": 20, "size": 3}, {"slots": 36, "layers": 1}]
    )
    def test_odd_sizes(self, sizes):
        """One slot per region, one text-stream key, D = 20 with three rows, 36 slots in a single layer."""
        case = cases.decode(**sizes)
        _close(self.run(case), self.expected(case), self.tolerance)

    @pytest.mark.parametrize("select_per", ["head", "kv_head"])
    def test_bf16(self, select_per):
        """bfloat16 cache and query: near the float32 result of the same rounded inputs."""
        case = cases.decode(select_per=select_per, dtype=jnp.bfloat16)
        wide = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, case)
        got = self.run(case)
        assert got.dtype == jnp.bfloat16
        _close(got, _program("reference")(wide), self.bf16_tolerance)

    @pytest.mark.parametrize("select_per", ["head", "kv_head"])
    def test_int8(self, select_per):
        """An int8 visual cache: as if every token had been rounded to 127 steps; unread slots hold NaN."""
        plain = cases.decode(select_per=select_per)
        bad = jnp.asarray(_unread(plain)[None])[..., None]
        k, v = (np.asarray(jnp.where(bad, jnp.nan, a)) for a in (plain.k, plain.v))
        int8 = dataclasses.replace(plain.spec, visual_dtype="int8")
        got = self.run(dataclasses.replace(plain, k=jnp.asarray(k), v=jnp.asarray(v), spec=int8))
        k, v = (jnp.asarray(rounding.int8(a), jnp.float32) for a in (k, v))
        rounded = dataclasses.replace(plain, k=k, v=v)
        # The scales may multiply logits and weights instead of keys and values, which rounds elsewhere.
        _close(got, self.expected(rounded), 10 * self.tolerance)
        assert np.abs(np.asarray(got) - np.asarray(self.run(plain))).max() > 1e-4, "it did round"

    @pytest.mark.parametrize(
        ("dim", "select_per", "kind"),
        [
            (20, "head", "int8"),
            (100, "kv_head", "bfloat16"),
            *(long(20, per, "bfloat16") for per in ("head", "kv_head")),
            *(long(100, per, "int8") for per in ("head", "kv_head")),
            *(long(20, "kv_head", "int8"), long(100, "head", "bfloat16")),
        ],
    )
    def test_bf16_where_no_block_divides(self, dim, select_per, kind):
        """3 rows of 3 kv heads, G = 3, 11 regions of 5 slots, 37 text-stream keys; what is unread is NaN.

        bfloat16 queries, a cache of bfloat16 or int8: no element is further from float64 than the roundings
        of bfloat16.
        """
        options = {"size": 3, "kv_heads": 3, "group": 3, "regions": 11, "text": 37, "capacity": 5}
        case = cases.decode(dim=dim, select_per=select_per, **options)
        unread = jnp.asarray(_unread(case)[None])[..., None]
        k, v = (jnp.where(unread, jnp.nan, a) for a in (case.k, case.v))
        narrow = {name: getattr(case, name).astype(jnp.bfloat16) for name in ("q", "text_k", "text_v")}
        case = dataclasses.replace(case, k=k, v=v, **narrow)
        if kind == "int8":
            spec = dataclasses.replace(case.spec, visual_dtype="int8")
            got = self.run(dataclasses.replace(case, spec=spec))
            case = dataclasses.replace(case, k=rounding.int8(k), v=rounding.int8(v))
        else:
            case = dataclasses.replace(case, k=k.astype(jnp.bfloat16), v=v.astype(jnp.bfloat16))
            got = self.run(case)
        assert got.dtype == jnp.bfloat16
        rounding.within(got, *rounding.decode(case))

    def test_large_logits(self):
        """Logits of +-10,000 neither overflow nor lose the maximum."""
        case = cases.decode()
        case = dataclasses.replace(case, q=case.q * 1e4)
        assert np.isfinite(self.run(case)).all()
        _close(self.run(case), self.expected(case), 1e-3)

    def test_unpack_inverts_pack(self):
        """K and V come back bit for bit from the implementation's layout."""
        case = cases.decode()
        options = {"spec": cases.runnable(case.spec), "implementation": self.implementation}
        k, v = api.unpack(api.pack(case.k, case.v, **options), **options)
        np.testing.assert_array_equal(k, case.k)
        np.testing.assert_array_equal(v, case.v)

    @pytest.mark.parametrize(
        ("dim", "slots", "kind"),
        [
            (7, 5, "float32"),
            (70, 67, "bfloat16"),
            (7, 5, "int8"),
            *(long(7, 5, "bfloat16"), long(70, 67, "float32"), long(70, 67, "int8")),
        ],
    )
    def test_appended_equals_packed_at_once(self, dim, slots, kind):
        """Reserve, widen, append at traced places: every array of the cache as if all had been there.

        Odd P and D, both sides of the layouts' cuts at 64; the regions come with fewer slots than P.
        """
        case = cases.decode(slots=slots, dim=dim, dtype=jnp.bfloat16 if kind == "bfloat16" else jnp.float32)
        spec = dataclasses.replace(case.spec, visual_dtype="int8" if kind == "int8" else None)
        options = {"spec": cases.runnable(spec), "implementation": self.implementation}
        cut = (np.arange(slots) < np.array([3, 3, 4, 4, 4, slots, slots])[:, None])[..., None]
        k, v = (np.where(cut, a, np.zeros((), a.dtype)) for a in (case.k, case.v))

        # Programs of some steps each: one for every operation takes three times as long to compile.
        @jax.jit
        def first(k, v):
            packed = api.reserve(api.pack(k, v, **options), 2, **options)
            return api.reserve(packed, 3, slots=slots, **options)

        pack, unpack, append = (
            jax.jit(functools.partial(step, **options)) for step in (api.pack, api.unpack, api.append)
        )
        packed = first(k[:, :, :, :2, :3], v[:, :, :, :2, :3])
        packed = append(packed, k[:, :, :, 5:], v[:, :, :, 5:], jnp.int32(5))
        packed = append(packed, k[:, :, :, 2:5, :4], v[:, :, :, 2:5, :4], jnp.int32(2))
        expected = pack(k, v)
        for got, whole in zip(jax.tree.leaves(packed), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(got, whole)
        for got, whole in zip(unpack(packed), unpack(expected), strict=True):
            np.testing.assert_array_equal(got, whole)

    def test_append_writes_in_place(self):
        """Of a donated cache no copy is made: it is the output, and temporaries are far smaller."""
        case = cases.decode(regions=64)
        options = {"spec": cases.runnable(case.spec), "implementation": self.implementation}
        packed = api.pack(case.k, case.v, **options)
        new = jax.ShapeDtypeStruct((3, 2, 2, 1, 5, 8), jnp.float32)
        start = jax.ShapeDtypeStruct((), jnp.int32)
        append = jax.jit(functools.partial(api.append, **options), donate_argnums=0)
        memory = append.lower(packed, new, new, start).compile().memory_analysis()
        cache = sum(a.nbytes for a in jax.tree.leaves(packed))
        assert memory.alias_size_in_bytes == cache
        assert memory.temp_size_in_bytes < cache / 10
