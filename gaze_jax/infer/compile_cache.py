"""Compiled programs on disk, of the command line and :func:`gaze_jax.load`; and what is said of compiling."""

import sys
import threading
import time

import jax
import jax.monitoring

from gaze_jax.cache_folder import cache_folder

_TRACED = "/jax/core/compile/jaxpr_trace_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"
_PATIENCE = 2.0
"""Seconds after which a compilation is worth a line."""


def keep_programs(folder: str | None = None) -> None:
    """Keep compiled programs in ``folder``, or in the default one if JAX is not configured with another."""
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", folder)
    elif jax.config.values.get("jax_compilation_cache_dir") is None:
        jax.config.update("jax_compilation_cache_dir", cache_folder())


class _Reporter:
    """Says on stderr that a program is being compiled, if that takes long, and how long it took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._since, self._announced = 0.0, False

    def listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """Take an event of ``jax.monitoring``: a program was traced, or compiled."""
        del duration_secs, kwargs
        with self._lock:
            if event == _TRACED and self._timer is None:
                self._since, self._announced = time.monotonic(), False
                self._timer = threading.Timer(_PATIENCE, self._announce)
                self._timer.daemon = True
                self._timer.start()
            elif event == _COMPILED and self._timer is not None:
                self._timer.cancel()
                self._timer = None
                if self._announced:
                    print(f"compiled in {time.monotonic() - self._since:.0f} s", file=sys.stderr, flush=True)

    def _announce(self) -> None:
        with self._lock:
            self._announced = True
            # A whole line: others, and a progress bar, may be written before it ends.
            print("compiling (once per size) ...", file=sys.stderr, flush=True)


_reporter: _Reporter | None = None


def report_compiles() -> None:
    """From now on say on stderr what compiles for long, if a person watches: in a terminal or a notebook."""
    global _reporter
    if _reporter is None and (sys.stderr.isatty() or "ipykernel" in sys.modules):
        _reporter = _Reporter()
        jax.monitoring.register_event_duration_secs_listener(_reporter.listen)
