"""Errors that a command prints as one sentence."""


class UserError(ValueError):
    """An error that the user can fix, such as a wrong config value, path or checkpoint.

    The message is one sentence that says what is wrong and how to fix it. Commands print it without a
    traceback; every other exception is a bug in the program and keeps its traceback.
    """
