"""The commands: ``python -m gaze_jax --help``."""

from gaze_jax.commands.main import run

if __name__ == "__main__":
    run()
