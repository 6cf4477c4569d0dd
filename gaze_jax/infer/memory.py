"""Memory of a cache, and free memory of a device: checked before anything is computed."""

from pathlib import Path

import jax

from gaze_jax.core.regions import descriptor_width
from gaze_jax.models.config import DTYPES, MLLMConfig


def cache_bytes(
    config: MLLMConfig, rows: int, regions: int, slots: int, text: int, *, on_host: bool = False
) -> int:
    """Bytes of a cache on the device: L * B * K * (2bDPR + bER + 2bDS), without padding.

    b is the bytes per number and E the width of a descriptor. An int8 visual cache has b = 1 and 4 more bytes
    per token for the scale of its key and of its value. An offloaded cache has only descriptors and the text
    stream on the device.

    Args:
      config: the model's configuration.
      rows, regions, slots, text: B, R, P, S.
      on_host: the device is the host's CPU, so an offloaded visual cache counts too.
    """
    c, gaze = config.decoder, config.gaze
    size = DTYPES[config.dtype](0).dtype.itemsize
    token = c.head_dim + 4 if gaze.visual_dtype == "int8" else size * c.head_dim
    away = gaze.decode_implementation == "offload" and not on_host
    visual = 0 if away else 2 * token * slots * regions
    described = size * descriptor_width(gaze.descriptor, c.head_dim) * regions
    return c.depth * rows * c.num_kv_heads * (visual + described + 2 * size * c.head_dim * text)


def free_bytes(device: jax.Device) -> int | None:
    """Free bytes on a device, for a CPU of the machine; None if unknown."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    table = Path("/proc/meminfo")
    if device.platform != "cpu" or not table.exists():
        return None
    lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def format_bytes(count: int) -> str:
    """A number of bytes as text, such as "1.4 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
