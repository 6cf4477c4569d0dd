"""Errors that a command prints as one sentence."""

import contextlib
import re
from collections.abc import Iterator, Mapping

AGAIN = 75
"""Exit status of a command that another start goes on with, what is done being saved: EX_TEMPFAIL."""


class UserError(ValueError):
    """An error that the user can fix, such as a wrong config value, path or checkpoint.

    The message is one sentence that says what is wrong and how to fix it. Commands print it without a
    traceback; every other exception is a bug in the program and keeps its traceback.

    Attributes:
      status: the exit status of a command that ends with it.
    """

    status = 2


class NotTogetherError(UserError):
    """The processes of a run did not find each other, perhaps since some start later."""

    status = AGAIN


class NotFiniteError(UserError):
    """The numbers of a run went wrong: started again, it would come to the same."""

    status = 4


def first_line(error: Exception) -> str:
    """The first line of what a library says in many, or the error's type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Context in which the message of a :class:`UserError` uses the user's names of options.

    Args:
      names: name of an option in messages -> its name for the user.
    """
    try:
        yield
    except UserError as error:
        words = "|".join(map(re.escape, names))
        message = re.sub(rf"(?<![\w.'-])(?:{words})\b", lambda found: names[found[0]], str(error))
        raise UserError(message) from error
