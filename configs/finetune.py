"""Fine-tune a converted checkpoint on your own images and videos, from dense attention down to Gaze.

gaze-jax train --config=finetune --config.init_from=ckpt/llava --config.data.path=my.jsonl --workdir=runs/my

First: gaze-jax data check finetune --config.init_from=ckpt/llava --config.data.path=my.jsonl
"""

import ml_collections

from gaze_jax.train.config import complete


def get_config() -> ml_collections.ConfigDict:
    """One epoch; the language model and the projector are trained, the image tower is not."""
    return complete(
        {
            "seed": 0,
            "steps": 0,  # as many as data.epochs take
            "batch_size": 8,  # rows, each with several samples; data.row limits a row to what fits a device
            "checkpoint_every": 500,
            "log_every": 10,
            "num_workers": 2,
            "model": {
                # What is not set here is the checkpoint's.
                "param_dtype": "float32",
                "remat": True,
                "gaze": {"top_k": 4},
            },
            "data": {"path": "", "epochs": 1.0},
            "optimizer": {
                "name": "adamw",
                # LLaVA-OneVision and Cambrian-S fine-tune with 1e-5, warmup over 3 % of the steps, cosine.
                "learning_rate": 1e-5,
                "warmup_steps": 0,
                "warmup_fraction": 0.03,
                "decay": "cosine",
                "weight_decay": 0.0,
                "b2": 0.999,
                "frozen": ("vision",),
            },
            # Sparse from the first step on lowers scores (the paper): begin with all regions.
            "schedule": {"dense_until": 0.2, "sparse_from": 0.6},
        }
    )
