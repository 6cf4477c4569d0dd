"""Tasks, metrics and routing accuracy."""
