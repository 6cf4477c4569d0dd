"""Ask a question about an image; print the answer and where each of its tokens looked.

python examples/ask_image.py ckpt/llava street.jpg "What is this?" --out=answer

Writes answer.html, a page for any browser, and answer.gaze, the trace that it was made from.
"""

import argparse
from pathlib import Path

import numpy as np

import gaze_jax
from gaze_jax.infer.trace import Trace
from gaze_jax.infer.trace_file import save
from gaze_jax.viewer.html import viewer_page


def where(trace: Trace, token: int) -> tuple[list[int], float]:
    """The region that most heads of all layers selected: its box in pixels, and their fraction."""
    votes = trace.mask()[token].mean(axis=(0, 1))  # mask is bool [tokens, layers, heads, regions]
    region = int(votes.argmax())
    view = next(view for view in trace.views if (view.regions == region).any())
    left, top, right, bottom = view.corners  # of the view's grid, in pixels
    rows, columns = np.nonzero(view.regions == region)
    height, width = view.regions.shape
    x0, x1 = np.interp([columns.min(), columns.max() + 1], [0, width], [left, right])
    y0, y1 = np.interp([rows.min(), rows.max() + 1], [0, height], [top, bottom])
    return [round(edge) for edge in (x0, y0, x1, y1)], float(votes[region])


def main() -> None:
    """Load, ask, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--gaze_keep", type=float, default=0.1, help="fraction of the regions per query")
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("answer"), help="name of the files, without suffix")
    args = parser.parse_args()

    model = gaze_jax.load(args.checkpoint)
    gaze = gaze_jax.GazeOptions(keep=args.gaze_keep)
    answer = model.generate(
        args.question, images=[args.image], gaze=gaze, max_tokens=args.max_tokens, return_trace=True
    )
    print(f"{answer.text}\n")
    for number, token in enumerate(answer.tokens):
        box, fraction = where(answer.trace, number)
        print(f"{token!r:>12}  {fraction:4.0%} of the heads selected the region at {box}")

    save(answer.trace, args.out.with_suffix(".gaze"))
    args.out.with_suffix(".html").write_text(viewer_page(answer.trace), encoding="utf-8")


if __name__ == "__main__":
    main()
