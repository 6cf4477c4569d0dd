"""Gaze Attention for JAX and Flax: multimodal language models that select visual regions, then attend.

model = gaze_jax.load("ckpt/llava")
answer = model.generate("How many rooms?", video="walk.mp4", gaze=gaze_jax.GazeOptions(keep=0.1))
print(answer.text)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gaze_jax.infer.answer import Answer as Answer
    from gaze_jax.infer.gaze_options import GazeOptions as GazeOptions
    from gaze_jax.infer.sampler import Sampler as Sampler
    from gaze_jax.infer.sampler import load as load
    from gaze_jax.infer.steer import LookAt as LookAt

__version__ = "0.1.0"

# Imported on first use: training and conversion need none of these.
_LAZY = {
    "Answer": "gaze_jax.infer.answer",
    "Sampler": "gaze_jax.infer.sampler",
    "LookAt": "gaze_jax.infer.steer",
    "GazeOptions": "gaze_jax.infer.gaze_options",
    "load": "gaze_jax.infer.sampler",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        importlib.import_module("gaze_jax.viewer.files")  # lets answers save and show themselves
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gaze_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_LAZY, "__version__"])
