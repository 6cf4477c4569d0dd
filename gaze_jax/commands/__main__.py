"""``python -m gaze_jax.commands COMMAND``: the command ``gaze-jax``, as ``python -m gaze_jax`` is."""

from gaze_jax.commands.main import run

if __name__ == "__main__":
    run()
