"""What is particular to the TPU decode kernel: its layout, its copies, its limits."""

import dataclasses
import faulthandler
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import GazeSpec, dispatch, gaze_decode
from pallas_kernels.gaze_decode import api, plan, shapes, tpu, tpu_kernel, tpu_layout
from tests.helpers import cases
from tests.helpers.poison import fresh_memory
from tests.kernels import decode_values
from tests.kernels.decode_values import call, long

# Private to jax: where it has moved, the suite in test_decode.py still runs.
interpret_pallas_call = pytest.importorskip("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="looks into the interpreter")


_reference = decode_values._program("reference")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_words_split_alike_in_the_kernel_and_interpreted(dtype):
    """The kernel's strided and shifted reads of a reference give the values that stand in each place."""
    places = 4 if dtype == jnp.int8 else 2
    values = jnp.asarray(np.random.default_rng(0).integers(-127, 128, (24, places, 128)), dtype)

    def kernel(ref, out):
        for place, split in enumerate(tpu_kernel.split_words(ref)):
            out[place] = split

    got = pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((places, 24, 128), jnp.float32), interpret=True
    )(values)
    np.testing.assert_array_equal(got, jnp.swapaxes(values, 0, 1).astype(jnp.float32))
    np.testing.assert_array_equal(jnp.stack(tpu_kernel.split_values(values)), got)


