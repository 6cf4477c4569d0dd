"""Doors as processes: started with flags, waited for, judged by status."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}


def start(door, *flags, **environment):
    """Start a door on one CPU device; ``environment`` adds variables."""
    return subprocess.Popen(
        [sys.executable, door, *map(str, flags)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, status=0):
    """What a door wrote to stdout and stderr, after asserting its exit status."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out, err
