"""GAZE_FORBID_SKIPS=1 fails a run that skips a test for a reason which tests/skips.txt does not have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TESTS = {
    "test_passes.py": "def test_it(): pass\n",
    "test_allowed.py": """
        import pytest

        @pytest.mark.skip(reason="needs an NVIDIA GPU and JAX_PLATFORMS=cuda")
        def test_marked(): pass

        def test_inside(): pytest.skip("xla has no backward pass")

        @pytest.mark.xfail(strict=True)
        def test_expected_to_fail(): assert False
    """,
    "test_module.py": "import pytest\nabsent = pytest.importorskip('absent_module')\n",
    "test_function.py": "import pytest\ndef test_it(): pytest.importorskip('absent_function')\n",
}


def run(folder, *names, forbid="1", workers=0):
    """Status and output of pytest over some of ``TESTS``, in a project of their own."""
    for name in names:
        lines = TESTS[name].strip("\n").splitlines()
        margin = len(lines[0]) - len(lines[0].lstrip())
        (folder / name).write_text("\n".join(line[margin:] for line in lines))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.helpers.skips", "-p", "no:cacheprovider"]
    command += ["-p", "xdist", "-n", str(workers)] if workers else []
    command += ["-c", os.devnull, f"--rootdir={folder}", str(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "GAZE_FORBID_SKIPS": forbid,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_only_skips_without_an_allowed_reason_fail_the_run(workers, tmp_path):
    """Of a test or a whole module, in this process or in workers; each reason is named, and where it is."""
    status, output = run(tmp_path, "test_passes.py", "test_allowed.py", workers=workers)
    assert (status, "does not allow" in output) == (0, False), output

    status, output = run(tmp_path, "test_module.py", "test_function.py", workers=workers)
    assert status == 1, output
    _, _, listed = output.partition("skips that tests/skips.txt does not allow")
    for missing, file in (("absent_module", "test_module.py"), ("absent_function", "test_function.py")):
        (line,) = (line for line in listed.splitlines() if f"'{missing}': " in line)
        assert f"could not import '{missing}'" in line and file in line
    assert "NVIDIA" not in listed


def test_a_run_of_nothing_but_missing_modules_fails(tmp_path):
    """Then pytest collects no test, which has a status of its own."""
    status, output = run(tmp_path, "test_module.py")
    assert (status, "absent_module" in output) == (1, True), output


def test_skips_pass_where_they_are_not_forbidden(tmp_path):
    """A machine without optional packages can run the other tests."""
    status, output = run(tmp_path, "test_passes.py", "test_module.py", "test_function.py", forbid="")
    assert (status, "does not allow" in output) == (0, False), output
