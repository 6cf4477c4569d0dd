"""Draws the figure of README's first screen: where tokens looked, and time per token by visual tokens.

python -m benchmarks.first_screen

Tokens are panels of docs/images/gaze.png; times are those of batch 1 in
benchmarks/results/generate_decode_cpu.json. Needs matplotlib (the plot extra).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# In gaze.png, pixels: where the first panel starts, the steps to the next column and row, a panel's size.
_LEFT, _TOP, _ACROSS, _DOWN, SIDE = 28, 94, 178, 212, 160
_LABEL = 28  # below a panel: the token
_PANELS = ((0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4))
"""(row, column) of the panels to show: digits of an answer, in their order."""

LINES = {
    "transformers": ("transformers", "#8a5a00"),
    "dense": ("dense", "#4a5560"),
    "head": ("Gaze, per head", "#3b8fb8"),
    "kv_head": ("Gaze, per kv head", "#00796b"),
}
"""Key of the JSON -> label and colour."""


Point = tuple[int, float, list[float]]
"""Visual tokens, the median of milliseconds per token, and its quartiles."""


def rows_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that the plot shows: decoding with a batch of one, by visual tokens."""
    rows = [row for row in report["rows"] if row["part"] == "decode" and row["batch"] == 1]
    return sorted(rows, key=lambda row: row["tokens"])


def series(report: dict[str, Any]) -> dict[str, list[Point]]:
    """The points of each of :data:`LINES`."""
    return {
        name: [(row["tokens"], row["ms"][name]["median"], row["ms"][name]["iqr"]) for row in rows_of(report)]
        for name in LINES
    }


def footnote(report: dict[str, Any]) -> str:
    """What was measured, where and when, in three lines."""
    kept = [f"{row['top_k'] / row['regions']:.0%}" for row in rows_of(report)]
    device = report["device"].replace("(R)", "").replace(" Processor", "")
    return (
        f"{report['model']}'s size, random weights, {report['dtype']}, batch 1; medians and quartiles\n"
        f"Gaze: {', '.join(kept)} of the regions, one selection per query head or per kv head\n"
        f"{report['date']}, {device}"
    )


def panels(sheet: Image.Image) -> list[np.ndarray]:
    """uint8 [height, width, 3] of each of :data:`_PANELS`, with its token below."""
    found = []
    for row, column in _PANELS:
        x, y = _LEFT + column * _ACROSS, _TOP + row * _DOWN
        # The margin holds the outline; the count at the right of the token is left out.
        panel = sheet.crop((x - 2, y - 2, x + SIDE + 2, y + SIDE + _LABEL)).convert("RGB")
        pixels = np.array(panel)
        pixels[SIDE + 5 :, SIDE // 2 :] = pixels[-1, -1]
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

    axes = figure.add_axes((0.585, 0.31, 0.225, 0.59))
    axes.set_title("Milliseconds per generated token, on a CPU", **heading, x=-0.16)
    _plot(axes, series(report))
    figure.text(0.012, 0.02, "Digits: E. Alpaydin and C. Kaynak, UCI, CC BY 4.0", fontsize=6, color="#666666")
    figure.text(0.545, 0.02, footnote(report), fontsize=6, color="#666666", linespacing=1.4)
    figure.savefig(path, facecolor="white")
    pyplot.close(figure)
    # Few colours: half the bytes, and no difference to see.
    with Image.open(path) as image:
        image.convert("RGB").quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)


def spread(values: dict[str, float], least: float) -> dict[str, float]:
    """Heights of labels near their values, in the same order and at least ``least`` apart."""
    found: dict[str, float] = {}
    below = -least
    for name in sorted(values, key=values.__getitem__):
        below = found[name] = max(values[name], below + least)
    return found


def _plot(axes: Any, lines: dict[str, list[Point]]) -> None:
    ends = {name: points[-1][1] for name, points in lines.items()}
    heights = spread(ends, 0.065 * max(ends.values()))
    for name, points in lines.items():
        label, colour = LINES[name]
        tokens, spent, quartiles = zip(*points, strict=True)
        axes.plot(tokens, spent, color=colour, marker="o", markersize=4.5, linewidth=2)
        axes.vlines(tokens, *zip(*quartiles, strict=True), color=colour, linewidth=5, alpha=0.3)
        axes.annotate(
            f"{spent[-1]:.0f}  {label}",
            (tokens[-1], spent[-1]),
            (1.06, heights[name]),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            fontweight="bold",
            fontsize=7.5,
            va="center",
        )
    counts = [point[0] for point in next(iter(lines.values()))]
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.set_xlim(counts[0] * 0.8, counts[-1] * 1.1)
    axes.set_ylim(0)
    axes.set_xlabel("visual tokens in the cache", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)


def main(argv: list[str] | None = None) -> None:
    """Read the results and the sheet, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/generate_decode_cpu.json"))
    parser.add_argument("--sheet", type=Path, default=Path("docs/images/gaze.png"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/first_screen.png"))
    args = parser.parse_args(argv)
    report = json.loads(args.results.read_text(encoding="utf-8"))
    with Image.open(args.sheet) as sheet:
        draw(report, sheet, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
