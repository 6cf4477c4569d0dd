"""FLOPs and bytes between devices, against counts by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gaze_jax.parallel.costs import Traffic, collective_traffic, count_flops, roofline
from gaze_jax.parallel.topology import Chip

M, K, N = 6, 5, 4
PRODUCT = 2 * M * K * N


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def flops(function, *arguments):
    return count_flops(jax.jit(function).trace(*arguments).jaxpr)


def matmul(a, b):
    return a @ b


def square(x, turns=7):
    """``turns`` products of [K, K] in a scan."""
    return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ x), None), x, None, length=turns)[0]


def test_a_product_and_a_batch_of_them():
    assert flops(matmul, array(M, K), array(K, N)).total == PRODUCT
    assert flops(matmul, array(3, M, K), array(3, K, N)).total == 3 * PRODUCT
    found = flops(lambda a, b: jnp.einsum("bhik,bjk->bhij", a, b), array(3, 2, M, K), array(3, N, K))
    assert (found.total, found.left_out) == (3 * 2 * PRODUCT, ())


def test_a_scan_counts_as_often_as_it_runs_and_so_does_a_scan_in_it():
    assert flops(square, array(K, K)).total == 7 * 2 * K**3

    def twice(x):
        return jax.lax.scan(lambda c, _: (square(c), None), x, None, length=3)[0]

    assert flops(twice, array(K, K)).total == 3 * 7 * 2 * K**3


def test_a_gradient_has_two_products_for_each_and_recomputation_a_third():
    """Of a chain of scans: d/dcarry and d/dx in each turn."""

    def loss(x):
        return jnp.sum(square(x))

    def recomputed(x):
        turn = jax.checkpoint(lambda carry, _: (jnp.tanh(carry @ x), None))
        return jnp.sum(jax.lax.scan(turn, x, None, length=7)[0])

    assert flops(jax.grad(loss), array(K, K)).total == 3 * 7 * 2 * K**3
    assert flops(jax.grad(recomputed), array(K, K)).total == 4 * 7 * 2 * K**3


def test_inside_of_custom_derivatives():
    @jax.custom_vjp
    def product(a, b):
        return a @ b

    product.defvjp(lambda a, b: (a @ b, (a, b)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))

    @jax.custom_jvp
    def other(a, b):
        return a @ b

    other.defjvp(lambda primals, tangents: (other(*primals), primals[0] @ tangents[1]))
    assert flops(product, array(M, K), array(K, N)).total == PRODUCT
    assert flops(other, array(M, K), array(K, N)).total == PRODUCT
    both = jax.grad(lambda a, b: jnp.sum(jnp.sin(product(a, b))), argnums=(0, 1))
    assert flops(both, array(M, K), array(K, N)).total == 3 * PRODUCT


def test_of_branches_the_most_expensive_counts():
    def choose(n, x):
        return jax.lax.switch(n, [lambda x: x, lambda x: x @ x, square], x)

    assert flops(choose, jax.ShapeDtypeStruct((), jnp.int32), array(K, K)).total == 7 * 2 * K**3


def test_loops_with_and_without_a_known_length():
    """fori_loop is a scan where its bounds are numbers; where they are arrays, one turn counts, it says."""

    def fixed(x):
        return jax.lax.fori_loop(0, 5, lambda _, carry: carry @ x, x)

    def traced(x, n):
        return jax.lax.fori_loop(0, n, lambda _, carry: carry @ x, x)

    found = flops(fixed, array(K, K))
    assert (found.total, found.left_out) == (5 * 2 * K**3, ())
    found = flops(traced, array(K, K), jax.ShapeDtypeStruct((), jnp.int32))
    assert (found.total, found.left_out) == (2 * K**3, ("all but one turn of a while loop",))


def mesh(data=2, model=4):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize(("manual", "devices"), [({"data", "model"}, 8), ({"data"}, 2)])
def test_a_shard_map_counts_what_all_devices_of_its_manual_axes_do(manual, devices):
    """Two groups multiply half the rows each; over the other axis it is done again where that is manual."""
    run = jax.shard_map(
        matmul,
        mesh=mesh(),
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        axis_names=manual,
        check_vma=False,
    )
    with jax.set_mesh(mesh()):
        assert flops(run, array(M, K), array(K, N)).total == devices * PRODUCT // 2


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 3)])
def test_a_convolution_and_its_gradient(stride, groups):
    """Every output reads 3x3 inputs in each channel of its group; so does the gradient of the kernel."""
    inputs, outputs, channels, features = (2, 8, 8), 8 // stride, 6, 9

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    arguments = array(*inputs, channels), array(3, 3, channels // groups, features)
    each = 2 * 2 * outputs**2 * features * 9 * channels // groups
    assert flops(convolve, *arguments).total == each
    kernel = jax.grad(lambda x, k: jnp.sum(convolve(x, k) ** 2), argnums=1)
    assert flops(kernel, *arguments).total == 2 * each


def test_a_kernel_is_left_out_by_name():
    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] @ x_ref[...]

    def run(x):
        return pl.pallas_call(double, jax.ShapeDtypeStruct((K, K), jnp.float32), name="double")(x) @ x

    found = flops(run, array(K, K))
    assert (found.total, found.left_out) == (2 * K**3, ("the Pallas kernel double",))


def hlo(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_collectives_of_a_loop_are_counted_as_often_as_it_turns():
    """Five turns, each with a psum of 2x3 float32 over groups of four: 2 * 24 * 3 / 4 bytes of a device."""
    devices = mesh()

    def local(x):
        return jax.lax.scan(lambda c, _: (jax.lax.psum(jnp.sin(c), "model"), None), x, None, length=5)[0]

    run = jax.shard_map(local, mesh=devices, in_specs=P(), out_specs=P(), check_vma=False)
    found = collective_traffic(hlo(run, array(2, 3)))
    assert found == Traffic(5 * 36, {"all-reduce": 5 * 36}, ())


@pytest.mark.parametrize(
    ("kind", "function", "sent"),
    [
        ("all-gather", lambda x: jax.lax.all_gather(x, "model"), 3 * 8 * 4),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "model", tiled=True), 3 * 2 * 4),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "model", 0, 0, tiled=True), 8 * 4 * 3 // 4),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "model", [(0, 1), (1, 0)]), 8 * 4),
    ],
)
def test_each_collective_moves_the_bytes_of_a_ring(kind, function, sent):
    """Of a float32 [8] on each device, in groups of four."""
    run = jax.shard_map(
        function, mesh=mesh(), in_specs=P(("data", "model")), out_specs=P(("data", "model")), check_vma=False
    )
    assert collective_traffic(hlo(run, array(64))) == Traffic(sent, {kind: sent}, ())


def test_a_program_of_the_compilers_own_collectives():
    """A product over a split axis: the compiler reduces the [M, N] result over all eight devices."""
    split = NamedSharding(mesh(), P(None, ("data", "model")))
    a = jax.ShapeDtypeStruct((M, 8), jnp.float32, sharding=split)
    b = jax.ShapeDtypeStruct((8, N), jnp.float32, sharding=NamedSharding(mesh(), P(("data", "model"))))
    run = jax.jit(matmul, out_shardings=NamedSharding(mesh(), P()))
    found = collective_traffic(run.lower(a, b).compile().as_text())
    assert found == Traffic(2 * M * N * 4 * 7 // 8, {"all-reduce": 2 * M * N * 4 * 7 // 8}, ())


HEAD = "HloModule jit_step, is_scheduled=true, replica_count=1, num_partitions=8\n\n"
LOOP = (
    HEAD
    + """%sum (x: f32[], y: f32[]) -> f32[] {
  ROOT %add = f32[] add(%x, %y)
}

