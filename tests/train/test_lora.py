"""Adapters: new ones change nothing, the decoder stays, and a run is read with them added to it."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.convert.origin import open_start
from gaze_jax.core.selection import Selection
from gaze_jax.core.streams import Streams
from gaze_jax.errors import UserError
from gaze_jax.models import MLLM
from gaze_jax.parallel import rules
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train import checkpoint, loop, lora
from gaze_jax.train.checkpoint import load_for_inference
from gaze_jax.train.config import parse
from gaze_jax.train.evaluation import measure_function
from gaze_jax.train.losses import distillation_loss, next_token_loss
from gaze_jax.train.step import abstract_state, put_batch, shardings_of, step_function
from gaze_jax.train.teacher import Teacher, make_teacher
from tests.helpers.experiments import (
    batches_of,
    random_state,
    reused_programs,
    save_untrained,
    tiny,
    tiny_experiment,
)

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("train")]

RANK = {"init_from": "ckpt", "lora.rank": 4, "lora.alpha": 6.0}
HEADS = {"model.decoder.num_kv_heads": 2}


def one_device():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def same(one, other):
    """Names of the arrays that have the same bits, and of the others."""
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    found = {name for name in one if np.array_equal(one[name], other[name])}
    return found, one.keys() - found


def logits(model, batch):
    """A function of parameters, compiled for those with adapters and for those without."""
    inputs = batch["images"], Streams.from_batch(batch), Selection()
    run = jax.jit(lambda params: MLLM(model).apply({"params": params}, *inputs)[0])
    return lambda params: np.asarray(run(params))


@pytest.fixture(scope="module")
def host():
    return batches_of(tiny_experiment())[0]


def adapted(**overrides):
    """An experiment with adapters, and random parameters on one device, those of the adapters too."""
    experiment = tiny_experiment(**RANK | overrides)
    return experiment, jax.device_put(random_state(experiment).params, jax.devices()[0])


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


def test_a_merged_model_is_the_one_with_adapters_and_new_ones_change_nothing(host):
    """In bfloat16 it is rounded as an ordinary model is, and nothing is promoted."""
    batch, found = put_batch(host, one_device()), {}
    for dtype in ("float32", "bfloat16"):
        experiment, params = adapted(**{"model.dtype": dtype})
        base = {part: tree for part, tree in params.items() if part != lora.PART}
        new = lora.with_new(base, experiment.lora, 0)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new[lora.PART]))
        merged = lora.merged(jax.tree.map(jnp.array, params), experiment.lora)
        joined = (lora.joined(tree, experiment.lora) for tree in (new, params))
        with jax.numpy_dtype_promotion("strict"):
            found[dtype] = [*map(logits(experiment.model, batch), (base, *joined, merged))]
    plain, new, adapters, merged = found["float32"]
    scale = np.abs(plain).max()
    assert np.abs(adapters - plain).max() > 0.1 * scale
    np.testing.assert_allclose(new, plain, rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(merged, adapters, rtol=0, atol=3e-6 * scale)
    _, _, rounded, ordinary = found["bfloat16"]
    assert 0 < rms(rounded - adapters) < 1.5 * rms(ordinary - adapters)


def gradient(mesh, host, experiment):
    """Gradient of everything that is trained, and metrics."""
    shardings = shardings_of(abstract_state(experiment, mesh).params)
    params = jax.device_put(random_state(experiment).params, shardings)
    trained = {part: tree for part, tree in params.items() if part not in experiment.frozen}

    def loss(trained, params, batch):
        joined = lora.joined(params | trained, experiment.lora)
        return next_token_loss(joined, batch, jnp.float32(0.25), experiment.model)

    run = jax.jit(jax.grad(loss, has_aux=True), out_shardings=(shardings_of(trained), rules.replicated(mesh)))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.flax_rules()):
        return run(trained, params, put_batch(host, mesh))


@pytest.mark.long
def test_a_mesh_splits_adapters_like_kernels_and_changes_no_gradient(host):
    experiment = tiny_experiment(**RANK | HEADS | {"optimizer.frozen": ("vision",)})
    mesh = make_mesh(MeshConfig(2, 2, 2))
    one, measured = gradient(one_device(), host, experiment)
    many, measured_many = gradient(mesh, host, experiment)
    for name, value in measured.items():
        np.testing.assert_allclose(measured_many[name], value, rtol=1e-5, err_msg=name)
    assert set(one) == {"projector", "newline", "context", lora.PART}
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one[lora.PART]))
    assert scale > 1e-3
    for name, leaf in leaves(many).items():
        np.testing.assert_allclose(leaf, leaves(one)[name], rtol=1e-4, atol=1e-5 * scale, err_msg=name)
    parts = {
        name: {key: leaf.sharding.spec for key, leaf in many[lora.PART][group][name].items()}
        for group, name in (("self_attn", "q_proj"), ("mlp", "down_proj"))
    }
    spec = jax.sharding.PartitionSpec
    assert parts["q_proj"] == {"a": spec(None, "fsdp", None), "b": spec(None, None, "tensor")}
    assert parts["down_proj"] == {"a": spec(None, "tensor", None), "b": spec(None, None, "fsdp")}


def test_parts_of_a_batch_add_up_no_gradient_of_the_decoder(host):
    """One would be as large as the decoder, and in memory for the whole step."""
    experiment = tiny_experiment(**RANK | {"accumulate": 2})
    state = abstract_state(experiment, one_device())
    batch = put_batch(host, one_device())
    traced = jax.jit(step_function(experiment)).trace(state, batch).jaxpr.eqns
    (sums,) = (
        eqn.outvars[: eqn.params["num_carry"]]
        for eqn in traced
        if eqn.primitive.name == "scan" and eqn.params["length"] == 2 and len(eqn.outvars) > 20
    )
    shapes = [leaf.aval.shape for leaf in sums]
    for part, tree in state.params.items():
        for name, leaf in leaves(tree).items():
            if leaf.ndim > 2:  # the shapes of the others are not one part's alone
                assert (leaf.shape in shapes) == (part != "decoder"), (part, name)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense run to start from, with random parameters."""
    workdir = tmp_path_factory.mktemp("dense")
    save_untrained(tiny_experiment(arm="dense"), workdir)
    return workdir


