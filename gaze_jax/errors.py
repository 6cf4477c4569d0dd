"""The errors that a command prints as one sentence."""


class UserError(ValueError):
    """Something that the user can mend: a config value, a path, a checkpoint of another experiment.

    The message is one sentence that says what is wrong and how to mend it. Commands print it without a
    traceback; every other exception is a defect of the program and keeps its traceback.
    """
