"""The device mesh: its axes and their sizes. ``rules.py`` says what is sharded over them."""

import dataclasses
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gaze_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices.

    Attributes:
      data: number of copies of the parameters; the batch is split over them. -1: all devices that ``fsdp``
        leaves.
      fsdp: number of devices that share one copy of the parameters; the batch is split over them too. -1:
        all devices that ``data`` leaves.
      tensor: number of devices that share every layer's work on the same tokens: attention by heads, the
        MLP by its hidden channels, embedding and logits by the vocabulary. It must divide the kv heads.
      context: number of devices that share each sequence: its regions, its text and, in decoding, its cache.
        They share a copy of the parameters as those of ``fsdp`` do.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Resolve -1 and check the product.

    Raises:
      UserError: the sizes do not multiply to ``devices``, or more than one is -1.
    """
    sizes = {name: getattr(config, name) for name in AXES}
    written = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"Mesh sizes must be positive and at most one of them -1, got {written}.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and devices % known == 0:
        sizes[open_axes[0]] = devices // known
    if math.prod(sizes.values()) != devices:
        raise UserError(
            f"The mesh {written} does not fit {devices} device{'s' * (devices != 1)}; the product of its "
            f"sizes must be {devices}, with one -1 for what the others leave."
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh with axes :data:`AXES` over ``devices`` (default: all).

    Raises:
      UserError: see :func:`axis_sizes`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    # Auto: the compiler shards activations. JAX's default, explicit axes, rejects embedding lookups.
    kinds = (AxisType.Auto,) * len(AXES)
    # Neighbours in a mesh axis are neighbours in the torus, even if an axis takes a part of one of its sides.
    placed = mesh_utils.create_device_mesh(
        tuple(sizes.values()), list(devices), allow_split_physical_axes=True
    )
    return Mesh(placed, AXES, axis_types=kinds)


def describe_devices() -> str:
    """Describe the accelerators, or the processor and the number of cores this process may use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.processor()}"
