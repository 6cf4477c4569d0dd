"""What can be trained on: digit scenes."""
