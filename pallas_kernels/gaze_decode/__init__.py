"""One query per sequence over regions by index; see ``api.py``."""
