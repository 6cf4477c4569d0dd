"""Ahead-of-time compilation of the TPU kernels: the reading of its programs, and the whole of it."""

import jax
import jax.numpy as jnp
import pytest

# Kernels alone can be tested without flax; whole decoding steps cannot.
pytest.importorskip("flax")

from benchmarks import routed_layers, tpu_aot
from pallas_kernels.gaze_decode import api, shapes

HLO = """HloModule jit_run

%fused_computation.1 (param_0: bf16[64,64]) -> f32[64] {
  %param_0 = bf16[64,64]{1,0} parameter(0)
  %inside = f32[64,64]{1,0} convert(%param_0)
  ROOT %sum = f32[64]{0} reduce(%inside), dimensions={1}
}

ENTRY %main (a: bf16[64,64]) -> f32[64] {
  %a = bf16[64,64]{1,0} parameter(0)
  %view = bf16[4096]{0} bitcast(%a)
  %copy-start = (bf16[16,64]{1,0:S(1)}, bf16[16,64]{1,0}, u32[]) copy-start(%a)
  ROOT %fusion = f32[64]{0} fusion(%a), kind=kLoop, calls=%fused_computation.1
}
"""


def test_the_largest_operation_is_what_is_written():
    """Arguments, views and the insides of a fusion do not count; a copy does, also into fast memory."""
    size, line = tpu_aot.largest_operation(HLO)
    assert size == 16 * 64 * 2 and "copy-start" in line


