"""A profiler trace of some steps of a run."""

from pathlib import Path
from typing import Any

import jax

FOLDER = "profile"


class Profile:
    """Traces steps ``first`` to ``last``, both included, into a folder of a run; None traces none."""

    def __init__(self, workdir: Path, steps: tuple[int, int] | None):
        self._folder, self._steps, self._on = workdir / FOLDER, steps, False

    def before(self, step: int, state: Any) -> None:
        """Begin, if ``step`` is one of them; a run that goes on within them traces the rest."""
        if self._steps is not None and not self._on and self._steps[0] <= step <= self._steps[1]:
            jax.block_until_ready(state)  # what was begun before is not in the trace
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, step: int, state: Any) -> bool:
        """End, if ``step`` is the last of them, when the devices are done with it; whether it ended."""
        if self._on and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(state)
            self.close()
            return True
        return False

    def close(self) -> None:
        """End a trace that has not ended: a run that stops keeps what it has."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
