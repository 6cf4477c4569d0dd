"""Cached generation."""
