"""Convert checkpoints between Hugging Face directories and this project: ``python convert.py --help``."""

from gaze_jax.commands.convert import run

if __name__ == "__main__":
    run()
