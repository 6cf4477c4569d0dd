"""Ask a model about images and videos: ``python generate.py --help``."""

from gaze_jax.commands.generate import run

if __name__ == "__main__":
    run()
