"""The GPU decode kernel: interpreted here, lowered for cuda here, compiled where there is a GPU.

Interpreted, the tensor cores' products are plain ones and layouts vanish; copies, indices, barriers,
masks and the softmax are the kernel's own. Lowering checks layouts, tiles and shared memory for sm_90
and runs nothing.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels import GazeSpec, gaze_decode
from pallas_kernels.dispatch import compile_for
from pallas_kernels.gaze_decode import api, gpu, gpu_layout
from tests.helpers import cases
from tests.kernels.decode_suite import InterpretedDecodeSuite
from tests.kernels.decode_values import _close, _program, call, long


@pytest.fixture
def no_races():
    """Fails a test in which two accesses were ordered by nothing but luck."""
    yield
    if jax.default_backend() == "cpu":
        races = gpu_callbacks._races  # None until a kernel has been interpreted
        assert races is None or not races.races_found


@pytest.mark.usefixtures("no_races")
class TestCopiesAndIndicesInterpreted(InterpretedDecodeSuite):
    """The shared suite, with race detection, NaN in fresh shared memory and bounds checks."""

    implementation = "gpu"
    shards_heads = False  # a Mosaic kernel is partitioned by shard_map, not by the compiler
    # What int8 and edge 12 do with lists per kv head; the kernel reads V like K.
    left = ("test_values[0-kv_head]", "test_edge_05_nan_in_a_region_reaches_the_heads_of_its_group[v-4]")
    left += ("test_dense_without_indices",)  # edge 03 has no list either

    @pytest.mark.parametrize(
        ("slots", "select_per"),
        [(36, "kv_head"), *(long(*rest) for rest in ((5, "head"), (5, "kv_head"), (36, "head")))],
    )
    def test_int8(self, slots, select_per):
        """int8 regions beside a float32 text stream: the reference's values of the same rounding."""
        case = cases.decode(slots=slots, select_per=select_per)
        case = dataclasses.replace(case, spec=dataclasses.replace(case.spec, visual_dtype="int8"))
        _close(self.run(case), self.expected(case), self.tolerance)

    def test_int8_nan_in_unseen_slots_changes_nothing(self):
        """A NaN token has a NaN scale, which must stay out of the logits and of the values."""
        case = cases.decode()
        case = dataclasses.replace(case, spec=dataclasses.replace(case.spec, visual_dtype="int8"))
        unseen = ~case.visual_seen[None, :, None, :, :, None]
        bad = dataclasses.replace(
            case, k=jnp.where(unseen, jnp.nan, case.k), v=jnp.where(unseen, jnp.nan, case.v)
        )
        got = np.asarray(self.run(bad))
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got, self.run(case))

    @pytest.mark.parametrize("select_per", [long("head"), long("kv_head")])
    def test_edge_07_minus_one_and_duplicates(self, select_per):  # the clamped slot of edge 07 has both
        super().test_edge_07_minus_one_and_duplicates(select_per)

    @pytest.mark.parametrize(
        "sizes", [*map(long, ({"dim": 20, "size": 3}, {"slots": 1}, {"text": 1}, {"slots": 36, "layers": 1}))]
    )
    def test_odd_sizes(self, sizes):  # where no block divides, by default: D = 20, three rows, both caches
        super().test_odd_sizes(sizes)

    @pytest.mark.parametrize("capacity", [3, long(None)])
    def test_edge_03_no_text_stream(self, capacity):  # a dense read is of one region, too
        super().test_edge_03_no_text_stream(capacity)

    @pytest.mark.parametrize("capacity", [long(1), long(3), long(7), long(9)])
    def test_edge_13_odd_capacities(self, capacity):  # of the TPU kernel by default, which shares the plan
        super().test_edge_13_odd_capacities(capacity)

    @pytest.mark.parametrize("select_per", [long("head"), "kv_head"])
    def test_a_ring_slot_is_filled_again(self, select_per):
        """More chunks for a block than there are stages; and float32 is float32, not a sum of two parts."""
        case = cases.decode(regions=24, capacity=15, select_per=select_per)
        _close(self.run(case), self.expected(case), 1e-6)

    @pytest.mark.parametrize("sizes", [{"slots": 70, "regions": 3}, {"text": 150}, long({"dim": 64})])
    def test_sizes_that_the_layout_cuts(self, sizes):
        """Regions in two pieces, a text stream whose last chunk moves back, D that is stored as it is."""
        case = cases.decode(**sizes)
        _close(self.run(case), self.expected(case), self.tolerance)


