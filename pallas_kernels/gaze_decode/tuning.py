"""Sizes of the kernels' tiles: a JSON file per platform, device kind or "default" -> dtype -> sizes.

Beside an entry's sizes is "measured": what a tuning run found on such a device, or null.
"""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Table = dict[str, dict[str, dict[str, Any]]]


def path(platform: str) -> pathlib.Path:
    """The file of "tpu" or "gpu"."""
    return pathlib.Path(__file__).with_name(f"{platform}_tiles.json")


@functools.cache
def tuned(platform: str) -> Table:
    """All entries of a platform."""
    table: Table = json.loads(path(platform).read_text(encoding="utf-8"))
    return table


def sizes(platform: str, dtype: DTypeLike) -> dict[str, Any]:
    """The entry of the first device's kind, or the default where that has none."""
    table = tuned(platform)
    return table.get(jax.devices()[0].device_kind, table["default"])[jnp.dtype(dtype).name]
