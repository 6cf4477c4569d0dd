"""Teach a dense checkpoint Gaze: imitate itself attended to densely, and select where it would attend.

gaze-jax train --config=gazify --config.init_from=ckpt/llava --config.data.path=my.jsonl --workdir=runs/gaze

First: gaze-jax data check gazify --config.init_from=ckpt/llava --config.data.path=my.jsonl
"""

import ml_collections

from gaze_jax.train.config import complete


def get_config() -> ml_collections.ConfigDict:
    """One epoch of any conversations about images or videos; their answers are imitated, not learned."""
    return complete(
        {
            "seed": 0,
            "steps": 0,  # as many as data.epochs take
            "batch_size": 8,  # rows, each with several samples; data.row limits a row to what fits a device
            "checkpoint_every": 500,
            "log_every": 10,
            "num_workers": 2,
            "model": {
                # What is not set here is the checkpoint's. It has no context tokens, so these are new.
                "param_dtype": "float32",
                "remat": True,
                "gaze": {"top_k": 4, "context_tokens": 4},
            },
            "data": {"path": "", "epochs": 1.0},
            "objective": {"name": "distill", "region_weight": 1.0},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-5,
                "warmup_steps": 0,
                "warmup_fraction": 0.03,
                "decay": "cosine",
                "weight_decay": 0.0,
                "b2": 0.999,
                "frozen": ("vision",),
            },
            # From all regions to top_k at once: the region loss says from the first step on what to select.
            "schedule": {"dense_until": 0.0, "sparse_from": 0.0},
        }
    )
