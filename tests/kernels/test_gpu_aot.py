"""Ahead-of-time compilation of the GPU kernel: the reading of ptxas' report and of XLA's programs."""

import jax
import jax.numpy as jnp
import pytest

# Kernels alone can be tested without flax; a routed layer cannot.
pytest.importorskip("flax")

from benchmarks import gpu_aot

REPORT = """\
ptxas warning : Registers are spilled to local memory in f, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Compiling entry function 'f' for 'sm_90a'
    16 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 16 bytes cumulative stack size, 1 bytes smem
"""


def test_a_report_is_of_one_kernel():
    assert gpu_aot.figures(REPORT) == {"registers": 255, "spilled_bytes": 36}
    for wrong, count in (("", 0), (REPORT * 2, 2)):
        with pytest.raises(ValueError, match=f"reported {count} kernels, not one"):
            gpu_aot.figures(wrong)


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
    good = {"dtype": "int8", "registers": 188, "spilled_bytes": 0, "blocks": 2}
    assert gpu_aot.problems(good) == [] == gpu_aot.problems({"kernels": []})
    assert gpu_aot.problems(good | {"spilled_bytes": 8}) == ["8 bytes are spilled"]
    assert gpu_aot.problems(good | {"blocks": 1}) == ["a multiprocessor holds 1 blocks, not 2"]
    assert gpu_aot.problems(good | {"dtype": "float32", "spilled_bytes": 8, "blocks": 1}) == []
