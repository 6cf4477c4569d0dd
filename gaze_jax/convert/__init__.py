"""Checkpoints of other projects into this one and back: one table per family, read in both directions."""
