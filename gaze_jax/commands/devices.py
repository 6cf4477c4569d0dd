"""Flags that say on which devices a command computes, and in which processes; of several commands."""

import typing

from gaze_jax.commands.flags import Flags, Values
from gaze_jax.errors import UserError, renamed
from gaze_jax.parallel import together
from gaze_jax.parallel.distributed import HEARTBEAT, ProcessConfig, start

if typing.TYPE_CHECKING:
    from jax.sharding import Mesh

SIZES = ("fsdp", "tensor", "context")
"""Flags for the mesh: the sizes of its axes, except for data, which is what they leave."""


def define_mesh(flags: Flags) -> None:
    """Flags for the mesh of a command that reads a checkpoint."""
    flags.boolean("all_devices", False, "Split batches over all devices, not one.")
    flags.integer("fsdp", None, "Devices that share one copy of the parameters; default: 1.")
    flags.integer("tensor", None, "Devices that share every layer's heads and channels; default: 1.")
    flags.integer("context", None, "Devices that share each sequence and its cache; default: 1.")


def define_processes(flags: Flags) -> None:
    """Flags for a command of several processes."""
    flags.group("Several processes")
    flags.boolean(
        "distributed",
        None,
        "There are several processes, which find each other on Cloud TPU, SLURM and Open MPI; if srun or "
        "mpirun has started several, that is the default.",
    )
    flags.string("coordinator", None, "Where the first process can be reached.", "HOST:PORT")
    flags.integer("num_processes", None, "How many processes there are, with --coordinator.")
    flags.integer("process_id", None, "Which of them this is, from 0, with --coordinator.")
    flags.integer(
        "heartbeat_seconds", HEARTBEAT, "After how long without a sign of life a process counts as dead."
    )


def start_processes(values: Values, *, saves: bool) -> bool:
    """Join the other processes, if there are any; see :func:`gaze_jax.parallel.distributed.start`."""
    config = ProcessConfig(
        values.distributed,
        values.coordinator,
        values.num_processes,
        values.process_id,
        values.heartbeat_seconds,
    )
    return start(config, saves=saves)


def check_sizes(all_devices: bool, sizes: typing.Mapping[str, int | None]) -> None:
    """Refuse sizes of a mesh that are none, and several processes without a mesh.

    Raises:
      UserError: a size is less than 1, or there are several processes and ``all_devices`` is False.
    """
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1.")
    if together.several() and not all_devices:
        raise UserError("Several processes compute together, on the devices of all; give --all_devices.")


def mesh_of(all_devices: bool, sizes: typing.Mapping[str, int | None]) -> "Mesh | None":
    """The mesh of all devices, or None for one device.

    Raises:
      UserError: the sizes do not fit the number of devices.
    """
    from gaze_jax.parallel.mesh import MeshConfig, make_mesh

    if not all_devices:
        return None
    with renamed({f"mesh.{name}": f"--{name}" for name in SIZES}):
        return make_mesh(MeshConfig(**{name: size or 1 for name, size in sizes.items()}))
