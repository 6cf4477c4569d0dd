"""Read a 4x4 grid of handwritten digits, attending to 2 of 16 regions.

gaze-jax train --config=digits --workdir=runs/digits
"""

import ml_collections

from gaze_jax.train.config import complete


def get_config() -> ml_collections.ConfigDict:
    """40x40 pixels, 8x8 tokens, 16 regions of 2x2 tokens with one digit each."""
    return complete(
        {
            "seed": 0,
            "steps": 500,
            "batch_size": 32,
            "checkpoint_every": 100,
            "log_every": 25,
            "model": {
                # On a CPU this also saves time, because fewer new memory pages are touched.
                "remat": True,
                "decoder": {
                    "vocab_size": 144,
                    "width": 96,
                    "depth": 3,
                    "num_heads": 4,
                    "num_kv_heads": 2,
                    "head_dim": 24,
                    "mlp_dim": 256,
                    "rope_theta": 100.0,
                    "qk_norm": False,
                    "tie_embeddings": False,
                },
                "vision": {
                    "image_size": 40,
                    "patch_size": 5,
                    "width": 96,
                    "depth": 2,
                    "num_heads": 4,
                    "mlp_dim": 192,
                },
                "gaze": {
                    "region": (2, 2),
                    "context_tokens": 1,
                    "top_k": 2,
                    "visual_scope": "view",
                    "visual_causal": False,
                },
            },
            # Without jitter a digit always has the same position in its region: learned several times faster.
            "data": {"rows": 4, "cols": 4, "cell": 10, "jitter": 0, "reads_per_sample": 2},
            "optimizer": {
                "name": "muon",
                "learning_rate": 5e-3,
                "adam_learning_rate": 3e-3,
                "warmup_steps": 15,
            },
            "schedule": {"dense_until": 0.3, "sparse_from": 0.65},
        }
    )
