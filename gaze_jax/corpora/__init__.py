"""Training data: scenes of handwritten digits."""
