"""Rows of benchmarks/decode.py: from seconds per layer to columns, and to a line of text."""

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks import timing


def columns(
    per: Mapping[str, list[float]],
    select_per: str,
    union: float,
    floor: float,
    read: float | None,
    bandwidth: float,
    einsum_form: str,
) -> dict[str, Any]:
    """The results of one ``select_per``: milliseconds per layer, and the speedup over competitors.

    Args:
      per: competitor -> seconds per layer in each round.
      select_per: whose results.
      union: mean number of regions that a kv head's heads select together.
      floor: bytes that a layer must read.
      read: bytes that the implementation counts itself, per layer; None if it does not.
      bandwidth: bytes per second that a large sum reads.
      einsum_form: the faster of the two.
    """

    def ms(label: str) -> dict[str, Any]:
        return {
            "median": 1e3 * statistics.median(per[label]),
            "iqr": [1e3 * t for t in timing.quartiles(per[label])],
        }

    against = {"einsum": einsum_form} | {
        label: label for label in ("dot_product_attention", "cudnn", "torch") if label in per
    }
    row: dict[str, Any] = {
        "rounds": len(per[f"{select_per} op"]),
        "ms": ms(f"{select_per} op"),
        "union": union,
        "bandwidth": bandwidth,
        "floor_bytes": floor,
        "floor_ms": 1e3 * floor / bandwidth,
        "read_bytes": read,
        "times_floor": statistics.median(per[f"{select_per} op"]) * bandwidth / floor,
        "einsum_form": einsum_form,
        "dense_ms": {label: ms(source) for label, source in against.items()},
        "speedup": {
            label: timing.ratio(per, source, f"{select_per} op") for label, source in against.items()
        },
    }
    if f"{select_per} routed" in per:
        row["routing_ms"] = ms(f"{select_per} routing")
        row["routed_ms"] = ms(f"{select_per} routed")
        row["routed_speedup"] = {
            label: timing.ratio(per, source, f"{select_per} routed") for label, source in against.items()
        }
    return row


def line(row: Mapping[str, Any]) -> str:
    """Format a row as text."""
    top_k = "all" if row["top_k"] is None else row["top_k"]
    name = f"{row['tokens']}/{row['regions']}/{top_k} B{row['batch']} {row['heads']} {row['dtype']}"
    text = f"{name:44}{row['implementation']:>10}{row['select_per']:>9}{row['ms']['median']:>9.3f} ms"
    text += f"{row['times_floor']:>6.2f} x floor (U {row['union']:.0f}, {row['bandwidth'] / 1e9:.1f} GB/s)"
    if row["read_bytes"] is not None:
        text += f"  read {row['read_bytes'] / row['floor_bytes']:.2f} x floor"
    text += "".join(
        f"  {k} {v['median']:.3f} ({row['speedup'][k]['median']:.2f}x)" for k, v in row["dense_ms"].items()
    )
    if "routed_ms" in row:
        text += (
            f"  routed {row['routed_ms']['median']:.3f} ({row['routed_speedup']['einsum']['median']:.2f}x), "
            f"routing alone {row['routing_ms']['median']:.3f}"
        )
    text += f"  [{row['rounds']} round{'s' if row['rounds'] > 1 else ''}]"
    return text + (f"  [{row['note']}: {row['layers']}]" if "note" in row else "")
