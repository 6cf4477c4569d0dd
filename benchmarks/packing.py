"""How well plans fill rows, and how long they take: packed, and one sample per row in one and four shapes.

python -m benchmarks.packing --json=benchmarks/results/packing.json

Corpora are drawn at random. An image is 576 tokens in 16 regions of 36 slots, one image of the tower. A video
has 8, 16, 32 or 64 frames, each an image of the tower, with 576 tokens, or in every other video 64 tokens in
4 regions of 16 slots. Text is log-normal, 250 tokens on average and 8 to 2000, with 4 context tokens per
image.
"""

import argparse
import time
from typing import Any

import numpy as np

from benchmarks import timing
from gaze_jax.data.plan import Limits, make_plan

# Mix -> parts of text alone, of one image, of two to four images, and of videos.
MIXES = {
    "mixed": (0.15, 0.45, 0.10, 0.30),
    "images": (0.00, 0.80, 0.20, 0.00),
    "images, text": (0.30, 0.50, 0.20, 0.00),
    "videos": (0.00, 0.00, 0.00, 1.00),
    "text": (1.00, 0.00, 0.00, 0.00),
}
# How -> (pack, buckets).
HOW = {"packed, 1": (True, 1), "packed, 4": (True, 4), "padded, 1": (False, 1), "padded, 4": (False, 4)}
CONTEXT = 4


def corpus(samples: int, mix: tuple[float, ...], seed: int = 0) -> np.ndarray:
    """int64 [samples, 4]: text, regions, images and slots of a corpus that the module describes."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, samples, p=mix)
    text = np.clip(np.exp(rng.normal(np.log(250) - 0.32, 0.8, samples)), 8, 2000).astype(np.int64)
    frames = rng.choice([8, 16, 32, 64], samples)
    images = np.select([kind == 0, kind == 1, kind == 2], [0, 1, rng.integers(2, 5, samples)], frames)
    small = (kind == 3) & (rng.random(samples) < 0.5)
    slots = np.where(images == 0, 0, np.where(small, 16, 36))
    return np.stack([text + CONTEXT * images, images * np.where(small, 4, 16), images, slots], axis=1)


def measure(name: str, samples: int, how: str) -> dict[str, Any]:
    """One row: a plan of a corpus."""
    pack, buckets = HOW[how]
    lengths = corpus(samples, MIXES[name])
    start = time.perf_counter()
    plan = make_plan(lengths, np.arange(samples), pack=pack, limits=Limits(), buckets=buckets, seed=0)
    seconds = time.perf_counter() - start
    rows = np.bincount(plan.bucket)
    sizes = np.array([[b.text, b.regions, b.images, b.slots] for b in plan.buckets])
    used, allocated = lengths[:, :3].sum(axis=0), rows @ sizes[:, :3]
    fill = {key: u / a if a else None for key, u, a in zip(("text", "regions", "images"), used, allocated)}
    tokens = int((lengths[:, 0] + lengths[:, 1] * lengths[:, 3]).sum())
    return {
        "mix": name,
        "how": how,
        "samples": samples,
        "rows": len(plan),
        "buckets": [
            {"text": b.text, "regions": b.regions, "images": b.images, "slots": b.slots, "rows": int(n)}
            for b, n in zip(plan.buckets, rows)
        ],
        "fill": fill,
        "binding": max(value for value in fill.values() if value is not None),
        "tokens": tokens / int(rows @ (sizes[:, 0] + sizes[:, 1] * sizes[:, 3])),
        "seconds": seconds,
        "digest": plan.digest(),
    }


def show(row: dict[str, Any]) -> None:
    fill = " ".join("    -" if value is None else f"{value:5.3f}" for value in row["fill"].values())
    budgets = " ".join(
        "/".join(str(bucket[key]) for key in ("text", "regions", "images", "slots"))
        for bucket in row["buckets"]
    )
    print(
        f"{row['mix']:13} {row['how']:10} {row['samples']:9,} {row['rows']:9,} {fill} {row['binding']:8.3f} "
        f"{row['tokens']:7.3f} {row['seconds']:6.2f} s  {budgets}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=50_000, help="samples of a corpus")
    parser.add_argument("--large", type=int, default=1_000_000, help="samples of one more mixed corpus")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    print(
        f"{'mix':13} {'how':10} {'samples':>9} {'rows':>9} {'text':>5} {'reg.':>5} {'img.':>5} "
        f"{'binding':>8} {'tokens':>7} {'time':>8}  text/regions/images/slots"
    )
    cases = [(name, args.samples, how) for name in MIXES for how in HOW]
    rows = []
    for case in (*cases, *(("mixed", args.large, how) for how in HOW)):
        rows.append(measure(*case))
        show(rows[-1])
    timing.write(args.json, timing.report("benchmarks.packing", None, rows))


if __name__ == "__main__":
    main()
