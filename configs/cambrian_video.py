"""Cambrian with Gaze, stage 3: images and videos of up to 16 frames, each of 576 tokens.

gaze-jax train --config=cambrian_video:4b --config.init_from=runs/image --config.data.path=mix.jsonl \
    --workdir=runs/video

A row has 16 frames (9,216 visual tokens) and 2,048 text tokens. A query ends at 3 of 16 regions of a frame;
the worked example of the paper (arXiv 2605.13080) has 20 of 128 regions of 8 frames.
"""

import ml_collections
from gaze_jax.configs import cambrian_image  # type: ignore[import-not-found]  # configs/, once installed


def get_config(size: str = "4b") -> ml_collections.ConfigDict:
    """:mod:`cambrian_image` with frames."""
    config = cambrian_image.get_config(size)
    config.model.gaze.top_k = 3
    config.data.max_frames = 16
    config.data.max_tokens = 2048 + 16 * 576
    config.data.row = {"text": 2048, "regions": 256, "images": 16}
    config.schedule = {"dense_until": 0.0, "sparse_from": 0.3}
    return config