@pytest.mark.parametrize("copied", [False, True])
def test_a_copy_of_a_layer_is_seen(copied):
    """In a program that XLA compiled: reading rows of a cache is small, slicing a layer out is not."""
    cache = jax.ShapeDtypeStruct((4, 64, 512), jnp.float32)

    def run(cache, layer):
        one = jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
        return one[::-1] if copied else one[3]

    text = jax.jit(run).lower(cache, jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()
    assert (tpu_aot.largest_operation(text)[0] >= 64 * 512 * 4) == copied


def test_rows_with_a_problem_are_named():
    """No kernel in the program, or an operation as large as a layer's cache."""
    good = {"kernels": 1, "largest_operation_bytes": 9, "largest_operation": "op", "layer_bytes": 10}
    assert tpu_aot.problems(good) == []
    assert "no kernel" in tpu_aot.problems(good | {"kernels": 0})[0]
    assert "anew: op" in tpu_aot.problems(good | {"largest_operation_bytes": 10})[0]
    assert tpu_aot.problems({"skipped": "too large"}) == []


LAYERS = """HloModule jit_run

%body (state: (s32[], f32[64])) -> (s32[], f32[64]) {
  %state = (s32[], f32[64]{0}) parameter(0)
  %q = f32[64]{0} get-tuple-element(%state), index=1
  %copy-start = (f32[64]{0:S(1)}, f32[64]{0}, u32[]) copy-start(%q)
  %copy-done = f32[64]{0:S(1)} copy-done(%copy-start)
  %sort.1 = (f32[64]{0}, s32[64]{0}) sort(%copy-done, %n), dimensions={0}, to_apply=%less
  %view = f32[64]{0} bitcast(%q)
  %call.2 = f32[64]{0} custom-call(%view), custom_call_target="tpu_custom_call"
  ROOT %out = (s32[], f32[64]{0}) tuple(%i, %call.2)
}

ENTRY %main (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  %fusion = f32[64]{0} fusion(%a), kind=kLoop, calls=%fused_computation.1
  %while.3 = (s32[], f32[64]{0}) while(%tuple), condition=%cond, body=%body
  ROOT %got = f32[64]{0} get-tuple-element(%while.3), index=1
}
"""


def test_operations_of_a_layer_are_those_of_the_loop():
    """A copy with its end, a sort and a call; what runs once is told apart; without a loop all counts."""
    each, once = routed_layers.operations(LAYERS)
    assert each == ["%copy-start copy-start", "%sort.1 sort", "%call.2 custom-call"]
    assert once == ["%fusion fusion"]
    assert routed_layers.operations(HLO) == (["%copy-start copy-start", "%fusion fusion"], [])
    with pytest.raises(ValueError, match="has 2 loops"):
        routed_layers.operations(LAYERS + LAYERS.replace("%body", "%other"))


def test_operations_of_a_compiled_loop():
    def run(a):
        return jax.lax.fori_loop(0, 9, lambda _, a: jnp.sort(jnp.sin(a)), a)

    text = jax.jit(run).lower(jax.ShapeDtypeStruct((64,), jnp.float32)).compile().as_text()
    assert sum(name.endswith(" sort") for name in routed_layers.operations(text)[0]) == 1


def test_layers_of_too_many_operations_are_named():
    row = {"kernels": 2, "select_per": "kv_head", "operations": 30, "operation_names": ["%a fusion"]}
    assert tpu_aot.problems(row) == []
    assert "executes 31 operations, more than 30" in tpu_aot.problems(row | {"operations": 31})[0]
    assert "a layer sorts" in tpu_aot.problems(row | {"operation_names": ["%b sort"]})[0]
    assert tpu_aot.problems(row | {"select_per": "head", "operations": 45}) == []
    assert "more than 45" in tpu_aot.problems(row | {"select_per": "head", "operations": 46})[0]


HOST = """ENTRY %main (cache: f32[9,512]) -> f32[64] {
  %cache = f32[9,512]{1,0:T(8,128)S(5)} parameter(0)
  %view = f32[4608]{0:T(1024)S(5)} bitcast(%cache)
  %call.start = ((f32[9,512]{1,0:S(5)}, s32[2]{0}), (f32[2,512]{1,0}, s8[2,4]{1,0}), u32[]) \
custom-call-start(%cache), custom_call_target="HostExecute"
  %call.done = (f32[2,512]{1,0}, s8[2,4]{1,0}) custom-call-done(%call.start)
  ROOT %fusion = f32[64]{0} fusion(%call.done)
}
"""


def test_what_comes_from_the_host_is_counted():
    """The results of its computations, not their arguments; and whatever else touches its memory is named."""
    assert tpu_aot.host_results(HOST) == [2 * 512 * 4, 2 * 4]
    assert tpu_aot.other_host_operations(HOST) == []
    copied = HOST.replace("bitcast(%cache)", "copy(%cache)")
    assert "%view = f32[4608]" in tpu_aot.other_host_operations(copied)[0]


def test_offloaded_steps_and_appended_caches_with_a_problem_are_named():
    """More on the device than allowed, other bytes than the selected ones, a cache that is copied."""
    step = {"kernels": 0, "visual_on_device": 0.03, "visual_limit": 0.03, "fetched_bytes": [3, 4]}
    step |= {"selected_bytes": 7, "other_host_operations": [], "layer_bytes": 9, "largest_operation_bytes": 7}
    assert tpu_aot.problems(step) == []
    assert "0.0310 of the visual" in tpu_aot.problems(step | {"visual_on_device": 0.031})[0]
    assert "come from the host, not 8" in tpu_aot.problems(step | {"selected_bytes": 8})[0]
    assert "used by copy" in tpu_aot.problems(step | {"other_host_operations": ["copy"]})[0]
    append = {"kernels": 0, "cache_bytes": 90, "written_in_place_bytes": 90, "temporary_bytes": 9}
    assert tpu_aot.problems(append) == []
    assert "not written in place" in tpu_aot.problems(append | {"written_in_place_bytes": 89})[0]
    assert "temporaries of 10" in tpu_aot.problems(append | {"temporary_bytes": 10})[0]


def test_layers_are_cut_to_the_memory():
    """A million tokens of Qwen3-4B in bfloat16 take 4.3 GB a layer: three fit 15.75 GB, in int8 seven."""
    shape = shapes.Shape("qwen3-4b", 1_048_576)
    assert shape.layer_bytes == 8 * 29_128 * 36 * 2 * 128 * 2
    assert shape.fitting(int(15.75e9)).layers == 3
    assert shapes.Shape("qwen3-4b", 1_048_576, visual_dtype="int8").fitting(int(15.75e9)).layers == 7
    assert shape.fitting(10**9) is None


@pytest.mark.tpu_aot
@pytest.mark.long
@pytest.mark.parametrize("chip", list(tpu_aot.CHIPS))
def test_every_kernel_compiles_for_real_chips(chip):
    """All shapes, no operation of a layer's cache size; scripts/tpu_aot.sh prints the same as a table."""
    assert tpu_aot.main(["--chips", chip]) == 0


@pytest.mark.tpu_aot
@pytest.mark.parametrize("chip", list(tpu_aot.CHIPS))
@pytest.mark.parametrize("tokens", [9_216, 36_864])
def test_a_routed_layer_has_little_around_its_kernels(chip, tokens):
    """Qwen3-4B, bfloat16 and int8: at most 30 operations a layer, per head 45, and no sort per kv head."""
    rows = list(tpu_aot.layer_rows(chip, f"routed layer qwen3-4b {tokens} B1 "))
    kinds = {(row["select_per"], "int8" in row["kernel"]) for row in rows}
    assert len(rows) == 4 and len(kinds) == 4
    for row in rows:
        assert row["operations"] + row["operations_once"] <= {"kv_head": 30, "head": 45}[row["select_per"]]
        assert row["kernels"] == 2 and tpu_aot.problems(row) == []


@pytest.mark.tpu_aot
@pytest.mark.parametrize("select_per", ["kv_head", "head"])
def test_nothing_is_sorted_in_the_layers_of_an_answer(select_per):
    """The list of selected regions is dropped where nobody reads it: only first tokens are sorted, once."""
    shape = shapes.Shape("qwen3-4b", 9_216, 1, select_per, layers=36)
    _, text, _ = tpu_aot.compile_step("v5e", "tpu", shape)
    assert sum(" sort(" in line for line in text.splitlines()) == 1
    assert not any(name.endswith(" sort") for name in routed_layers.operations(text)[0])


@pytest.mark.tpu_aot
@pytest.mark.parametrize("select_per", ["kv_head", "head"])
def test_an_offloaded_cache_leaves_the_device(select_per):
    """Qwen3-4B, 40 of 256 regions: at most 0.03 (per head 0.06) of the resident visual cache is on a v5e."""
    (row,) = tpu_aot.offload_rows("v5e", f"offload step qwen3-4b 9216 B1 {select_per}")
    assert row["visual_limit"] == {"kv_head": 0.03, "head": 0.06}[select_per]
    assert row["resident_visual_bytes"] == 36 * 8 * 256 * 36 * 128 * 2 * 2
    assert row["visual_on_device"] <= row["visual_limit"]
    assert row["host_argument_bytes"] == row["resident_visual_bytes"]
    assert row["resident_argument_bytes"] - row["argument_bytes"] == row["resident_visual_bytes"]
    assert tpu_aot.problems(row) == []


@pytest.mark.tpu_aot
def test_of_mapped_offloaded_caches_only_what_is_read_leaves_the_host():
    """Two caches of four layers, one query: from each, 40 regions of each of 8 kv heads move to a v5e."""
    shape = shapes.Shape("qwen3-4b", 9_216, select_per="kv_head", layers=4)

    def decode(*arguments):
        return api.gaze_decode(*arguments, spec=shape.spec, implementation="offload")

    with tpu_aot.target("v5e") as where:
        q, visual, *rest = shape.arguments("offload")
        both = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype), visual)
        mapped = jax.vmap(decode, in_axes=(None, 0, *[None] * 6))
        figures, text = tpu_aot.compile_one(mapped, (q, tpu_aot.on_host(both, where), *rest), where)
    assert figures["host_argument_bytes"] == 2 * 4 * shape.layer_bytes
    assert tpu_aot.other_host_operations(text) == []
    assert sum(tpu_aot.host_results(text)) == 2 * 8 * 40 * 36 * 128 * 2 * 2
