"""Optimiser, training step, loop and checkpoints."""
