"""Train one experiment; a run on digit scenes is then evaluated, and drawn where it looked.

gaze-jax train --config=digits --workdir=runs/digits [--config.FIELD=VALUE ...]
gaze-jax train --config=finetune --config.init_from=ckpt/llava --config.data.path=my.jsonl --workdir=runs/my

The same command continues a run that was stopped or killed. Exit status 75 asks for that.
"""

import sys
import typing
from pathlib import Path

from gaze_jax.commands import cli
from gaze_jax.commands.devices import define_processes, start_processes
from gaze_jax.commands.flags import Flags, Values
from gaze_jax.errors import AGAIN, UserError
from gaze_jax.parallel import together

if typing.TYPE_CHECKING:
    import ml_collections


def define_flags(flags: Flags) -> None:
    """The flags; every field of the config is a flag too."""
    flags.group("The run")
    define_config(flags)
    flags.string("workdir", None, "Where checkpoints, metrics and results go.", "FOLDER")
    define_processes(flags)


def define_config(flags: Flags) -> None:
    """``--config``, and a flag for every field of it."""
    from ml_collections import config_flags

    text = (
        "A Python file with get_config(), or the name of a shipped config, such as digits. "
        "--config.FIELD=VALUE changes a field of it, such as --config.steps=1000."
    )
    flags.argv = cli.with_config_path(flags.argv)
    config_flags.DEFINE_config_file(
        "config", None, text, flag_values=flags.values, lock_config=True, sys_argv=flags.argv
    )
    flags.listed("config", "FILE", text)


def config_of(values: Values) -> "ml_collections.ConfigDict":
    """The config file's values, overridden by flags.

    Raises:
      UserError: the file does not exist or has no ``get_config``.
    """
    from ml_collections import config_flags

    config = values.config
    try:
        _ = config.items  # the placeholder for a file that could not be loaded raises at its first use
        return config
    except (OSError, AttributeError) as error:
        raise UserError(cli.unloadable(config_flags.get_config_filename(values["config"]))) from error


def main(values: Values) -> None:
    """Train and evaluate."""
    if not values["config"].present:
        raise UserError("Give --config, a file or the name of a shipped config, such as digits.")
    if values.workdir is None:
        raise UserError("Give --workdir, the folder for checkpoints, metrics and results.")
    start_processes(values, saves=True)

    from gaze_jax.convert.origin import open_start
    from gaze_jax.corpora.digits import DigitsConfig
    from gaze_jax.evaluate.run import run as evaluate
    from gaze_jax.infer.progress import progress_bar
    from gaze_jax.parallel.mesh import make_mesh
    from gaze_jax.train.config import parse
    from gaze_jax.train.loop import train
    from gaze_jax.viewer.training import draw_evaluation

    config = config_of(values)
    start = None
    if named := config.get("init_from"):
        # A resumed run needs only what it kept, unless the checkpoint is its teacher.
        distills = config.get("objective", {}).get("name") == "distill"
        start = open_start(named, None if distills else Path(values.workdir))
    experiment = parse(config, None if start is None else start.config)
    finished = train(experiment, values.workdir, start, progress_bar, draw_evaluation)
    if not finished:
        sys.exit(AGAIN)
    if isinstance(experiment.data, DigitsConfig):
        evaluate(values.workdir, mesh=make_mesh(experiment.mesh) if together.several() else None)


def run() -> None:
    """The command."""
    cli.run(main, define_flags, __doc__)


if __name__ == "__main__":
    run()
