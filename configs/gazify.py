"""Teach a dense checkpoint Gaze: imitate itself attended to densely, and select where it would attend.

gaze-jax train --config=gazify --config.init_from=ckpt/llava --config.data.path=my.jsonl --workdir=runs/gaze

First: gaze-jax data check gazify --config.init_from=ckpt/llava --config.data.path=my.jsonl
Any conversations about images or videos will do: their answers are imitated, not learned.
"""

import ml_collections
from gaze_jax.configs import finetune  # type: ignore[import-not-found]  # configs/, once installed


def get_config() -> ml_collections.ConfigDict:
    """:mod:`finetune` with the dense checkpoint as the teacher."""
    config = finetune.get_config()
    config.objective = {"name": "distill", "region_weight": 1.0}
    config.model.gaze.context_tokens = 4  # the checkpoint has none, so these are new
    # From all regions to top_k at once: the region loss says from the first step on what to select.
    config.schedule = {"dense_until": 0.0, "sparse_from": 0.0}
    return config
