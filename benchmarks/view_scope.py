"""A training step with ``visual_scope="view"`` beside "all": time, and the FLOPs that are really computed.

python -m benchmarks.view_scope --json=benchmarks/results/view_scope.json

One sequence of frames, 64 tokens and 4 context tokens each, and text before and behind; a small decoder,
whose attention weighs more than its other products, and a tower of one layer. The step is forward, backward
and update. Products outside of the chunks of attention are counted from the step's jaxpr, those of a chunk
times the chunks that were visited, counted while the step runs.
"""

import argparse
import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from gaze_jax.core.streams import EMPTY, IGNORE, Kind, Streams
from gaze_jax.corpora.digits import DigitsConfig
from gaze_jax.models.config import DecoderConfig, GazeConfig, MLLMConfig, VisionConfig
from gaze_jax.parallel.costs import count_flops
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train.config import Experiment
from gaze_jax.train.optimizer import OptimizerConfig
from gaze_jax.train.step import init_state, step_function
from pallas_kernels.gaze_prefill import chunks

SIDE, REGION, CONTEXT = 8, 4, 4
"""Tokens along a side of a frame and of a region, and context tokens of a frame."""
SCOPES = ("all", "view")


def experiment(scope: str, args: argparse.Namespace) -> Experiment:
    """A run of the small decoder, with dense attention."""
    decoder = DecoderConfig(
        vocab_size=256,
        width=args.width,
        depth=args.depth,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        mlp_dim=2 * args.width,
    )
    model = MLLMConfig(
        decoder=decoder,
        vision=VisionConfig(4 * SIDE, 4, width=32, depth=1, num_heads=2, mlp_dim=32),
        gaze=GazeConfig(region=(REGION, REGION), context_tokens=CONTEXT, visual_scope=scope),
    )
    optimizer = OptimizerConfig(name="adamw")
    return Experiment(model, DigitsConfig(), arm="dense_context", batch_size=1, optimizer=optimizer)


def frames_batch(frames: int, before: int, behind: int) -> dict[str, np.ndarray]:
    """One sequence: text, frames with their context tokens, and text that is supervised."""
    each, per = SIDE * SIDE + CONTEXT, SIDE // REGION
    grid = np.arange(SIDE * SIDE).reshape(per, REGION, per, REGION).swapaxes(1, 2).reshape(per * per, -1)
    frame = np.repeat(np.arange(frames), per * per)[:, None]
    source = np.tile(grid, (frames, 1)) + SIDE * SIDE * frame
    order = np.tile(grid, (frames, 1)) + before + each * frame
    rng = np.random.default_rng(0)
    text = np.concatenate([np.arange(before), before + each * frames + np.arange(behind)])
    context = before + each * np.arange(frames)[:, None] + SIDE * SIDE + np.arange(CONTEXT)
    text_order = np.concatenate([text, context.reshape(-1)])
    kind = np.repeat([Kind.TEXT, Kind.CONTEXT], [text.size, context.size])
    words = rng.integers(1, 256, (2, text_order.size))
    place = np.argsort(text_order)
    row = Streams(
        visual_src=source,
        visual_order=order,
        visual_positions=order,
        visual_view=np.broadcast_to(frame, order.shape),
        region_segment=np.zeros(len(order)),
        tokens=np.where(kind == Kind.TEXT, words[0], (text_order - before) % each - SIDE * SIDE)[place],
        kind=kind[place],
        text_order=text_order[place],
        text_positions=text_order[place],
        text_segment=np.zeros(kind.size),
        text_view=np.where(kind == Kind.TEXT, EMPTY, (text_order - before) // each)[place],
        targets=np.where(text_order >= before + each * frames, words[1], IGNORE)[place],
    )
    names = [f.name for f in dataclasses.fields(Streams) if getattr(row, f.name) is not None]
    batch = {name: np.asarray(getattr(row, name), np.int32)[None] for name in names}
    pixels = rng.integers(0, 256, (1, frames, 4 * SIDE, 4 * SIDE, 3), np.uint8)
    return batch | {"images": pixels, "sample_id": np.zeros(1, np.int32)}


def step_flops(step: Any, state: Any, batch: Any) -> dict[str, int]:
    """FLOPs of one step: of the chunks that are visited, and of everything else.

    The step runs without the loops over chunks, of which only the turns are noted: they follow from where
    the tokens are, whatever the values.
    """
    found: list[int] = []

    def noted(block: Any, body: Any, carry: Any) -> Any:
        each = count_flops(jax.make_jaxpr(body)(block.visits[0], carry)).total
        jax.debug.callback(lambda turns: found.append(int(turns) * each), block.count)
        return carry

    with mock.patch.object(chunks, "_turns", noted):
        # Another function than what is measured: what is patched is no part of the tracing cache's key.
        traced = jax.jit(lambda *arguments: step(*arguments)).trace(state, batch)
    rest = count_flops(traced.jaxpr)
    assert not rest.left_out
    jax.block_until_ready(traced.lower().compile()(state, batch))
    jax.effects_barrier()
    return {"chunks": sum(found), "rest": rest.total}


def measure(frames: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: both scopes in the same rounds."""
    mesh = make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    batch = jax.tree.map(jnp.asarray, frames_batch(frames, args.before, args.behind))
    calls, flops = {}, {}
    state = init_state(experiment(SCOPES[0], args), mesh)
    for scope in SCOPES:
        step = step_function(experiment(scope, args))
        calls[scope] = functools.partial(jax.jit(step).lower(state, batch).compile(), state, batch)
        flops[scope] = step_flops(step, state, batch)
    times = timing.paired(calls, rounds=args.rounds, seconds=args.seconds)
    totals = {scope: sum(parts.values()) for scope, parts in flops.items()}
    expected, measured = totals["all"] / totals["view"], timing.ratio(times, "all", "view")
    row = {
        "frames": frames,
        "tokens": frames * SIDE * SIDE,
        "text_stream": int(batch["tokens"].shape[1]),
        "flops": flops,
        "ms": {scope: 1e3 * float(np.median(times[scope])) for scope in SCOPES},
        "rounds": len(times["all"]),
        "faster_by_flops": expected,
        "faster": measured,
        "of_expected": measured["median"] / expected,
    }
    print(
        f"{frames:4} frames  all {row['ms']['all']:8.1f} ms  view {row['ms']['view']:8.1f} ms  faster "
        f"{measured['median']:.2f}x, by FLOPs {expected:.2f}x  chunks {flops['all']['chunks'] / 1e9:.2f} and "
        f"{flops['view']['chunks'] / 1e9:.2f} GFLOP, the rest {flops['all']['rest'] / 1e9:.2f}",
        flush=True,
    )
    return row


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.view_scope", description=__doc__)
    parser.add_argument("--frames", default="8,16,32", help="frames of the sequences, comma-separated")
    parser.add_argument("--before", type=int, default=16, help="text tokens before the frames")
    parser.add_argument("--behind", type=int, default=112, help="text tokens behind them, supervised")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=120.0, help="measuring time per number of frames")
    parser.add_argument("--quick", action="store_true", help="a dry run at toy sizes")
    parser.add_argument("--json", help="write the results to this file")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(frames="9", width=16, depth=1, heads=2, kv_heads=1, head_dim=8, rounds=1)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows = [measure(int(frames), args) for frames in args.frames.split(",")]
    timing.write(args.json, timing.report("benchmarks.view_scope", argv, rows, sizes=vars(args)))


if __name__ == "__main__":
    main()
