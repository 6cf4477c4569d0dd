"""A training run that takes seconds: four digits, a narrow model, AdamW (Muon takes long to compile)."""

from typing import Any

import ml_collections

from gaze_jax.train.config import Experiment, complete, parse


def tiny(**overrides: Any) -> ml_collections.ConfigDict:
    """The config of the run; ``tiny(steps=3, **{"optimizer.name": "adamw"})`` changes fields by path."""
    config = complete(
        {
            "seed": 3,
            "steps": 6,
            "batch_size": 8,
            "log_every": 2,
            "model": {
                "decoder": {
                    "vocab_size": 144,
                    "width": 32,
                    "depth": 2,
                    "num_heads": 2,
                    "num_kv_heads": 1,
                    "head_dim": 16,
                    "mlp_dim": 48,
                    "tie_embeddings": False,
                },
                "vision": {
                    "image_size": 20,
                    "patch_size": 5,
                    "width": 32,
                    "depth": 1,
                    "num_heads": 2,
                    "mlp_dim": 48,
                },
                "gaze": {"region": (2, 2), "context_tokens": 1, "top_k": 1},
            },
            "data": {"rows": 2, "cols": 2, "reads_per_sample": 2, "train_scenes": 64, "augment": False},
            "optimizer": {"name": "adamw", "warmup_steps": 2},
            "eval": {"samples": 6, "batch_size": 4},
        }
    )
    with config.unlocked():
        config.update_from_flattened_dict(overrides)
    return config


def tiny_experiment(**overrides: Any) -> Experiment:
    """:func:`tiny`, parsed."""
    return parse(tiny(**overrides))
