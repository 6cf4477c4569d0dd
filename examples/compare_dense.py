"""Ask the same question with Gaze and with dense attention; print answers, keys read and time per token.

python examples/compare_dense.py ckpt/llava street.jpg "What is this?" --gaze_keep=0.1
"""

import argparse
import time

import gaze_jax


def milliseconds_per_token(
    model: gaze_jax.Sampler, question: str, image: str, gaze: gaze_jax.GazeOptions, max_tokens: int
) -> float:
    """Time of a streamed answer after its first token, which waits for the prompt."""
    seconds, tokens = 0.0, 0
    for _ in range(2):  # the first answer compiles the programs; the second is measured
        chat = model.chat(gaze=gaze, free_slots=max_tokens)
        chat.ask(question, images=[image])
        chunks = chat.stream(max_tokens)
        next(chunks)
        start = time.perf_counter()
        tokens = sum(1 for _ in chunks)
        seconds = time.perf_counter() - start
    return 1000 * seconds / max(tokens, 1)


def main() -> None:
    """Load once, answer both ways, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--gaze_keep", type=float, default=0.1, help="fraction of the regions per query")
    parser.add_argument("--max_tokens", type=int, default=64)
    args = parser.parse_args()

    model = gaze_jax.load(args.checkpoint)
    ways = {
        "gaze": gaze_jax.GazeOptions(keep=args.gaze_keep),
        "dense": gaze_jax.GazeOptions(dense=True),
    }
    print("       visual keys per query   ms per token   answer")
    for name, gaze in ways.items():
        # A trace costs as much as dense attention, so the time is measured without one.
        answer = model.generate(
            args.question, images=[args.image], gaze=gaze, max_tokens=args.max_tokens, return_trace=True
        )
        entries = answer.trace.entries[..., 0].mean()  # [tokens, layers, kinds]; the first kind is visual
        read = f"{entries:.1f} of {answer.trace.visual_tokens[0]}"
        spent = milliseconds_per_token(model, args.question, args.image, gaze, args.max_tokens)
        print(f"{name:5}  {read:>21} {spent:14.2f}   {answer.text!r}")


if __name__ == "__main__":
    main()