%body (p: (s32[], bf16[16,64])) -> (s32[], bf16[16,64]) {
  %gathered = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[]{:T(128)}, bf16[16,64]{1,0:T(8,128)(2,1)}) tuple(%i, %gathered)
}

%condition (p: (s32[], bf16[16,64])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(36)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

%all-reduce-scatter.2 (input: bf16[16,64]) -> bf16[4,64] {
  %all-reduce.1 = bf16[16,64]{1,0} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  ROOT %slice = bf16[4,64]{1,0} dynamic-slice(%all-reduce.1, %i), dynamic_slice_sizes={4,64}
}

ENTRY %main (a: bf16[4,64]) -> bf16[16,64] {
  %while.1 = (s32[]{:T(128)}, /*index=1*/bf16[16,64]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %fusion = bf16[4,64]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2
}
"""
)
GATHERED = 16 * 64 * 2 * 3 // 4


def test_a_tpu_loop_turns_as_often_as_its_condition_says():
    """And a reduce-scatter is a fusion of an all-reduce with a slice there."""
    found = collective_traffic(LOOP)
    assert found.by_kind == {"all-gather": 36 * GATHERED, "reduce-scatter": GATHERED}
    assert found.total == 37 * GATHERED and found.left_out == ()


@pytest.mark.parametrize(
    "condition", ["direction=LT", "constant(36)"], ids=["no comparison", "a bound that is no constant"]
)
def test_a_loop_of_unknown_length_counts_once_and_is_named(condition):
    found = collective_traffic(LOOP.replace(condition, "unknown"))
    assert found.by_kind["all-gather"] == GATHERED
    assert found.left_out == ("all but one turn of a while loop",)


def test_what_the_compiler_knows_of_a_loop_goes_first():
    known = 'body=%body, backend_config={"known_trip_count":{"n":"5"},"known_init_step":{}}'
    assert collective_traffic(LOOP.replace("body=%body", known)).by_kind["all-gather"] == 5 * GATHERED


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        # Of a pair, the start has the operand and then the result; the end is not counted.
        ("(f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3}}", 32 * 4 * 3 // 4),
        ("((f32[2], f32[3]), (f32[8], f32[12]), u32[]) all-gather-start(%x), replica_groups=[2,4]<=[8]", 60),
        ("f32[8,4]{1,0} all-gather-done(%x)", None),
        ("f32[4] all-reduce-start(%x), replica_groups={}, to_apply=%sum", 2 * 16 * 7 // 8),
        ("(f32[4], bf16[8]) all-reduce(%x, %y), replica_groups=[1,8]<=[8], to_apply=%sum", 2 * 32 * 7 // 8),
        ("(f32[4], f32[4], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}", 16),
        ("f32[4]{0} collective-permute-done(%x)", None),
        ("f32[2] reduce-scatter(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", 8),
        ("(s8[4], s8[4]) all-to-all(%x, %y), replica_groups={{0,1},{2,3},{4,5},{6,7}}", 4),
        (
            "pred[8] all-gather(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'b'}",
            6,
        ),
        ("f8e4m3fn[8] all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}", 7),
        ("f32[8] all-gather(%x), replica_groups=mesh['a'=8] {'a':(1)4}, dimensions={0}", 24),
        ("f32[8] all-gather(%x), replica_groups={{0},{1}}, dimensions={0}", 0),
    ],
)
def test_the_forms_of_a_line(line, sent):
    text = f"{HEAD}ENTRY %main (x: f32[8]) -> f32[8] {{\n  ROOT %r = {line}\n}}\n"
    found = collective_traffic(text)
    assert (found.total, found.left_out) == (sent or 0, ())
    assert len(found.by_kind) == (sent is not None)


def test_an_operation_in_two_halves_is_counted_once():
    """Both name the computation that they run."""
    text = LOOP.replace(
        "fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2",
        "async-start(%x), calls=%all-reduce-scatter.2\n"
        "  %done = bf16[4,64]{1,0} async-done(%fusion), calls=%all-reduce-scatter.2",
    )
    assert collective_traffic(text) == collective_traffic(LOOP)


def test_a_collective_that_runs_beside_other_work_is_counted_once():
    """Lines of a TPU program at the default effort, shortened: three fusions name one collective."""
    gather = (
        "  %all-gather.{} = bf16[2560,2560]{{0,1}} all-gather(%p), channel_id=54, replica_groups="
        "mesh['axis_0'=1,'axis_1'=64,'axis_2'=4], device_ids=([4,64]T(1,0)) {{'axis_1'}}, dimensions={{1}}, "
        'frontend_attributes={{chain_id="21"}}'
    )
    text = f"""HloModule jit_step, num_partitions=256
%start (p: bf16[2560,40]) -> bf16[2560,2560] {{
{gather.format(1)}
  ROOT %c = bf16[2560,2560] custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}
%step (p: bf16[2560,40]) -> bf16[2560,2560] {{
{gather.format(2)}
  ROOT %c = bf16[2560,2560] custom-call(%all-gather.2), custom_call_target="AsyncCollectiveUpdate"
}}
%done (p: bf16[2560,40]) -> bf16[2560,2560] {{
{gather.format(3)}
  ROOT %c = bf16[2560,2560] custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}}
ENTRY %main (p: bf16[2560,40]) -> bf16[2560,2560] {{
  %a = bf16[2560,2560] fusion(%p), kind=kCustom, calls=%start
  %b = bf16[2560,2560] fusion(%a), kind=kOutput, calls=%step
  ROOT %c = bf16[2560,2560] fusion(%b), kind=kCustom, calls=%done
}}
"""
    assert collective_traffic(text) == Traffic(
        2 * 2560 * 2560 * 63 // 64, {"all-gather": 2 * 2560 * 2560 * 63 // 64}
    )


def test_groups_in_an_unknown_form_are_named_and_not_guessed():
    line = "f32[8] all-gather(%x), replica_groups=others, dimensions={0}"
    found = collective_traffic(f"{HEAD}ENTRY %main (x: f32[8]) -> f32[8] {{\n  ROOT %r = {line}\n}}\n")
    assert (found.total, found.left_out) == (0, ("all-gather operations whose groups cannot be read",))


def test_of_a_conditional_the_branch_that_sends_most_counts():
    text = LOOP.replace(
        "fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2",
        "conditional(%i, %x, %x), branch_computations={%sum, %all-reduce-scatter.2}",
    )
    assert collective_traffic(text) == collective_traffic(LOOP)


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collective_traffic("HloModule empty")


CHIP = Chip(hbm_bytes=10, flops_per_second=100.0, hbm_bytes_per_second=10.0, ici_bytes_per_second=1.0)


def test_the_bound_is_the_longest_of_three():
    found = roofline(CHIP, flops=300, memory_bytes=20, sent_bytes=1)
    assert (found.seconds, found.by) == (3.0, "compute")
    assert dict(found.parts) == {"compute": 3.0, "memory": 2.0, "interconnect": 1.0}
    assert roofline(CHIP, flops=300, memory_bytes=40, sent_bytes=1).by == "memory"
    fast = dataclasses.replace(CHIP, ici_bytes_per_second=1e-3)
    np.testing.assert_allclose(roofline(fast, flops=300, memory_bytes=40, sent_bytes=1).seconds, 1000.0)
