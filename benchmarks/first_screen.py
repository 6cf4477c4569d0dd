"""Draws the figure of README's first screen: tokens and where they looked, and time per token by visual tokens.

python -m benchmarks.first_screen

Tokens are panels of docs/images/gaze.png; times are those of benchmarks/results/generate_cpu.json, batch 1.
Needs matplotlib (the plot extra).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# In gaze.png, pixels: where the first panel starts, the steps to the next column and row, a panel's size.
_LEFT, _TOP, _ACROSS, _DOWN, _SIDE = 28, 94, 178, 212, 160
_LABEL = 28  # below a panel: the token
_PANELS = ((0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4))
"""(row, column) of the panels to show: digits of an answer, in their order."""

LINES = {
    "transformers": ("transformers, dense", "#8a6d3b"),
    "dense": ("gaze_jax, dense", "#555f6b"),
    "kv_head": ("gaze_jax, Gaze", "#00796b"),
}
"""Key of the JSON -> label and colour."""


def series(report: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """(visual tokens, median milliseconds per token) of each of :data:`LINES`, for a batch of one."""
    rows = [row for row in report["rows"] if row["part"] == "decode" and row["batch"] == 1]
    rows.sort(key=lambda row: row["tokens"])
    return {name: [(row["tokens"], row["ms"][name]["median"]) for row in rows] for name in LINES}


def panels(sheet: Image.Image) -> list[np.ndarray]:
    """uint8 [height, width, 3] of each of :data:`_PANELS`, with its token below."""
    found = []
    for row, column in _PANELS:
        x, y = _LEFT + column * _ACROSS, _TOP + row * _DOWN
        # The margin holds the outline; the count at the right of the token is left out.
        panel = sheet.crop((x - 2, y - 2, x + _SIDE + 2, y + _SIDE + _LABEL)).convert("RGB")
        pixels = np.array(panel)
        pixels[_SIDE + 5 :, _SIDE // 2 :] = pixels[-1, -1]
        found.append(pixels)
    return found


def draw(report: dict[str, Any], sheet: Image.Image, path: Path) -> None:
    """Write the figure as a PNG of 1,600 pixels across on opaque white."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(8, 3.5), dpi=200, facecolor="white")
    heading = {"fontsize": 10, "fontweight": "bold", "loc": "left", "pad": 8}
    grid = figure.add_gridspec(2, 3, left=0.012, right=0.5, top=0.9, bottom=0.09, wspace=0.04, hspace=0.06)
    for number, pixels in enumerate(panels(sheet)):
        axes = figure.add_subplot(grid[divmod(number, 3)])
        axes.imshow(np.where(pixels >= 245, 255, pixels))  # the sheet's paper is nearly white
        axes.axis("off")
        if number == 0:
            axes.set_title("Every token selects the regions it reads", **heading)

    axes = figure.add_axes((0.585, 0.215, 0.4, 0.685))
    axes.set_title("Milliseconds per generated token", **heading)
    _plot(axes, series(report))
    figure.text(0.012, 0.03, "Digits: E. Alpaydin and C. Kaynak, UCI, CC BY 4.0", fontsize=6, color="#666666")
    what = f"{report['model']}'s size, {report['dtype']}, batch 1. {report['date']}, {report['device']}"
    figure.text(0.985, 0.03, what.replace("(R)", ""), fontsize=6, color="#666666", ha="right")
    figure.savefig(path, facecolor="white")
    pyplot.close(figure)
    # Few colours: half the bytes, and no difference to see.
    with Image.open(path) as image:
        image.convert("RGB").quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)


def _plot(axes: Any, lines: dict[str, list[tuple[int, float]]]) -> None:
    for name, points in lines.items():
        label, colour = LINES[name]
        tokens, spent = zip(*points, strict=True)
        axes.plot(tokens, spent, color=colour, marker="o", markersize=4, linewidth=2)
        axes.annotate(f"{spent[-1]:.0f}", (tokens[-1], spent[-1]), (6, -3), textcoords="offset points", color=colour)
        axes.annotate(label, (tokens[-1], spent[-1]), (-4, 7), textcoords="offset points", color=colour, ha="right")
    counts = [tokens for tokens, _ in next(iter(lines.values()))]
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.set_xlim(counts[0] * 0.8, counts[-1] * 1.35)
    axes.set_ylim(0)
    axes.set_xlabel("visual tokens in the cache")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)


def main(argv: list[str] | None = None) -> None:
    """Read the results and the sheet, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/generate_cpu.json"))
    parser.add_argument("--sheet", type=Path, default=Path("docs/images/gaze.png"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/first_screen.png"))
    args = parser.parse_args(argv)
    report = json.loads(args.results.read_text(encoding="utf-8"))
    with Image.open(args.sheet) as sheet:
        draw(report, sheet, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
