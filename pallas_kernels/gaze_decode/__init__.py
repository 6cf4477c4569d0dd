"""Attention of one query per sequence over regions by index; see ``api.py``."""
