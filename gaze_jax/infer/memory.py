"""What a cache takes and what there is, so that too much is refused before anything is computed."""

from pathlib import Path

import jax

from gaze_jax.core.regions import descriptor_width
from gaze_jax.models.config import DTYPES, MLLMConfig


def cache_bytes(
    config: MLLMConfig, rows: int, regions: int, slots: int, text: int, *, on_host: bool = False
) -> int:
    """Bytes of a cache on the device: L * B * K * (2bDPR + bER + 2bDS), its padding not counted.

    Args:
      config: of the model. An int8 cache has a byte for b, and 4 per token and side for scales; one that
        is kept by the host has nothing but descriptors and the text stream here.
      rows, regions, slots, text: B, R, P, S.
      on_host: the device is the host, so what it keeps for a device counts too.
    """
    c, gaze = config.decoder, config.gaze
    size = DTYPES[config.dtype](0).dtype.itemsize
    token = c.head_dim + 4 if gaze.visual_dtype == "int8" else size * c.head_dim
    away = gaze.decode_implementation == "offload" and not on_host
    visual = 0 if away else 2 * token * slots * regions
    described = size * descriptor_width(gaze.descriptor, c.head_dim) * regions
    return c.depth * rows * c.num_kv_heads * (visual + described + 2 * size * c.head_dim * text)


def free_bytes(device: jax.Device) -> int | None:
    """Memory that is left on a device; of the machine, where the device is a CPU; None if nobody says."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    table = Path("/proc/meminfo")
    if device.platform != "cpu" or not table.exists():
        return None
    lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def written(count: int) -> str:
    """A number of bytes for a person: "1.4 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
