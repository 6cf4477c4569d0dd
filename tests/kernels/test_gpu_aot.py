"""Ahead-of-time compilation of the GPU kernel: the reading of ptxas' report and of XLA's programs."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

# Kernels alone can be tested without flax; a routed layer cannot.
pytest.importorskip("flax")

from benchmarks import gpu_aot

ROOT = Path(__file__).parents[2]
REPORT = """\
ptxas warning : Registers are spilled to local memory in f, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Compiling entry function 'first_mosaic_gpu_kernel' for 'sm_90a'
    16 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 16 bytes cumulative stack size, 1 bytes smem
ptxas info    : Compiling entry function 'second_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 2 barriers, 1 bytes smem
"""
FIRST, SECOND = {"registers": 255, "spilled_bytes": 36}, {"registers": 64, "spilled_bytes": 0}


def test_a_report_names_its_kernels():
    assert gpu_aot.figures(REPORT) == {"first": FIRST, "second": SECOND}
    assert gpu_aot.figures("") == {}


def test_kernels_that_were_compiled_before_are_not_reported_again():
    """Each Mosaic kernel of a program by its name; one without figures is an error."""
    line = (
        '  %mpmd_map.{} = f32[4] custom-call(%a), custom_call_target="mosaic_gpu_v2", '
        'metadata={{op_name="jit(run)/{}/mpmd_map"}}, backend_config={{kernel_hash = "{}", module = ""}}'
    )
    program = "\n".join(
        ["ENTRY %main (a: f32[4]) -> f32[4] {", line.format(3, "first", "A"), line.format(7, "second", "B")]
    )
    before = {}
    assert gpu_aot.mosaic(program, REPORT, before) == {"first": FIRST, "second": SECOND}
    assert before == {"A": FIRST, "B": SECOND}
    assert gpu_aot.mosaic(program, "", before) == {"first": FIRST, "second": SECOND}
    assert gpu_aot.kernels(program) == ["%mpmd_map.3 first", "%mpmd_map.7 second"]
    with pytest.raises(KeyError, match="first"):
        gpu_aot.mosaic(program, "", {})


@pytest.mark.parametrize(
    ("registers", "shared", "blocks"),
    [(255, 10_000, 2), (188, 99_840, 2), (188, 115_713, 1), (127, 50_688, 4), (64, 1_000, 8)],
)
def test_blocks_are_what_registers_and_shared_memory_allow(registers, shared, blocks):
    """65,536 registers in steps of 8 a thread; 228 KB, of which each block takes one more."""
    assert gpu_aot.blocks_of(registers, shared) == blocks


def test_only_what_launches_a_kernel_counts():
    """Of a program of XLA: two fusions, a product and a sort; not their insides, nor views of arguments."""
    hlo = """ENTRY %main (a: f32[4,4]) -> f32[4] {
  %a = f32[4,4]{1,0} parameter(0)
  %view = f32[16]{0} bitcast(%a)
  %dot.1 = f32[4,4]{1,0} custom-call(%a, %a), custom_call_target="__cublas$gemm"
  %loop_fusion = f32[16]{0} fusion(%view), kind=kLoop, calls=%fused
  %sort.1 = (f32[16]{0}, s32[16]{0}) sort(%loop_fusion, %n), dimensions={0}, to_apply=%less
  ROOT %one = f32[4]{0} get-tuple-element(%sort.1), index=0
}
"""
    inside = "%fused (p: f32[16]) -> f32[16] {\n  ROOT %add = f32[16]{0} add(%p, %p)\n}\n"
    less = "%less (x: f32[], y: f32[]) -> pred[] {\n  ROOT %lt = pred[] compare(%x, %y)\n}\n"
    expected = ["%dot.1 __cublas$gemm", "%loop_fusion fusion", "%sort.1 sort"]
    assert gpu_aot.kernels(inside + less + hlo) == expected


def test_kernels_of_a_loop_count_once():
    def run(a):
        return jax.lax.fori_loop(0, 9, lambda _, a: jnp.sort(a), a)

    text = jax.jit(run).lower(jax.ShapeDtypeStruct((64,), jnp.float32)).compile().as_text()
    assert sum("sort" in name for name in gpu_aot.kernels(text)) == 1


def test_rows_with_a_problem_are_named():
    good = {"program": "gaze_decode", "dtype": "int8", "registers": 188, "spilled_bytes": 0, "blocks": 2}
    good |= {"beside": {"gaze_join": SECOND}, "kernels": list("abcdefg")}
    assert gpu_aot.problems(good) == [] == gpu_aot.problems({"program": "masks", "kernels": []})
    assert gpu_aot.problems(good | {"spilled_bytes": 8}) == ["8 bytes are spilled"]
    assert gpu_aot.problems(good | {"blocks": 1}) == ["a multiprocessor holds 1 blocks, not 2"]
    assert gpu_aot.problems(good | {"dtype": "float32", "spilled_bytes": 8, "blocks": 1}) == []
    assert gpu_aot.problems(good | {"beside": {"gaze_cut": FIRST}}) == ["36 bytes of gaze_cut are spilled"]
    layer = {"program": "routed layer", "dtype": "int8", "kernels": list("abcdef")}
    assert gpu_aot.problems(layer) == []
    too_many = layer | {"kernels": list("abcdefg")}
    assert gpu_aot.problems(too_many) == ["a routed layer launches 7 kernels, not at most 6"]


def test_the_recorded_routed_layers_launch_what_the_documentation_says():
    """docs/kernels.md: four kernels with a selection per kv head, five per head; one more in batches."""
    rows = json.loads((ROOT / "benchmarks/results/gpu_aot.json").read_text())["rows"]
    layers = [row for row in rows if row["program"].startswith("routed layer")]
    assert len(layers) == 16
    for row in layers:
        per_head = " head " in row["program"]
        names = ["gaze_scores", *["gaze_cut"] * per_head, "gaze_list", "gaze_attention", "gaze_join"]
        assert [name.split()[1] for name in row["kernels"] if "gaze_" in name] == names
        assert len(row["kernels"]) - len(names) == (" B8 " in row["program"])
    for row in rows:
        assert gpu_aot.problems(row) == []
