import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from gaze_jax.errors import UserError
from gaze_jax.models.parameters import init_variables
from gaze_jax.parallel import rules
from gaze_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from tests.helpers.experiments import tiny_experiment


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=4))


def boxed(shape, names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def test_the_table_names_only_axes_that_a_mesh_has():
    assert {axis for axes in rules.RULES.values() for axis in axes} <= set(AXES)


def test_every_parameter_of_a_model_has_a_place(mesh):
    experiment = tiny_experiment()
    abstract = jax.eval_shape(lambda: init_variables(experiment.model, jax.random.key(0)))
    shardings = rules.param_shardings(mesh, abstract)
    kernel = shardings["decoder"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.spec == PartitionSpec(None, "fsdp", None)  # [L, M, H * D]: the model width is split
    per_device = rules.bytes_per_device(nn.meta.unbox(abstract), shardings)
    whole = rules.bytes_per_device(
        nn.meta.unbox(abstract), jax.tree.map(lambda _: rules.replicated(mesh), shardings)
    )
    assert whole["decoder/embedding"] == 144 * 32 * 4
    assert per_device["decoder/embedding"] == 144 * 32 * 4 // 4
    assert sum(per_device.values()) < sum(whole.values()) / 3


def test_tensor_parallelism_splits_heads_channels_and_the_vocabulary():
    """Beside fsdp, which splits the width; a kernel over both; vectors of one name by that."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    experiment = tiny_experiment(**{"model.decoder.num_kv_heads": 2, "model.decoder.qkv_bias": True})
    abstract = jax.eval_shape(lambda: init_variables(experiment.model, jax.random.key(0)))
    shardings = rules.param_shardings(mesh, abstract)
    layers = shardings["decoder"]["layers"]
    assert layers["self_attn"]["k_proj"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert layers["self_attn"]["k_proj"]["bias"].spec == PartitionSpec(None, "tensor")
    assert layers["self_attn"]["o_proj"]["kernel"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert layers["mlp"]["down_proj"]["kernel"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert shardings["decoder"]["embedding"].spec == PartitionSpec("tensor", "fsdp")
    assert shardings["decoder"]["lm_head"]["kernel"].spec == PartitionSpec("fsdp", "tensor")


def test_an_unknown_axis_is_named():
    with pytest.raises(ValueError, match=r"'colour' of kernel is not in the table"):
        rules.partition_spec(("embed", "colour"), "kernel")


def test_two_axes_cannot_share_a_mesh_axis():
    with pytest.raises(ValueError, match="'batch' and 'embed' of x are both split over mesh axis 'fsdp'"):
        rules.partition_spec(("batch", "embed"), "x")


def test_a_size_that_does_not_divide_is_refused_rather_than_replicated(mesh):
    kernel = {"a": {"kernel": boxed((1026, 514), ("mlp", "embed"))}}
    with pytest.raises(
        UserError,
        match=r"Axis 1 of parameter a/kernel has size 514, which mesh.fsdp = 4 .* all 2,109,456 bytes",
    ):
        rules.param_shardings(mesh, kernel)


@pytest.mark.parametrize(
    ("shape", "names", "spec"),
    [
        ((8, 6), ("mlp", "embed"), ("fsdp", None)),
        ((4, 12, 8, 6), ("layers", None, None, "embed"), (None, "fsdp", None, None)),
        ((4, 7, 6), ("layers", "mlp", "embed"), ("fsdp", None, None)),
        ((7, 6), ("mlp", "embed"), (None, None)),
        ((7, 8), ("mlp", "embed"), (None, "fsdp")),
    ],
)
def test_what_the_mesh_does_not_divide_is_split_elsewhere(mesh, shape, names, spec):
    """The largest axis that it divides, layers last; only a small array is replicated; each is told."""
    tree = {"a": boxed(shape, names)}
    assert rules.param_shardings(mesh, tree)["a"].spec == PartitionSpec(*spec)
    lines = rules.moved(mesh, tree)
    assert (not lines) == (spec[names.index("embed")] == "fsdp")
    if lines:
        where = "replicated" if set(spec) == {None} else f"fsdp over axis {spec.index('fsdp')}"
        assert lines == [f"a {list(shape)}: {where}"]


def test_a_parameter_without_names_is_refused(mesh):
    with pytest.raises(ValueError, match="Parameter a has no logical axis names"):
        rules.param_shardings(mesh, {"a": jax.ShapeDtypeStruct((8,), jnp.float32)})


def test_a_batch_is_split_over_all_devices(mesh):
    array = jax.device_put(jnp.zeros((16, 3)), rules.batch_sharding(mesh))
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 3)}
    assert len({shard.index[0].start for shard in array.addressable_shards}) == 8