SETTINGS = {
    "lora.rank": 4,
    "lora.alpha": 6.0,
    "lora.modules": ("q_proj", "v_proj", "down_proj"),
    "steps": 4,
    "log_every": 1,
    "optimizer.frozen": ("vision",),
    "optimizer.part_rates.projector": 0.5,
    "optimizer.part_rates.decoder": 2.0,
    "average_decay": 0.25,
    "checkpoint_every": 2,
    "mesh.fsdp": 2,
}


@pytest.fixture(scope="module")
def run(dense, tmp_path_factory):
    """Four steps, the experiment, and what a copy that lost the last two ends with on doing them again."""
    experiment = parse(tiny(init_from=str(dense), **SETTINGS))
    folder, start = tmp_path_factory.mktemp("runs"), open_start(str(dense))
    with reused_programs():
        assert loop.train(experiment, folder / "whole", start)
        shutil.copytree(folder / "whole", folder / "again")
        shutil.rmtree(folder / "again" / "checkpoints" / "4")
        assert loop.train(experiment, folder / "again", start)
    return experiment, folder / "whole", folder / "again"


def state_of(experiment, workdir):
    with checkpoint.open_manager(workdir) as manager:
        meta = checkpoint._meta(manager, manager.latest_step())
        items = checkpoint._items(abstract_state(experiment, make_mesh(experiment.mesh)))
        return checkpoint._read_trees(manager, 4, meta, items)


