"""Evaluate the newest checkpoint of a run: accuracy, visual entries and routing, against dense attention.

python eval.py --workdir=runs/digits [--samples=1024]
"""

from absl import flags

from gaze_jax import cli
from gaze_jax.errors import UserError
from gaze_jax.evaluate.run import run

_WORKDIR = flags.DEFINE_string("workdir", None, "The workdir of a run of train.py.", required=True)
_SAMPLES = flags.DEFINE_integer("samples", None, "Questions of each family; default: the config's.")


def main() -> None:
    """Print the table and write eval.json and the picture."""
    if _SAMPLES.value is not None and _SAMPLES.value < 2:
        raise UserError(
            f"--samples={_SAMPLES.value} must be at least 2: one half chooses the layer to report."
        )
    run(_WORKDIR.value, _SAMPLES.value)


if __name__ == "__main__":
    cli.run_door(main)