@pytest.mark.gpu
class TestCompiled(TestCopiesAndIndicesInterpreted):
    """The same suite on a GPU: ``JAX_PLATFORMS=cuda pytest -m gpu tests/kernels``."""

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
    @pytest.mark.parametrize("select_per", ["head", "kv_head"])
    @pytest.mark.parametrize("dim", [64, 128])
    def test_real_sizes(self, dim, select_per, dtype):
        """555 regions of 36 slots, 55 per head, G = 7, 700 text-stream keys: chunks in every split."""
        case = cases.decode(
            layers=2,
            group=7,
            kv_heads=4,
            regions=555,
            slots=36,
            text=700,
            dim=dim,
            capacity=55,
            select_per=select_per,
            dtype=dtype,
        )
        wide = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, case)
        tolerance = self.tolerance if dtype == jnp.float32 else self.bf16_tolerance
        _close(self.run(case), _program("reference")(wide), tolerance)


def count_copies(monkeypatch, shape):
    """The first index of each block of this shape that kernels copy to shared memory from now on."""
    copied = []
    # The interpreter has no public way to watch copies, and jax 0.12 has another class for them than 0.10.
    if hasattr(gpu_callbacks, "DeviceLocalMemoryTransfer"):
        transfer, method = gpu_callbacks.DeviceLocalMemoryTransfer, "execute"

        def source(copy):
            at = copy.src_transforms[-1]
            return tuple(at.get_indexer_shape()), at.indices[0]
    else:
        transfer, method = gpu_callbacks.AsyncCopyGmemToSmemTask, "__call__"

        def source(copy):
            return copy.src_access.shape, copy.src_access.range[0]

    original = getattr(transfer, method)

    def count(copy, argument):
        copied_shape, index = source(copy)
        if copied_shape == shape:
            copied.append(int(index))
        return original(copy, argument)

    monkeypatch.setattr(transfer, method, count)
    return copied


@pytest.mark.parametrize("select_per", ["head", long("kv_head")])
def test_every_region_of_the_union_is_copied_once(select_per, monkeypatch):
    """G = 4 query heads: K and V of a region cross the bus once for all that want it, and no other does."""
    case = cases.decode(size=1, group=4, select_per=select_per)
    copied = count_copies(monkeypatch, (5, 64))
    # A program of its own: another test's would have been traced without the count.
    jax.block_until_ready(jax.jit(lambda case: call(case, "gpu"))(case))

    batch, kv_heads, regions = 1, 2, 7
    picks = np.asarray(case.indices).reshape(batch, kv_heads, -1)
    expected = [
        ((int(case.layer) * batch + b) * kv_heads + h) * regions + r
        for b in range(batch)
        for h in range(kv_heads)
        for r in sorted(set(picks[b, h].tolist()) - {-1})
    ]
    assert sorted(copied) == sorted(2 * expected)


