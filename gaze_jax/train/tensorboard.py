"""The rows of a run as events for TensorBoard."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gaze_jax.errors import UserError
from gaze_jax.train import evaluation, metrics, timing
from gaze_jax.train.metrics import Row

FOLDER = "tensorboard"


def check() -> None:
    """Check that events can be written.

    Raises:
      UserError: tensorboardX is not installed.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        raise UserError(
            "tensorboard=True writes events with tensorboardX, which is not installed; install the extra: "
            "pip install 'gaze-jax[tensorboard]'."
        )


class Events:
    """Writes events into a folder of a run.

    The files of a run are the truth: the events of an earlier process are replaced by those of the rows that
    are left when a run goes on, so no step is there twice, whatever reads them.
    """

    def __init__(self, workdir: Path):
        """Begin with the rows that the run has."""
        from tensorboardX import SummaryWriter

        folder = workdir / FOLDER
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        # A TensorBoard that is open already forgets what it has read from step 0 on.
        self._writer = SummaryWriter(logdir=str(folder), purge_step=0)
        times = timing.kept_rows(metrics.read(workdir / timing.FILE))
        at = {row["step"]: row["time"] for row in times}
        for row in times:
            self.timing(row)
        for row in metrics.read(workdir / metrics.FILE):
            self.training(row, at.get(row["step"]))
        for row in metrics.read(workdir / evaluation.FILE):
            self.evaluation(row, at.get(row["step"]))

    def _add(self, group: str, row: Mapping[str, Any], step: float, when: float | None = None) -> None:
        for name, value in row.items():
            self._writer.add_scalar(f"{group}/{name}", value, int(step), walltime=when)

    def training(self, row: Row, when: float | None = None) -> None:
        """Write a row of metrics.jsonl; ``when``: in seconds of ``time.time()``, None for now."""
        self._add("train", {name: value for name, value in row.items() if name != "step"}, row["step"], when)

    def evaluation(self, row: Mapping[str, Any], when: float | None = None) -> None:
        """Write a row of evaluation.jsonl."""
        for way in ("gaze", "dense"):
            self._add(f"held_out_{way}", row.get(way, {}), row["step"], when)

    def timing(self, row: Row) -> None:
        """Write what was done per second, and the shares of the time, of a row of timing.jsonl."""
        found = {name: row[name] for name in timing.SPEEDS if name in row}
        self._add("speed", found, row["step"], row["time"])

    def close(self) -> None:
        """Write what is not written yet."""
        self._writer.close()
