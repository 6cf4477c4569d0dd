"""A pytest plugin: with GAZE_FORBID_SKIPS=1 a test that is skipped for an unexpected reason fails the run.

Otherwise a package that is missing would take its tests away without a word. tests/skips.txt has the reasons
that are expected, one a line; ``*`` stands for anything, ``#`` starts a comment.
"""

import collections
import fnmatch
import os
import pathlib

import pytest

ALLOWED = pathlib.Path(__file__).parents[1] / "skips.txt"


def read_allowed(path):
    """The patterns of a file."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def reason_of(report):
    """Why a test or a module was skipped, or None: it was not, or failed as it was expected to."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return None
    return report.longrepr[2].removeprefix("Skipped: ")


class ForbiddenSkips:
    """Collects the skips that are not allowed, and fails the run at its end if there are any."""

    def __init__(self, allowed):
        self.allowed = allowed
        self.skipped = collections.defaultdict(list)

    def _note(self, report):
        reason = reason_of(report)
        if reason is not None and not any(fnmatch.fnmatchcase(reason, pattern) for pattern in self.allowed):
            self.skipped[reason].append(report.nodeid)

    def pytest_runtest_logreport(self, report):
        self._note(report)

    def pytest_collectreport(self, report):
        self._note(report)

    def pytest_sessionfinish(self, session):
        # An interruption or an error of pytest's own keeps its status.
        if self.skipped and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if not self.skipped:
            return
        terminalreporter.section("skips that tests/skips.txt does not allow", red=True, bold=True)
        for reason, tests in sorted(self.skipped.items()):
            others = f" and {len(tests) - 1} more" if len(tests) > 1 else ""
            terminalreporter.line(f"{reason}: {tests[0]}{others}")


def pytest_configure(config):
    """Watch where reports arrive: under pytest-xdist in the process that started the workers."""
    if os.environ.get("GAZE_FORBID_SKIPS") == "1" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ForbiddenSkips(read_allowed(ALLOWED)), "forbidden_skips")
