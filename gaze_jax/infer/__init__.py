"""Answers of a checkpoint: one, many, or a conversation; on one cache, in programs that compile once."""
