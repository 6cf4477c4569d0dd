"""Meshes of devices, and where every array lives on them."""