def _lower(*, group, slots, dim, dtype, select_per, int8=False, text=300, batch=1, capacity=8, vmapped=False):
    """StableHLO with the Mosaic kernel for sm_90 in it."""
    layers, kv_heads, regions = 2, 2, 32
    spec = GazeSpec(scale=1.0, select_per=select_per, visual_dtype="int8" if int8 else None)

    def call(q, k, v, text_k, text_v, layer, indices, visual_seen, text_seen):
        packed = api.pack(k, v, spec=spec, implementation="gpu")
        arrays = (text_k, text_v, layer, indices, visual_seen, text_seen)
        return gaze_decode(q, packed, *arrays, spec=spec, implementation="gpu")

    lead = (3,) if vmapped else ()
    array = functools.partial(lambda dtype, *shape: jax.ShapeDtypeStruct((*lead, *shape), dtype))
    shared = kv_heads * group if select_per == "head" else kv_heads
    cache = array(dtype, layers, batch, kv_heads, regions, slots, dim)
    stream = array(dtype, layers, batch, kv_heads, text, dim)
    with compile_for("gpu"):
        traced = jax.jit(jax.vmap(call) if vmapped else call).trace(
            array(dtype, batch, kv_heads * group, dim),
            cache,
            cache,
            stream,
            stream,
            array(jnp.int32),
            array(jnp.int32, batch, shared, capacity),
            array(jnp.bool_, batch, regions, slots),
            array(jnp.bool_, batch, text),
        )
        return traced.lower(lowering_platforms=("cuda",)).as_text()


# Every size, by turns beside each dtype and kind of visual cache; the kernel itself sees G only as 8 rows.
LOWERED = [
    pytest.param(
        {
            "group": group,
            "slots": slots,
            "dim": dim,
            "dtype": dtype,
            "select_per": select_per,
            "int8": int8,
            "text": text,
        },
        id=f"{group}-{slots}-{dim}-{dtype.__name__}-{select_per}-{int8}-{text}",
        marks=[] if kind == number % 4 else [pytest.mark.long],
    )
    for number, (group, slots, dim, select_per, text) in enumerate(
        [
            (4, 36, 128, "kv_head", 300),
            (7, 36, 64, "head", 1),
            (1, 5, 128, "head", 0),
            (8, 40, 128, "head", 128),
            (5, 1, 64, "kv_head", 1000),
        ]
    )
    for kind, (dtype, int8) in enumerate(itertools.product((jnp.bfloat16, jnp.float32), (False, True)))
]


@pytest.mark.parametrize("sizes", LOWERED)
def test_lowers_for_cuda(sizes):
    """Layouts, copies, tensor core shapes and shared memory are legal on sm_90."""
    assert "mosaic_gpu" in _lower(**sizes)


def test_lowers_for_cuda_under_vmap():
    """The batched kernel has one more axis in front of every copy."""
    assert "mosaic_gpu" in _lower(
        group=4, slots=36, dim=128, dtype=jnp.bfloat16, select_per="kv_head", vmapped=True
    )


def test_what_does_not_fit_is_refused():
    """float16, a wide D in float32 and 16 query heads per kv head: one sentence each."""
    common = {"group": 2, "slots": 4, "dim": 64, "select_per": "kv_head"}
    with pytest.raises(NotImplementedError, match="keeps bfloat16, float32 and int8, not float16"):
        _lower(**common, dtype=jnp.float16)
    with pytest.raises(NotImplementedError, match="has no room for D = 512"):
        _lower(**common | {"dim": 512}, dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="at most 15 query heads per kv head, not 16"):
        _lower(**common | {"group": 16, "select_per": "head"}, dtype=jnp.bfloat16)


def test_splits_fill_the_chip_and_leave_none_empty():
    """One row gets every block, many rows one each, and no split is without a chunk."""
    tiles = gpu.Tiles(pieces=3, stages=2, blocks=132)
    assert gpu._splits(tiles, 4, 104) == 33
    assert gpu._splits(tiles, 4, 9) == 9
    assert gpu._splits(tiles, 64, 104) == 2
    assert gpu._splits(tiles, 1000, 5) == 1


@pytest.mark.parametrize(
    ("slots", "dim", "itemsize", "expected"),
    [
        (36, 128, 2, (1, 36)),
        (36, 64, 1, (1, 36)),
        (5, 64, 1, (1, 6)),
        (100, 128, 2, (2, 50)),
        (1, 64, 4, (1, 1)),
    ],
)
def test_pieces(slots, dim, itemsize, expected):
    """A piece is a multiple of 128 bytes and at most 64 slots, and P = 36 is stored as it is."""
    assert gpu_layout.pieces_of(slots, dim, itemsize) == expected
