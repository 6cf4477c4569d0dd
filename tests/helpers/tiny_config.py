"""The tiny run as a file for ``--config``."""

from tests.helpers.experiments import tiny as get_config

__all__ = ["get_config"]
