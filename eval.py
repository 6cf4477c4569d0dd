"""Evaluate a run, or compare a checkpoint with dense attention: ``python eval.py --help``."""

from gaze_jax.commands.eval import run

if __name__ == "__main__":
    run()