@pytest.mark.parametrize(
    ("dim", "slots", "visual_dtype"),
    [
        *((128, 36, None), (64, 36, "int8"), (64, 5, None), (20, 3, "int8"), (100, 7, None)),
        *(long(*case) for case in ((128, 36, "int8"), (64, 36, None), (64, 5, "int8"))),
        *(long(*case) for case in ((20, 3, None), (100, 7, "int8"))),
    ],
)
def test_slots_are_ordered_as_the_kernel_meets_them(dim, slots, visual_dtype):
    """by_row names, for every key that the kernel cuts from C regions, the token slot that it is."""
    key = jnp.arange(4 * slots, dtype=jnp.float32).reshape(1, 1, 1, 4, slots, 1) + 1
    k = jnp.broadcast_to(key, (1, 1, 1, 4, slots, dim))
    spec = GazeSpec(scale=1.0, visual_dtype=visual_dtype)

    @jax.jit
    def keys_and_order(k):
        packed = tpu_layout.pack(k, k, spec=spec)
        words = packed.words[0, 0, 0, :, : packed.rows].reshape(-1, *packed.words.shape[-2:])
        split = tpu_kernel.split_values(words)
        keys = jnp.concatenate(split[: len(split) // (1 if packed.joint else 2)])
        return keys, tpu_layout.by_row(packed, key[0, 0, 0, ..., 0])

    keys, order = keys_and_order(k)
    seen = np.asarray(order) > 0
    assert seen.sum() == 4 * slots
    if visual_dtype is None:
        np.testing.assert_array_equal(keys[:, 0], order)
    else:
        assert (np.asarray(keys[:, 0])[seen] == 127).all() and (np.asarray(keys[:, 0])[~seen] == 0).all()


def test_bytes_of_the_cache_are_the_logical_ones():
    """36 tokens: no padding for bfloat16; int8 takes half, and its scales the share that is documented."""
    shape = jax.ShapeDtypeStruct((1, 1, 1, 64, 36, 128), jnp.bfloat16)
    logical = 2 * 2 * shape.size

    def size(visual_dtype):
        spec = GazeSpec(scale=1.0, visual_dtype=visual_dtype)
        packed = jax.eval_shape(functools.partial(tpu_layout.pack, spec=spec), shape, shape)
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(packed))

    assert size(None) == logical
    assert size("int8") == logical / 2 + 64 * 128 * 4


@pytest.fixture
def copies(monkeypatch):
    """Sizes in bytes of the copies that the interpreter carried out."""
    sizes = []
    carry_out = interpret_pallas_call.DMA.execute_read

    def counted(dma):
        carry_out(dma)
        sizes.append(dma.data_size)

    monkeypatch.setattr(interpret_pallas_call.DMA, "execute_read", counted)
    return sizes


def _dense_bytes(case, tile):
    """What the block pipeline fetches: used tiles of K, V and the mask, for every kv head."""
    kv_heads, dense, dim = case.text_k.shape[2:]
    last = np.max(np.where(np.asarray(case.text_seen), np.arange(1, dense + 1), 0), axis=-1)
    tiles = np.maximum(-(-last // tile), 1).sum()
    return int(kv_heads * tiles * tile * (2 * dim * case.text_k.dtype.itemsize + 4))


@pytest.mark.parametrize(
    ("capacity", "select_per", "visual_dtype"),
    [
        (13, "head", None),
        *(
            long(*rest)
            for rest in itertools.product((13, 16), ("head", "kv_head"), (None, "int8"))
            if rest != (13, "head", None)
        ),
    ],
)
def test_bytes_moved_are_near_the_floor(select_per, capacity, visual_dtype, copies):
    """Copies of regions, side tables and dense tiles stay within 1.15 of the bytes that must be read.

    A region is copied once however many heads ask for it, and a chunk that is not full copies what it has:
    13 regions in chunks of 8 are 13 copies.
    """
    case = cases.decode(
        layers=2,
        regions=64,
        slots=36,
        text=64,
        dim=128,
        group=4,
        capacity=capacity,
        select_per=select_per,
        dtype=jnp.bfloat16,
    )
    case = dataclasses.replace(
        case,
        spec=dataclasses.replace(case.spec, interpret=True, visual_dtype=visual_dtype),
        text_seen=jnp.ones_like(case.text_seen),
        visual_seen=jnp.ones_like(case.visual_seen),
    )
    jax.block_until_ready(jax.jit(lambda case: call(case, "tpu"))(case))
    union = jax.jit(plan.union, static_argnums=(1, 2, 3))
    fetched = int(union(case.indices, 2, 4, 64).count.sum())
    region = 36 * 2 * 128 * (2 if visual_dtype is None else 1)
    scales = 36 * 2 * 4 if visual_dtype else 0
    assert copies.count(region) == fetched
    moved = sum(copies) + _dense_bytes(case, 64)
    floor = fetched * (region + scales) + 2 * 2 * 64 * 2 * 128 * 2
    assert floor <= moved <= 1.15 * floor, moved / floor


def test_dense_tiles_behind_the_last_key_that_counts_are_not_fetched():
    """Rows that use 0, 1, 2 and 4 of 4 tiles: behind them the index repeats, which fetches nothing."""
    seen = np.zeros((4, 13), bool)
    seen[1, 3] = seen[2, [0, 4]] = seen[3, 12] = True
    used = tpu._used_tiles(jnp.asarray(seen), 4)
    assert used.tolist() == [0, 1, 2, 4]
    grid = tpu._Grid(kv_heads=2, per_core=8, lanes_are_tokens=False)
    scalars = tpu_kernel.Scalars(layer=0, count=0, tiles=used)
    tiles = [[int(grid.text_seen(0, 2 * b + 1, tile, scalars)[2]) for tile in range(4)] for b in range(4)]
    assert tiles == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize(("text", "value"), [(24, 1.0), (37, np.nan), long(24, np.nan), long(37, 1.0)])
def test_a_partial_tile_is_not_read_past_its_end(text, value, monkeypatch):
    """Whatever memory holds behind the keys and their mask."""
    monkeypatch.setattr(tpu, "TEXT_TILE", 16)
    case = dataclasses.replace(cases.decode(text=text, size=1), text_seen=jnp.ones((1, text), bool))
    case = dataclasses.replace(case, spec=dataclasses.replace(case.spec, interpret=True))
    with fresh_memory(value):
        got = jax.jit(lambda case: call(case, "tpu"))(case)
    np.testing.assert_allclose(got, _reference(case), atol=2e-5)


@pytest.mark.parametrize("dim", [long(8), 128])
def test_a_dense_stream_of_several_tiles(dim, monkeypatch):
    """Three tiles, of which rows use none, one, two and all: every key that counts, and NaN in the others."""
    monkeypatch.setattr(tpu, "TEXT_TILE", 128)
    case = cases.decode(size=4, text=384, dim=dim)
    case = dataclasses.replace(case, spec=dataclasses.replace(case.spec, interpret=True))
    ends = jnp.array([0, 128, 129, 384])[:, None]
    seen = (jnp.arange(384) < ends) & (case.text_seen | (jnp.arange(384) == ends - 1))
    k, v = (jnp.where(seen[None, :, None, :, None], a, jnp.nan) for a in (case.text_k, case.text_v))
    # A function of its own: the size of a tile is no part of jit's key.
    got = jax.jit(lambda case: call(case, "tpu"))(
        dataclasses.replace(case, text_k=k, text_v=v, text_seen=seen)
    )
    expected = _reference(dataclasses.replace(case, text_seen=seen))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.fixture
def no_hanging():
    """Ends the process, with an error, where a kernel waits for a copy that nobody started."""
    faulthandler.dump_traceback_later(240, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.usefixtures("no_hanging")
@pytest.mark.parametrize("blind", [(3, 7), *map(long, ((0,), (1, 2), tuple(range(8))))])
def test_a_kv_head_that_lists_nothing_still_prefetches_for_the_next(blind):
    """First, in between and last of a core's four rows without a chunk: each other reads its own regions."""
    case = cases.decode(size=1, kv_heads=8, capacity=2, regions=20)
    indices = jnp.arange(32, dtype=jnp.int32).reshape(1, 16, 2) % 20
    blind = jnp.isin(jnp.arange(8), jnp.array(blind))
    indices = jnp.where(jnp.repeat(blind, 2)[None, :, None], -1, indices)
    case = dataclasses.replace(case, indices=indices, spec=dataclasses.replace(case.spec, interpret=True))
    got = _program(case)
    cases.no_races(got)
    expected = _reference(case)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@jax.jit
def _program(case):
    return call(case, "tpu")


def test_races_would_be_found():
    """The interpreter that the suite runs under reports a kernel that reads what a copy is still writing."""
    from jax.experimental.pallas import tpu as pltpu

    def kernel(x, out, scratch, sem):
        copy = pltpu.make_async_copy(x, scratch, sem)
        copy.start()
        out[...] = scratch[...]
        copy.wait()

    racing = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        interpret=dispatch.interpreter(),
    )
    try:
        jax.block_until_ready(racing(jnp.ones((8, 128))))
        found = interpret_pallas_call.races.races_found  # jax 0.10 makes a note
    except jax.errors.JaxRuntimeError as error:
        found = "RACE DETECTED" in str(error)  # jax 0.12 raises
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert found
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("mapped", [("q",), ("visual",), ("q", "visual")], ids=["query", "cache", "both"])
def test_vmap_of_what_is_compiled_is_a_loop(mapped):
    """Compiled, the cache is kept out of fast memory and copied by hand: JAX can map neither of the two."""
    shape = shapes.Shape("qwen3-4b", 4_608, layers=2)
    axes = tuple(0 if name in mapped else None for name in ("q", "visual", *["rest"] * 6))

    def decode(*arguments):
        return gaze_decode(*arguments, spec=shape.spec, implementation="tpu")

    with dispatch.compile_for("tpu"):
        arguments = tuple(
            jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), a) if axis == 0 else a
            for a, axis in zip(shape.arguments("tpu"), axes, strict=True)
        )
        program = str(jax.make_jaxpr(jax.vmap(decode, in_axes=axes))(*arguments))
    assert program.count("pallas_call[") == 1 and "scan[" in program


def test_a_head_dim_or_dtype_that_does_not_fit_is_refused():
    """D = 256 and float16 get a sentence, not a wrong layout."""
    spec = GazeSpec(scale=1.0, interpret=True)
    wide = jnp.zeros((1, 1, 1, 1, 1, 256))
    with pytest.raises(NotImplementedError, match="takes D up to 128, not 256"):
        api.pack(wide, wide, spec=spec, implementation="tpu")
    half = jnp.zeros((1, 1, 1, 1, 1, 8), jnp.float16)
    with pytest.raises(NotImplementedError, match="keeps float32 and bfloat16 caches, not float16"):
        api.pack(half, half, spec=spec, implementation="tpu")


def test_no_tpu_no_kernel():
    """Asked for by name without a TPU, it says so and nothing falls back."""
    case = cases.decode()
    with pytest.raises(NotImplementedError, match="'tpu' cannot run here: it is a kernel for tpu and JAX"):
        api.pack(case.k, case.v, spec=case.spec, implementation="tpu")
