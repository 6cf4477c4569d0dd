"""Convert checkpoints of other projects and back: one table per family, used in both directions."""
