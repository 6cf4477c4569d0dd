"""How grey levels become numbers for the tower: a table shared by the data pipeline and the model."""

import numpy as np

# Rounded as in the original: a float64 product, then float32.
_SCALED = (np.arange(256) * (1 / 255)).astype(np.float32)
LEVELS = (_SCALED - np.float32(0.5)) / np.float32(0.5)
"""float32 [256], in [-1, 1]: x / 255, then mean and deviation 0.5, as for SigLIP."""
LEVELS.setflags(write=False)
