"""Attention of many queries, each with its own selection of regions; see ``api.py``."""
