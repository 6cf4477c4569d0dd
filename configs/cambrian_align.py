"""Cambrian with Gaze, stage 1: the projector, the newline and the context tokens learn; all else is frozen.

gaze-jax convert --llm=Qwen3-4B --vision=siglip2-so400m-patch16-384 --gaze_context_tokens=4 --to=ckpt/cam
gaze-jax train --config=cambrian_align:4b --config.init_from=ckpt/cam --config.data.path=align.jsonl \
    --workdir=runs/align

The models are those of Gaze Attention (arXiv 2605.13080): Cambrian-4B, with ``:7b`` -7B. The optimizer is
that of the same stage in Cambrian-S's scripts (arXiv 2511.04670): AdamW, 1e-3, warmup over 3 % of the steps,
cosine, no weight decay, one epoch. No batch size could be verified.
"""

import ml_collections

from gaze_jax.config import to_dict
from gaze_jax.families import MODELS
from gaze_jax.train.config import complete


def get_config(size: str = "4b") -> ml_collections.ConfigDict:
    """The config of a stage on Cambrian-4B or -7B at 384 pixels: 16 regions of 6x6 tokens for each image."""
    if size not in ("4b", "7b"):
        raise ValueError(f"size={size!r} must be 4b or 7b.")
    model = to_dict(MODELS[f"cambrian-{size}-384"])
    return complete(
        {
            "steps": 0,
            "batch_size": 64,
            "checkpoint_every": 500,
            "log_every": 10,
            "num_workers": 8,
            # Attention is dense until stage 2: scores need a projector that works.
            "arm": "dense_context",
            # Scores of 128 queries at a time: those of 512 take 0.7 GB at 11,264 tokens.
            "model": model
            | {"param_dtype": "float32", "remat": True, "gaze": model["gaze"] | {"query_block": 128}},
            "data": {
                "path": "",
                "epochs": 1.0,
                "max_tokens": 2048 + 4 * 576,
                "too_long": "truncate",
                "row": {"text": 2048, "regions": 64, "images": 4},
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-3,
                "warmup_steps": 0,
                "warmup_fraction": 0.03,
                "decay": "cosine",
                "weight_decay": 0.0,
                "b2": 0.999,
                "frozen": ("vision", "decoder"),
            },
        }
    )
