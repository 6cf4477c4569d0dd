"""What a command says of errors that nobody expected, of a user's config file, and of compiling."""

import errno
import io
import logging
import re
import sys
import types
from pathlib import Path

import jax
import pytest
from absl import logging as absl_logging

from gaze_jax.commands import cli, quiet
from gaze_jax.errors import UserError
from gaze_jax.infer import compile_cache
from tests.helpers.commands import call, refusals


def raised(error, cause=None):
    try:
        raise error from cause
    except Exception as caught:
        return caught


def test_an_unexpected_error_is_a_sentence_and_a_file_with_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, message = cli._unexpected(raised(ValueError("first line\nsecond line")))
    assert status == 1 and "\n" not in message
    file = Path(re.search(r"with (\S+), which", message)[1])
    assert "ValueError: first line" in message and "Traceback" in file.read_text()


@pytest.mark.parametrize(
    ("error", "cause", "match"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.bin"), None, "a file 'a.bin' cannot be written"),
        (OSError(errno.EROFS, "Read-only file system"), None, "a file cannot be written"),
        (ValueError("saving failed"), OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (
            ValueError("RESOURCE_EXHAUSTED: No space left on device [source locations='...']"),
            None,
            "No space",
        ),
    ],
)
def test_a_full_or_read_only_disk_is_the_users_to_mend(error, cause, match):
    status, message = cli._unexpected(raised(error, cause))
    assert status == 2 and match in message and "\n" not in message


def test_logs_of_a_full_disk_are_left_out(monkeypatch, capsys):
    """Of threads and callbacks too; other errors are there."""
    raised_unseen = []
    monkeypatch.setattr(quiet, "_filter", None)
    monkeypatch.setattr(sys, "unraisablehook", raised_unseen.append)
    handler = absl_logging.get_absl_handler()
    quiet.leave_out_full_disks()
    found = quiet._filter
    try:
        full = raised(ValueError("RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']"))
        closed, other = raised(RuntimeError("Event loop is closed")), raised(RuntimeError("a bug"))
        for error, shown in ((full, False), (closed, False), (other, True)):
            record = logging.LogRecord("absl", logging.ERROR, "a.py", 1, "it failed", (), None)
            assert handler.filter(record)
            record.exc_info = (type(error), error, error.__traceback__)
            assert bool(handler.filter(record)) == shown
            sys.unraisablehook(types.SimpleNamespace(exc_value=error))
            assert len(raised_unseen) == shown
    finally:
        handler.removeFilter(found)


@pytest.mark.parametrize(
    ("code", "match"),
    [
        ("def get_config():\n    return undefined\n", "line 2: NameError"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError"),
        ("def get_config(:\n", "line 1"),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n    ConfigDict().lock().a = 1\n",
            "line 3",
        ),
    ],
)
def test_an_error_in_a_users_config_file_names_its_line(code, match, tmp_path):
    (tmp_path / "own.py").write_text(code)
    (line,) = refusals([("train.py", f"--config={tmp_path / 'own.py'}", f"--workdir={tmp_path / 'run'}")])
    assert match in line and "own.py" in line


def test_a_long_compilation_is_announced(monkeypatch):
    """After two seconds, and with its time; a short one is not."""
    monkeypatch.setattr(compile_cache, "_PATIENCE", 0.05)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    reporter = compile_cache._Reporter()
    reporter.listen(compile_cache._TRACED, 0.0)
    timer = reporter._timer
    timer.join()
    reporter.listen(compile_cache._COMPILED, 0.0)
    assert sys.stderr.getvalue() == "compiling (once per size) ...\ncompiled in 0 s\n"
    reporter.listen(compile_cache._TRACED, 0.0)
    reporter.listen(compile_cache._COMPILED, 0.0)
    assert sys.stderr.getvalue().count("compiling") == 1


@pytest.fixture
def _folder_of_programs():
    """The folder that JAX is configured with, which `gaze_jax.load` in another test may have set."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("_folder_of_programs")
def test_programs_are_kept_where_the_user_says(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    compile_cache.keep_programs()
    assert jax.config.jax_compilation_cache_dir == "/cache/gaze_jax"
    compile_cache.keep_programs("/here")
    assert jax.config.jax_compilation_cache_dir == "/here"
    compile_cache.keep_programs()
    assert jax.config.jax_compilation_cache_dir == "/here"


@pytest.mark.parametrize(
    ("error", "status", "match"),
    [
        ("KeyboardInterrupt()", cli.STOPPED, "stopped."),
        ("KeyError('x')", 1, "unexpected error (KeyError: 'x')"),
    ],
)
def test_a_command_that_is_interrupted_or_fails_prints_no_traceback(error, status, match, tmp_path):
    code = f"""
from gaze_jax.commands import cli
def main(values):
    raise {error}
cli.run(main, lambda flags: None, "A command.")
"""
    (tmp_path / "command.py").write_text(code)
    _, err = call(tmp_path / "command.py", status=status, TMPDIR=str(tmp_path))
    assert match in err and "Traceback" not in err


def test_without_a_place_for_the_traceback_it_is_printed(monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    status, message = cli._unexpected(raised(ValueError("x")))
    assert status == 1 and "ValueError: x" in message


def test_a_read_only_target_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match="is read-only"):
        cli.check_writable("answers", str(tmp_path / "a.jsonl"))
