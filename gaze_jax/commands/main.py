"""Gaze Attention multimodal models: train, evaluate, ask, convert, view, and prepare data.

gaze-jax COMMAND [--FLAG=VALUE ...]
"""

import difflib
import importlib
import os
import sys

import gaze_jax

COMMANDS = {
    "train": "train one experiment, then evaluate it",
    "eval": "evaluate a run, or compare a checkpoint with dense attention",
    "generate": "ask a model about images and videos",
    "convert": "convert checkpoints between Hugging Face directories and gaze_jax",
    "data": "prepare a corpus for training",
    "topology": "compile a config's programs for TPUs, without a TPU",
    "view": "draw where a model looked, from its gaze traces",
    "env": "say what is installed, and which attention implementations run here",
}
"""Name of a command, which is a module of this package with a function ``run`` -> what it does."""


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            (__doc__ or "").strip(),
            "",
            "Commands:",
            *lines,
            "",
            "gaze-jax COMMAND --help lists a command's flags; gaze-jax --version prints the version.",
        ]
    )


def run() -> None:
    """The command: hands the rest of the command line to the module of the named command."""
    program, *words = sys.argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        print(f"gaze-jax {gaze_jax.__version__}")
        return
    name = words[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"give one of {', '.join(COMMANDS)}."
        print(f"{os.path.basename(program)}: {name!r} is no command; {hint}", file=sys.stderr)
        sys.exit(2)
    # The command reads its own flags after this, and names itself "gaze-jax COMMAND" in messages.
    sys.argv = [f"{program} {name}", *words[1:]]
    importlib.import_module(f"gaze_jax.commands.{name}").run()
