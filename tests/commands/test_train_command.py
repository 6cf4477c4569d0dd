"""train.py and what asks its runs, as processes: exit statuses, and what is left when one is killed."""

import functools
import json
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from gaze_jax.commands import train
from gaze_jax.errors import NotFiniteError, UserError
from gaze_jax.train import checkpoint
from tests.helpers import commands
from tests.helpers.commands import finish, refusals
from tests.helpers.experiments import save_untrained, tiny_experiment

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("commands")]

CONFIG = "--config=tests/helpers/tiny_config.py"
ONE_DEVICE = "--config.mesh.fsdp=1"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a command with flags; all that it starts share one cache of compiled programs."""
    return functools.partial(
        commands.start,
        JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.mktemp("cache")),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )


def last_row(workdir):
    path = workdir / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    return json.loads(rows[-1])["step"] if rows else 0


@pytest.mark.long  # tests/train/test_loop.py has the signal and the bits
def test_sigterm_saves_and_ends_well(start, tmp_path):
    process = start("train.py", CONFIG, ONE_DEVICE, "--config.steps=100000", f"--workdir={tmp_path}")
    while last_row(tmp_path) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.terminate()
    out, _ = finish(process, status=75)
    assert "Stopped by SIGTERM after step" in out
    with checkpoint.open_manager(tmp_path) as manager:
        assert manager.latest_step() >= 4
    assert not (tmp_path / "eval.json").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    with jax.numpy_dtype_promotion("standard"):
        save_untrained(tiny_experiment(), workdir)
    return workdir


@pytest.mark.long  # scripts/wheel.sh asks a run, test_generate_command.py checkpoints
def test_generate_answers_and_draws(start, run, tmp_path):
    image = np.random.default_rng(0).integers(256, size=(20, 20, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    flags = [f"--checkpoint={run}", f"--image={tmp_path / 'image.png'}", "--question=Where is the only 7?"]
    picture = tmp_path / "answer.png"
    out, err = finish(start("generate.py", *flags, f"--out={picture}", "--layer=1", "--max_tokens=3"))
    assert out.endswith("\n")
    assert not err
    with Image.open(picture) as sheet:
        assert sheet.format == "PNG"


def test_mistakes_end_in_one_sentence_that_says_how_to_mend_them(run, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "wide.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "fits.png")
    (tmp_path / "text.png").write_text("not a picture")
    ask = ["generate.py", f"--checkpoint={run}", "--question=Where is the only 7?"]
    train = ["train.py", CONFIG, ONE_DEVICE, f"--workdir={tmp_path / 'new'}"]
    cases = {
        "'topk' does not exist, did you mean 'top_k'": [*train, "--config.model.gaze.topk=2"],
        "gaze.top_k=0 must be at least 1 region": [*train, "--config.model.gaze.top_k=0"],
        "is larger than the tower's 4x4 token grid": [*train, "--config.model.gaze.region=(9, 9)"],
        "--config.steps=many": [*train, "--config.steps=many"],
        "--config=nowhere.py cannot be loaded": ["train.py", "--config=nowhere.py", *train[2:]],
        "--config=absent.py cannot be loaded": ["train.py", "--config=absent.py", train[-1]],
        "Give --config, a file or the name of a shipped config": ["train.py", train[-1]],
        "Give --workdir, the folder": train[:2],
        "is of another config: seed was 3 and is 4": [
            *["train.py", CONFIG, ONE_DEVICE, f"--workdir={run}", "--config.seed=4"]
        ],
        "is 20x30 pixels but the tower takes 20x20; resize it": [*ask, f"--image={tmp_path / 'wide.png'}"],
        "is none of JPEG, PNG": [*ask, f"--image={tmp_path / 'text.png'}"],
        "is not a file; check the path": [*ask, f"--image={tmp_path / 'none.png'}"],
        "a character has no token": [*ask[:2], f"--image={tmp_path / 'fits.png'}", "--question=Où?"],
        "holds no checkpoint": ["eval.py", f"--workdir={tmp_path}"],
        "unexpected argument 'runs/digits'": ["eval.py", f"--workdir={tmp_path}", "runs/digits"],
    }
    for sentence, line in zip(cases, refusals(cases.values()), strict=True):
        assert sentence in line
    assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore:the load_module")  # by which ml_collections reads a config file
@pytest.mark.parametrize(
    ("ends", "status"),
    [
        (lambda *_: True, 0),
        (lambda *_: False, 75),
        (mock.Mock(side_effect=NotFiniteError("It is NaN.")), 4),
        (mock.Mock(side_effect=UserError("It is wrong.")), 2),
        (mock.Mock(side_effect=KeyError("a bug")), 1),
    ],
    ids=["done", "stopped", "not finite", "user", "bug"],
)
def test_the_status_says_whether_to_start_again(ends, status, tmp_path, monkeypatch, capsys):
    """docs/reliability.md has the table that supervisors follow."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("gaze_jax.train.loop.train", ends)
    monkeypatch.setattr("gaze_jax.evaluate.run.run", lambda workdir, mesh: None)
    monkeypatch.setattr(sys, "argv", ["train.py", CONFIG, f"--workdir={tmp_path / 'run'}"])
    try:
        train.run()
        found = 0
    except SystemExit as end:
        found = end.code or 0
    assert found == status
    assert len(capsys.readouterr().err.splitlines()) == (status in (1, 2, 4))


SMALL_FILES = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.long  # tests/convert/test_checkpoint.py has a conversion
def test_a_full_disk_is_one_sentence(tmp_path):
    """For which Orbax has hundreds of lines; no checkpoint has its final name."""
    flags = [CONFIG, ONE_DEVICE, "--config.steps=6", "--config.checkpoint_every=3", f"--workdir={tmp_path}"]
    _, err = finish(commands.start("-c", SMALL_FILES, "train.py", *flags), status=2)
    assert err == (
        f"train.py: {tmp_path} cannot be written (File too large); free space and run the same command to "
        "go on from its newest checkpoint.\n"
    )
    assert not any(path.name.isdecimal() for path in (tmp_path / "checkpoints").iterdir())
