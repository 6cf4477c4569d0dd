"""Commands as processes: started with flags, waited for, judged by status."""

import atexit
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}


def start(command, *flags, **environment):
    """Start a command on one CPU device; ``environment`` adds variables. :func:`call` is quicker."""
    return subprocess.Popen(
        [sys.executable, command, *map(str, flags)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, status=0):
    """What a command wrote to stdout and stderr, after asserting its exit status."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out, err


_GLOO = re.compile(
    r"\[Gloo\] ?|Rank \d* ?|is connected to \d* ?|peer ranks\. ?|"
    r"Expected number of connected peer ranks is : ?\d*"
)


def without_gloo(out):
    """Lines that a process printed, without the pieces in which Gloo's threads tell of connections."""
    lines = [(line, _GLOO.sub("", line)) for line in out.splitlines()]
    return [rest for line, rest in lines if rest.strip("0123456789 ") or line == rest != ""]


def call(command, *flags, status=0, **environment):
    """What a script, or ``-m`` and a module, wrote to stdout and stderr, after asserting its exit status.

    It is a process of its own on one CPU device, but a fork of one that has imported what takes seconds to
    import. ``environment`` adds variables, which come too late for JAX.
    """
    words = [str(command), *map(str, flags)]
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("out", "err")]
        server = _server()
        print(json.dumps([words, files, environment]), file=server.stdin, flush=True)
        found = int(server.stdout.readline())
        out, err = (Path(file).read_text(encoding="utf-8") for file in files)
    assert found == status, f"{words}: status {found}\n{out}\n{err}"
    return out, err


def refusals(calls):
    """What several calls of commands print that all end with status 2 and one line; returns the lines."""
    lines = []
    for words in calls:
        out, err = call(*words, status=2)
        assert not out and len(err.strip().splitlines()) == 1, (words, out, err)
        lines.append(err.strip())
    return lines


@functools.cache
def _server():
    """The process that :func:`call` has forks of; it ends with this one."""
    server = subprocess.Popen(
        [sys.executable, "-c", _FORKS],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)
    return server


_FORKS = """
import json, os, runpy, sys, tempfile, warnings
import grain, jax, orbax.checkpoint
import gaze_jax.commands.main, gaze_jax.convert.run, gaze_jax.viewer.html
import gaze_jax.evaluate.run, gaze_jax.infer.requests, gaze_jax.train.loop


def run(words, files, environment):
    for number, path in enumerate((os.devnull, *files)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), number)
    os.environ.update(environment)
    tempfile.tempdir = None
    if any(word.startswith("--compilation_cache=") for word in words):
        # JAX keeps no program that took less than a second: on a fast machine none of a toy.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


for line in sys.stdin:
    with warnings.catch_warnings():  # JAX has threads, which a fork has not
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        status = run(*json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
