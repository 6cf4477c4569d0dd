"""gaze-jax: its subcommands, the names of shipped configs, and a reader that leaves."""

import subprocess
import sys
import tomllib

import pytest

from gaze_jax import __version__
from gaze_jax.commands import cli, main, train
from gaze_jax.errors import UserError
from gaze_jax.train.config import parse
from tests.helpers.commands import ROOT, finish, start

PROGRAM = "/usr/bin/gaze-jax"


def called(monkeypatch, capsys, *words):
    """Status, stdout and stderr of ``gaze-jax WORDS`` in this process."""
    monkeypatch.setattr(sys, "argv", [PROGRAM, *words])
    status = 0
    try:
        main.run()
    except SystemExit as end:
        status = end.code or 0
    return status, *capsys.readouterr()


def test_help_lists_every_command(monkeypatch, capsys):
    status, out, err = called(monkeypatch, capsys, "--help")
    assert status == 0 and not err
    for name, text in main.COMMANDS.items():
        assert f"  {name}" in out and text in out
    assert called(monkeypatch, capsys, "-h") == (0, out, "")
    assert called(monkeypatch, capsys) == (2, out, "")
    assert called(monkeypatch, capsys, "--version") == (0, f"gaze-jax {__version__}\n", "")


@pytest.mark.parametrize(
    ("word", "hint"), [("trian", "did you mean 'train'?"), ("xyz", "give one of train, eval, generate")]
)
def test_another_command_is_refused(monkeypatch, capsys, word, hint):
    status, out, err = called(monkeypatch, capsys, word, "--help")
    assert status == 2 and not out
    assert err.startswith(f"gaze-jax: {word!r} is no command; ") and hint in err


@pytest.mark.parametrize("name", main.COMMANDS)
def test_a_command_gets_the_rest_of_the_line_and_names_itself(monkeypatch, capsys, name):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    status, out, err = called(monkeypatch, capsys, name, "--no_such_flag=1")
    assert (status, out) == (2, "")
    assert err == f"gaze-jax {name}: Unknown command line flag 'no_such_flag'\n"


def test_the_recorded_command_line_can_be_run_again(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", [f"{PROGRAM} eval", "--workdir=a b"])
    assert cli.command_line() == "gaze-jax eval '--workdir=a b'"
    monkeypatch.setattr(sys, "argv", ["eval.py", "--workdir=a"])
    assert cli.command_line() == "python eval.py --workdir=a"


@pytest.mark.parametrize("module", ["gaze_jax", "gaze_jax.commands"])
def test_the_module_is_the_command_too(module):
    _, err = finish(start("-m", module, "train", "--no_such_flag"), status=2)
    assert err == f"python -m {module} train: Unknown command line flag 'no_such_flag'\n"


def test_the_script_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"gaze-jax": "gaze_jax.commands.main:run"}


@pytest.mark.filterwarnings("ignore:the load_module")
@pytest.mark.parametrize("name", ["cambrian_align", "cambrian_image", "cambrian_video"])
def test_a_stage_has_the_model_of_its_argument(name):
    """It needs a corpus and a checkpoint, and then is an experiment on the published model."""
    for size, width in (("4b", 2560), ("7b", 3584)):
        words = [f"--config={name}:{size}", "--config.init_from=x", "--config.data.path=y"]
        values, _ = cli.parse(train.define_flags, "", ["train", *words])
        experiment = parse(train.config_of(values))
        assert experiment.model.decoder.width == width and experiment.model.gaze.context_tokens == 4
        images, regions = experiment.data.row.images, experiment.data.row.regions
        assert regions == images * experiment.model.layout.regions
    values, _ = cli.parse(train.define_flags, "", ["train", f"--config={name}", "--config.data.path=y"])
    with pytest.raises(UserError, match="Training on a corpus needs init_from"):
        parse(train.config_of(values))


def test_shipped_configs_are_those_of_the_checkout():
    files = {file.stem for file in (ROOT / "configs").glob("*.py")} - {"__init__"}
    assert set(cli.shipped_configs()) == files


@pytest.mark.filterwarnings("ignore:the load_module")  # by which ml_collections reads a config file
@pytest.mark.parametrize(
    "words", [["--config=digits"], ["--config", "digits"], ["--config=configs/digits.py"]]
)
def test_a_config_is_a_name_or_a_path(words):
    values, _ = cli.parse(train.define_flags, "", ["train", *words, "--config.steps=7"])
    config = train.config_of(values)
    assert (config.steps, config.batch_size) == (7, 32)


@pytest.mark.filterwarnings("ignore:the load_module")
def test_a_name_that_is_no_config_is_refused_with_the_names():
    values, _ = cli.parse(train.define_flags, "", ["train", "--config=digit"])
    with pytest.raises(
        UserError,
        match=r"digit cannot be loaded.*shipped config \(cambrian_align, .*digits_24, finetune, gazify\)",
    ):
        train.config_of(values)


def test_a_file_in_the_way_of_a_name_needs_its_suffix(tmp_path, monkeypatch):
    """A shipped name is the shipped config, whatever lies in the folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text("")
    (found,) = cli.with_config_path(["--config=digits"])
    assert found.endswith("/configs/digits.py")
    assert cli.with_config_path(["--config=./digits", "--config.data=digits"]) == [
        "--config=./digits",
        "--config.data=digits",
    ]


@pytest.mark.parametrize("name", ["train", "generate"])
def test_a_reader_that_leaves_is_no_error(name):
    """``gaze-jax train --help | head -0``: status 1, and nothing on stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gaze_jax", name, "--help"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert err == ""
    process.stderr.close()
