"""The start of a run of several processes, before anything touches a device.

A process of a pod computes on its own devices and knows those of the others. On SLURM and under Open MPI the
processes find each other, on Cloud TPUs if they are asked to (``--distributed``); elsewhere they are told.
"""

import dataclasses
import os

from gaze_jax.errors import NotTogetherError, UserError, first_line
from gaze_jax.parallel import peers

_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""Environment variables in which srun and mpirun say how many processes they have started."""

HEARTBEAT = 600
"""Seconds without a sign of life after which a process counts as dead; compiling a large step can take some
hundred, in which a process gives none."""


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """How the processes of a run find each other.

    Attributes:
      distributed: whether there are several; None: if srun or mpirun has started several.
      coordinator: HOST:PORT of the first process, where others cannot find it themselves.
      num_processes, process_id: how many there are, and which this is, from 0; with ``coordinator``.
      heartbeat_seconds: after how many seconds without a sign of life a process counts as dead.
    """

    distributed: bool | None = None
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_seconds: int = HEARTBEAT


def _check(config: ProcessConfig) -> None:
    told = {name: getattr(config, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [f"--{name}" for name, value in told.items() if value is None]
    if config.heartbeat_seconds < 10:
        raise UserError(f"--heartbeat_seconds={config.heartbeat_seconds} must be at least 10.")
    if len(missing) == len(told):
        return
    if missing:
        raise UserError(
            f"{' and '.join(missing)} must be given too: --coordinator, --num_processes and --process_id say "
            "together how the processes find each other."
        )
    if config.distributed is False:
        raise UserError("--nodistributed contradicts --coordinator; drop one of them.")
    if not 0 <= told["process_id"] < told["num_processes"]:
        raise UserError(
            f"--process_id={config.process_id} must be at least 0 and less than --num_processes="
            f"{config.num_processes}."
        )
    host, _, port = told["coordinator"].rpartition(":")
    if not (host and port.isdigit()):
        raise UserError(f"--coordinator={config.coordinator} must be HOST:PORT of the first process.")


def _launched() -> bool:
    """Whether a launcher has started several processes, this among them."""
    counts = [os.environ.get(name, "") for name in _COUNTS]
    return any(count.isdigit() and int(count) > 1 for count in counts)


def start(config: ProcessConfig, *, saves: bool = True) -> bool:
    """Join the other processes of a run, if there are any; waits for them for at most five minutes.

    Must be called before anything else uses a device.

    Args:
      config: how they find each other.
      saves: whether SIGTERM is asked about, by JAX's preemption service; otherwise it ends a process.

    Returns:
      Whether the run has several processes.

    Raises:
      UserError: the flags contradict each other, or nothing says where the other processes are.
      NotTogetherError: the others were not there in time.
    """
    _check(config)
    told = config.coordinator is not None
    if not (told or config.distributed or (config.distributed is None and _launched())):
        return False
    import jax  # here, since flags are defined and explained without it

    jax.config.update("jax_enable_preemption_service", saves)
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
        )
    except (RuntimeError, ValueError) as error:
        hint = (
            "check --coordinator, and that all processes were started."
            if told
            else "where neither Cloud TPU nor SLURM nor Open MPI starts the processes, give --coordinator, "
            "--num_processes and --process_id."
        )
        late = isinstance(error, RuntimeError)
        raise (NotTogetherError if late else UserError)(
            f"The processes of the run did not find each other ({first_line(error)}); {hint}"
        ) from error
    if jax.process_count() == 1:
        return False
    peers.joined()
    return True
