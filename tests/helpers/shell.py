"""Shell commands as documentation shows them, parsed as their programs would parse them."""

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from absl import flags as absl_flags

from gaze_jax.commands.flags import Flags

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("train", "eval", "generate", "convert", "view", "data", "topology", "env")

FOREIGN = {"cd", "docker", "export", "git", "mkdir", "mkdocs", "mypy", "pip", "pre-commit", "ruff", "source"}
FOREIGN |= {"gcloud", "kubectl", "sbatch", "scancel", "squeue", "srun", "xpk"}
"""Programs that are not of this project; their flags are not checked."""

FOREIGN_MODULES = {"build", "mypy", "pip", "ruff", "venv"}
"""The same for ``python -m``."""

PYTEST_FLAGS = {"-m", "-k", "-n", "-q", "-v", "-x", "--lf", "--dist", "--durations"}

FORWARDS = {
    "scripts/digits.sh": "gaze-jax train --config=configs/digits.py",
    "scripts/test.sh": "pytest",
    "scripts/tpu_aot.sh": "python -m benchmarks.tpu_aot",
    ".ci/run": "pytest",
}
"""Scripts that pass arguments on, and to what."""

EXPLAINED = ("benchmarks/screenshots.py",)
"""Scripts with argparse whose flags stand alone in sentences."""

_OPERATORS = {"&&", "||", ";", "|", "&", "(", ")", ">", "<", ">>"}


class Unknown(Exception):
    """The command is of nobody that is known here."""


@dataclasses.dataclass(frozen=True)
class Command:
    """The words of a command, and its line in the block, from 1."""

    line: int
    words: list[str]


def syntax_error(text: str) -> str | None:
    """What bash finds wrong with a script, without running it."""
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    return checked.stderr.strip().splitlines()[0] if checked.returncode else None