def test_a_run_moves_its_adapters_leaves_the_decoder_and_resumes_in_the_same_bits(run, dense):
    experiment, whole, again = run
    assert (whole / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()
    trees, others = (state_of(experiment, workdir) for workdir in (whole, again))
    assert not same(trees, others)[1]
    before = load_for_inference(dense, one_device()).params
    for part, tree in before.items():
        kept, moved = same(tree, trees["params"][part])
        # Scenes of digits have no newlines.
        assert not (moved if part in ("vision", "decoder", "newline") else kept)
    adapters = leaves(trees["params"][lora.PART])
    assert len(adapters) == 6 and all(np.any(leaf) for leaf in adapters.values())
    assert {leaf.shape[2] for name, leaf in adapters.items() if name.endswith("['a']")} == {4}
    # Neither the optimizer nor the average has anything of what is frozen.
    held = str(list(leaves((trees["train"], trees["average"]))))
    assert "'lora'" in held and "'decoder'" not in held and "'vision'" not in held


def test_what_reads_a_run_gets_an_ordinary_model_with_the_averaged_adapters(run):
    experiment, whole, _ = run
    trees, found = state_of(experiment, whole), load_for_inference(whole, one_device())
    assert set(found.params) == {"vision", "projector", "newline", "context", "decoder"}
    base, mine = (params["decoder"]["layers"] for params in (trees["params"], found.params))
    for group, name in (("self_attn", "q_proj"), ("self_attn", "v_proj"), ("mlp", "down_proj")):
        pair = {
            key: np.asarray(leaf, np.float64) for key, leaf in trees["average"]["lora"][group][name].items()
        }
        product = np.einsum("lir,lro->lio", pair["a"], pair["b"])
        wanted = np.asarray(base[group][name]["kernel"]) + 1.5 * product
        assert np.abs(1.5 * product).max() > 1e-4
        np.testing.assert_allclose(mine[group][name]["kernel"], wanted, rtol=1e-6, atol=1e-7)
    assert len(same(base, mine)[1]) == 3


def test_evaluation_during_a_run_reads_the_adapters(host):
    experiment, params = adapted(arm="dense")
    batch = put_batch(host, one_device())
    found = jax.jit(measure_function(experiment))(params, batch)
    merged = jax.jit(measure_function(experiment))(lora.merged(params, experiment.lora), batch)
    for name, value in merged["dense"].items():
        np.testing.assert_allclose(found["dense"][name], value, rtol=1e-5, err_msg=name)


def test_the_teacher_of_a_distillation_is_the_decoder_without_adapters(dense):
    """It shares the student's; a dense student is that teacher until it has adapters."""
    changes = {"objective.name": "distill", "optimizer.frozen": ("vision",), "arm": "dense"}
    experiment = parse(tiny(**RANK | changes | {"init_from": str(dense)}))
    start, mesh = open_start(str(dense)), one_device()
    params = start.load(mesh)
    taught = make_teacher(experiment, start.config, params, mesh)
    assert set(taught.params) == {"projector", "newline"}
    batch = put_batch(batches_of(experiment)[0], mesh)

    @jax.jit
    def kl(params, teacher):
        joined = lora.joined(params, experiment.lora)
        return distillation_loss(joined, batch, None, experiment.model, teacher, 0.0)[1]["kl"]

    new = lora.with_new(params, experiment.lora, 0)
    other = params | {lora.PART: adapted(arm="dense")[1][lora.PART]}
    assert abs(float(kl(new, taught))) < 1e-6
    found, whole = (float(kl(other, each)) for each in (taught, Teacher(taught.config, params)))
    assert found > 0.01
    np.testing.assert_allclose(found, whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"init_from": None}, "lora.rank=4 needs init_from, the checkpoint that the adapters adapt"),
        ({"optimizer.frozen": ("decoder",)}, "optimizer.frozen names decoder, which lora.rank=4 freezes"),
        ({"lora.rank": -1}, "lora.rank=-1 must not be negative"),
        ({"lora.rank": 0}, "lora.alpha has no effect with lora.rank=0; set the rank"),
        ({"lora.alpha": 0.0}, "lora.alpha=0.0 must be positive"),
        ({"lora.modules": ("q_proj", "qkv")}, "lora.modules names qkv; known are q_proj, k_proj"),
        ({"lora.modules": ()}, "lora.modules is empty; name linear layers, or set lora.rank to 0"),
    ],
)
def test_adapters_that_cannot_be_are_refused_in_one_sentence(change, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        parse(tiny(**RANK | change))
    assert "\n" not in str(error.value)
