"""Prepare a corpus for training: records and media in ArrayRecord shards, each checked once.

gaze-jax data prepare llava_v1_5_mix665k.json --media=/data/llava --out=/data/mix665k
    reads LLaVA's JSON, JSON Lines, parquet, webdataset tars, or a folder of captioned media (docs/data.md);
    the same command again goes on where it stopped
gaze-jax data prepare "shards/*.tar" --out=/shared/web --engine=ray --ray_address=auto --workers=256
    does it on a Ray cluster; what is read may also be in a bucket, gs://bucket/train.jsonl
"""

import contextlib
import difflib
import os
import sys
from collections.abc import Sequence

from gaze_jax.commands import cli
from gaze_jax.commands.flags import Flags, Values
from gaze_jax.errors import UserError

VERBS = ("prepare",)
_SHOWN = 20
"""Records that were left out and are printed; all are in the listing."""


def define_flags(flags: Flags) -> None:
    """What is read, and where it is written."""
    flags.group("What is read")
    flags.strings("media", "Folder, or plain tar, that the media of a JSON corpus are in.", "PATH")
    text = 'What is asked of a medium that has a caption; default: "Describe this picture."'
    flags.string("prompt", None, text)
    flags.group("What is written")
    flags.string("out", None, "New folder for the shards.", "FOLDER")
    flags.integer("shards", None, "Number of shards; default: one for every 10,000 records.")
    flags.integer("workers", 1, "Processes that read and write.")
    flags.choice("bad", "error", ("error", "skip"), "Whether a record that cannot be read ends the run.")
    flags.group("Where it is prepared")
    flags.choice("engine", "local", ("local", "ray"), "Processes of this machine, or Ray Data.")
    flags.string("ray_address", None, 'Ray cluster to join; "auto": that of this machine.', "HOST:PORT")


def main(values: Values, arguments: Sequence[str]) -> None:
    """Do what the first argument says."""
    verb, *sources = arguments or ("",)
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"give {' or '.join(VERBS)}."
        raise UserError(f"{verb!r} is nothing that can be done with data; {hint}")
    if len(sources) != 1:
        raise UserError(
            f"Give one corpus to prepare, not {len(sources)}: a file, a folder or a pattern in quotes."
        )
    if values.out is None:
        raise UserError("Give --out, a new folder for the shards.")
    if values.ray_address is not None and values.engine != "ray":
        raise UserError("--ray_address needs --engine=ray; give both, or neither.")
    from gaze_jax.corpora.prepare import prepare
    from gaze_jax.corpora.reading import PROMPT, open_corpus
    from gaze_jax.infer.progress import progress_bar

    prompt = PROMPT if values.prompt is None else values.prompt
    corpus = open_corpus(sources[0], media=values.media, prompt=prompt)
    number = -(-len(corpus) // 10_000) if values.shards is None else values.shards
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress_bar("records", len(corpus)))
        if values.engine == "ray":  # it prints about processes that died, which one sentence says at the end
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        found = prepare(
            corpus,
            values.out,
            shards=number,
            workers=values.workers,
            bad=values.bad,
            engine=values.engine,
            ray_address=values.ray_address,
            advance=advance,
        )
    for name, why in found.skipped[:_SHOWN]:
        print(f"left out: {name}: {why}", file=sys.stderr)
    if len(found.skipped) > _SHOWN:
        more = len(found.skipped) - _SHOWN
        print(f"left out: {more} more, which {values.out}/corpus.json lists", file=sys.stderr)
    shards = "1 shard" if found.shards == 1 else f"{found.shards} shards"
    print(f"{found.records} records in {shards}: {values.out}")
    cli.exit_partly(len(found.skipped))


def run() -> None:
    """The command."""
    cli.run(main, define_flags, __doc__, arguments=True)


if __name__ == "__main__":
    run()
