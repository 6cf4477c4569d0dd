"""What all commands share: flags in, exit status out, and one sentence for what the user can mend."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from gaze_jax.errors import UserError


def _unloadable(path: str) -> str:
    return (
        f"--config={path} cannot be loaded; give a Python file with a get_config() function, such as "
        "configs/digits.py."
    )


def _sentence(error: Exception, argv: Sequence[str]) -> str:
    """What absl and ml_collections raise for a flag, on one line."""
    if isinstance(error, OSError):  # an override needs the config that it changes
        return _unloadable(next((arg.split("=", 1)[1] for arg in argv if arg.startswith("--config=")), ""))
    message = " ".join(str(error.args[0] if error.args else error).split())
    if isinstance(error, AttributeError | KeyError):
        overrides = [arg.split("=")[0] for arg in argv if arg.startswith("--config.")]
        close = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message)
        hint = f"{close[2]!r} does not exist, did you mean {close[1]!r}?" if close else message
        return f"Unknown config key in {', '.join(overrides)}: {hint}"
    return message


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser, with whatever is wrong with a flag as a sentence."""
    try:
        return flags.FLAGS(list(argv))
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        print(f"{_program()}: {_sentence(error, argv)}", file=sys.stderr)
        sys.exit(2)


def _program() -> str:
    """How the program was started, for messages."""
    spec = sys.modules["__main__"].__spec__
    return os.path.basename(sys.argv[0]) if spec is None else f"python -m {spec.parent}"


def run(main: Callable[..., None], *, arguments: bool = False) -> None:
    """Parse the flags and call ``main``, with a list of what is no flag if it takes ``arguments``.

    A :class:`UserError` ends the program with status 2 and its sentence alone; anything else is a defect
    and keeps its traceback.
    """

    def guarded(argv: Sequence[str]) -> None:
        name = _program()
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every save
        if len(argv) > 1 and not arguments:
            print(f"{name}: unexpected argument {argv[1]!r}; every option is a --flag.", file=sys.stderr)
            sys.exit(2)
        try:
            main(*([argv[1:]] if arguments else []))
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(guarded, flags_parser=_parse_flags)


def refuse_flags(holders: Iterable[flags.FlagHolder], why: str) -> None:
    """Raise a UserError if the user gave one of these flags, which ``why`` have no effect."""
    for holder in holders:
        if flags.FLAGS[holder.name].present:
            raise UserError(f"--{holder.name} {why}; drop it.")


def check_file(flag: str, path: str) -> None:
    """Raise a UserError if no file could be written at ``path``, which the user gave with a flag."""
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"--{flag}={path} lies in a folder that does not exist; make it first.")
    if Path(path).is_dir():
        raise UserError(f"--{flag}={path} is a folder; give the name of a file.")


def make_folder(flag: str, path: str) -> Path:
    """The folder that the user gave with a flag, made if it does not exist.

    Raises:
      UserError: it cannot be.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{flag}={path} cannot be a folder ({error.strerror}).") from error
    return folder


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Where a file is written: what the system refuses is a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{os.fspath(path)!r} cannot be written ({error.strerror}).") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, UTF-8 with line feeds.

    Raises:
      UserError: the system refuses.
    """
    with writing(path):
        Path(path).write_text(text, encoding="utf-8", newline="\n")


def config_of(holder: flags.FlagHolder) -> ml_collections.ConfigDict:
    """The value of a ``config_flags.DEFINE_config_file`` flag.

    Raises:
      UserError: the file does not exist or has no ``get_config``.
    """
    try:
        return holder.value
    except (OSError, AttributeError) as error:
        raise UserError(_unloadable(config_flags.get_config_filename(flags.FLAGS[holder.name]))) from error
