"""Watch a video while it runs: append its frames to a conversation and ask questions in between.

python examples/stream_video.py ckpt/llava walk.mp4 "What is on the table?" --every=8

The file stands for a camera: any iterator of uint8 [height, width, 3] frames will do.
"""

import argparse
import itertools

import gaze_jax
from gaze_jax.media.video import FrameSampling, open_video


def main() -> None:
    """Append a few frames, ask, stream the answer, and go on until the video ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("video")
    parser.add_argument("question")
    parser.add_argument("--fps", type=float, default=1.0, help="frames to show per second of video")
    parser.add_argument("--every", type=int, default=8, help="frames between two questions")
    parser.add_argument("--gaze_keep", type=float, default=0.1, help="fraction of the regions per query")
    parser.add_argument("--max_tokens", type=int, default=64)
    args = parser.parse_args()

    model = gaze_jax.load(args.checkpoint)
    chat = model.chat(gaze=gaze_jax.GazeOptions(keep=args.gaze_keep))
    frames = iter(open_video(args.video, FrameSampling(fps=args.fps)))
    seen = 0
    while batch := list(itertools.islice(frames, args.every)):
        chat.append_frames(batch)  # computes these frames only; a camera may append one at a time
        seen += len(batch)
        print(f"After {seen} frames, {chat.regions} regions: ", end="")
        chat.ask(args.question)
        for chunk in chat.stream(args.max_tokens):
            print(chunk.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
