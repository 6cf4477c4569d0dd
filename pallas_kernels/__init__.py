"""Attention ops of Gaze Attention, one folder each; imports jax and numpy only.

``gaze_decode``: one query per sequence, regions by index, plus the text stream.
``gaze_prefill``: many queries, each with its own selection, forward and backward.

Both are one softmax over selected visual keys and visible text-stream keys. An implementation asked for by
name never falls back to another.
"""

from pallas_kernels.gaze_decode.api import gaze_decode
from pallas_kernels.gaze_prefill.api import gaze_prefill
from pallas_kernels.spec import GazeSpec, KeyPlaces, Windows

__all__ = ["GazeSpec", "KeyPlaces", "Windows", "gaze_decode", "gaze_prefill"]
