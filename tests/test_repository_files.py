"""Settings for services and tools around the checkout: they parse, and the commands in them exist."""

import re

import pytest
import yaml

from tests.helpers.pages import Code, shell_complaints
from tests.helpers.shell import ROOT

FOLDER = ROOT / ".github"
WORKFLOWS = sorted((FOLDER / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((FOLDER / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
INPUTS = {"checkboxes", "dropdown", "input", "markdown", "textarea"}
"""Kinds of parts that GitHub's forms may have."""


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def name(path):
    return path.name


@pytest.mark.parametrize("path", WORKFLOWS, ids=name)
def test_commands_of_a_workflow_exist(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    wrong = [found for step in steps for found in shell_complaints(Code(0, "sh", step.get("run", "")))]
    assert not wrong, "\n".join(wrong)
    assert any("run" in step for step in steps)
    for step in steps:
        assert ("run" in step) != ("uses" in step)
        assert re.fullmatch(r"actions/[\w-]+@(v\d+|[0-9a-f]{40})", step.get("uses", "actions/x@v1"))


def test_the_workflow_runs_every_check_on_the_oldest_and_the_newest_python():
    jobs = read(FOLDER / "workflows" / "ci.yml")["jobs"].values()
    setups = [step["with"]["python-version"] for job in jobs for step in job["steps"] if "with" in step]
    runs = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert setups == ["3.11", "3.13"]
    assert runs == [".ci/run", ".ci/run --python=3.13"]


@pytest.mark.parametrize("path", FORMS, ids=name)
def test_a_form_has_what_github_asks_for(path):
    form = read(path)
    assert form["name"] and form["description"] and form["body"]
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in form["body"]} <= INPUTS
    assert len({part["id"] for part in asked}) == len(asked) and all(p["attributes"]["label"] for p in asked)
    assert any(part.get("validations", {}).get("required") for part in asked)


def test_security_reports_are_sent_elsewhere():
    config = read(FOLDER / "ISSUE_TEMPLATE" / "config.yml")
    assert config["blank_issues_enabled"] is False
    (link,) = config["contact_links"]
    assert link["url"].startswith("https://") and "SECURITY.md" in link["about"]
    assert (ROOT / "SECURITY.md").is_file()


def test_hooks_run_from_the_environment():
    """The versions are those of constraints.txt, as no hook brings its own."""
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = repository["hooks"]
    assert repository["repo"] == "local" and all(hook["language"] == "system" for hook in hooks)
    assert [" ".join(hook["entry"].split()[:4]) for hook in hooks] == [
        "python -m ruff check",
        "python -m ruff format",
        "python -m mypy",
    ]
    wrong = [found for hook in hooks for found in shell_complaints(Code(0, "sh", hook["entry"]))]
    assert not wrong, "\n".join(wrong)
