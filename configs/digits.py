"""Read a 4x4 grid of handwritten digits, attending to 2 of 16 regions.

python train.py --config=configs/digits.py --workdir=runs/digits
"""

import ml_collections

from gaze_jax.train.config import complete


def get_config() -> ml_collections.ConfigDict:
    """40x40 pixels, 8x8 tokens, 16 regions of 2x2 tokens, one digit each."""
    return complete(
        {
            "seed": 0,
            "steps": 600,
            "batch_size": 32,
            "model": {
                "remat": True,
                "decoder": {
                    "vocab_size": 144,
                    "width": 128,
                    "depth": 3,
                    "num_heads": 4,
                    "num_kv_heads": 2,
                    "head_dim": 32,
                    "mlp_dim": 320,
                    "rope_theta": 100.0,
                    "tie_embeddings": False,
                },
                "vision": {
                    "image_size": 40,
                    "patch_size": 5,
                    "width": 128,
                    "depth": 2,
                    "num_heads": 4,
                    "mlp_dim": 320,
                },
                "gaze": {
                    "region": (2, 2),
                    "context_tokens": 1,
                    "top_k": 2,
                    "visual_scope": "unit",
                    "visual_causal": False,
                },
            },
            "data": {"rows": 4, "cols": 4, "cell": 10, "reads_per_sample": 2},
            "optimizer": {
                "name": "muon",
                "learning_rate": 5e-3,
                "adam_learning_rate": 3e-3,
                "warmup_steps": 15,
            },
            "schedule": {"dense_until": 0.15, "sparse_from": 0.6},
        }
    )