def commands(text: str) -> Iterator[Command]:
    """The commands of a script; line continuations, comments, pipes and redirections are understood."""
    line = 1
    for written in re.split(r"(?<!\\)\n", text):
        lexer = shlex.shlex(written.replace("\\\n", " "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        redirected = False
        for word in (*lexer, ";"):
            if word in _OPERATORS:
                if words:
                    yield Command(line, words)
                words, redirected = [], word.startswith((">", "<"))
            elif redirected:
                redirected = False  # a file
            elif words or not re.fullmatch(r"\w+=.*", word):  # a variable of the command's environment
                words.append(word)
        line += written.count("\n") + 1


def is_ours(text: str) -> bool:
    """Whether a code span is a command of this project."""
    return bool(re.match(r"(gaze-jax|python|scripts/|\.ci/|pytest)\b.* |scripts/\S+\.sh$", text))


def complaint_of(words: list[str], *, complete: bool) -> str | None:
    """What is wrong with a command, if anything.

    Args:
      words: the program and its arguments.
      complete: required arguments must be there.

    Raises:
      Unknown: the program is not known.
    """
    program, *arguments = words
    program = program.removeprefix("./").removeprefix(".venv/bin/")
    if program == "gaze-jax":
        return _gaze_jax(arguments)
    if program in FORWARDS or program.endswith(".sh"):
        return _script(program, arguments, complete)
    if program == "pytest":
        return _pytest(arguments)
    if program == "python":
        return _python(arguments, complete)
    if program == "pip" and arguments[:1] == ["install"]:
        return _extras(arguments)
    if program in FOREIGN:
        return None
    raise Unknown(f"{program} is no command of this project, and not in FOREIGN of tests/helpers/shell.py")


def _gaze_jax(arguments: list[str]) -> str | None:
    if not arguments:
        return "gaze-jax needs a subcommand"
    name, *rest = arguments
    if name in ("--help", "--version"):
        return None
    if name not in COMMANDS:
        return f"gaze-jax has no {name}; it has {', '.join(COMMANDS)}"
    return _own(name, rest)


def _own(name: str, arguments: list[str]) -> str | None:
    """One of :data:`COMMANDS`."""
    if arguments in (["--help"], ["-h"]):
        return None
    module = importlib.import_module(f"gaze_jax.commands.{name}")
    defined = Flags("", [name, *arguments])
    module.define_flags(defined)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # ml_collections loads config files in an old way
        patch.chdir(ROOT)
        try:
            values, rest = defined.parse()
            if name == "train" and "config" in values and values["config"].present:
                module.config_of(values)
        except (absl_flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            return f"gaze-jax {name}: {' '.join(str(error).split())}"
    takes_more = len(inspect.signature(module.main).parameters) > 1
    return None if takes_more or not rest else f"gaze-jax {name} takes no argument {rest[0]}"


def _python(arguments: list[str], complete: bool) -> str | None:
    if not arguments:
        return "python needs a script"
    first, *rest = arguments
    if first == "-m":
        module, *rest = rest
        if module in FOREIGN_MODULES:
            return None
        if module == "pytest":
            return _pytest(rest)
        if module == "gaze_jax.viewer":
            return _own("view", rest)
        if module == "gaze_jax" or module.startswith("gaze_jax.commands"):
            return _gaze_jax([*module.split(".")[2:], *rest])
        files = [module.replace(".", "/") + end for end in (".py", "/__main__.py")]
        script = next((file for file in files if (ROOT / file).is_file()), None)
        if script is None:
            return f"there is no module {module}"
        return _other(script, rest, complete)
    if not (ROOT / first).is_file():
        return f"there is no script {first}"
    if first.removesuffix(".py") in COMMANDS:
        return _own(first.removesuffix(".py"), rest)
    return _other(first, rest, complete)


class _Found(BaseException):
    """Carries the parser out of a script that is about to parse; not an error that it would handle."""


def _absl_flags(script: str) -> set[str]:
    """Names of the flags that a script defines with absl, read from its source, as running it would work."""
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    defined = [call for call in calls if ast.unparse(call.func).startswith("flags.DEFINE_")]
    return {ast.literal_eval(call.args[0]) for call in defined}


@functools.cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """The argument parser of a script that uses argparse, caught before it parses."""

    def caught(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise _Found(parser)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, name, caught)
        patch.setattr(sys, "argv", [script])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except _Found as found:
            return found.args[0]
    raise AssertionError(f"{script} parses no arguments")


def _other(script: str, arguments: list[str], complete: bool) -> str | None:
    """A script of this project that is no shim."""
    if "parse_args(" in (ROOT / script).read_text(encoding="utf-8"):
        return _argparse(script, arguments, complete)
    given = [match[1] for word in arguments if (match := re.match(r"--(\w+)", word))]
    unknown = sorted({*given} - _absl_flags(script))
    return f"{script} has no flag --{unknown[0]}" if unknown else None


def _argparse(script: str, arguments: list[str], complete: bool) -> str | None:
    parser = parser_of(script)
    output = io.StringIO()
    required = [action for action in parser._actions if action.required]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(output):
        if not complete:
            for action in required:
                patch.setattr(action, "required", False)
                if not action.option_strings and action.nargs is None:
                    patch.setattr(action, "nargs", "?")
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            parser.parse_args(arguments)
    return " ".join(output.getvalue().split()).split("error: ")[-1] if output.getvalue() else None


def _script(script: str, arguments: list[str], complete: bool) -> str | None:
    path = ROOT / script
    if not path.is_file() or not path.stat().st_mode & 0o100:
        return f"{script} is no program"
    text = path.read_text(encoding="utf-8")
    for called in re.findall(r"\bscripts/\w+\.sh", text):
        text += (ROOT / called).read_text(encoding="utf-8")
    arguments = [word for word in arguments if not _named(word, text)]
    if script in FORWARDS:
        if script == "scripts/digits.sh" and arguments and not arguments[0].startswith("-"):
            arguments = arguments[1:]  # the workdir
        if FORWARDS[script] == "pytest":  # scripts/environment.sh takes this one
            arguments = [word for word in arguments if not re.fullmatch(r"--python=3\.\d+", word)]
        return complaint_of([*shlex.split(FORWARDS[script]), *arguments], complete=complete)
    return f"{script} has no {arguments[0]}" if arguments else None


def _named(flag: str, script: str) -> bool:
    """Whether a shell script handles a flag itself: it names it in a pattern of a case."""
    return re.search(rf"^\s*{re.escape(flag.split('=')[0])}\b[^)\n]*\)", script, re.MULTILINE) is not None


def _pytest(arguments: list[str]) -> str | None:
    values = iter(arguments)
    for word in values:
        name = word.split("=")[0]
        if word.startswith("-") and name not in PYTEST_FLAGS:
            return f"pytest: {name} is not in PYTEST_FLAGS of tests/helpers/shell.py"
        if word in ("-m", "-k", "-n", "--dist"):
            next(values, None)
        elif not word.startswith("-") and not (ROOT / word.split("::")[0]).exists():
            return f"pytest: {word} does not exist"
    return None


def _extras(arguments: list[str]) -> str | None:
    """The extras of this project that pip is asked for exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in arguments:
        asked = re.fullmatch(r"(?:\.|gaze-jax)\[([\w,-]+)\]", word)
        for extra in asked[1].split(",") if asked else ():
            if extra not in project["optional-dependencies"]:
                return f"pyproject.toml has no extra {extra}"
    return None


@functools.cache
def every_flag() -> set[str]:
    """Names of the flags of all commands, and of the scripts whose flags the documentation explains."""
    found = {"help", "version"}
    for script in EXPLAINED:
        found |= {name.removeprefix("--") for name in parser_of(script)._option_string_actions}
    for name in COMMANDS:
        defined = Flags("", [name])
        importlib.import_module(f"gaze_jax.commands.{name}").define_flags(defined)
        found |= {n for flag in defined.values for n in (flag, f"no{flag}")}
    return found
