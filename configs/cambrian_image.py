"""Cambrian with Gaze, stage 2: images; the language model and the projector learn, the tower is frozen.

gaze-jax train --config=cambrian_image:4b --config.init_from=runs/align --config.data.path=images.jsonl \
    --workdir=runs/image

Attention goes from all regions to 4 of 16 for each query: 144 of 576 tokens, the best average of the paper
(arXiv 2605.13080), in which starting sparse lowers scores. The learning rate, 1e-5, is that of Cambrian-S's
last stage (arXiv 2511.04670); that of its image stage could not be verified.
"""

import ml_collections
from gaze_jax.configs import cambrian_align  # type: ignore[import-not-found]  # configs/, once installed


def get_config(size: str = "4b") -> ml_collections.ConfigDict:
    """:mod:`cambrian_align` with everything trained but the tower, and with Gaze."""
    config = cambrian_align.get_config(size)
    config.arm = "gaze"
    config.model.gaze.top_k = 4
    config.data.max_tokens = 2048 + 8 * 576
    config.data.row = {"text": 2048, "regions": 128, "images": 8}
    config.optimizer.learning_rate = 1e-5
    config.optimizer.frozen = ("vision",)
    config.schedule = {"dense_until": 0.1, "sparse_from": 0.6}
    return config
