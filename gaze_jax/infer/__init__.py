"""Cached generation in one compiled program."""

from gaze_jax.infer.generate import Generation, Generator, next_token

__all__ = ["Generation", "Generator", "next_token"]
