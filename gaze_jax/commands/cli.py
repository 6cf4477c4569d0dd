"""Shared by all commands: parse flags, set the exit status, report what the user can fix in one sentence.

The exit status is 0 for success, 2 for what the user can fix, 3 if some of many questions have no answer, 4
if the numbers of a run went wrong, 75 if the same command goes on with what is saved, 130 after Ctrl-C, and 1
otherwise: the reader of a pipe left, or the program has a bug. docs/reliability.md tells supervisors more.
"""

import contextlib
import importlib.resources
import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from gaze_jax.commands.flags import RENAMED_FIELDS, Flags, Values
from gaze_jax.commands.quiet import leave_out_full_disks
from gaze_jax.errors import UserError
from gaze_jax.parallel.peers import end_without, is_lost, leave
from gaze_jax.writing import full_disk

PARTLY, STOPPED = 3, 130


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every config in the installed package ``gaze_jax.configs``."""
    try:
        folder = importlib.resources.files("gaze_jax.configs")
    except ModuleNotFoundError:  # the sources alone: the checkout's configs/ is that package once installed
        return {}
    files = (Path(str(file)) for file in folder.iterdir())
    return {file.stem: file for file in sorted(files) if file.suffix == ".py" and file.stem != "__init__"}


def with_config_path(argv: Sequence[str]) -> list[str]:
    """A command line in which ``--config=NAME[:ARGUMENT]``, of a shipped config, names the config's file."""
    found = list(argv)
    for number, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "-config"):
            continue
        if not equals:
            number, value = number + 1, argv[number + 1] if number + 1 < len(argv) else ""
        # "cambrian_image:4b" gives get_config the argument "4b".
        name, colon, argument = value.partition(":")
        if re.fullmatch(r"\w+", name) and (file := shipped_configs().get(name)):
            found[number] = f"{flag}={file}{colon}{argument}" if equals else f"{file}{colon}{argument}"
    return found


def unloadable(path: str) -> str:
    """The error message for a config file without a config."""
    names = ", ".join(shipped_configs()) or "none is installed"
    return (
        f"--config={path} cannot be loaded; give a Python file with a get_config() function, or the name of "
        f"a shipped config ({names})."
    )


def _sentence(error: Exception, argv: Sequence[str]) -> str:
    """An error of absl or ml_collections about a flag, or of a user's config file, on one line."""
    configs = [os.path.abspath(arg.split("=", 1)[1]) for arg in argv if arg.startswith("--config=")]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if os.path.abspath(frame.filename) in configs:
            reason = " ".join(str(error).split())
            return f"{frame.filename}, line {frame.lineno}: {type(error).__name__}: {reason}"
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}."
    if isinstance(error, OSError):  # an override needs the config that it changes
        return unloadable(next((arg.split("=", 1)[1] for arg in argv if arg.startswith("--config=")), ""))
    message = " ".join(str(error.args[0] if error.args else error).split())
    if isinstance(error, AttributeError | KeyError):
        overrides = [arg.split("=")[0] for arg in argv if arg.startswith("--config.")]
        for override in overrides:
            section, _, field = override.rpartition(".")
            if field in RENAMED_FIELDS:
                return f"{override} is now {section}.{RENAMED_FIELDS[field]}; use that."
        close = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message)
        hint = f"{close[2]!r} does not exist, did you mean {close[1]!r}?" if close else message
        return f"Unknown config key in {', '.join(overrides)}: {hint}"
    return message


def program() -> str:
    """How the program was started: a file name, ``gaze-jax COMMAND``, or ``python -m MODULE``."""
    name = os.path.basename(sys.argv[0])
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        return name
    # Of a package with several commands the command is behind the file's name: see main.run.
    _, space, command = name.partition(" ")
    return f"python -m {spec.name.removesuffix('.__main__')}{space}{command}"


