"""Steer an answer: the same question, free to look anywhere and restricted to a box.

python examples/steer.py ckpt/llava street.jpg "What does the sign say?" 400,80,620,190

The box is x0,y0,x1,y1 in pixels of the image.
"""

import argparse

import numpy as np

import gaze_jax
from gaze_jax.infer.steer import bias_of


def main() -> None:
    """Ask twice and count how many of the selected regions lie in the box."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("box")
    parser.add_argument("--gaze_keep", type=float, default=0.1, help="fraction of the regions per query")
    parser.add_argument("--max_tokens", type=int, default=64)
    args = parser.parse_args()

    model = gaze_jax.load(args.checkpoint)
    box = gaze_jax.LookAt.parse(args.box)
    for name, look_at in (("free", ()), ("steered", (box,))):
        gaze = gaze_jax.GazeOptions(keep=args.gaze_keep, look_at=look_at)
        answer = model.generate(
            args.question, images=[args.image], gaze=gaze, max_tokens=args.max_tokens, return_trace=True
        )
        trace = answer.trace
        # Regions outside the box have a bias of minus infinity, the same in every layer.
        inside = np.isfinite(bias_of([box], trace.views, trace.layers, trace.regions)[0])
        selected = trace.mask()  # bool [tokens, layers, heads, regions]
        fraction = selected[..., inside].sum() / selected.sum()
        print(f"{name}: {fraction:.0%} of the selected regions touch the box")
        print(f"  {answer.text!r}")


if __name__ == "__main__":
    main()
