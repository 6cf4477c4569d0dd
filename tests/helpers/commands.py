"""Commands as processes: started with flags, waited for, judged by status."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}


def start(command, *flags, **environment):
    """Start a command on one CPU device; ``environment`` adds variables."""
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


def refusals(calls):
    """What several calls of commands print that all end with status 2 and one line; returns the lines.

    Each call, a command and its flags, is a process, but all are forks of one that has imported what takes
    seconds to import.
    """
    calls = [[str(word) for word in call] for call in calls]
    found, _ = finish(start("-W", "ignore", "-c", _FORKS, json.dumps(calls)))
    lines = []
    for call, (status, out, err) in zip(calls, json.loads(found), strict=True):
        assert status == 2, (call, status, err)
        assert not out and len(err.strip().splitlines()) == 1, (call, out, err)
        lines.append(err.strip())
    return lines


_FORKS = """
import json, os, runpy, sys, tempfile
import grain, orbax.checkpoint
import gaze_jax.evaluate.run, gaze_jax.infer.requests, gaze_jax.train.loop

results = []
for call in json.loads(sys.argv[1]):
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]
    child = os.fork()
    if child == 0:
        for number, file in enumerate(files, start=1):
            os.dup2(file.fileno(), number)
        sys.argv = call
        status = 0
        try:
            runpy.run_path(call[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            status = 1
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read())
    results.append([status, *texts])
print(json.dumps(results))
"""
