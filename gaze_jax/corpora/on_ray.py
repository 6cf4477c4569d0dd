"""The shards of a prepared corpus written by Ray Data, on one machine or on a cluster.

Needs Ray, from the ``ray`` extra. Ray starts a task again if its process or its machine is lost, without end;
here a shard is begun three times.
"""

import contextlib
import functools
import logging
import os
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from gaze_jax.errors import UserError, first_line

DIED = (
    "A process that prepared records died, perhaps for want of memory; run the same command again with fewer "
    "workers, and it goes on from there."
)
"""What is said when a process is lost."""

_TRIES = 3


def written(
    write: Callable[[int], None], numbers: Sequence[int], notes: str, *, workers: int, address: str | None
) -> Generator[int]:
    """Call ``write`` with each number on Ray; yields each number when it is done.

    Args:
      write: writes one shard; it and what it holds are pickled.
      numbers: of the shards.
      notes: a folder that every machine reaches; how often each shard was begun is noted there.
      workers: how many are written at a time.
      address: of the cluster, "auto" for the one that this machine belongs to; None starts Ray on this
        machine, and ends it afterwards. If the process uses Ray already, that is used.

    Raises:
      UserError: ``write`` raised it, Ray is not installed, the cluster cannot be joined, or a process died.
    """
    forget(Path(notes))
    with _session(address, workers) as ray, _quiet(ray):
        task = functools.partial(_attempt, write, os.path.abspath(notes), os.getcwd())
        rows = ray.data.from_items(list(numbers), override_num_blocks=len(numbers))
        found = iter(rows.map(task, compute=ray.data.TaskPoolStrategy(size=workers)).iter_rows())
        try:
            for row in found:
                if row["error"]:
                    raise UserError(row["error"])
                yield int(row["number"])
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            why = first_line(error).rstrip(".")
            raise UserError(f"Ray ended early ({why}); the same command goes on from there.") from error
        finally:
            found.close()  # ends what still runs


def forget(notes: Path) -> None:
    """Remove the notes of how often shards were begun."""
    for path in notes.glob("*.tries"):
        path.unlink(missing_ok=True)


def _attempt(write: Callable[[int], None], notes: str, here: str, row: dict[str, Any]) -> dict[str, Any]:
    """What became of a shard, on the machine that writes it; an error travels as its sentence."""
    number = int(row["item"])
    with contextlib.suppress(OSError):
        os.chdir(here)  # relative paths are those of the machine that the command runs on
    if not os.path.isdir(notes):
        folder, host = os.path.dirname(notes), socket.gethostname()
        why = f"{folder} is not there on {host}; write to a folder that every machine of the cluster reaches."
        return {"number": number, "error": why}
    tries = Path(notes, f"{number}.tries")
    with tries.open("ab") as file:
        file.write(b".")
    if tries.stat().st_size > _TRIES:
        return {"number": number, "error": DIED}
    try:
        write(number)
    except UserError as error:
        return {"number": number, "error": str(error)}
    return {"number": number, "error": ""}


@contextlib.contextmanager
def _session(address: str | None, workers: int) -> Iterator[Any]:
    """Context with Ray, joined to a cluster or started here; it ends what it began."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError("--engine=ray needs Ray Data: pip install 'gaze-jax[ray]'.") from error
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address is None:
        # "local": otherwise RAY_ADDRESS, or a cluster that runs here, would be joined unasked.
        address, options = "local", options | {"num_cpus": workers, "include_dashboard": False}
    else:
        _check_address(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
    try:
        try:
            ray.init(address, **options)
        except (ConnectionError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            what = "Ray cannot be started" if address == "local" else f"No Ray cluster answers at {address!r}"
            raise UserError(f"{what} ({first_line(error).rstrip('.')}).") from error
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse an address at which nothing answers, for which Ray would wait minutes."""
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    if not (host and colon and port.isdecimal()) or "/" in address:
        raise UserError(f"{address!r} is no address of a Ray cluster; give HOST:PORT of its head, or 'auto'.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"No Ray cluster answers at {address!r} ({first_line(error)}).") from error


@contextlib.contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Context in which Ray Data prints nothing; its log files stay."""
    options = ray.data.DataContext.get_current()
    bars = options.enable_progress_bars
    handlers = [h for h in logging.getLogger("ray.data").handlers if isinstance(h, logging.StreamHandler)]
    levels = [handler.level for handler in handlers]
    options.enable_progress_bars = False
    for handler in handlers:
        handler.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        options.enable_progress_bars = bars
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)
