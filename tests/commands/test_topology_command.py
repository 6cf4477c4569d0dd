"""gaze-jax topology: what is read of a config, what is refused, the table, and programs for real chips."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from gaze_jax.commands import cli
from gaze_jax.commands import topology as command
from gaze_jax.commands import topology_programs as programs
from gaze_jax.commands import topology_rows as table
from gaze_jax.errors import UserError
from gaze_jax.models.config import REMAT_POLICIES
from gaze_jax.models.parameters import abstract_params
from gaze_jax.parallel import topology
from gaze_jax.parallel.costs import count_flops
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train.step import put_batch
from tests.helpers.commands import ROOT
from tests.helpers.experiments import batches_of, tiny_experiment

TINY = f"--config={ROOT}/tests/helpers/tiny_config.py"
V5E = topology.CHIPS["v5e"]

# ml_collections reads a config file by it; optax adds floats to int32 step counts.
pytestmark = [pytest.mark.filterwarnings("ignore:the load_module"), pytest.mark.standard_promotion]


def values_of(*words):
    return cli.parse(command.define_flags, command.__doc__, ["topology", *words])[0]


def config_of(*words):
    return command.config_of(values_of(*words))


@pytest.fixture
def on_cpus(monkeypatch):
    """The devices of every topology are eight fake CPU devices."""
    monkeypatch.setattr(topology, "load_devices", lambda name: jax.devices())
    monkeypatch.setattr(command, "_versions", dict)  # of libtpu too, which need not be here


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give --config"),
        ([TINY], "Give --topology, the chips to compile for, such as v5e:16x16"),
        ([TINY, "--topology=v5e"], "--topology=v5e must be a chip and its mesh"),
        ([TINY, "--topology=v5e:2x2", "--effort=2"], "--effort=2 must be between -1 and 1"),
        ([TINY, "--topology=v5e:2x2", "--sweep", "--program=decode"], "drop it, or --program=decode"),
        ([TINY, "--topology=v5e:2x2", "--sweep", "--nodense_row"], "--dense_row has no effect with --sweep"),
        ([TINY, "--topology=v5e:2x2", "--sweep_remat=off"], "--sweep_remat has no effect without --sweep"),
        ([TINY, "--topology=v5e:2x2", "--sweep", "--sweep_batch_sizes=0"], "must be at least 1"),
        ([TINY, "--topology=v5e:2x2", "--json=/nowhere/x.json"], "--json=/nowhere/x.json lies in a folder"),
    ],
)
def test_bad_usage_is_one_sentence(words, message):
    with pytest.raises(UserError) as error:
        command.main(values_of(*words))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_libtpu_is_asked_for_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="tpu-aot"):
        command.main(values_of(TINY, "--topology=v5e:2x2"))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("/x/configs/cambrian_video.py:4b", "cambrian_4b_video"),
        ("cambrian_image.py:7b", "cambrian_7b_image"),
        ("/x/cambrian_align.py", "cambrian_4b_align"),
        ("configs/digits.py", "digits"),
        ("/a:b/mine_too.py", "mine_too"),
    ],
)
def test_a_config_is_named_with_its_size(file, name):
    assert command.config_name(file) == name


def test_a_published_stage_needs_no_checkpoint_and_no_corpus():
    experiment = programs.read_experiment(config_of("--config=cambrian_video:4b"))
    assert experiment.model.decoder.depth == 36 and experiment.steps == 1000
    mesh = make_mesh(MeshConfig(data=8))
    batch = programs.abstract_batch(experiment, mesh)
    assert batch["images"].shape == (64, 16, 384, 384, 3)
    assert batch["visual_src"].shape == (64, 256, 36) and batch["tokens"].shape == (64, 2048)
    dense = programs.dense_of(experiment)
    assert dense.model.gaze.top_k is None and dense.model.gaze.context_tokens == 4
    assert programs.dense_of(dense) is None


def test_a_config_without_a_model_takes_a_published_one():
    words = ["--config=finetune", "--config.data.row.text=64"]
    with pytest.raises(UserError, match=r"model has no decoder; name its checkpoint in --config\.init_from"):
        programs.read_experiment(config_of(*words))
    with pytest.raises(UserError, match="init_from=/nowhere is neither a folder nor a published model"):
        programs.read_experiment(config_of(*words, "--config.init_from=/nowhere"))
    named = [*words, "--config.init_from=llava-onevision-qwen2-0.5b"]
    experiment = programs.read_experiment(config_of(*named))
    assert experiment.model.views.style == "llava_onevision" and experiment.model.gaze.top_k == 4
    assert experiment.model.param_dtype == "float32"


def test_a_distillation_has_a_teacher_of_what_it_trains():
    """In bfloat16, without the frozen tower; and a dense form beside it."""
    words = ["--config=gazify", "--config.data.row.text=64", "--config.model.dtype=bfloat16"]
    experiment = programs.read_experiment(
        config_of(*words, "--config.init_from=llava-onevision-qwen2-0.5b", "--config.mesh.fsdp=2")
    )
    mesh = make_mesh(experiment.mesh)
    _, _, teacher = programs.CALLS["train"](experiment, mesh).arguments
    assert sorted(teacher.params) == ["decoder", "newline", "projector"]
    table = teacher.params["decoder"]["embedding"]
    assert table.dtype == jnp.bfloat16 and table.sharding.shard_shape(table.shape) == (152000, 448)
    assert teacher.config.gaze.top_k is None and teacher.config.gaze.context_tokens == 0
    dense = programs.dense_of(experiment)
    assert dense.objective.name == "distill" and dense.objective.region_weight == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 0}, "data.row.text=0 leaves the size of a row to the corpus"),
        ({"text": 64, "regions": 9}, "data.row.regions=9 and data.row.images=0 must both be given"),
    ],
)
def test_a_row_without_sizes_is_refused(row, message):
    words = ["--config=finetune", "--config.init_from=llava-onevision-qwen2-0.5b"]
    words += [f"--config.data.row.{name}={size}" for name, size in row.items()]
    experiment = programs.read_experiment(config_of(*words))
    with pytest.raises(UserError, match=message):
        programs.abstract_batch(experiment, make_mesh(MeshConfig(data=8)))


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    mesh = make_mesh(MeshConfig(4, 2))
    with pytest.raises(UserError, match="batch_size=12 must be a multiple of the 8 devices"):
        programs.abstract_batch(tiny_experiment(batch_size=12), mesh)
    # Each part of a training batch is shared by all devices.
    with pytest.raises(UserError, match="batch_size=8 / accumulate=2 must be a multiple of the 8 devices"):
        programs.abstract_batch(tiny_experiment(batch_size=8, accumulate=2), mesh)


def test_the_abstract_batch_is_that_of_training():
    experiment, mesh = tiny_experiment(), make_mesh(MeshConfig(4, 2))
    (batch,) = batches_of(experiment)
    real = put_batch(batch, mesh)
    abstract = programs.abstract_batch(experiment, mesh)
    assert {n: (a.shape, a.dtype, a.sharding) for n, a in abstract.items()} == {
        n: (a.shape, a.dtype, a.sharding) for n, a in real.items()
    }


def test_pooled_views_have_pooling_indices():
    words = [
        "--config=finetune",
        "--config.init_from=llava-onevision-qwen2-0.5b",
        "--config.data.row.text=64",
    ]
    words += ["--config.data.row.regions=32", "--config.data.row.images=2"]
    experiment = programs.read_experiment(config_of(*words))
    batch = programs.abstract_batch(experiment, make_mesh(MeshConfig(data=8)))
    slots = experiment.model.layout.slots
    assert batch["pool_indices"].shape == batch["pool_weights"].shape == (8, 32, slots, 4)
    assert (batch["pool_indices"].dtype, batch["pool_weights"].dtype) == ("int32", "float32")


def test_inference_is_split_over_sequences_only():
    experiment = tiny_experiment()
    sizes = {"data": 4, "fsdp": 2, "tensor": 1, "context": 1}
    assert programs.mesh_of(experiment, jax.devices(), "v5e:2x4", "train").shape == sizes
    with pytest.raises(UserError, match=r"--program=decode splits batches.*leave out --config\.mesh\.fsdp"):
        programs.mesh_of(experiment, jax.devices(), "v5e:2x4", "decode")


def test_a_mesh_that_jax_cannot_arrange_is_one_sentence(monkeypatch):
    def refuse(*arguments):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 1\nmore")

    monkeypatch.setattr(programs, "make_mesh", refuse)
    with pytest.raises(UserError, match=r"mesh.fsdp=2, mesh.tensor=1, mesh.context=1 on v5p:4x4x8; choose"):
        programs.mesh_of(tiny_experiment(), jax.devices(), "v5p:4x4x8", "train")


def test_the_memory_bound_counts_what_is_read_and_written():
    """State read and written; a frozen tower is read; a decoding step reads the decoder and its cache."""
    mesh = make_mesh(MeshConfig(data=8))
    words = {"optimizer.frozen": ("vision",), "batch_size": 8, "mesh.fsdp": 1}
    experiment = tiny_experiment(**words)
    params = abstract_params(experiment.model, mesh)
    size = {part: sum(leaf.size * 4 for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}
    trained = sum(size.values()) - size["vision"]
    call = programs.CALLS["train"](experiment, mesh)
    moments = 2 * trained + 2 * 4  # and two counters
    assert call.memory_bytes == sum(size.values()) + trained + 2 * moments

    table_bytes = 144 * 32 * 4  # not tied, so only looked up
    decode = programs.CALLS["decode"](experiment, mesh)
    cache = decode.arguments[1]
    kv = {name: a.size * 4 // 8 for name, a in (("text", cache.text_k), ("visual", cache.descriptors))}
    visual = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache.visual)) // 8
    keep = 1 / 4  # top_k of the regions of an image
    assert cache.visual_order.shape[1] == 4 and kv["text"] > 0
    assert decode.memory_bytes == size["decoder"] - table_bytes + int(keep * visual) + 2 * kv["text"]


REPORT = """Memory Space: default (color=0)
Total bytes: 5403345408 (5.03GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    1.45GiB( 17%);    1.45GiB;   2586181632;                2; 2×f32[151936,2560]
    4.04GiB( 46%);  720.00MiB;    228016128;                1; f32[32,16,576,576]
    4.04GiB( 46%);      320B;    228016128;                1; f32[80]

Memory Space: vmem (color=1)
    1.45GiB( 17%);    9.45GiB;   2586181632;                2; f32[1]
"""


def test_the_largest_buffers_are_those_of_the_hbm():
    assert table.largest_buffers(REPORT) == [
        {"bytes": int(1.45 * 2**30), "arrays": "2×f32[151936,2560]"},
        {"bytes": 720 * 2**20, "arrays": "f32[32,16,576,576]"},
        {"bytes": 320, "arrays": "f32[80]"},
    ]
    assert table.largest_buffers("") == table.largest_buffers(REPORT.replace("default", "other")) == []


def test_a_sweep_has_every_mesh_with_every_policy():
    found = [(each.mesh.data, each.mesh.fsdp) for each in command.swept(tiny_experiment(), 8)]
    assert found == [mesh for mesh in ((1, 8), (2, 4), (4, 2), (8, 1)) for _ in command.REMAT]
    several = command.swept(tiny_experiment(), 1, batch_sizes=(4, 8))
    found = [(each.batch_size, each.model.remat, each.model.remat_policy) for each in several]
    kinds = [(True, "nothing"), (True, "dots"), (False, "nothing")]  # a policy without remat is no config
    assert found == [(size, *kind) for size in (4, 8) for kind in kinds]
    assert set(command.REMAT) == {*REMAT_POLICIES, command.OFF}


def test_a_sweep_suggests_the_lowest_bound_that_fits(on_cpus, monkeypatch, capsys, tmp_path):
    """What does not fit, is refused, or is slower is shown and not suggested; nor what sends more."""
    bounds = {(1, 8, True): 2.0, (2, 4, True): 2.0, (2, 4, False): 1.0, (4, 2, True): 2.5}

    def measured(experiment, mesh, chip, program, **options):
        row = table.refused(experiment, chip, "")
        bound = bounds.get((mesh.shape["data"], mesh.shape["fsdp"], experiment.model.remat), 9.0)
        row |= {"bound_seconds": bound, "bound_by": "compute", "collective_bytes": 5, "peak_bytes": 10**9}
        parts = {"compute": bound, "interconnect": bound / mesh.shape["data"]}
        return row | {"fits": bound > 1, "flops": 10**15, "refused": None, "bound_parts": parts}

    def state_bytes(experiment, mesh):
        if experiment.mesh.fsdp == 2:
            raise UserError("Axis 1 of kernel has size 3.")
        return 10**12 if experiment.mesh.fsdp == 1 else 1

    monkeypatch.setattr(table, "measure", measured)
    monkeypatch.setattr(table, "state_bytes", state_bytes)
    out = tmp_path / "rows.json"
    flags = ["--sweep", "--sweep_remat=nothing,off", f"--json={out}"]
    command.main(values_of(TINY, "--topology=v5e:2x4", *flags))
    printed, progress = capsys.readouterr()
    lines = printed.splitlines()
    assert lines[-1].startswith(
        "The lowest bound that fits: --config.mesh.data=2 --config.mesh.fsdp=4 --config.model.remat=True (2 s"
    )
    (not_fitting,) = (line for line in lines if line.endswith("does not fit"))
    assert "data=2 fsdp=4" in not_fitting and " off " in not_fitting
    assert sum("Axis 1 of kernel has size 3." in line for line in lines) == 2
    assert sum("the state alone is too large" in line for line in lines) == 2
    assert "compiling 8 of 8: gaze data=8 fsdp=1 batch 8 remat off" in progress
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 8 and [row["fits"] for row in rows] == [True, True, True, False] + 4 * [False]


def test_a_sweep_of_batches_and_policies_suggests_the_least_of_a_sample(on_cpus, monkeypatch, capsys):
    """Eight rows in three seconds are less than four in two."""
    seconds = {(8, "dots"): 3.0, (4, "nothing"): 2.0}

    def measured(experiment, mesh, chip, program, **options):
        bound = seconds.get((experiment.batch_size, experiment.model.remat_policy), 9.0)
        row = table.refused(experiment, chip, "") | {"bound_seconds": bound, "bound_by": "compute"}
        row |= {"flops": 1, "collective_bytes": 0, "peak_bytes": 10**9, "bound_parts": {"compute": bound}}
        return row | {"fits": True, "refused": None}

    monkeypatch.setattr(table, "measure", measured)
    flags = ["--sweep", "--sweep_remat=nothing,dots", "--sweep_batch_sizes=4,8"]
    command.main(values_of(TINY, "--topology=v5e:2x4", *flags))
    *lines, last = capsys.readouterr().out.splitlines()
    assert "--config.batch_size=8 --config.model.remat=True --config.model.remat_policy=dots (3 s" in last
    assert sum(" 8   dots " in line for line in lines) == 4


def test_a_sweep_without_a_mesh_that_fits_has_status_1(on_cpus, monkeypatch, capsys):
    monkeypatch.setattr(table, "state_bytes", lambda experiment, mesh: 10**12)
    with pytest.raises(SystemExit) as end:
        command.main(values_of(TINY, "--topology=v5e:2x4", "--sweep"))
    assert end.value.code == 1
    assert "No mesh fits" in capsys.readouterr().out.splitlines()[-1]


def does_not_fit(*arguments):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: ... Used 19.25G of 15.75G hbm. Exceeded ...")


def test_the_step_of_a_config_is_compiled_and_described(on_cpus, monkeypatch, capsys, tmp_path):
    """For the devices of this machine: the rows are of the real step, and dense attention is the second."""
    out = tmp_path / "rows.json"
    command.main(values_of(TINY, "--topology=v5e:2x4", f"--json={out}"))
    report = json.loads(out.read_text())
    gaze, dense = report["rows"]
    assert set(report) == {"date", "command", "versions", "rows"}
    assert (gaze["dense"], dense["dense"]) == (False, True)
    for row in report["rows"]:
        assert (row["config"], row["topology"], row["program"]) == ("tiny_config", "v5e:2x4", "train")
        assert (
            row["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1, "context": 1}
            and row["fits"]
            and row["hbm_bytes"] == V5E.hbm_bytes
        )
        assert row["flops"] > 3e7 and row["flops_left_out"] == row["collectives_left_out"] == []
        # Half of the parameters are gathered at least once, and their gradients reduced.
        assert row["collective_bytes"] > row["memory_bytes"] / 10 > 0
        assert row["bound_seconds"] == max(row["bound_parts"].values())
        assert row["bound_parts"]["compute"] == row["flops"] / 8 / V5E.flops_per_second
    printed = capsys.readouterr().out
    assert printed.startswith("tiny_config train on v5e:2x4: 8 chips with 16.91 GB of HBM for a program;")
    assert "gaze       data=4 fsdp=2" in printed and "dense      data=4 fsdp=2" in printed
    # What the arguments take is known without the compiler, if the program does not fit.
    monkeypatch.setattr(table, "_compiled", does_not_fit)
    with pytest.raises(SystemExit):
        command.main(values_of(TINY, "--topology=v5e:2x4", f"--json={out}", "--nodense_row"))
    (row,) = json.loads(out.read_text())["rows"]
    # The compiler also drops sample_id, which only random routing reads.
    assert row["argument_bytes"] == gaze["argument_bytes"] + 4 and row["bound_seconds"] is None


def test_what_does_not_fit_is_a_row_with_the_compilers_number(on_cpus, monkeypatch, capsys):
    monkeypatch.setattr(table, "_compiled", does_not_fit)
    with pytest.raises(SystemExit) as end:
        command.main(values_of(TINY, "--topology=v5e:2x4", "--nodense_row"))
    assert end.value.code == 1
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("gaze "))
    assert "20.67" in row and row.endswith("does not fit")


def test_another_error_of_the_compiler_is_no_row(on_cpus, monkeypatch):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: it broke")

    monkeypatch.setattr(table, "_compiled", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="it broke"):
        command.main(values_of(TINY, "--topology=v5e:2x4"))


def test_the_effort_is_a_number_or_a_level(monkeypatch):
    """By the version of JAX."""
    monkeypatch.setattr(type(jax.config), "jax_exec_time_optimization_effort", 0.0, raising=False)
    assert table.effort_options(-0.5) == {"exec_time_optimization_effort": -0.5}
    monkeypatch.setattr(table.jax, "config", object())
    assert table.effort_options(-1.0) == {"optimization_level": "O0"}
    assert table.effort_options(0.0) == {} and table.effort_options(1.0) == {"optimization_level": "O3"}
    with pytest.raises(UserError, match=r"--effort=-0\.5 must be -1, 0 or 1 with jax"):
        table.effort_options(-0.5)


@pytest.mark.parametrize("dense", [False, True])
def test_the_flops_of_a_decoding_step_are_those_of_a_count_by_hand(dense):
    """For a token: the matrices of two layers, the head, attention to all four regions and to the text."""
    experiment, mesh = tiny_experiment(**{"mesh.fsdp": 1}), make_mesh(MeshConfig(data=8))
    experiment = programs.dense_of(experiment) if dense else experiment
    call = programs.CALLS["decode"](experiment, mesh)
    with table._on(mesh):
        found = count_flops(call.function.trace(*call.arguments).jaxpr)
    layers, width, heads, mlp, vocabulary = 2, 32, 2 * 16, 48, 144
    text, slots = call.arguments[1].text_k.shape[3], 4 * 4
    matrices = 2 * layers * (2 * width * heads + 2 * width * 16 + 3 * width * mlp)
    attention = 4 * layers * (slots + text) * heads
    scores = 0 if dense else 2 * layers * 4 * heads
    by_hand = matrices + 2 * width * vocabulary + attention + scores
    assert (found.total, found.left_out) == (8 * by_hand, ())


def test_arguments_that_a_program_does_not_use_take_no_memory():
    """A decoding step has no use for the tower."""
    experiment, mesh = tiny_experiment(**{"mesh.fsdp": 1}), make_mesh(MeshConfig(data=8))
    call = programs.CALLS["decode"](experiment, mesh)
    params = call.arguments[0]
    with table._on(mesh):
        traced = call.function.trace(*call.arguments)
    unused = programs.chip_bytes(
        {part: params[part] for part in ("vision", "projector", "context", "newline")}
    )
    assert table._used(traced, call.arguments) <= programs.chip_bytes(call.arguments) - unused


@pytest.mark.tpu_aot
@pytest.mark.parametrize("program", ["train", "prefill", "decode"])
def test_programs_compile_for_chips(program, tmp_path, capsys):
    out = tmp_path / "rows.json"
    words = [TINY, "--topology=v5e:2x2", f"--program={program}", f"--json={out}", "--nodense_row"]
    command.main(values_of(*words, "--config.mesh.fsdp=1"))
    (row,) = json.loads(out.read_text())["rows"]
    assert row["fits"] and row["peak_bytes"] > row["argument_bytes"] / 2 > 0
    assert len(row["largest_buffers"]) == 5
    # Only a training step of several copies sends anything: the gradients.
    assert (row["collective_bytes"] > 0) == (program == "train")
    assert "Largest buffers, gaze:" in capsys.readouterr().out


@pytest.mark.tpu_aot
def test_a_batch_that_does_not_fit_chips_has_status_1(capsys):
    """Of images alone: 4,000,000 of 20x20 pixels in uint8 are 1.2 GB on each chip, and more as floats."""
    words = [TINY, "--topology=v5e:2x2", "--config.batch_size=16000000", "--nodense_row"]
    with pytest.raises(SystemExit) as end:
        command.main(values_of(*words))
    assert end.value.code == 1
    assert "does not fit" in capsys.readouterr().out
