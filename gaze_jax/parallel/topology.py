"""TPU topologies to compile for on a machine without a TPU, and what their chips can do at most."""

import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gaze_jax.errors import UserError, first_line

if TYPE_CHECKING:
    import jax

ENVIRONMENT: Mapping[str, str] = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # One type serves every topology.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
"""What libtpu and jax read when they load; without it libtpu looks for the machine it believes to run on."""

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of a chip, as its maker states them.

    Attributes:
      hbm_bytes: bytes of HBM that a program may use.
      flops_per_second: peak of bfloat16 matrix products.
      hbm_bytes_per_second: bandwidth of the HBM.
      ici_bytes_per_second: what the chip can send to its neighbours over all links together; it can receive
        as much at the same time.
    """

    hbm_bytes: int
    flops_per_second: float
    hbm_bytes_per_second: float
    ici_bytes_per_second: float


# hbm_bytes: "... of 15.75G hbm" is what libtpu 0.0.50 says of a program that does not fit, its G being 2**30
# (0.0.42 gives v5p and v6e 0.01G more); the rest of a chip's HBM is the runtime's. The other figures:
# docs.cloud.google.com/tpu/docs/v5e, v5p and v6e, read in November 2026, which give the interconnect in both
# directions together: 400, 1200 and 800 GB/s.
CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(int(15.75 * _GIB), 197e12, 819e9, 200e9),
    "v5p": Chip(int(95.73 * _GIB), 459e12, 2765e9, 600e9),
    "v6e": Chip(int(31.24 * _GIB), 918e12, 1638e9, 400e9),
}
"""Name of a chip, the first part of a topology's name -> its figures."""

_KINDS: Mapping[str, float] = {
    **{f"TPU {name}": CHIPS["v5e"].flops_per_second for name in ("v5 lite", "v5e")},
    **{f"TPU {name}": CHIPS["v5p"].flops_per_second for name in ("v5", "v5p")},
    **{f"TPU {name}": CHIPS["v6e"].flops_per_second for name in ("v6 lite", "v6e")},
    # NVIDIA's data sheets, without sparsity: 312 TFLOPS, and half of the 1,979 that they give with it.
    **{f"NVIDIA A100-SXM4-{memory}GB": 312e12 for memory in (40, 80)},
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H200": 989.5e12,
}
"""``device_kind`` -> peak of bfloat16 matrix products, as the maker states it."""


def peak_flops(device_kind: str) -> float | None:
    """FLOPs per second that a chip reaches at most in bfloat16; None if it is not known, as of a CPU."""
    return _KINDS.get(device_kind)


EXAMPLES = "v5e:16x16, v5p:4x4x8 or v6e:16x16"


def prepare() -> None:
    """Set what libtpu and jax read when they load; what the user has set stays.

    To be called before jax is used. If it is imported already, it is told to use the CPU, unless the user
    chose another platform.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "jax" in sys.modules:
        import jax

        if not jax.config.jax_platforms:  # type: ignore[attr-defined]
            jax.config.update("jax_platforms", ENVIRONMENT["JAX_PLATFORMS"])


def chip_of(topology: str) -> Chip:
    """The figures of the chip of a topology such as ``v5p:4x4x8``.

    Raises:
      UserError: it is no name of a topology, or the chip has no figures here.
    """
    if not re.fullmatch(r"\w+:\d+(x\d+){1,2}", topology):
        raise UserError(f"--topology={topology} must be a chip and its mesh of chips, such as {EXAMPLES}.")
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise UserError(
            f"--topology={topology} names a chip other than {', '.join(CHIPS)}; give one of these."
        )
    return CHIPS[name]


def load_devices(topology: str) -> Sequence["jax.Device"]:
    """The devices of a topology, for a mesh to compile for; nothing can run on them.

    Args:
      topology: as :func:`chip_of` takes it.

    Raises:
      UserError: as :func:`chip_of`; or there is no libtpu, or it knows no such topology.
    """
    chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "Compiling for TPUs needs libtpu; install the extra: pip install 'gaze-jax[tpu-aot]'."
        )
    prepare()
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # libtpu raises errors of several types, some of them of C++
        raise UserError(
            f"--topology={topology} cannot be loaded ({first_line(error)}); give one that exists, such as "
            f"{EXAMPLES}."
        ) from error


def needed_bytes(message: str) -> int | None:
    """HBM that a program takes which does not fit, from the compiler's message; None if it tells of no HBM.

    It says "Used 19.25G of 15.75G hbm" or "(144.00G) exceeds available HBM", its G being 2**30.
    """
    found = re.search(
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm|\(([\d.]+)([KMGT])\) exceeds available HBM", message
    )
    if found is None:
        return None
    number, prefix = found[1] or found[3], found[2] or found[4]
    return int(float(number) * 2 ** (10 * (1 + "KMGT".index(prefix))))
