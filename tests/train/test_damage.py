"""What is lost of a checkpoint, by a disk or by who copied it, is named, and no other is read instead."""

import gc
import shutil
import time

import pytest

from gaze_jax.errors import UserError
from gaze_jax.parallel.mesh import make_mesh
from gaze_jax.train import checkpoint, loop
from tests.helpers.disks import full_after
from tests.helpers.experiments import data_of, reused_programs, save_untrained, tiny_experiment
from tests.train.test_loop import content, during_step

pytestmark = [
    pytest.mark.standard_promotion,
    pytest.mark.xdist_group("train"),
    # When one array cannot be read, Orbax closes its event loop on the reads of the others.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    path.unlink()


def flip(path):
    values = bytearray(path.read_bytes())
    if values:
        values[len(values) // 2] ^= 1
    path.write_bytes(values)


DAMAGES = (cut, remove, flip)


@pytest.fixture(autouse=True)
def _no_leftovers():
    """Orbax leaves coroutines and callbacks of what it refused: they end here, not in a later test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two checkpoints: that of step 1 is the newest."""
    workdir = tmp_path_factory.mktemp("run")
    save_untrained(tiny_experiment(), workdir)
    shutil.copytree(workdir / "checkpoints" / "0", workdir / "checkpoints" / "1")
    return workdir


def restore(workdir):
    experiment = tiny_experiment()
    with checkpoint.open_manager(workdir, 2) as manager:
        return checkpoint.restore(
            manager, experiment, make_mesh(experiment.mesh), data_of(experiment).fingerprint
        )


def refusal(run, workdir, file, damage):
    """What is said of a damaged file; None if all arrays are there nevertheless, bit for bit."""
    shutil.copytree(run / "checkpoints", workdir / "checkpoints")
    newest = workdir / "checkpoints" / "1"
    damage(newest / file)
    try:
        found = restore(workdir)
    except UserError as error:
        message = str(error)
        assert message.startswith(f"Checkpoint {newest} ") and "\n" not in message and len(message) < 600
        assert "move it away to continue from the one before it." in message
        shutil.rmtree(newest)  # as the sentence says
        assert restore(workdir) is not None
        return message
    assert found is not None
    return None


def of(run, pattern):
    """The largest file of the newest checkpoint that matches."""
    base = run / "checkpoints" / "1"
    return max(base.glob(pattern), key=lambda path: path.stat().st_size).relative_to(base)


@pytest.mark.parametrize("damage", [cut, pytest.param(remove, marks=pytest.mark.long), flip])
@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("meta/metadata", r"(meta: "),
        ("params/ocdbt*/d/*", None),
        ("train/manifest.ocdbt", "(train: array opt_state/"),
    ],
)
def test_what_is_damaged_is_named_and_no_older_checkpoint_is_read(pattern, named, damage, run, tmp_path):
    message = refusal(run, tmp_path, of(run, pattern), damage)
    assert message is not None
    if named is not None:
        assert f"cannot be read {named}" in message
    elif damage is flip:
        assert "is damaged: " in message and " is not what was saved;" in message
    else:
        assert "cannot be read (params: array " in message


@pytest.mark.long
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_is_read_whole_or_refused(damage, run, tmp_path):
    base = run / "checkpoints" / "1"
    files = sorted(path.relative_to(base) for path in base.rglob("*") if path.is_file())
    refused = [
        file for number, file in enumerate(files) if refusal(run, tmp_path / str(number), file, damage)
    ]
    # The others are copies and notes of Orbax; what they say is in meta too.
    assert {file.parts[0] for file in refused} == {"meta", "params", "train"}


def test_what_was_not_written_to_its_end_is_removed_with_a_word(run, tmp_path, capsys):
    """And the checkpoint before it, which is whole, is the newest."""
    workdir = shutil.copytree(run, tmp_path / "run")
    unfinished = workdir / "checkpoints" / f"2{checkpoint.UNFINISHED}"
    shutil.copytree(workdir / "checkpoints" / "1", unfinished)
    shutil.rmtree(unfinished / "params")
    assert restore(workdir) is not None
    assert checkpoint.remove_unfinished(workdir) == [unfinished.name]
    assert not unfinished.exists() and (workdir / "checkpoints" / "1").is_dir()
    assert checkpoint.remove_unfinished(tmp_path / "none") == []


def test_a_full_disk_costs_no_checkpoint_and_the_run_ends_in_the_same_bits(tmp_path, monkeypatch):
    whole, full = tmp_path / "whole", tmp_path / "full"
    experiment = tiny_experiment(checkpoint_every=2)
    with reused_programs():
        assert loop.train(experiment, whole)
        with monkeypatch.context() as patch, pytest.raises(UserError) as error:
            limit = full_after(8000)

            def fill(state):
                while not (full / "checkpoints" / "2").exists():  # the first is written in the background
                    time.sleep(0.01)
                limit.__enter__()
                return state

            during_step(patch, 4, fill)
            try:
                loop.train(experiment, full)
            finally:
                limit.__exit__(None, None, None)
        assert str(error.value) == (
            f"{full} cannot be written (File too large); free space and run the same command to go on from "
            "its newest checkpoint."
        )
        with checkpoint.open_manager(full) as manager:
            assert manager.all_steps() == [2]
        assert loop.train(experiment, full)
    assert content(full) == content(whole)
