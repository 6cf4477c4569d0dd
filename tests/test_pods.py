"""What launches runs on pods: a supervisor, tried with commands that end as runs do, and files to edit."""

import os
import re
import signal
import subprocess
import time

import pytest
import yaml

from gaze_jax.errors import AGAIN, NotFiniteError, UserError
from tests.helpers.shell import ROOT, commands, complaint_of, syntax_error

PODS = ROOT / "scripts" / "pods"


def again(folder, script, **environment):
    """Start again.sh with a bash script as its command; how often it ran is in ``folder / "runs"``."""
    text = f'echo run >> "{folder}/runs"; count=$(wc -l < "{folder}/runs"); {script}'
    return subprocess.Popen(
        [PODS / "again.sh", "bash", "-c", text],
        env=os.environ | {"WAIT": "0"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def runs(folder):
    path = folder / "runs"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("status", [75, 134, 137, 143])
def test_a_run_that_goes_on_is_started_again(status, tmp_path):
    process = again(tmp_path, f"((count < 3)) && exit {status}; exit 0")
    _, err = process.communicate(timeout=30)
    assert (process.returncode, runs(tmp_path)) == (0, 3)
    assert f"start 2 of 100 ended with status {status}" in err


@pytest.mark.parametrize("status", [0, 1, 2, 3, 4, 130])
def test_a_run_that_needs_somebody_is_not(status, tmp_path):
    note = tmp_path / "note"
    process = again(tmp_path, f"exit {status}", NOTE=str(note))
    process.communicate(timeout=30)
    assert (process.returncode, runs(tmp_path)) == (status, 1)
    assert (note.read_text() == f"{status}\n") if status else not note.exists()


def test_tries_have_an_end(tmp_path):
    process = again(tmp_path, "exit 75", TRIES="2", NOTE=str(tmp_path / "note"))
    process.communicate(timeout=30)
    assert (process.returncode, runs(tmp_path)) == (75, 2)
    assert not (tmp_path / "note").exists()


@pytest.mark.parametrize("status", [75, 0])
def test_sigterm_reaches_the_run_which_is_not_started_again(status, tmp_path):
    process = again(tmp_path, f'trap "sleep 0.2; exit {status}" TERM; while :; do sleep 0.05; done')
    while not runs(tmp_path):
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert (process.returncode, runs(tmp_path)) == (status, 1)


def test_sigterm_between_two_starts_ends_it(tmp_path):
    process = again(tmp_path, "exit 75", WAIT="60")
    while not runs(tmp_path):
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert (process.returncode, runs(tmp_path)) == (75, 1)


# -- Files that a user edits -------------------------------------------------------------------------------

SCRIPTS = sorted([*PODS.glob("*.sh"), *PODS.glob("*.sbatch")])
PAGE = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
NEEDS_YOU = {1, NotFiniteError.status, UserError.status, 3}
"""Statuses after which no launcher may start a run again."""


def file_name(path):
    return path.name


def ours(text):
    """Words of the commands of this project in a script, whatever starts them."""
    for command in commands(text):
        words = [word.removeprefix("/shared/gaze_jax/") for word in command.words]
        at = next((n for n, word in enumerate(words) if word == "gaze-jax"), None)
        if at is not None:
            yield words[at:]


@pytest.mark.filterwarnings("ignore:the load_module")  # by which ml_collections reads a config file
@pytest.mark.parametrize("path", SCRIPTS, ids=file_name)
def test_scripts_are_right_as_far_as_they_are_ours(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n") and syntax_error(text) is None
    assert os.access(path, os.X_OK) == (path.suffix == ".sh")
    for words in ours(text):
        assert complaint_of(words, complete=True) is None, words
    for called in re.findall(r"scripts/pods/[\w.]+", text):
        assert (ROOT / called).is_file(), called


def test_every_launcher_starts_a_run():
    starting = {path.name for path in SCRIPTS if "gaze-jax" in (t := path.read_text()) and [*ours(t)]}
    assert starting == {"run.sh", "slurm.sbatch"}
    for name in ("tpu_vm.sh", "gke_xpk.sh", "gke_jobset.yaml"):
        assert "/shared/gaze_jax/scripts/pods/run.sh" in (PODS / name).read_text(encoding="utf-8")


def test_words_to_edit_are_explained_and_no_others():
    used = {word for path in PODS.iterdir() for word in re.findall(r"\bMY_[A-Z]+\b", path.read_text())}
    (table,) = re.findall(r"\| Word in the files \| Is \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE)
    explained = re.findall(r"`(MY_[A-Z]+)`", "".join(line.split("|")[1] for line in table.splitlines()))
    assert len(set(explained)) == len(explained) and set(explained) == used
    assert set(re.findall(r"\bMY_[A-Z]+\b", PAGE)) == used


def flags_of(name, flag):
    (value,) = re.findall(rf"--config\.{flag}=(\d+)", (PODS / name).read_text(encoding="utf-8"))
    return int(value)


def test_the_jobset_has_what_it_needs_and_stops_where_a_restart_is_in_vain():
    jobset = yaml.safe_load((PODS / "gke_jobset.yaml").read_text(encoding="utf-8"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "MY_RUN"
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "In"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert set(rule["onExitCodes"]["values"]) == NEEDS_YOU and AGAIN not in NEEDS_YOU
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert job["parallelism"] == job["completions"]
    chips = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert chips == flags_of("run.sh", r"mesh\.data") * flags_of("run.sh", r"mesh\.fsdp") == 16 * 16
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
    assert flags_of("run.sh", "batch_size") % chips == 0
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert volume["name"] == mount["name"] and mount["mountPath"] == "/shared"


def test_the_other_launchers_stop_there_too():
    again_text = (PODS / "again.sh").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^ *([\d |]+)\)$", again_text, re.MULTILINE)
    assert set(map(int, listed.split("|"))) == NEEDS_YOU | {130}
    xpk = (PODS / "gke_xpk.sh").read_text(encoding="utf-8")
    assert f"--restart-on-exit-codes={AGAIN} " in xpk and "--max-restarts=" in xpk
    slurm = (PODS / "slurm.sbatch").read_text(encoding="utf-8")
    sizes = {
        name: int(value) for name, value in re.findall(r"#SBATCH --([\w-]+)=(\d+)$", slurm, re.MULTILINE)
    }
    assert sizes["ntasks-per-node"] == sizes["gpus-per-node"], "a process for each GPU"
    gpus = sizes["nodes"] * sizes["gpus-per-node"]
    assert gpus == flags_of("slurm.sbatch", r"mesh\.data") * flags_of("slurm.sbatch", r"mesh\.fsdp")
    assert flags_of("slurm.sbatch", "batch_size") % gpus == 0
