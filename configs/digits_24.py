"""Read an 8x8 grid of handwritten digits in the paper's shape: 24x24 tokens, 6x6 regions, 4 context tokens.

gaze-jax train --config=digits_24 --workdir=runs/digits_24

Meant for a GPU or TPU; benchmarks/gpu.sh --digits runs it with its dense arms. Not yet trained to the end.
"""

import ml_collections

from gaze_jax.train.config import complete


def get_config() -> ml_collections.ConfigDict:
    """120x120 pixels, 576 tokens, 16 regions of 36 tokens with four digits each."""
    return complete(
        {
            "seed": 0,
            "steps": 6000,
            "batch_size": 128,
            "checkpoint_every": 1000,
            "log_every": 100,
            "num_workers": 8,
            "model": {
                "dtype": "bfloat16",
                "remat": True,
                "decoder": {
                    "vocab_size": 144,
                    "width": 384,
                    "depth": 6,
                    "num_heads": 6,
                    "num_kv_heads": 2,
                    "head_dim": 64,
                    "mlp_dim": 1024,
                    "rope_theta": 1000.0,
                    "tie_embeddings": False,
                },
                "vision": {
                    "image_size": 120,
                    "patch_size": 5,
                    "width": 256,
                    "depth": 4,
                    "num_heads": 4,
                    "mlp_dim": 1024,
                },
                "gaze": {
                    "region": (6, 6),
                    "context_tokens": 4,
                    "top_k": 2,
                    "visual_scope": "view",
                    "visual_causal": False,
                },
            },
            "data": {
                "rows": 8,
                "cols": 8,
                "cell": 15,
                "jitter": 1,
                "families": (0.5, 0.3, 0.2),
                "reads_per_sample": 6,
            },
            "optimizer": {
                "name": "muon",
                "learning_rate": 3e-3,
                "adam_learning_rate": 1e-3,
                "warmup_steps": 200,
            },
            "schedule": {"dense_until": 0.3, "sparse_from": 0.7},
            "eval": {"samples": 512, "batch_size": 64},
        }
    )
