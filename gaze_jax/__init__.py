"""Gaze Attention for JAX and Flax: multimodal language models that select visual regions, then attend."""

__version__ = "0.1.0"
