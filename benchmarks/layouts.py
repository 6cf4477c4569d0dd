"""Views, tokens and regions of images and videos, and the part of them that a query reads.

python -m benchmarks.layouts --json=benchmarks/results/layouts.json

Counts, not times, for the published families, with real picture sizes and videos of 16, 64 and 128 frames. A
query of the language model attends to a tenth of the regions (rounded up), all newlines, context tokens and
64 text tokens; "read" is the fraction of all keys. "Slot fill" is the fraction of cache slots with a token.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gaze_jax.core.layout import VisualLayout
from gaze_jax.core.regions import partition_frames
from gaze_jax.data.views import GridShape, frame_shape, image_shapes
from gaze_jax.families import MODELS, get_family

FAMILIES = {
    "cambrian (paper), 384": "cambrian-4b-384",
    "cambrian (paper), 512": "cambrian-4b-512",
    "llava-onevision": "llava-onevision-qwen2-7b",
    "cambrian-s": "cambrian-s-7b",
}
IMAGES = {"photo 640x480": (480, 640), "full HD 1920x1080": (1080, 1920), "page 1240x1754": (1754, 1240)}
FRAME = (720, 1280)
FRAMES = (16, 64, 128)
KEEP = 0.1
TEXT = 64
LEAST_FILL = 0.87
"""Minimum slot fill of presets; below it they store and read too much padding."""


def describe(
    layout: VisualLayout, groups: list[tuple[int, GridShape]], end_newline: bool, video: bool
) -> dict[str, Any]:
    """Count tokens and regions for groups of equal views, given as (number, grid)."""
    region = layout.frame_region if video else (1, *layout.region)
    tables, newlines = [], int(end_newline)
    for count, (height, width, rows) in groups:
        routed = rows and layout.newlines == "region"
        tables.append(partition_frames(count, height, width, region, newlines=routed))
        newlines += count * height * (rows and not routed)
    views = sum(count for count, _ in groups)
    slots = max(table.shape[1] for table in tables)
    regions = sum(len(table) for table in tables)
    tokens = sum(int((table >= 0).sum()) for table in tables)
    context = views * layout.context_tokens
    top_k = math.ceil(KEEP * regions)
    always = newlines + context + TEXT
    return {
        "views": views,
        "tokens": tokens,
        "regions": regions,
        "slots": slots,
        "slot_fill": tokens / (regions * slots),
        "newlines": newlines,
        "context": context,
        "top_k": top_k,
        "read": (top_k * tokens / regions + always) / (tokens + always),
    }


def rows() -> Iterator[dict[str, Any]]:
    """A row for every family, input and newline convention."""
    for family, name in FAMILIES.items():
        whole = MODELS[name].layout
        style = get_family(whole.views.style).views
        for newlines in ("text", "region"):
            layout = dataclasses.replace(whole, newlines=newlines)
            shown = []
            for label, size in IMAGES.items():
                shapes, end = image_shapes(style, layout, *size, alone=True)
                shown.append((label, [(1, shape) for shape in shapes], end, False))
            grid = frame_shape(style, layout, *FRAME)
            end = style.video_end_newline
            shown += [(f"{count} frames 1280x720", [(count, grid)], end, True) for count in FRAMES]
            if newlines == "region" and not any(shape[2] for _, groups, _, _ in shown for _, shape in groups):
                continue  # no newline inside a view, so no convention to choose
            for label, groups, end, video in shown:
                yield {"family": family, "shown": label, "newlines_in": newlines} | describe(
                    layout, groups, end, video
                )


def line(row: dict[str, Any]) -> str:
    """Format a row as text."""
    return (
        f"{row['family']:22}{row['shown']:22}{row['newlines_in']:>8}{row['views']:>6}{row['tokens']:>8,}"
        f"{row['regions']:>8,}{row['slots']:>6}{row['slot_fill']:>7.2f}{row['newlines']:>9,}"
        f"{row['context']:>8,}{row['top_k']:>7}{row['read']:>8.3f}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layouts", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(argv)
    found = list(rows())
    print(
        f"{'':44}{'newline':>8}{'views':>6}{'tokens':>8}{'regions':>8}{'slots':>6}{'fill':>7}"
        f"{'newlines':>9}{'context':>8}{'top_k':>7}{'read':>8}"
    )
    for row in found:
        print(line(row))
    if args.json is not None:
        args.json.write_text(json.dumps({"keep": KEEP, "text": TEXT, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
