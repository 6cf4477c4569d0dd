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

from pallas_kernels import GazeSpec, dispatch, gaze_decode, quantize
from pallas_kernels.gaze_decode import api, shapes, tpu, tpu_kernel, tpu_keys, tpu_layout, tuning
from tests.helpers import cases
from tests.helpers.poison import fresh_memory
from tests.kernels import decode_values
from tests.kernels.decode_values import call, long
from tests.kernels.test_tpu_route import problem, routed

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
        for place, split in enumerate(tpu_keys.split_words(ref)):
            out[place] = split

    got = pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((places, 24, 128), jnp.float32), interpret=True
    )(values)
    np.testing.assert_array_equal(got, jnp.swapaxes(values, 0, 1).astype(jnp.float32))
    np.testing.assert_array_equal(jnp.stack(tpu_keys.split_values(values)), got)


@pytest.mark.parametrize(
    ("dim", "slots"), [(128, 36), (64, 5), long(64, 36), long(100, 7), long(20, 3), long(128, 100)]
)
def test_scales_reach_their_own_keys(dim, slots):
    """Of 8 regions in int8: strided reads and rolls put each scale where its key is multiplied."""
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(1, 1, 1, 8, slots, dim)), jnp.float32) for _ in "kv")
    packed = jax.jit(functools.partial(tpu_layout.pack, spec=GazeSpec(1.0, visual_dtype="int8")))(k, v)
    word_rows, tokens = packed.words.shape[-3], packed.per_row
    sizes = {"chunk": 8, "word_rows": word_rows, "scale_rows": word_rows - packed.rows, "slots": slots}
    static = tpu_keys.Static(1, joint=packed.joint, compute=jnp.float32, scale=1.0, interpret=False, **sizes)
    words = packed.words[0, 0, 0].reshape(-1, 4, 128)
    wide = 128 * static.scale_rows

    def kernel(words, raw, out):
        raw[...] = scales = tpu_keys._scales(static, words, None)
        for i in range(2 * tokens):
            out[i] = tpu_keys._aligned(scales, i * packed.rows, word_rows, words.shape[0])

    shapes = [(8, wide), (2 * tokens, 8, words.shape[0])]
    raw, found = pl.pallas_call(
        kernel, out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes], interpret=True
    )(words)
    np.testing.assert_array_equal(raw, tpu_keys._scales(static, words, words))
    expected = [quantize.quantize(a)[1][0, 0, 0] for a in (k, v)]
    for side, token, region, row in np.ndindex(2, tokens, 8, packed.rows):
        slot = row * tokens + token
        if slot < slots:
            got = found[side * tokens + token, region, region * word_rows + row]
            assert got == expected[side][region, slot]


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
    lists_of_kv_heads = np.asarray(case.indices).reshape(case.q.shape[0] * 2, -1)
    fetched = sum(len(set(row) - {-1}) for row in lists_of_kv_heads.tolist())
    region = 36 * 2 * 128 * (2 if visual_dtype is None else 1)
    scales = 36 * 2 * 4 if visual_dtype else 0
    copied = region + (128 * 4 if visual_dtype else 0)  # a whole word row of scales
    assert copies.count(copied) == fetched
    lists = 4 * (128 * 4) * (1 + 1 + 8)  # of each row: its numbers, those of the next one, the side table
    moved = sum(copies) + lists + _dense_bytes(case, 64)
    floor = fetched * (region + scales) + 2 * 2 * 64 * 2 * 128 * 2
    assert floor <= moved <= 1.15 * floor, moved / floor


@pytest.mark.parametrize(
    ("select_per", "visual_dtype"),
    [long(*rest) for rest in itertools.product(("head", "kv_head"), (None, "int8"))],
)
def test_bytes_of_a_routed_layer_are_near_the_floor(select_per, visual_dtype, copies):
    """With descriptors in the floor, and all that the first kernel reads, writes and hands on on top."""
    sizes = {"layers": 2, "slots": 36, "text": 64, "dim": 128, "group": 4, "dtype": jnp.bfloat16}
    case, (descriptors, _, _, order) = problem(regions=64, capacity=13, select_per=select_per, **sizes)
    case = dataclasses.replace(
        case,
        spec=dataclasses.replace(case.spec, visual_dtype=visual_dtype),
        text_seen=jnp.ones_like(case.text_seen),
    )
    everywhere = (descriptors, jnp.full((2,), 13, jnp.int32), jnp.ones((2, 64), bool), order)
    found = jax.block_until_ready(jax.jit(lambda case, *a: routed(case, a, 13))(case, *everywhere))
    fetched = sum(len(np.unique(lists)) for lists in np.asarray(found.indices).reshape(4, -1))
    copied = 36 * 2 * 128 * (1 if visual_dtype else 2) + (128 * 4 if visual_dtype else 0)
    assert copies.count(copied) == fetched and sum(copies) == fetched * copied
    lists = 4 * (128 * 4) * ((1 + 8) + (1 + 1 + 8))  # of each row: written, and read
    selecting = 2 * (128 * 4) * (1 + 2) + found.scores.shape[1] * 2 * 128 * 4  # of two sequences
    keys = 4 * 64 * 128 * 2
    moved = sum(copies) + lists + selecting + keys + _dense_bytes(case, 64)
    scales = 36 * 2 * 4 if visual_dtype else 0
    floor = fetched * (36 * 2 * 128 * (1 if visual_dtype else 2) + scales) + keys + 2 * keys
    assert floor <= moved <= 1.15 * floor, moved / floor


def test_dense_tiles_behind_the_last_key_that_counts_are_not_fetched():
    """Rows that use 0, 1, 2 and 4 of 4 tiles: behind them the index repeats, which fetches nothing."""
    seen = np.zeros((4, 13), bool)
    seen[1, 3] = seen[2, [0, 4]] = seen[3, 12] = True
    used = tpu._used_tiles(jnp.asarray(seen), 4)
    assert used.tolist() == [0, 1, 2, 4]
    grid = tpu._Grid(kv_heads=2, per_core=8, lanes_are_tokens=False)
    scalars = tpu_kernel.Scalars(layer=0, tiles=used)
    tiles = [[int(grid.text_seen(0, 2 * b + 1, tile, scalars)[2]) for tile in range(4)] for b in range(4)]
    assert tiles == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize(("text", "value"), [(24, 1.0), (37, np.nan), long(24, np.nan), long(37, 1.0)])
def test_a_partial_tile_is_not_read_past_its_end(text, value, monkeypatch):
    """Whatever memory holds behind the keys and their mask."""
    monkeypatch.setattr(tuning, "sizes", lambda *_: {"chunk_bytes": 1 << 19, "text_tile": 16})
    case = dataclasses.replace(cases.decode(text=text, size=1), text_seen=jnp.ones((1, text), bool))
    case = dataclasses.replace(case, spec=dataclasses.replace(case.spec, interpret=True))
    with fresh_memory(value):
        got = jax.jit(lambda case: call(case, "tpu"))(case)
    np.testing.assert_allclose(got, _reference(case), atol=2e-5)


@pytest.mark.parametrize("dim", [long(8), 128])
def test_a_dense_stream_of_several_tiles(dim, monkeypatch):
    """Three tiles, of which rows use none, one, two and all: every key that counts, and NaN in the others."""
    monkeypatch.setattr(tuning, "sizes", lambda *_: {"chunk_bytes": 1 << 19, "text_tile": 128})
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
    assert program.count("pallas_call[") == 2 and "scan[" in program  # the lists, and what attends to them


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
