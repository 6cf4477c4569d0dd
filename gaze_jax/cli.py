"""What all doors share: flags in, exit status out, and one sentence for what the user can mend."""

import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from gaze_jax.errors import UserError


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser, with config overrides that fit no field turned into a sentence."""
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        message = str(error)
    except (AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        # What ml_collections raises for an unknown or ill-typed --config.field=value, or a missing file.
        message = str(error.args[0] if error.args else error)
    sys.exit(f"{os.path.basename(argv[0])}: {' '.join(message.split())}")


def run_door(main: Callable[[], None]) -> None:
    """Parse the flags and call ``main``.

    A :class:`UserError` ends the program with status 2 and its sentence alone; anything else is a defect
    and keeps its traceback.
    """

    def guarded(argv: Sequence[str]) -> None:
        name = os.path.basename(sys.argv[0])
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every save
        if len(argv) > 1:
            print(f"{name}: unexpected argument {argv[1]!r}; every option is a --flag.", file=sys.stderr)
            sys.exit(2)
        try:
            main()
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(guarded, flags_parser=_parse_flags)
