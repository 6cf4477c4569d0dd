"""Evaluation: accuracy, routing accuracy, and comparison with dense attention."""
