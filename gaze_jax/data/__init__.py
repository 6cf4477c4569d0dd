"""Samples, tokens, packing and the input pipeline: numpy in, numpy out."""
