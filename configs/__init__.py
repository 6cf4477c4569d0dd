"""Experiments, one file each; installed as the package gaze_jax.configs."""
