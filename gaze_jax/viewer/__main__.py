"""Show gaze traces: ``python -m gaze_jax.viewer --help``."""

from gaze_jax.commands.view import run

if __name__ == "__main__":
    run()
