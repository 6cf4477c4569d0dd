"""Where this package keeps what it can make again: compiled programs, and indexes of large files."""

import os


def cache_folder() -> str:
    """The package's folder in the user's cache, which the XDG base directory specification names."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "gaze_jax")
