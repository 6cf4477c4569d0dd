"""Runs of several processes: they compute what one computes, and flags that contradict are refused."""

import base64
import dataclasses
import json
import math
import os
import re
import shutil
import socket
from collections import Counter

import jax
import numpy as np
import pytest

from gaze_jax.errors import UserError
from gaze_jax.parallel import distributed
from gaze_jax.parallel.distributed import ProcessConfig
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train import loop
from gaze_jax.train.checkpoint import FOLDER, load_for_inference
from gaze_jax.train.step import abstract_state
from tests.helpers.commands import finish, start, without_gloo
from tests.helpers.experiments import reused_programs, tiny_experiment

MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
RUN = {"steps": 4, "checkpoint_every": 1, "log_every": 1, "model.decoder.num_kv_heads": 2, **MESH}
RUN["keep_checkpoints"] = 4
SPLIT = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 1, "mesh.context": 4}
"""Every sequence is on devices of more than one process."""
SINGLE = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1, "mesh.context": 1}
ONE_AXIS = {"data": (2, 8), "fsdp": (4, 8), "tensor": (2, 2), "context": (4, 4)}
"""Meshes of one axis, by pairs: how many processes, which have how many devices together."""


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def train_by(count, workdir, run, devices=8):
    """Train to the end in ``count`` processes, which have ``devices`` together; what the first one prints."""
    settings = [f"--config.{name}={value}" for name, value in run.items()]
    command = ["train", "--config=tests/helpers/tiny_config.py", f"--workdir={workdir}", *settings]
    command += [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
    command += ["--heartbeat_seconds=120"]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    environment = {"JAX_NUM_CPU_DEVICES": str(devices // count), "XLA_FLAGS": flags}
    processes = [
        start("-m", "gaze_jax", *command, f"--process_id={number}", **environment) for number in range(count)
    ]
    first, *others = [finish(process)[0] for process in processes]
    assert "step 4/4" in first and f"on {devices} cpu device(s)" in first
    assert "random routing" in first, "evaluated by all, on the run's mesh"
    # Only the first process prints; a number alone in its line is Gloo's, whose threads cut each other short.
    assert not [line for out in others for line in without_gloo(out) if not line.strip().isdecimal()]
    return first


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """A run of two processes with four devices each, whose rows are split over them."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    train_by(2, workdir, RUN)
    return workdir


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    with reused_programs():
        assert loop.train(tiny_experiment(**RUN), workdir)
    return workdir


def same_params(folder, other):
    """Within rounding, on one device."""
    one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    mine, theirs = (load_for_inference(each, one).params for each in (folder, other))
    for leaf, wanted in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-3, atol=2e-5)


def check_shardings(workdir, run):
    """The newest checkpoint notes how what the last step returned lay on the devices of all processes."""
    experiment = tiny_experiment(**run)
    sizes = dataclasses.asdict(experiment.mesh)
    mesh = make_mesh(experiment.mesh, jax.devices()[: math.prod(sizes.values())])
    leaves = jax.tree_util.tree_leaves_with_path(abstract_state(experiment, mesh).params)
    wanted = {jax.tree_util.keystr(path, simple=True, separator="."): leaf.sharding for path, leaf in leaves}
    seen = Counter()
    for item in ("params", "train"):
        noted = json.loads((workdir / FOLDER / str(run["steps"]) / item / "_sharding").read_text())
        for name, text in noted.items():
            found = json.loads(text)
            assert dict(zip(found["axis_names"], found["shape"], strict=True)) == sizes
            leaf = re.sub(r"^opt_state\..*\.[mn]u\.", "", base64.b64decode(name).decode())
            spec = wanted[leaf].spec if leaf in wanted else ()
            spec = [list(axes) if isinstance(axes, tuple) else axes for axes in spec]
            assert found["partition_spec"] == spec, leaf
            seen[leaf] += 1
    assert all(seen[leaf] == 3 for leaf in wanted), "each parameter and its two moments"


def close(mine, theirs):
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for one, other in zip(mine, theirs, strict=True):
        for name, value in other.items():
            np.testing.assert_allclose(one[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.long  # two processes that compile a step each
@pytest.mark.standard_promotion
@pytest.mark.xdist_group("train")
class TestTwoProcesses:
    def test_they_compute_what_one_computes(self, by_two, by_one):
        close(rows(by_two), rows(by_one))
        same_params(by_two, by_one)
        check_shardings(by_two, RUN)

    @pytest.mark.parametrize("axis", ONE_AXIS)
    def test_they_share_one_axis(self, tmp_path, by_one, axis):
        """All devices of all processes along it."""
        count, devices = ONE_AXIS[axis]
        run = RUN | SINGLE | {f"mesh.{axis}": devices}
        train_by(count, tmp_path / "run", run, devices)
        close(rows(tmp_path / "run"), rows(by_one))
        same_params(tmp_path / "run", by_one)
        check_shardings(tmp_path / "run", run)

    @pytest.mark.parametrize("count", [2, 4])
    def test_they_share_sequences(self, tmp_path, by_one, count):
        """Of two processes each has two of four ranks, and both read the same rows; of four, one."""
        train_by(count, tmp_path / "run", RUN | SPLIT)
        close(rows(tmp_path / "run"), rows(by_one))
        same_params(tmp_path / "run", by_one)
        check_shardings(tmp_path / "run", RUN | SPLIT)

    def test_four_processes_and_then_one_go_on_from_them(self, by_two, by_one, tmp_path):
        """On other meshes: the same global batches, so the same rows."""
        workdir = shutil.copytree(by_two, tmp_path / "run")
        for step in ("3", "4"):
            shutil.rmtree(workdir / FOLDER / step)
        assert "from step 2\n" in train_by(
            4, workdir, RUN | {"mesh.data": 4, "mesh.fsdp": 2, "mesh.tensor": 1}
        )
        close(rows(workdir), rows(by_one))
        same_params(workdir, by_one)
        shutil.rmtree(workdir / FOLDER / "4")
        experiment = tiny_experiment(**RUN | {"mesh.data": 4, "mesh.tensor": 1})
        with reused_programs():
            assert loop.train(experiment, workdir)
        close(rows(workdir), rows(by_one))
        same_params(workdir, by_one)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator": "a:1", "process_id": 0}, "--num_processes must be given too"),
        ({"num_processes": 2}, "--coordinator and --process_id must be given too"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process_id=2 must be .* less than"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "--coordinator=a must be HOST:PORT"),
        (
            {"coordinator": "a:1", "num_processes": 1, "process_id": 0, "distributed": False},
            "--nodistributed contradicts",
        ),
        ({"heartbeat_seconds": 1}, "--heartbeat_seconds=1 must be at least 10"),
    ],
)
def test_flags_that_contradict_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        distributed.start(ProcessConfig(**flags))


def test_several_processes_are_joined_if_a_launcher_says_so_or_the_user_does(monkeypatch):
    """One that a launcher has started alone, or that is told not to, joins nobody."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *words, **more: calls.append((words, more)))
    for name in distributed._COUNTS:
        monkeypatch.delenv(name, raising=False)
    assert not distributed.start(ProcessConfig()) and not calls
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert not distributed.start(ProcessConfig()) and not calls
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert not distributed.start(ProcessConfig(distributed=False)) and not calls
    distributed.start(ProcessConfig())
    distributed.start(dataclasses.replace(ProcessConfig(), distributed=True, heartbeat_seconds=60))
    told = ProcessConfig(coordinator="host:1", num_processes=4, process_id=3)
    distributed.start(told)
    assert [words for words, _ in calls] == [(None, None, None)] * 2 + [("host:1", 4, 3)]
    assert [more["heartbeat_timeout_seconds"] for _, more in calls] == [600, 60, 600]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("coordinator_address should be defined.\nmore"), 2),
        (RuntimeError("DEADLINE_EXCEEDED"), 75),
    ],
    ids=["nothing says where", "too late"],
)
def test_processes_that_find_nobody_say_what_to_give(error, status, monkeypatch):
    """Those that came too late may be there at the next start."""

    def fail(*words, **more):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    message = r"did not find each other \((coordinator_address|DEADLINE).*give --coord"
    with pytest.raises(UserError, match=message) as found:
        distributed.start(ProcessConfig(distributed=True))
    assert found.value.status == status
