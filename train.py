"""Train one experiment and evaluate it: ``python train.py --help``."""

from gaze_jax.commands.train import run

if __name__ == "__main__":
    run()
