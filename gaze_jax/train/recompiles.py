"""Programs that are compiled between the steps of a run, where none should be."""

import contextlib
from collections.abc import Callable, Iterator

from gaze_jax.compiles import compiles


class Recompiles:
    """Notices compilations of the thread that trains, outside of what may compile."""

    def __init__(self, report: Callable[[str], None]):
        """Begin; ``report`` takes a line for the steps after which something was compiled."""
        self._report, self._known = report, compiles(here=True)

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Context in which a program may be compiled: a step's first batch, an evaluation, a save."""
        before = compiles(here=True)
        try:
            yield
        finally:
            self._known += compiles(here=True) - before

    def check(self, step: int) -> None:
        """Report what was compiled since the check before."""
        found = compiles(here=True) - self._known
        if found:
            self._known += found
            self._report(
                f"step {step}: {found} program{'s' * (found > 1)} compiled where none should be, which costs "
                "time at every such step; please report it."
            )
