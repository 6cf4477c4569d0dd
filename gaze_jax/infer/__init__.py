"""Inference: single answers, batches and conversations, on one kv cache and programs that compile once."""
