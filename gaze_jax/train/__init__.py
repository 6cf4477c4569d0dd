"""From an experiment to trained parameters: step, optimizer, loop, checkpoint."""
