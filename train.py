"""Train one experiment, then evaluate it and draw where it looked.

python train.py --config=configs/digits.py --workdir=runs/digits [--config.FIELD=VALUE ...]

The same command goes on with a run that was stopped or killed.
"""

import jax
from absl import flags
from ml_collections import config_flags

from gaze_jax import cli
from gaze_jax.evaluate.run import run
from gaze_jax.train.config import parse
from gaze_jax.train.loop import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
flags.mark_flag_as_required("config")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and results go.", required=True)


def main() -> None:
    """Train and, on one process, evaluate."""
    finished = train(parse(cli.config_of(_CONFIG)), _WORKDIR.value)
    if finished and jax.process_count() == 1:
        run(_WORKDIR.value)


if __name__ == "__main__":
    cli.run(main)