def command_line() -> str:
    """The running command, quoted for a shell."""
    name = program()
    return f"{f'python {name}' if name.endswith('.py') else name} {shlex.join(sys.argv[1:])}"


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """Context for writing to stdout; if its reader is gone (``| head``), the program ends with status 1."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the last flush would fail again
        leave(1)


def parse(define: Callable[[Flags], None], doc: str, argv: Sequence[str]) -> tuple[Values, list[str]]:
    """Values of a command's flags, and the other arguments; an error exits with status 2 and a message.

    Args:
      define: defines the flags.
      doc: what the command does, for its help.
      argv: the command line, the program first.
    """
    defined = Flags(doc, argv)
    define(defined)
    try:
        with quiet_pipe():  # for --help
            return defined.parse()
    except Exception as error:  # a user's config file can raise anything
        print(f"{program()}: {_sentence(error, argv)}", file=sys.stderr)
        sys.exit(2)


def run(
    main: Callable[..., None], define: Callable[[Flags], None], doc: str | None, *, arguments: bool = False
) -> None:
    """Parse the flags and call ``main`` with their values.

    A :class:`UserError` ends the program with its status and its message. The traceback of any other
    exception goes to a file, which the message names.

    Args:
      main: takes the values and, with ``arguments``, the list of arguments that are not flags.
      define: defines the flags.
      doc: what the command does, for ``--help``.
      arguments: whether arguments that are not flags are allowed.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character shows its escape
            stream.reconfigure(errors="backslashreplace")

    def guarded(parsed: tuple[Values, list[str]]) -> None:
        values, rest = parsed
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax logs every step of every save
            leave_out_full_disks()
        if rest and not arguments:
            print(f"{program()}: unexpected argument {rest[0]!r}; every option is a --flag.", file=sys.stderr)
            sys.exit(2)
        try:
            with quiet_pipe():
                main(values, *([rest] if arguments else []))
        except UserError as error:
            print(f"{program()}: {error}", file=sys.stderr)
            leave(error.status)
        except KeyboardInterrupt:
            print(f"\n{program()}: stopped.", file=sys.stderr)
            leave(STOPPED)
        except Exception as error:
            if is_lost(error):
                end_without(error)
            status, message = _unexpected(error)
            print(f"{program()}: {message}", file=sys.stderr)
            leave(status)

    # absl passes on what its parser returns.
    parser: Any = lambda argv: parse(define, doc or "", argv)  # noqa: E731
    app.run(guarded, flags_parser=parser)


def _unexpected(error: Exception) -> tuple[int, str]:
    """Exit status and message for an exception that nobody expected; its traceback goes to a file."""
    if full := full_disk(error):
        where = f" {error.filename!r}" if isinstance(error, OSError) and error.filename else ""
        return 2, f"a file{where} cannot be written ({full})."
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="gaze-jax-", suffix=".log", delete=False) as file:
            file.write(f"{command_line()}\n{text}")
    except OSError:
        return 1, f"unexpected error; please report it.\n{text}"
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return 1, (
        f"unexpected error ({type(error).__name__}{': ' * bool(reason)}{reason}); please report it with "
        f"{file.name}, which has the traceback."
    )


def exit_partly(failures: int) -> None:
    """End with status 3 if some of many questions have no answer."""
    if failures:
        sys.exit(PARTLY)


def refuse_flags(values: Values, names: Iterable[str], why: str) -> None:
    """Raise a UserError if the user gave one of these flags; ``why`` says why they have no effect."""
    for name in names:
        if values[name].present:
            raise UserError(f"--{name} {why}; drop it.")


def check_file(flag: str, path: str) -> None:
    """Raise a UserError if no file can be written at ``path``, the value of a flag."""
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"--{flag}={path} lies in a folder that does not exist; make it first.")
    if Path(path).is_dir():
        raise UserError(f"--{flag}={path} is a folder; give the name of a file.")


def check_writable(flag: str, path: str) -> None:
    """Raise a UserError if the file at ``path``, the value of a flag, could not be replaced or written."""
    check_file(flag, path)
    for where in (path, os.path.dirname(os.path.abspath(path))):
        if os.path.exists(where) and not os.access(where, os.W_OK):
            raise UserError(f"--{flag}={path} cannot be written: {where!r} is read-only.")


def make_folder(flag: str, path: str) -> Path:
    """The folder at ``path``, the value of a flag; created if it does not exist.

    Raises:
      UserError: it cannot be created.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{flag}={path} cannot be a folder ({error.strerror}).") from error
    return folder


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Context for writing a file: an OSError becomes a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{os.fspath(path)!r} cannot be written ({error.strerror}).") from error
