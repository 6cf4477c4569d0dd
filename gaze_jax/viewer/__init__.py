"""Pages, pictures and clips of the regions that a model selected."""
